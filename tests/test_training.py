"""train.py: a run can be stopped, killed and gone on with; what it can't do, it says in one sentence.

But for the last tests, a network of one layer takes SSD300's place, so that an epoch takes less than a second.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_voc
from torch import nn

import train
from model import SSD300, MultiBoxLoss
from utils import InputError, create_data_lists, load_checkpoint


class Base(nn.Module):
    def load_pretrained_layers(self):
        raise AssertionError('downloads weights')


class TinySSD(nn.Module):
    """Looks like SSD300 from outside, but is one convolution."""
    made = []  # noqa: RUF012

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes = n_classes
        self.base = Base()
        self.conv = nn.Conv2d(3, 4 + n_classes, kernel_size=30, stride=30)
        self.register_buffer('priors_cxcy', SSD300.create_prior_boxes(None), persistent=False)
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
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network, more of them are slower

    def run(folder='run', **settings):
        with monkeypatch.context() as context:
            for name, value in {'data_folder': sample_lists, 'output_folder': str(tmp_path / folder), 'workers': 0,
                                'pretrained': False, 'batch_size': 3, 'epochs': 1, **settings}.items():
                assert name in train.__annotations__
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
    create_data_lists(make_voc(voc, {'2': []}, 'test'), None, tmp_path / 'lists')
    return tmp_path / 'lists'


def read_log(folder):
    with open(folder / 'training_log.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def assert_bit_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_bit_equal(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for values in zip(one, other):
            assert_bit_equal(*values)
    else:
        assert one == other


def assert_same_training(one, other):
    for part in ('epoch', 'model', 'optimizer', 'scheduler'):
        assert_bit_equal(one[part], other[part])


# --------------------------------------------------------------------------------------------------- going on

@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_in_one_go_and_one_that_is_gone_on_with_end_bit_equal(workers, run, tmp_path, run_path):
    # The second resume falls on an epoch after which the learning rate falls.
    settings = {'workers': workers, 'decay_lr_at': [2], 'augment': True}
    in_one_go = run('in_one_go', epochs=3, **settings)
    run(epochs=1, **settings)
    run(epochs=2, checkpoint=run_path, **settings)
    gone_on_with = run(epochs=3, checkpoint=run_path, **settings)
    assert_same_training(in_one_go, gone_on_with)
    logs = [read_log(tmp_path / folder) for folder in ('in_one_go', 'run')]
    for line in (*logs[0], *logs[1]):
        assert float(line.pop('images_per_second')) > 0
    assert logs[0] == logs[1]
    assert [line['epoch'] for line in logs[0]] == ['1', '2', '3']


def test_so_it_is_with_the_real_network(run, one_picture, tmp_path, run_path, monkeypatch):
    monkeypatch.setattr(train, 'SSD300', SSD300)
    torch.set_num_threads(os.cpu_count())
    settings = {'data_folder': one_picture, 'grad_clip': 10.0}
    in_one_go = run('in_one_go', epochs=2, **settings)
    run(epochs=1, **settings)
    assert_same_training(in_one_go, run(epochs=2, checkpoint=run_path, **settings))


def test_the_seed_and_the_augmentation_decide_about_the_weights(run):
    runs = [run(f'{i}', **settings) for i, settings in enumerate(({}, {}, {'seed': 1}, {'augment': False}))]
    weights = [content['model']['conv.weight'] for content in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


@pytest.mark.parametrize('augment', [False, True])
def test_epochs_differ_in_the_order_of_pictures_and_in_what_is_drawn_for_them(augment, run, one_picture, tmp_path):
    settings = {'augment': True, 'data_folder': one_picture} if augment else {'augment': False}
    # The weights stay: only chance changes the loss.
    run(epochs=3, lr=1e-30, momentum=0.0, weight_decay=0.0, **settings)
    assert len({line['loss'] for line in read_log(tmp_path / 'run')}) == 3


@pytest.mark.parametrize('stop_after', [1, 2, 3, 4])
def test_the_learning_rate_falls_once_at_the_right_epoch_wherever_the_run_was_stopped(stop_after, run, tmp_path,
                                                                                      run_path, one_picture):
    settings = {'data_folder': one_picture, 'decay_lr_at': [2, 3], 'lr': 1e-3}
    run(epochs=stop_after, **settings)
    content = run(epochs=5, checkpoint=run_path, **settings)
    rates = [float(line['lr']) for line in read_log(tmp_path / 'run')]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5, 1e-5])
    assert [group['lr'] for group in content['optimizer']['param_groups']] == pytest.approx([2e-5, 1e-5])


def test_a_decay_after_the_last_epoch_is_none(run, tmp_path, one_picture):
    run(data_folder=one_picture, epochs=2, decay_lr_at=[154, 193])
    assert [float(line['lr']) for line in read_log(tmp_path / 'run')] == [1e-3, 1e-3]


def test_a_resume_says_which_settings_it_takes_from_the_checkpoint(run, run_path, capsys):
    run(lr=1e-3, decay_lr_at=[1])
    content = run(epochs=2, checkpoint=run_path, lr=5e-3, decay_lr_at=[7])
    said = capsys.readouterr().out
    assert 'The run goes on with the lr of its checkpoint, 0.001, not with 0.005' in said
    assert 'The run goes on with the decay_lr_at of its checkpoint, [1], not with [7]' in said
    assert content['optimizer']['param_groups'][1]['lr'] == pytest.approx(1e-4)


# ----------------------------------------------------------------------------------------------------- the step

def test_biases_learn_twice_as_fast(run):
    settings = {'lr': 1e-3, 'momentum': 0.0, 'weight_decay': 0.0, 'batch_size': 8, 'augment': False}
    content = run(**settings)
    network = TinySSD.made[-1]
    assert [len(group['params']) for group in content['optimizer']['param_groups']] == [1, 1]
    torch.manual_seed(0)
    before = TinySSD(network.n_classes)
    for name, rate in (('weight', 1e-3), ('bias', 2e-3)):  # one step: the gradient is still there
        parameter = getattr(network.conv, name)
        step = getattr(before.conv, name) - parameter
        assert parameter.grad.abs().max() > 0
        assert torch.allclose(step, rate * parameter.grad, atol=1e-7)


def test_weight_decay_and_momentum_reach_the_optimizer(run):
    content = run(weight_decay=0.25, momentum=0.5)
    for group in content['optimizer']['param_groups']:
        assert (group['weight_decay'], group['momentum']) == (0.25, 0.5)


def test_grad_clip_limits_the_norm_of_the_gradient(run):
    for grad_clip in (None, 1e-3):
        run(grad_clip=grad_clip, batch_size=8)
        norm = torch.cat([p.grad.flatten() for p in TinySSD.made[-1].parameters()]).norm()
        assert (norm > 0.1) if grad_clip is None else (norm == pytest.approx(1e-3, rel=1e-3))


def test_pretrained_weights_are_loaded_for_a_new_run_alone(run, run_path):
    with pytest.raises(AssertionError, match='downloads weights'):
        run(pretrained=True)
    run()
    run(pretrained=True, checkpoint=run_path, epochs=2)


# ----------------------------------------------------------------------------------------------- sizes of things

def test_a_training_set_smaller_than_a_batch_trains(run, one_picture, tmp_path):
    run(data_folder=one_picture, batch_size=32, epochs=2)
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == ['1', '2']


def test_fewer_pictures_than_workers_train(run, one_picture):
    assert run(data_folder=one_picture, workers=3)['epoch'] == 1


def test_a_batch_without_any_object_trains(run, tmp_path):
    voc = make_voc(tmp_path / 'VOC', {'1': [], '2': [], '3': [('dog', (5, 5, 40, 40), 1)]})
    create_data_lists(make_voc(voc, {'4': []}, 'test'), None, tmp_path / 'lists')
    content = run(data_folder=tmp_path / 'lists', batch_size=1, keep_difficult=False)
    assert torch.isfinite(content['model']['conv.weight']).all()
    assert float(read_log(tmp_path / 'run')[0]['loss']) == 0


def test_a_list_without_pictures_is_one_sentence(run, one_picture):
    for name in ('TRAIN_images.json', 'TRAIN_objects.json'):
        (one_picture / name).write_text('[]')
    with pytest.raises(InputError) as caught:
        run(data_folder=one_picture)
    assert str(one_picture) in str(caught.value)


# ------------------------------------------------------------------------------------------- losses that aren't finite

def breaking_loss(at, how):
    """MultiBoxLoss, but its call number `at` gives a loss or a gradient that isn't finite."""
    class Breaking(MultiBoxLoss):
        calls = 0

        def forward(self, predicted_locs, *others):
            loss = super().forward(predicted_locs, *others)
            Breaking.calls += 1
            if Breaking.calls == at:
                nothing = predicted_locs.sum() * 0
                if how == 'gradient':
                    return loss + nothing.abs().sqrt()  # 0, whose gradient is 0 · ∞
                self.parts[1] = float(how)
                loss = loss + float(how)
            return loss

    return Breaking


@pytest.mark.parametrize('how', ['nan', 'inf'])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run_at_once_and_names_the_pictures(how, workers, run, run_path,
                                                                                sample_lists, monkeypatch):
    run(workers=workers)
    before = Path(run_path).read_bytes()
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(5, how))  # 3 steps an epoch: the second of epoch 3
    batches = []
    monkeypatch.setattr(train, 'BatchSampler', lambda *args, **more: batches.append(
        list(torch.utils.data.BatchSampler(*args, **more))) or batches[-1])
    with pytest.raises(InputError, match='the loss is no longer finite in epoch 3, step 2') as caught:
        run(workers=workers, checkpoint=run_path, epochs=5)
    sentence = str(caught.value)
    assert re.search(rf'confidence [0-9.]+, localization {how};', sentence)
    images = json.loads((sample_lists / 'TRAIN_images.json').read_text())
    assert [name for name in images if name in sentence] == [images[i] for i in sorted(batches[1][1])]
    assert '--grad_clip 10 or a lower lr; checkpoints are untouched' in sentence
    assert load_checkpoint(run_path)['epoch'] == 2  # the epoch that was whole; the one before is gone by right
    assert Path(run_path).read_bytes() != before
    assert not Path(f'{run_path}.tmp').exists()


def test_the_checkpoint_before_a_loss_that_is_not_finite_is_untouched(run, run_path, monkeypatch):
    run()
    before = Path(run_path).read_bytes()
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(3, 'nan'))  # the last step of the epoch
    with pytest.raises(InputError, match='in epoch 2, step 3'):
        run(checkpoint=run_path, epochs=2)
    assert Path(run_path).read_bytes() == before


def test_a_last_step_that_breaks_the_weights_leaves_the_checkpoint_untouched(run, run_path, monkeypatch):
    run()
    before = Path(run_path).read_bytes()
    monkeypatch.setattr(train, 'MultiBoxLoss', breaking_loss(3, 'gradient'))
    with pytest.raises(InputError, match=r'weights are no longer finite after epoch 2.*untouched'):
        run(checkpoint=run_path, epochs=2)
    assert Path(run_path).read_bytes() == before


def test_a_run_that_diverges_by_itself_is_stopped(run):
    with pytest.raises(InputError, match=r'no longer finite in epoch 1, step \d'):
        run(lr=1e30, batch_size=1)


# ---------------------------------------------------------------------------------------------- what lies in the folder

def test_a_new_run_moves_what_earlier_ones_have_left_to_names_of_their_own(run, tmp_path, capsys):
    folder, contents = tmp_path / 'run', []
    for seed in range(3):
        run(seed=seed)
        contents.append({name: (folder / name).read_bytes() for name in ('checkpoint_ssd300.pth', 'training_log.csv')})
    said = capsys.readouterr().out
    for number in (1, 2):
        for name, content in contents[number - 1].items():
            aside = folder / f'previous_{number}_{name}'
            assert aside.read_bytes() == content
            assert f'{folder / name} of an earlier run is now {aside}' in said


def test_a_run_that_goes_on_from_elsewhere_does_not_overwrite_the_one_that_lies_there(run, tmp_path):
    run('one', seed=1)
    run('two', seed=2, epochs=2)
    before = (tmp_path / 'two' / 'checkpoint_ssd300.pth').read_bytes()
    content = run('two', epochs=3, checkpoint=str(tmp_path / 'one' / 'checkpoint_ssd300.pth'), seed=1)
    assert content['epoch'] == 3
    assert (tmp_path / 'two' / 'previous_1_checkpoint_ssd300.pth').read_bytes() == before
    assert [line['epoch'] for line in read_log(tmp_path / 'two')] == ['2', '3']


def test_the_log_has_one_line_per_epoch_also_after_a_run_that_died_before_saving(run, run_path, tmp_path):
    run(epochs=2)
    log = tmp_path / 'run' / 'training_log.csv'
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace('2,', '3,', 1) + '\n')
    assert [line['epoch'] for line in read_log(tmp_path / 'run')] == ['1', '2', '3']
    first = read_log(tmp_path / 'run')[0]
    run(epochs=4, checkpoint=run_path)
    lines = read_log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == ['1', '2', '3', '4']
    assert lines[0] == first
    assert lines[2]['loss'] != lines[1]['loss']
    assert list(first) == ['epoch', 'loss', 'confidence_loss', 'localization_loss', 'lr', 'images_per_second']


def test_a_damaged_log_is_one_sentence_before_the_training_begins(run, run_path, tmp_path):
    run()
    for content in (b'epoch,loss\nthree,4\n', b'\xff\xfe\x00', b'loss\n3\n'):
        (tmp_path / 'run' / 'training_log.csv').write_bytes(content)
        with pytest.raises(InputError, match=r"training_log\.csv' can't be read"):
            run(epochs=2, checkpoint=run_path)
        assert load_checkpoint(run_path)['epoch'] == 1


def test_a_disk_that_is_full_at_the_end_of_an_epoch_leaves_the_checkpoint_untouched(run, run_path):
    run()
    before = Path(run_path).read_bytes()
    Path(f'{run_path}.tmp').symlink_to('/dev/full')
    with pytest.raises(InputError, match='No space left on device') as caught:
        run(epochs=2, checkpoint=run_path)
    assert run_path in str(caught.value)
    assert Path(run_path).read_bytes() == before
    assert run(epochs=2, checkpoint=run_path)['epoch'] == 2


# ------------------------------------------------------------------------------------------ what can't be gone on with

def test_a_finished_run_is_not_gone_on_with(run, run_path):
    run(epochs=2)
    for epochs in (1, 2):
        with pytest.raises(InputError, match='has 2 epochs behind it already: set epochs to more') as caught:
            run(epochs=epochs, checkpoint=run_path)
        assert run_path in str(caught.value)


def test_a_checkpoint_for_other_classes_is_refused_and_both_are_shown(run, run_path, one_picture):
    run()
    labels = {'background': 0, 'emu': 1}
    (one_picture / 'label_map.json').write_text(json.dumps(labels))
    with pytest.raises(InputError, match='belong together') as caught:
        run(data_folder=one_picture, epochs=2, checkpoint=run_path)
    assert str(labels) in str(caught.value)
    assert 'aeroplane' in str(caught.value)


@pytest.mark.parametrize('missing', ['optimizer', 'scheduler', 'settings'])
def test_weights_alone_are_not_gone_on_with(missing, run, run_path):
    content = run()
    del content[missing]
    torch.save(content, run_path)
    with pytest.raises(InputError, match='holds weights but no training to go on with') as caught:
        run(epochs=2, checkpoint=run_path)
    assert run_path in str(caught.value)


@pytest.mark.parametrize('change', [{'optimizer': {}}, {'optimizer': {'state': {}, 'param_groups': []}},
                                    {'optimizer': {'state': 3, 'param_groups': 4}}])
def test_the_training_of_something_else_is_not_gone_on_with(change, run, run_path):
    torch.save({**run(), **change}, run_path)
    with pytest.raises(InputError, match=r"holds another optimizer than train\.py's") as caught:
        run(epochs=2, checkpoint=run_path)
    assert run_path in str(caught.value)


# ------------------------------------------------------------------------------------------- real processes, real kills

# Trains in child processes for ever, with what is there or from the start, and sends each a signal at a random moment.
# Prints what the child has said, how it ended, and what is left of it.
SIGNALS = '''
import json
import os
import random
import signal
import sys
import time

import torch

sys.path.insert(0, 'tests')
import test_training
import train
import utils

torch.set_num_threads(1)
data_folder, folder, workers, signal_number, n_signals = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
path, output = os.path.join(folder, 'checkpoint_ssd300.pth'), os.path.join(data_folder, 'output.txt')
train.SSD300 = test_training.TinySSD
sys.argv[1:] = ['--data_folder', data_folder, '--output_folder', folder, '--workers', str(workers), '--no-pretrained']
luck = random.Random(0)
for _ in range(n_signals):
    child = os.fork()
    if child == 0:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if os.path.exists(path):
            sys.argv += ['--checkpoint', path, '--epochs', '1000000']
        utils.run_script(train)
    while True:  # until the bar is there
        time.sleep(0.01)
        if os.path.exists(output) and 'Epoch ' in open(output).read():
            break
    time.sleep(luck.uniform(0, 0.7))
    (os.kill, os.killpg)[luck.random() < 0.7](child, signal_number)  # a terminal's Ctrl-C goes to the workers as well
    deadline = time.monotonic() + 30
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.killpg(child, signal.SIGKILL)  # it hangs
    said = open(output).read()
    os.remove(output)
    epoch = utils.load_checkpoint(path)['epoch'] if os.path.exists(path) else 0
    print(json.dumps({'status': ended[1], 'said': said, 'epoch': epoch}))
'''


def send_signals(data_folder, folder, workers, signal_number, n_signals):
    process = subprocess.run([sys.executable, '-c', SIGNALS, data_folder, folder, str(workers), str(int(signal_number)),
                              str(n_signals)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_kill_9_during_training_leaves_a_checkpoint_to_go_on_from(one_picture, tmp_path):
    ends = send_signals(one_picture, tmp_path / 'run', 0, signal.SIGKILL, 20)
    assert {end['status'] for end in ends} == {signal.SIGKILL}
    epochs = [end['epoch'] for end in ends]
    assert epochs == sorted(epochs)
    assert epochs[-1] >= 5
    assert [int(line['epoch']) for line in read_log(tmp_path / 'run')][:epochs[-1]] == list(range(1, epochs[-1] + 1))


def test_ctrl_c_at_any_moment_of_training_is_one_sentence_that_tells_from_where_to_go_on(one_picture, tmp_path):
    path = tmp_path / 'run' / 'checkpoint_ssd300.pth'
    for end in send_signals(one_picture, tmp_path / 'run', 2, signal.SIGINT, 6):
        assert os.waitstatus_to_exitcode(end['status']) == 1, end['said']  # 0: it hung
        assert 'Traceback' not in end['said'], end['said']
        assert end['said'].splitlines()[-1] == (
            f"Stopped: go on from the end of epoch {end['epoch']} in {path} by naming it as --checkpoint"
            if end['epoch'] else 'Stopped before the end of the first epoch: nothing is saved yet')
    assert end['epoch'] > 1


def children(pid):
    """Process ids of a process' children."""
    found = []
    for status in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has just ended
            if status.read_text().rpartition(')')[2].split()[1] == str(pid):
                found.append(int(status.parent.name))
    return found


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def ctrl_c(folder, data_folder, wait_for, workers):
    """Starts train.py, presses Ctrl-C once its bar shows `wait_for`; returns its output, and the process ids of its
    workers."""
    process = subprocess.Popen([sys.executable, ROOT / 'train.py', '--data_folder', data_folder, '--output_folder',
                                folder, '--no-pretrained', '--batch_size', '2', '--workers', str(workers)], cwd=folder,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        said = b''
        while wait_for not in said:
            piece = os.read(process.stderr.fileno(), 1000)
            assert piece, said.decode()
            said += piece
        pids, deadline = [], time.monotonic() + 30
        while len(pids) < workers and time.monotonic() < deadline:
            pids = children(process.pid)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 1
    return (said + rest).decode(), pids


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='finds the workers in /proc')
def test_ctrl_c_in_the_first_epoch_is_one_sentence_and_leaves_no_workers(sample_lists, tmp_path):
    said, pids = ctrl_c(tmp_path, sample_lists, b'Epoch 1/', 2)
    assert 'Traceback' not in said, said
    assert said.splitlines()[-1] == 'Stopped before the end of the first epoch: nothing is saved yet'
    assert len(pids) >= 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    assert os.listdir(tmp_path) == []


def test_ctrl_c_in_a_later_epoch_says_from_where_to_go_on(one_picture, tmp_path):
    (tmp_path / 'run').mkdir()
    said, _ = ctrl_c(tmp_path / 'run', one_picture, b'Epoch 2/', 0)
    assert 'Traceback' not in said, said
    path = tmp_path / 'run' / 'checkpoint_ssd300.pth'
    epoch = load_checkpoint(path)['epoch']
    sentence = f'Stopped: go on from the end of epoch {epoch} in {path} by naming it as --checkpoint'
    assert said.splitlines()[-1] == sentence
    assert sorted(os.listdir(path.parent)) == ['checkpoint_ssd300.pth', 'training_log.csv']
