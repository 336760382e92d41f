"""train.py: a run can be stopped, killed and gone on with; what it can't do, it says in one sentence.

But for a few tests, a network of one layer takes SSD300's place, so that an epoch takes less than a second.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, make_voc, run_script
from PIL import Image
from torch import nn

import train
from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss
from utils import InputError, create_data_lists, load_checkpoint


class Base(nn.Module):
    load_pretrained_layers, freeze_blocks = Mock(side_effect=AssertionError('downloads weights')), Mock()


class TinySSD(nn.Module):
    """Looks like SSD300 from outside, but is one convolution."""
    image_mean, image_std, clip_boxes = SSD300.image_mean, SSD300.image_std, False
    decode, detect_objects = SSD300.decode, SSD300.detect_objects
    made = []  # noqa: RUF012

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        self.base = Base()
        self.conv = nn.Conv2d(3, 4 + n_classes, kernel_size=30, stride=30)
        self.register_buffer('priors_cxcy', SSD300.create_prior_boxes(), persistent=False)
        TinySSD.made.append(self)

    def forward(self, images):
        predictions = self.conv(images).flatten(2)  # (N, 4 + n_classes, 100)
        # Repeated, not indexed: on several threads, the backward pass of indexing adds up in random order.
        predictions = predictions.repeat(1, 1, 88)[:, :, :8732].transpose(1, 2)  # (N, 8732, 4 + n_classes)
        return predictions[:, :, :4], predictions[:, :, 4:]


@pytest.fixture
def run(sample_lists, tmp_path, monkeypatch):
    """Runs train.py's main() on the sample, with some settings as if the command line had them; returns the
    checkpoint that it leaves. What isn't given is as in the file, or as in the checkpoint to go on with."""
    monkeypatch.setattr(train, 'SSD300', TinySSD)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network, more of them are slower

    def run(folder='run', **settings):
        first = {} if 'checkpoint' in settings else {'pretrained': False, 'batch_size': 3, 'epochs': 1}
        given = {'data_folder': sample_lists, 'output_folder': str(tmp_path / folder), 'workers': 0, 'eval_every': None,
                 **first, **settings}
        with monkeypatch.context() as context:
            for name in train.__annotations__:  # so that all are put back afterwards
                context.setattr(train, name, given.get(name, getattr(train, name)))
            train.main(set(given))
        return load_checkpoint(tmp_path / folder / 'checkpoint_ssd300.pth')

    yield run
    torch.set_num_threads(n_threads)


@pytest.fixture
def run_path(tmp_path):
    return str(tmp_path / 'run' / 'checkpoint_ssd300.pth')


@pytest.fixture
def one_picture(tmp_path):
    """Data lists of a single training picture."""
    voc = make_voc(tmp_path / 'VOC', {'1': [('dog', (5, 5, 40, 40), 0)]})
    create_data_lists(make_voc(voc, {'2': [('dog', (5, 5, 40, 40), 0)]}, 'test'), None, tmp_path / 'lists')
    return tmp_path / 'lists'


def read_log(folder):
    with open(folder / 'training_log.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def assert_same_training(one, other):
    assert one['epoch'] == other['epoch']
    for name, weights in one['model'].items():
        assert torch.equal(weights, other['model'][name]), name
    for number, state in one['optimizer']['state'].items():
        assert torch.equal(state['momentum_buffer'], other['optimizer']['state'][number]['momentum_buffer'])


# ------------------------------------------------------------------------------------------------ learning rate

def rates(monkeypatch, steps, steps_per_epoch, **settings):
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    return [train.learning_rate(step, steps_per_epoch) for step in steps]


@pytest.mark.parametrize(('epochs', 'falls'), [(232, [154, 193]), (50, [33, 41]), (3, [2, 2]), (1, [])])
def test_the_learning_rate_falls_after_two_thirds_and_five_sixths_of_the_training(epochs, falls, monkeypatch):
    per_epoch = rates(monkeypatch, range(0, 2 * epochs, 2), 2, epochs=epochs, warmup=0, lr=1.0)
    expected = [0.1 ** sum(epoch >= fall for fall in falls) for epoch in range(epochs)]
    assert per_epoch == pytest.approx(expected)


def test_the_learning_rate_rises_over_the_warm_up_but_no_longer_than_the_first_epoch(monkeypatch):
    assert rates(monkeypatch, range(6), 10, warmup=4, lr=1.0) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(monkeypatch, range(4), 2, warmup=500, lr=1.0) == [0.5, 1, 1, 1]
    assert rates(monkeypatch, range(2), 2, warmup=0, lr=1.0) == [1, 1]


# ----------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize(('network', 'epochs'), [(TinySSD, 4), pytest.param(SSD300, 2, marks=pytest.mark.slow)])
def test_a_run_in_one_go_and_one_gone_on_with_by_the_bare_command_end_bit_equal(network, epochs, run, run_path,
                                                                                tmp_path, one_picture, monkeypatch):
    monkeypatch.setattr(train, 'SSD300', network)
    settings = {'epochs': epochs, 'lr': 2e-3, 'decay_lr_at': [0.5], 'warmup': 2, 'momentum': 0.8, 'weight_decay': 1e-3,
                'grad_clip': 10.0, 'localization': 'l1', 'batch_size': 4, 'keep_difficult': False, 'seed': 3}
    place = {'data_folder': one_picture} if network is SSD300 else {}
    in_one_go = run('in_one_go', **settings, **place)
    with monkeypatch.context() as context:
        context.setattr(train, 'check_weights', stop_after(epochs // 2))
        with pytest.raises(SystemExit, match=f'go on from the end of epoch {epochs // 2}'):
            run(**settings, **place)
    gone_on_with = run(checkpoint=run_path, **place)
    assert_same_training(in_one_go, gone_on_with)
    for name, value in settings.items():
        assert gone_on_with['settings'][name] == value
    logs = [read_log(tmp_path / folder) for folder in ('in_one_go', 'run')]
    for line in (*logs[0], *logs[1]):
        assert float(line.pop('images_per_second')) > 0
    assert logs[0] == logs[1]
    assert [line['epoch'] for line in logs[0]] == [str(1 + epoch) for epoch in range(epochs)]


def stop_after(epoch):
    """In place of check_weights: presses Ctrl-C during an epoch's last step."""
    def press(model, number):
        if number + 1 == epoch:
            os.kill(os.getpid(), signal.SIGINT)
    return press


def test_what_the_command_line_gives_wins_over_the_checkpoint_and_is_printed(run, run_path, tmp_path, capsys):
    run(epochs=1, lr=1e-3, decay_lr_at=[], warmup=0, momentum=0.9)
    capsys.readouterr()
    content = run(checkpoint=run_path, epochs=2, lr=5e-4, momentum=0.5)
    said = capsys.readouterr().out
    assert 'lr is 0.0005 from now on; the checkpoint had 0.001' in said
    assert 'momentum is 0.5 from now on; the checkpoint had 0.9' in said
    assert 'batch_size' not in said
    assert [group['lr'] for group in content['optimizer']['param_groups']] == pytest.approx([1e-3, 5e-4])
    assert {group['momentum'] for group in content['optimizer']['param_groups']} == {0.5}
    assert [float(line['lr']) for line in read_log(tmp_path / 'run')] == pytest.approx([1e-3, 5e-4])


def test_pretrained_weights_are_loaded_for_a_new_run_alone(run, run_path):
    with pytest.raises(AssertionError, match='downloads weights'):
        run(pretrained=True)
    run()
    run(pretrained=True, checkpoint=run_path, epochs=2)


# ---------------------------------------------------------------------- the same training, whoever reads the pictures

def test_the_number_of_workers_changes_nothing(run):
    runs = [run(f'{workers}', workers=workers, epochs=2) for workers in (0, 2)]
    assert_same_training(*runs)


def test_seeds_and_epochs_share_neither_orders_nor_changes(sample_lists):
    orders, pictures = [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1)):
        dataset = PascalVOCDataset(sample_lists, 'TRAIN', seed=seed)
        sampler = train.DistributedSampler(dataset, 1, 0, seed=seed * 1_000_003)
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
        pictures.append(tuple(image.sum().item() for image, *_ in (dataset[i] for i in range(8))))
    assert len(set(orders)) == 4 and orders[3] == orders[4] and pictures[3] == pictures[4]
    assert all(len(set(changes)) == 4 for changes in zip(*pictures))


def test_the_seed_and_the_augmentation_decide_about_the_weights(run):
    weights = [run(str(i), **settings)['model']['conv.weight']
               for i, settings in enumerate(({}, {}, {'seed': 1}, {'augment': False}))]
    assert [torch.equal(weights[0], other) for other in weights[1:]] == [True, False, False]


TWO_PROCESSES = '''
import sys
import torch
sys.path[:0] = ['tests', '.']
import test_training, train, utils
torch.set_num_threads(1)
train.SSD300 = test_training.TinySSD
utils.run_script(train, pass_given=True)
'''


@pytest.mark.slow
def test_two_processes_with_batches_of_2_see_the_very_pictures_of_one_with_batches_of_4(sample_lists, tmp_path, run):
    script = tmp_path / 'two_processes.py'
    script.write_text(TWO_PROCESSES)
    settings = ['--data_folder', sample_lists, '--epochs', 2, '--no-pretrained', '--workers', 1, '--eval_every', 1,
                '--batch_size', 2, '--output_folder', tmp_path / 'two']
    process = run_script(script, *settings, n_processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('Saved') == process.stderr.count('Epoch 1/2:   0%') == 1  # the first alone reports
    two = load_checkpoint(tmp_path / 'two' / 'checkpoint_ssd300.pth')
    one = run('one', batch_size=4, epochs=2, eval_every=1)
    for name, weights in one['model'].items():  # shuffled and augmented
        torch.testing.assert_close(two['model'][name], weights, rtol=0, atol=1e-6)
    lines = [[(line['loss'][:6], line['mAP'][:6]) for line in read_log(tmp_path / name)] for name in ('one', 'two')]
    assert lines[0] == lines[1]


# --------------------------------------------------------------------------------------------- watching it learn

def test_measuring_the_mAP_changes_nothing_in_the_training_and_is_drawn(run, tmp_path):
    without, measured = run('without', epochs=3), run('measured', epochs=3, eval_every=2)
    assert_same_training(without, measured)
    assert [bool(line['mAP']) for line in read_log(tmp_path / 'measured')] == [False, True, True]  # and after the last
    assert not (tmp_path / 'without' / 'best_checkpoint_ssd300.pth').exists()
    with Image.open(tmp_path / 'measured' / 'training_log.png') as picture:
        assert len(picture.convert('RGB').getcolors(100_000)) > 5  # the lines' colors, the grid, the text


def test_the_best_checkpoint_is_that_of_the_highest_mAP_also_over_a_resume(run, run_path, tmp_path, monkeypatch):
    values = iter([0.2, 0.4, 0.1, 0.3])
    monkeypatch.setattr(train, 'evaluate', lambda *_: ({}, next(values)))
    run(epochs=3, eval_every=1)
    run(checkpoint=run_path, epochs=4, eval_every=1)
    assert [float(line['mAP']) for line in read_log(tmp_path / 'run')] == [0.2, 0.4, 0.1, 0.3]
    assert load_checkpoint(tmp_path / 'run' / 'best_checkpoint_ssd300.pth')['epoch'] == 2


def test_losses_rate_and_mAP_go_to_tensorboard_where_it_is_installed(run, tmp_path, monkeypatch):
    scalars = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=lambda _: writer))
    run(epochs=2, eval_every=2, warmup=0)
    steps = {name: [step for key, _, step in scalars if key == name] for name, _, _ in scalars}
    assert steps['loss'] == steps['confidence_loss'] == steps['localization_loss'] == steps['lr'] == [1, 2, 3, 4, 5, 6]
    assert steps['mAP'] == [6]
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # importing it fails
    run('without')


# ----------------------------------------------------------------------------------------------------- the step

def test_biases_learn_twice_as_fast_and_grad_clip_limits_the_norm_of_the_gradient(run):
    content = run(lr=1.0, momentum=0.0, weight_decay=0.0, batch_size=8, grad_clip=0.05)
    network = TinySSD.made[-1]
    assert [len(group['params']) for group in content['optimizer']['param_groups']] == [1, 1]
    torch.manual_seed(0)
    before = TinySSD(network.n_classes)
    for name, rate in (('weight', 1), ('bias', 2)):  # one step: the gradient is still there
        parameter = getattr(network.conv, name)
        assert parameter.grad.abs().max() > 1e-4
        assert torch.allclose(getattr(before.conv, name) - parameter, rate * parameter.grad, atol=1e-7)
    norm = torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm()
    assert norm == pytest.approx(0.05, rel=1e-3)


def test_frozen_blocks_keep_their_weights_and_need_no_graph():
    network = SSD300(n_classes=3)
    network.base.freeze_blocks(2)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {f'base.conv{block}_{i}.{kind}' for block in (1, 2) for i in (1, 2) for kind in ('weight', 'bias')}
    images = torch.rand(1, 3, 300, 300)
    assert not network.base.conv2_2(network.base.conv2_1(torch.rand(1, 64, 9, 9))).requires_grad
    (network(images)[0].sum()).backward()
    assert network.base.conv2_2.weight.grad is None
    assert network.base.conv3_1.weight.grad is not None


# ----------------------------------------------------------------------------------------------- sizes of things

def test_fewer_pictures_than_a_batch_or_than_workers_train(run, one_picture, tmp_path):
    run(data_folder=one_picture, batch_size=32, epochs=2, workers=2)
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == ['1', '2']


def test_a_batch_without_any_object_trains(run, tmp_path):
    voc = make_voc(tmp_path / 'VOC', {'1': [], '2': [], '3': [('dog', (5, 5, 40, 40), 1)]})
    create_data_lists(make_voc(voc, {'4': []}, 'test'), None, tmp_path / 'lists')
    content = run(data_folder=tmp_path / 'lists', batch_size=1, keep_difficult=False)
    assert torch.isfinite(content['model']['conv.weight']).all()
    assert float(read_log(tmp_path / 'run')[0]['loss']) == 0


# ------------------------------------------------------------------------------------------- losses that aren't finite

def breaking_loss(at, how):
    """MultiBoxLoss, but its call number `at` gives a loss or a gradient that isn't finite."""
    class Breaking(MultiBoxLoss):
        calls = 0

        def forward(self, predicted_locs, *others):
            loss = super().forward(predicted_locs, *others)
            Breaking.calls += 1
            if Breaking.calls == at:
                if how == 'gradient':
                    return loss + (predicted_locs.sum() * 0).abs().sqrt()  # 0, whose gradient is 0 · ∞
                self.parts[1] = float(how)
                loss = loss + float(how)
            return loss

    return Breaking


def test_a_loss_that_is_not_finite_stops_the_run_at_once_and_names_the_pictures(run, run_path, sample_lists,
                                                                                monkeypatch):
    run(workers=2, decay_lr_at=[])
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(5, 'nan'))  # 3 steps an epoch: the second of epoch 3
    with pytest.raises(InputError, match='the loss is no longer finite in epoch 3, step 2') as caught:
        run(workers=2, checkpoint=run_path, epochs=5)
    assert re.search(r'confidence [0-9.]+, localization nan;', str(caught.value))
    sampler = train.DistributedSampler(range(8), 1, 0, seed=0)
    sampler.set_epoch(2)
    images = json.loads((sample_lists / 'TRAIN_images.json').read_text())
    assert f"pictures: {', '.join(images[i] for i in list(sampler)[3:6])})" in str(caught.value)
    assert '--grad_clip 10 or a lower lr; checkpoints are untouched' in str(caught.value)
    assert load_checkpoint(run_path)['epoch'] == 2  # the epoch that was whole


@pytest.mark.parametrize(('how', 'complaint'), [('inf', 'in epoch 2, step 3'),
                                                ('gradient', r'weights are no longer finite after epoch 2.*untouched')])
def test_a_last_step_that_breaks_everything_leaves_the_checkpoint_untouched(how, complaint, run, run_path, monkeypatch):
    run()
    before = Path(run_path).read_bytes()
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(3, how))
    with pytest.raises(InputError, match=complaint):
        run(checkpoint=run_path, epochs=2)
    assert Path(run_path).read_bytes() == before


# ---------------------------------------------------------------------------------------------- what lies in the folder

def test_a_new_run_moves_what_earlier_ones_have_left_to_folders_of_their_own(run, tmp_path, capsys):
    folder, contents = tmp_path / 'run', []
    for seed in range(3):
        run(seed=seed)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    said = capsys.readouterr().out
    for number in (1, 2):
        aside = folder / f'previous_run_{number}'
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == contents[number - 1]
        assert f'What an earlier run left in {folder} is now in {aside}' in said


def test_the_log_has_one_line_per_epoch_also_after_a_run_that_died_before_saving(run, run_path, tmp_path):
    run(epochs=2)
    log = tmp_path / 'run' / 'training_log.csv'
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace('2,', '3,', 1) + '\n')
    first = read_log(tmp_path / 'run')[0]
    run(epochs=4, checkpoint=run_path)
    lines = read_log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == ['1', '2', '3', '4']
    assert lines[0] == first
    assert lines[2]['loss'] != lines[1]['loss']
    assert list(first) == ['epoch', 'loss', 'confidence_loss', 'localization_loss', 'lr', 'images_per_second', 'mAP']


# ------------------------------------------------------------------------------------------ what can't be gone on with

@pytest.mark.parametrize('columns', ['epoch,loss', 'epoch,loss,mAP'])  # in the second, the line is too short
def test_the_log_of_an_older_version_goes_on_with_todays_columns(columns, run, run_path, tmp_path):
    run(epochs=1)
    log = tmp_path / 'run' / 'training_log.csv'
    log.write_text(f'{columns}\n1,9.5\n')
    run(epochs=2, checkpoint=run_path, eval_every=1)
    first, second = read_log(tmp_path / 'run')
    assert first['loss'] == '9.5' and first['mAP'] == '' and float(second['mAP']) >= 0
    log.write_text('epoch,loss\nnone,9.5\n')
    with pytest.raises(InputError, match=r"training_log\.csv' can't be read"):
        run(epochs=3, checkpoint=run_path)


@pytest.mark.parametrize(('name', 'value'), [
    ('freeze', 6), ('warmup', -1), ('decay_lr_at', [0.8, 0.5]), ('decay_lr_at', [154]), ('decay_lr_to', 0.0),
    ('lr', 0.0), ('momentum', 1.0), ('weight_decay', -1.0), ('seed', -1), ('eval_every', 0), ('workers', -1)])
def test_a_setting_out_of_its_range_is_refused_by_name(name, value, monkeypatch):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(InputError, match=f'^{name} must be '):
        train.check_settings()


def test_a_finished_run_or_one_for_other_classes_or_without_a_training_is_not_gone_on_with(run, run_path, one_picture):
    content = run()

    def refused(complaint, **settings):
        with pytest.raises(InputError, match=complaint) as caught:
            run(checkpoint=run_path, **settings)
        return str(caught.value)

    assert run_path in refused('has 1 epochs behind it already: set epochs to more')
    labels = {'background': 0, 'emu': 1}
    (one_picture / 'label_map.json').write_text(json.dumps(labels))
    sentence = refused('belong together', data_folder=one_picture, epochs=2)
    assert str(labels) in sentence and 'aeroplane' in sentence
    del content['optimizer']
    torch.save(content, run_path)
    assert run_path in refused('holds weights but no training to go on with', epochs=2)


# ------------------------------------------------------------------------------------------------- Ctrl-C

@pytest.mark.slow
@pytest.mark.parametrize('epoch', [1, 3])
def test_ctrl_c_is_one_sentence_that_tells_from_where_to_go_on_and_leaves_no_workers(epoch, sample_lists, tmp_path):
    (tmp_path / 'tiny.py').write_text(TWO_PROCESSES)
    command = [sys.executable, tmp_path / 'tiny.py', '--data_folder', sample_lists, '--no-pretrained', '--workers', '2',
               '--output_folder', tmp_path / 'run', '--epochs', '9999', '--eval_every', 'None', '--batch_size', '1']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    while f'Epoch {epoch}/'.encode() not in (said := os.read(process.stderr.fileno(), 1000)):
        assert said, 'it ended by itself'
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and b'Traceback' not in said, said.decode()
    path = tmp_path / 'run' / 'checkpoint_ssd300.pth'
    last = said.decode().splitlines()[-1]
    if path.exists():
        done = load_checkpoint(path)['epoch']
        assert last == f'Stopped: go on from the end of epoch {done} in {path} by naming it as --checkpoint'
    else:
        assert epoch == 1 and last == 'Stopped before the end of the first epoch: nothing is saved yet'
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left in its group
