"""train.py: a run can be stopped, killed and resumed; what it can't do, it says in one sentence.

But for a few tests, a network of one layer takes SSD300's place, so that an epoch takes less than a second.
"""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import ROOT, make_voc, run_script
from torch import nn

import train
import utils
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
    """Runs train.py's main() on the sample with some settings; returns the checkpoint that it leaves."""
    monkeypatch.setattr(train, 'SSD300', TinySSD)
    for module in ('torch.utils.tensorboard', 'matplotlib.figure'):
        monkeypatch.setitem(sys.modules, module, None)  # importing them fails, as where they aren't installed
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # would wait for all that others write to the same disk
    monkeypatch.setattr(sys, 'argv', ['train.py', '--as', 'typed', '--overwrite'])
    monkeypatch.setattr(sys, 'orig_argv', ['python', *sys.argv])
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network, more of them are slower

    def run(folder='run', **settings):
        settings = {'data_folder': sample_lists, 'output_folder': str(tmp_path / folder), 'workers': 0, 'epochs': 1,
                    'eval_every': None, 'pretrained': False, 'batch_size': 3, **settings}
        with monkeypatch.context() as context:
            for name, value in settings.items():
                context.setattr(train, name, value)
            train.main()
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


# ----------------------------------------------------------------------------------------------------- resuming

def refused(run, complaint, **settings):
    """The one sentence with which a run is refused."""
    with pytest.raises(InputError, match=complaint) as caught:
        run(**settings)
    sentence, = str(caught.value).splitlines()
    return sentence


def stopped(run, **settings):
    """The last words of a run that ends early: a sentence, and the command that resumes it."""
    with pytest.raises(SystemExit) as caught:
        run(**settings)
    sentence, command = caught.value.code.splitlines()
    return sentence, command


def press_ctrl_c_after(epoch):
    """In place of write_log: presses Ctrl-C at the end of an epoch."""
    def press(run, news):
        if run.epoch == epoch:
            os.kill(os.getpid(), signal.SIGINT)
    return press


@pytest.mark.parametrize(('network', 'epochs'), [(TinySSD, 4), pytest.param(SSD300, 2, marks=pytest.mark.slow)])
def test_a_run_in_one_go_and_one_resumed_end_bit_equal(network, epochs, run, run_path, tmp_path, one_picture,
                                                      monkeypatch):
    monkeypatch.setattr(train, 'SSD300', network)
    settings = {'epochs': epochs, 'lr': 2e-3, 'decay_lr_at': [0.5], 'warmup': 2, 'momentum': 0.8, 'weight_decay': 1e-3,
                'grad_clip': 10.0, 'localization': 'l1', 'batch_size': 4, 'keep_difficult': False, 'seed': 3}
    place = {'data_folder': one_picture, 'freeze': 4} if network is SSD300 else {}
    in_one_go = run('in_one_go', **settings, **place)
    with monkeypatch.context() as context:
        context.setattr(train.Run, 'write_log', press_ctrl_c_after(epochs // 2))
        sentence, command = stopped(run, **settings, **place)
    assert sentence == f'Stopped. To resume after epoch {epochs // 2}:'
    assert command.endswith(f' --as typed --checkpoint {run_path}')
    resumed = run(checkpoint=run_path, **settings, **place)
    assert_same_training(in_one_go, resumed)
    assert {group['weight_decay'] for group in resumed['optimizer']['param_groups']} == {1e-3}
    logs = [read_log(tmp_path / folder) for folder in ('in_one_go', 'run')]
    for line in (*logs[0], *logs[1]):
        assert float(line.pop('images_per_second')) > 0
    assert logs[0] == logs[1]
    assert [line['epoch'] for line in logs[0]] == [str(1 + epoch) for epoch in range(epochs)]


def test_on_a_resume_todays_settings_count_and_those_that_differ_are_printed_with_the_flags_to_undo_it(run, run_path,
                                                                                                     tmp_path, capsys):
    run(epochs=1, lr=1e-3, decay_lr_at=[], warmup=0, momentum=0.9, augment=False)
    capsys.readouterr()
    content = run(checkpoint=run_path, epochs=2, lr=5e-4, decay_lr_at=[0.5], warmup=0, momentum=0.5)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f'Settings that differ from those of {run_path}:'
    assert '    lr: 0.0005 from now on, 0.001 before' in said and '    momentum: 0.5 from now on, 0.9 before' in said
    undo, = [line for line in said if line.startswith('To keep those of the checkpoint: ')]
    assert undo.endswith(': --no-augment --epochs 1 --lr 0.001 --decay_lr_at --momentum 0.9')
    assert not any('batch_size' in line or 'output_folder' in line for line in said)
    assert [group['lr'] for group in content['optimizer']['param_groups']] == pytest.approx([1e-4, 5e-5])
    assert {group['momentum'] for group in content['optimizer']['param_groups']} == {0.5}
    assert [float(line['lr']) for line in read_log(tmp_path / 'run')] == pytest.approx([1e-3, 5e-5])


def test_pretrained_weights_are_loaded_for_a_new_run_alone_and_only_frozen_blocks_are_frozen(run, run_path, capsys):
    Base.freeze_blocks.reset_mock()
    with pytest.raises(AssertionError, match='downloads weights'):
        run(pretrained=True)
    run()
    Base.freeze_blocks.assert_not_called()  # so another base needn't have it
    run(pretrained=True, checkpoint=run_path, finetune='nowhere', epochs=2, freeze=2)
    Base.freeze_blocks.assert_called_once_with(2)
    assert 'random weights' not in capsys.readouterr().out
    run('frozen', freeze=3)
    assert 'Frozen blocks keep random weights' in capsys.readouterr().out


def test_finetuning_starts_from_the_weights_and_the_normalization_of_another_network(run, monkeypatch):
    def start(model, checkpoint_path, label_map):  # what it really does, test_beyond.py proves
        assert (checkpoint_path, label_map) == ('other.pth', utils.label_map)
        nn.init.constant_(model.conv.weight, 0.01)
        model.image_mean = [0.1, 0.2, 0.3]

    means = []
    monkeypatch.setattr(train, 'start_from_checkpoint', start)
    monkeypatch.setattr(PascalVOCDataset, 'normalize_for', lambda _, network: means.append(network.image_mean))
    monkeypatch.setattr(train, 'evaluate', lambda loader, *_: ({}, float(loader.dataset.keep_difficult)))
    content = run(finetune='other.pth', eval_every=1, lr=1e-9)
    torch.testing.assert_close(content['model']['conv.weight'], torch.full((25, 3, 30, 30), 0.01))
    assert content['image_mean'] == [0.1, 0.2, 0.3]
    assert means == [[0.1, 0.2, 0.3]] * 2  # of the pictures for training and for testing
    assert content['log'][0]['mAP'] == 1  # measured with difficult objects, which must not count as errors


def test_the_scale_of_float16_is_resumed_but_not_into_another_precision(run, run_path, monkeypatch):
    def float16_run(**settings):
        with monkeypatch.context() as context:
            context.setattr(train, 'choose_dtype', lambda *_: torch.float16)
            context.setattr(train, 'evaluate', lambda *_: ({}, float(torch.is_autocast_enabled('cpu'))))
            return run(**settings)

    content = float16_run(eval_every=1)
    assert content['log'][0]['mAP'] == 1  # measured in this precision, too
    assert content['scaler']['scale'] < 2 ** 16  # the first gradients overflow: no error, their steps are skipped
    content['scaler'].update(scale=4.0, _growth_tracker=5)
    torch.save(content, run_path)
    scaler = float16_run(checkpoint=run_path, epochs=2)['scaler']
    assert (scaler['scale'], scaler['_growth_tracker']) == (4, 5 + 3)
    assert run(checkpoint=run_path, epochs=3)['scaler'] == {}
    assert float16_run(checkpoint=run_path, epochs=4)['scaler']['scale'] > 4  # begins anew


# ---------------------------------------------------------------------- the same training, whoever reads the pictures

def test_seeds_and_epochs_share_neither_orders_nor_changes(sample_lists):
    orders, pictures = [], []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1)):
        dataset = PascalVOCDataset(sample_lists, 'TRAIN', seed=seed)
        sampler = train.DistributedSampler(dataset, 1, 0, seed=10 * seed)
        dataset.set_epoch(epoch)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
        pictures.append(tuple(image.sum().item() for image, *_ in (dataset[i] for i in range(8))))
    assert len(set(orders)) == 4 and orders[3] == orders[4] and pictures[3] == pictures[4]
    assert all(len(set(changes)) == 4 for changes in zip(*pictures))


def test_every_epoch_has_its_own_order_and_its_own_random_changes(run, monkeypatch):
    seen, read = [], PascalVOCDataset.__getitem__
    monkeypatch.setattr(PascalVOCDataset, '__getitem__',
                        lambda dataset, i: seen.append((dataset.epoch.item(), i)) or read(dataset, i))
    run(epochs=3)
    orders = [[i for epoch, i in seen if epoch == number] for number in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders) and orders[0] != orders[1] != orders[2]


CHANGED = {'keep_difficult': False, 'augment': False, 'batch_size': 2, 'epochs': 1, 'lr': 2e-3, 'warmup': 3,
           'decay_lr_at': [1.0], 'decay_lr_to': 0.5, 'momentum': 0.5, 'weight_decay': 0.1, 'grad_clip': 0.1,
           'localization': 'l1', 'min_negatives': 500, 'seed': 1}


def test_every_setting_of_the_learning_decides_about_the_weights_but_the_number_of_workers_does_not(run):
    assert CHANGED.keys() | {'freeze', 'precision'} == set(train.LEARNING)  # which have tests of their own
    settings = {'warmup': 0, 'decay_lr_at': [0.5], 'epochs': 2}
    expected = run('0', **settings)
    with patch.object(BaseProcess, 'start', autospec=True, side_effect=BaseProcess.start) as start:
        assert_same_training(expected, run('workers', workers=2, **settings))
    assert start.call_count == 2  # they stay for all epochs
    for name, value in CHANGED.items():
        other = run(name, **{**settings, name: value})
        assert not torch.equal(other['model']['conv.weight'], expected['model']['conv.weight']), name


TINY = f'''
import sys
import torch
sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]
sys.modules.update({{'torch.utils.tensorboard': None, 'matplotlib.figure': None}})
import test_training, train, utils
torch.set_num_threads(1)
train.SSD300 = test_training.TinySSD
utils.run_script(train)
'''


@pytest.fixture
def tiny(tmp_path):
    """A script that is train.py with the network of one layer."""
    (tmp_path / 'tiny.py').write_text(TINY)
    return tmp_path / 'tiny.py'


@pytest.mark.slow
def test_two_processes_with_batches_of_2_see_the_very_pictures_of_one_with_batches_of_4(sample_lists, tmp_path, run,
                                                                                       tiny):
    settings = ['--data_folder', sample_lists, '--epochs', 2, '--no-pretrained', '--workers', 1, '--eval_every', 1,
                '--batch_size', 2, '--output_folder', tmp_path / 'two']
    process = run_script(tiny, *settings, n_processes=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('Saved') == process.stderr.count('Epoch 1/2:   0%') == 1  # the first alone reports
    two = load_checkpoint(tmp_path / 'two' / 'checkpoint_ssd300.pth')
    one = run('one', batch_size=4, epochs=2, eval_every=1)
    for name, weights in one['model'].items():  # shuffled and augmented
        torch.testing.assert_close(two['model'][name], weights, rtol=0, atol=1e-6)
    lines = [[(line['loss'][:6], line['mAP'][:6]) for line in read_log(tmp_path / name)] for name in ('one', 'two')]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_two_processes_train_the_real_network_without_a_warning(one_picture, tmp_path):
    process = run_script('train.py', '--data_folder', one_picture, '--epochs', 1, '--no-pretrained', '--workers', 0,
                         '--eval_every', 'None', '--batch_size', 1, '--freeze', 5, '--output_folder', tmp_path,
                         n_processes=2)
    assert process.returncode == 0, process.stderr
    assert 'arn' not in process.stderr.replace('OMP_NUM_THREADS', ''), process.stderr  # DDP's 'Warning: Grad strides …'


# --------------------------------------------------------------------------------------------- watching it learn

def test_measuring_the_mAP_changes_nothing_in_the_training(run, tmp_path):
    without, measured = run('without', epochs=3), run('measured', epochs=3, eval_every=2)
    assert_same_training(without, measured)
    assert [bool(line['mAP']) for line in read_log(tmp_path / 'measured')] == [False, True, True]  # and after the last
    assert not (tmp_path / 'without' / 'best_checkpoint_ssd300.pth').exists()


def test_the_log_goes_to_tensorboard_where_it_is_installed_and_a_resume_hides_what_was_rewound(run, run_path, tmp_path,
                                                                                              monkeypatch):
    scalars, opened = [], []

    def writer(path, purge_step):
        opened.append(purge_step)
        return types.SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar))

    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=writer))
    run(epochs=2, eval_every=2)
    run(checkpoint=run_path, epochs=3)
    assert opened == [1, 3]
    epochs = {name: [epoch for key, _, epoch in scalars if key == name] for name, _, _ in scalars}
    assert epochs['loss'] == epochs['confidence_loss'] == epochs['localization_loss'] == epochs['lr'] == [1, 2, 3]
    assert epochs['mAP'] == [2]
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)  # importing it fails
    run('without')


def test_a_log_or_picture_that_can_not_be_written_costs_a_warning_but_no_epoch(run, tmp_path, monkeypatch):
    figure = Mock()  # in place of matplotlib's
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', Mock(Figure=lambda **_: figure))
    for name in ('training_log.csv', 'training_log.png'):
        (tmp_path / 'run' / name).mkdir(parents=True)  # in the way
    with pytest.warns(UserWarning) as warned:
        content = run(epochs=2)
    assert content['epoch'] == len(content['log']) == 2
    assert [re.search(r"^can't write '.*training_log\.(\w+)' ", str(warning.message))[1]
            for warning in warned] == ['csv', 'png'] * 2
    assert [call.kwargs['title'] for call in figure.add_subplot.call_args_list] == ['loss', 'learning rate', 'mAP'] * 2


def test_a_run_that_ended_while_its_last_mAP_was_measured_is_measured_on_resuming(run, run_path, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(train, 'evaluate', Mock(side_effect=KeyboardInterrupt))
        assert stopped(run, eval_every=1)[0] == 'Stopped. To resume after epoch 1:'
    monkeypatch.setattr(train, 'evaluate', lambda *_: ({}, 0.25))
    content = run(eval_every=1, checkpoint=run_path, lr=5e-4)
    assert content['settings']['lr'] == 1e-3  # with which it was trained
    assert [line['mAP'] for line in read_log(tmp_path / 'run')] == ['0.25']
    assert 'already trained for 1 epoch' in refused(run, 'set epochs to more', eval_every=1, checkpoint=run_path)


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
    with torch.device('meta'):  # computes shapes and the graph, but no values
        network, images = SSD300(n_classes=3), torch.rand(1, 3, 300, 300)
    network.base.freeze_blocks(2)
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {f'base.conv{block}_{i}.{kind}' for block in (1, 2) for i in (1, 2) for kind in ('weight', 'bias')}
    outputs = []
    network.base.conv2_2.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    network(images)[0].sum().backward()
    assert not outputs[0].requires_grad
    assert network.base.conv2_2.weight.grad is None and network.base.conv3_1.weight.grad is not None


# ----------------------------------------------------------------------------------------------- sizes of things

def test_fewer_pictures_than_a_batch_or_than_workers_train(run, one_picture, tmp_path):
    run(data_folder=one_picture, batch_size=32, epochs=2, workers=2)
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == ['1', '2']


def test_a_batch_without_any_object_trains(run, tmp_path):
    voc = make_voc(tmp_path / 'VOC', {'1': [], '2': [], '3': [('dog', (5, 5, 40, 40), 1)]})
    create_data_lists(make_voc(voc, {'4': [('dog', (5, 5, 40, 40), 0)]}, 'test'), None, tmp_path / 'lists')
    content = run(data_folder=tmp_path / 'lists', batch_size=1, keep_difficult=False)
    assert torch.isfinite(content['model']['conv.weight']).all()
    assert float(read_log(tmp_path / 'run')[0]['loss']) == 0


# ------------------------------------------------------------------------------------------- losses that aren't finite

def breaking_loss(at, how):
    """MultiBoxLoss, but its call number `at` gives a loss or a gradient that isn't finite."""
    class Breaking(MultiBoxLoss):
        calls = 0

        def parts(self, predicted_locs, *others):
            confidence, localization = super().parts(predicted_locs, *others)
            Breaking.calls += 1
            if Breaking.calls == at:
                # The second has the value 0, but the gradient 0 · ∞.
                localization = localization + ((predicted_locs.sum() * 0).abs().sqrt() if how == 'gradient'
                                               else float(how))
            return confidence, localization

    return Breaking


def test_a_loss_that_is_not_finite_stops_the_run_at_once_and_names_the_pictures(run, run_path, sample_lists,
                                                                                monkeypatch):
    run(workers=2, decay_lr_at=[])
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(5, 'nan'))  # 3 steps an epoch: the second of epoch 3
    sentence, command = stopped(run, workers=2, checkpoint=run_path, epochs=5)
    assert re.match(r'Error: the loss is no longer finite in epoch 3, step 2 \(confidence [0-9.]+, localization nan; ',
                    sentence)
    sampler = train.DistributedSampler(range(8), 1, 0, seed=0)
    sampler.set_epoch(2)
    paths = json.loads((sample_lists / 'TRAIN_images.json').read_text())
    assert f"pictures: {', '.join(paths[i] for i in list(sampler)[3:6])})" in sentence
    assert command.endswith(f' --as typed --grad_clip 10 --checkpoint {run_path}')
    assert load_checkpoint(run_path)['epoch'] == 2  # the epoch that was whole


@pytest.mark.parametrize(('how', 'complaint'), [('inf', 'in epoch 2, step 3'),
                                                ('gradient', 'weights are no longer finite after epoch 2')])
def test_a_last_step_that_breaks_everything_leaves_the_checkpoint_untouched(how, complaint, run, run_path, monkeypatch):
    run()
    before = Path(run_path).read_bytes()
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(3, how))
    sentence, command = stopped(run, checkpoint=run_path, epochs=2, grad_clip=10, lr=0.004)
    assert complaint in sentence and sentence.endswith('To resume after epoch 1:')
    assert command.endswith('train.py --as typed --overwrite --lr 0.002')  # what clipping hasn't cured
    assert Path(run_path).read_bytes() == before


# ---------------------------------------------------------------------------------------------- what is in the folder

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_new_run_never_touches_another_ones_checkpoint_unless_told_to(run, run_path, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'evaluate', lambda *_: ({}, 0.9))
    run(epochs=2, eval_every=1)
    before, best = contents(tmp_path / 'run'), Path(run_path).with_name('best_checkpoint_ssd300.pth')
    sentence = refused(run, 'holds a run of 2 epochs', seed=1)
    assert f'--checkpoint {run_path}' in sentence and 'output_folder' in sentence and '--overwrite' in sentence
    refused(run, 'holds a run of 2 epochs', checkpoint=best, epochs=3)  # an earlier point of the same run
    with monkeypatch.context() as context:  # a new run that fails before it has anything to save
        context.setattr(PascalVOCDataset, '__getitem__', Mock(side_effect=InputError('no picture')))
        assert stopped(run, overwrite=True)[1].endswith('train.py --as typed --overwrite')
    assert contents(tmp_path / 'run') == before

    run(seed=1, overwrite=True)
    assert not best.exists() and [line['mAP'] for line in read_log(tmp_path / 'run')] == ['']


def test_a_checkpoint_is_resumed_into_another_folder_with_its_log_and_rewound_to_the_best_with_its_own(run, run_path,
                                                                                                     tmp_path,
                                                                                                     monkeypatch):
    values = iter([0.4, 0.2, 0.3, float('nan'), 0.5])
    monkeypatch.setattr(train, 'evaluate', lambda *_: ({}, next(values)))
    run(epochs=2, eval_every=1)
    before = contents(tmp_path / 'run')
    assert load_checkpoint(tmp_path / 'run' / 'best_checkpoint_ssd300.pth')['epoch'] == 1
    run('other', checkpoint=run_path, epochs=3, eval_every=1)
    assert contents(tmp_path / 'run') == before
    assert [line['mAP'] for line in read_log(tmp_path / 'other')] == ['0.4', '0.2', '0.3']
    assert not (tmp_path / 'other' / 'best_checkpoint_ssd300.pth').exists()  # 0.3 isn't the best of this run
    run('nothing to find', eval_every=1)
    assert not (tmp_path / 'nothing to find' / 'best_checkpoint_ssd300.pth').exists()  # nan is no best
    best = tmp_path / 'run' / 'best_checkpoint_ssd300.pth'
    run(checkpoint=best, epochs=2, eval_every=1, overwrite=True)
    assert [line['mAP'] for line in read_log(tmp_path / 'run')] == ['0.4', '0.5']
    assert load_checkpoint(best)['log'][-1]['mAP'] == 0.5


def test_the_log_beside_a_checkpoint_of_an_older_version_is_not_lost(run, run_path, tmp_path):
    content = run(epochs=2)
    del content['log'], content['scaler']
    content['settings'].update(decay_lr_at=[1, 2])  # which counted epochs
    torch.save(content, run_path)
    log = tmp_path / 'run' / 'training_log.csv'
    log.write_text('epoch,loss\n1,9.5\n2,8.5\n3,7.5\n')  # the third one was never saved
    content = run(epochs=3, checkpoint=run_path)
    assert content['log'][:2] == [{'epoch': 1, 'loss': 9.5, 'mAP': None}, {'epoch': 2, 'loss': 8.5, 'mAP': None}]
    first, second, third = read_log(tmp_path / 'run')
    assert (first['loss'], second['loss'], first['mAP']) == ('9.5', '8.5', '') and third['loss'] != '7.5'
    assert list(first) == ['epoch', 'loss', 'confidence_loss', 'localization_loss', 'lr', 'images_per_second', 'mAP']


# ------------------------------------------------------------------------------------------ what can't be resumed

def test_a_finished_run_or_one_for_other_classes_or_without_a_training_is_not_resumed(run, run_path, one_picture):
    content = run()
    assert run_path in refused(run, 'was already trained for 1 epochs: set epochs to more', checkpoint=run_path)
    labels = {'background': 0, 'emu': 1}
    (one_picture / 'label_map.json').write_text(json.dumps(labels))
    sentence = refused(run, 'belong together', data_folder=one_picture, checkpoint=run_path, epochs=2)
    assert str(labels) in sentence and 'aeroplane' in sentence
    del content['optimizer']
    torch.save(content, run_path)
    assert run_path in refused(run, 'has weights but no training state to resume: use --finetune', checkpoint=run_path)


def test_a_picture_that_a_worker_can_not_read_and_a_training_without_any_object_are_one_sentence(run, one_picture):
    (one_picture / 'TRAIN_images.json').write_text('["gone.jpg"]')
    assert stopped(run, data_folder=one_picture, workers=1)[0] == (
        "Error: picture 'gone.jpg' isn't there: copy it there, or make the data lists without it. Nothing is "
        'saved yet. To start again:')
    (one_picture / 'TRAIN_objects.json').write_text('[{"boxes": [], "labels": [], "difficulties": []}]')
    assert str(one_picture) in refused(run, 'no training picture .* has an object', data_folder=one_picture)


def test_after_a_full_disk_the_command_resumes_the_last_epoch_that_was_saved(run, monkeypatch):
    save = Mock(side_effect=[None, InputError("can't write")])
    monkeypatch.setattr(train, 'save_checkpoint', save)
    assert stopped(run, epochs=3)[0] == "Error: can't write. To resume after epoch 1:"


# ------------------------------------------------------------------------------------------------- Ctrl-C

def press_ctrl_c(command, when, folder):
    """Start a command, press Ctrl-C once it has said a word; return the finished process and what else it said."""
    bin_folder = Path(sys.executable).parent
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               start_new_session=True, env={**os.environ, 'PATH': f'{bin_folder}:{os.environ["PATH"]}'})
    while when.encode() not in (said := os.read(process.stderr.fileno(), 1000)):
        assert said, 'it ended by itself'
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    said = process.communicate(timeout=60)[1].decode()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left in its group
    return process, said


@pytest.mark.slow
def test_the_last_line_after_ctrl_c_is_the_command_that_ends_as_if_nothing_had_happened(sample_lists, tmp_path, run,
                                                                                       run_path, tiny):
    whole = run('whole', epochs=4, eval_every=2, batch_size=1, workers=1)
    command = [sys.executable, str(tiny), *f'--data_folder {sample_lists} --no-pretrained --workers 1 --epochs 4 '
               f'--eval_every 2 --batch_size 1 --overwrite --output_folder {tmp_path}/run'.split()]
    for when, way in (('Epoch 1/', 'Nothing is saved yet. To start again:'),
                      ('Evaluating', 'To resume after epoch 2:')):
        process, said = press_ctrl_c(command, when, tmp_path)
        assert process.returncode == 1 and 'Traceback' not in said
        *_, sentence, last = said.splitlines()
        assert sentence == f'Stopped. {way}' and last.startswith(f'{sys.executable} {tiny}')
        command = shlex.split(last)
        assert ('--overwrite' in command) == ('Nothing' in way)
    subprocess.run(last, shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert_same_training(load_checkpoint(run_path), whole)
    assert [line['mAP'] for line in load_checkpoint(run_path)['log']] == [line['mAP'] for line in whole['log']]

    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', *command[1:]]
    said = press_ctrl_c([*launcher, '--epochs', '99', '--batch_size', '4'], 'Epoch 6/', tmp_path)[1]  # one step each
    assert re.search(r'Stopped\. To resume after epoch [5-9]:\ntorchrun --nproc_per_node=2 ', said)


def test_the_command_to_resume_is_the_one_typed_with_the_checkpoint_added_or_replaced(monkeypatch):
    def command(*typed, checkpoint='a b.pth', **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, 'argv', ['train.py', *typed])
        monkeypatch.setattr(sys, 'orig_argv', ['python', '-u', 'train.py', *typed])
        return utils.command_to_resume(checkpoint)

    resumed = "python -u train.py --lr 1 --checkpoint 'a b.pth'"
    assert command('--lr', '1', '--overwrite') == resumed
    assert command('--checkpoint', 'old', '--lr', '1', '--checkpoint=old') == resumed
    assert command('--overwrite', '--finetune', 'x', checkpoint=None) == 'python -u train.py --overwrite --finetune x'
    assert (command('--lr', '1', WORLD_SIZE='4', LOCAL_WORLD_SIZE='4')
            == "torchrun --nproc_per_node=4 train.py --lr 1 --checkpoint 'a b.pth'")
    assert (command('--lr', '1', WORLD_SIZE='8', LOCAL_WORLD_SIZE='4')
            == "the same torchrun command with --checkpoint 'a b.pth'")
