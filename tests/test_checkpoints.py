"""Checkpoints: nothing is lost when saving them fails or is killed, and no code is run by loading them."""

import io
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

import train
from utils import (InputError, current_settings, load_checkpoint, make_folder, make_label_map, replaced_file,
                   save_checkpoint)

LABEL_MAP = make_label_map(['dog', 'cat'])


def small_run(seed=0):
    """A network of a few thousand weights, its optimizer and schedule, in the middle of a training."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(50, 50))
    optimizer = torch.optim.SGD([{'params': [network[0].bias, network[1].bias], 'lr': 2e-3},
                                 {'params': [network[0].weight, network[1].weight]}], lr=1e-3, momentum=0.9)
    scheduler = MultiStepLR(optimizer, milestones=[2, 5], gamma=0.1)
    for _ in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        scheduler.step()
    return network, optimizer, scheduler


def save(path, epoch=3, seed=0):
    save_checkpoint(path, epoch, *small_run(seed), LABEL_MAP, current_settings(train))
    return path


def parts(content):
    """All values within nested containers, and the containers."""
    yield content
    if isinstance(content, dict):
        for item in content.items():
            yield from parts(item)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from parts(value)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for values in zip(one, other):
            assert_same(*values)
    else:
        assert one == other


# ------------------------------------------------------------------------------------------------ what is in it

def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    network, optimizer, scheduler = small_run()
    loaded = load_checkpoint(save(tmp_path / 'checkpoint.pth'))
    assert list(loaded) == ['epoch', 'model', 'optimizer', 'scheduler', 'label_map', 'settings']
    assert (loaded['epoch'], loaded['label_map'], loaded['settings']) == (3, LABEL_MAP, current_settings(train))
    assert_same(loaded['model'], network.state_dict())
    assert_same(loaded['optimizer'], optimizer.state_dict())
    assert len(loaded['optimizer']['state']) == 4  # momentum of each parameter

    fresh = small_run(seed=1)
    for thing, name in zip(fresh, ('model', 'optimizer', 'scheduler')):
        thing.load_state_dict(loaded[name])
    assert_same(fresh[0].state_dict(), network.state_dict())
    assert_same(fresh[1].state_dict(), optimizer.state_dict())
    for _ in range(4):  # the schedule goes on alike, over the milestone at 5
        assert fresh[2].get_last_lr() == scheduler.get_last_lr()
        for schedule in (fresh[2], scheduler):
            schedule.optimizer.step()
            schedule.step()


def test_a_checkpoint_is_made_of_plain_containers_alone(tmp_path):
    path = save(tmp_path / 'checkpoint.pth')
    plain = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    assert {type(part) for part in parts(torch.load(path, weights_only=True))} <= plain
    if hasattr(torch.serialization, 'get_unsafe_globals_in_checkpoint'):  # not in PyTorch 2.4
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []


def test_a_checkpoint_from_a_gpu_is_loaded_to_the_cpu(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth'
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    save(path)
    assert b'cuda:0' in path.read_bytes()
    loaded = load_checkpoint(path)
    assert {part.device.type for part in parts(loaded) if isinstance(part, torch.Tensor)} == {'cpu'}


# --------------------------------------------------------------------------------------------- when saving fails

def assert_untouched(path, before):
    """The file is as it was, and nothing else lies beside it."""
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    load_checkpoint(path)


@pytest.fixture
def old(tmp_path):
    """A checkpoint in a folder of its own."""
    (tmp_path / 'run').mkdir()
    return save(tmp_path / 'run' / 'checkpoint.pth')


class Failing(io.RawIOBase):
    """A file that fails in the middle of a checkpoint."""

    def __init__(self, file, error):
        super().__init__()
        self.file, self.error, self.room = file, error, 2000

    def write(self, content):
        self.room -= len(content)
        if self.room < 0:
            raise self.error
        return self.file.write(content)


@pytest.mark.parametrize('error', [KeyboardInterrupt(), MemoryError(), ValueError('no')])
def test_an_exception_in_the_middle_of_writing_leaves_the_old_checkpoint(error, old):
    before = old.read_bytes()
    with pytest.raises(type(error)), replaced_file(old) as file:
        file.write(b'half')
        raise error
    assert_untouched(old, before)


def test_ctrl_c_in_the_middle_of_saving_stays_a_ctrl_c(old):
    before = old.read_bytes()
    with pytest.raises(KeyboardInterrupt), replaced_file(old) as file:
        torch.save({'model': torch.rand(10000)}, Failing(file, KeyboardInterrupt()))
    assert_untouched(old, before)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(old):
    before = old.read_bytes()
    old.with_name('checkpoint.pth.tmp').symlink_to('/dev/full')  # the kernel says ENOSPC to whatever is written there
    with pytest.raises(InputError, match='No space left on device') as caught:
        save(old, epoch=4)
    assert str(old) in str(caught.value)
    assert 'what was there before is unchanged' in str(caught.value)
    assert_untouched(old, before)


def test_a_disk_that_fills_up_in_the_middle_is_one_sentence_and_leaves_the_old_checkpoint(old):
    before = old.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1, 4096, len(before) // 2, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # the kernel refuses to write more
        try:
            with pytest.raises(InputError, match='make room') as caught:
                save(old, epoch=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(old) in str(caught.value)
        assert_untouched(old, before)
    save(old, epoch=4)
    assert load_checkpoint(old)['epoch'] == 4


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / 'run').write_text('a file')
    for attempt in (lambda: save(tmp_path / 'run' / 'checkpoint.pth'), lambda: make_folder(tmp_path / 'run'),
                    lambda: make_folder(tmp_path / 'run' / 'deeper')):
        with pytest.raises(InputError, match='choose another') as caught:
            attempt()
        assert str(tmp_path / 'run') in str(caught.value)


@pytest.fixture
def read_only(old):
    """The folder of `old`, read-only: for root too, who may write where permissions say no."""
    folder = old.parent
    folder.chmod(0o555)
    immutable = os.access(folder, os.W_OK)
    if immutable and not (shutil.which('chattr') and subprocess.run(['chattr', '+i', folder]).returncode == 0):
        pytest.skip('no way to make a folder read-only for root here')
    yield folder
    if immutable:
        subprocess.run(['chattr', '-i', folder], check=True)
    folder.chmod(0o755)


def test_a_read_only_folder_is_one_sentence_and_keeps_the_old_checkpoint(old, read_only):
    before = old.read_bytes()
    with pytest.raises(InputError, match='choose another place') as caught:
        save(old, epoch=4)
    assert str(old) in str(caught.value)
    assert_untouched(old, before)


def test_a_read_only_folder_is_refused_before_the_work_begins(read_only):
    with pytest.raises(InputError, match="can't write to the folder") as caught:
        make_folder(read_only)
    assert str(read_only) in str(caught.value)


# Saves for ever in a child process, epoch after epoch with all weights equal to the epoch, and kills it at a random
# moment; then looks at what is left.
KILL = '''
import itertools
import os
import random
import signal
import sys
import time

import torch
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR

from utils import load_checkpoint, save_checkpoint

path, n_kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
network = nn.Sequential(*(nn.Linear(400, 400) for _ in range(3)))
optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
scheduler = MultiStepLR(optimizer, milestones=[2])

def save(epoch):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(epoch)
    save_checkpoint(path, epoch, network, optimizer, scheduler, {'background': 0}, {})

save(1)
start = time.monotonic()
save(1)
duration = time.monotonic() - start
luck, epoch, n_halves = random.Random(0), 1, 0
for _ in range(n_kills):
    child = os.fork()
    if child == 0:
        for epoch in itertools.count(epoch + 1):
            save(epoch)
    time.sleep(luck.uniform(0, 4 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    n_halves += os.path.exists(path + '.tmp')
    loaded = load_checkpoint(path)
    assert loaded['epoch'] >= epoch, (loaded['epoch'], epoch)
    epoch = loaded['epoch']
    assert all((tensor == epoch).all() for tensor in loaded['model'].values()), epoch
save(epoch + 1)
print(n_halves, epoch, os.listdir(os.path.dirname(path)))
'''


def test_kill_9_at_any_moment_of_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    (tmp_path / 'run').mkdir()
    path = tmp_path / 'run' / 'checkpoint.pth'
    process = subprocess.run([sys.executable, '-c', KILL, path, '30'], cwd=ROOT, capture_output=True, text=True,
                             timeout=120)
    assert process.returncode == 0, process.stderr
    n_halves, epoch, files = process.stdout.split(maxsplit=2)
    assert int(n_halves) >= 8, 'hardly any kill hit a save'
    assert int(epoch) > 15
    assert files.strip() == "['checkpoint.pth']"  # the next save clears what a killed one has left


# ------------------------------------------------------------------------------------------------ when loading fails

def refusal(path, match):
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert len(sentence.splitlines()) == 1
    return sentence


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    refusal(tmp_path / 'checkpoint.pth', "isn't there: train one with train.py")


def test_a_folder_instead_of_a_checkpoint_is_one_sentence(tmp_path):
    refusal(tmp_path, "can't be loaded: Is a directory")


def test_a_checkpoint_cut_off_anywhere_is_one_sentence(tmp_path):
    path = save(tmp_path / 'checkpoint.pth')
    whole, luck = path.read_bytes(), random.Random(0)
    for length in [0, 1, 4, len(whole) - 1, *(luck.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:length])
        refusal(path, "can't be loaded: it is damaged or wasn't written by train.py")


def test_a_checkpoint_with_a_wrong_byte_loads_unchanged_or_is_refused_in_one_sentence(tmp_path):
    path = save(tmp_path / 'checkpoint.pth')
    whole, right, luck, n_refused = path.read_bytes(), load_checkpoint(path), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[luck.randrange(len(whole))] ^= luck.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            assert_same(load_checkpoint(path), right)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            n_refused += 1
    assert n_refused > 100  # zip archives have gaps, in which bytes mean nothing


def foreign_files(folder):
    """Files of all sorts that somebody might take for a checkpoint."""
    files = {'text': b'epoch 3\n', 'zeros': bytes(5000), 'picture': b'\x89PNG\r\n\x1a\n' + bytes(100),
             'pickle': b'\x80\x02}.'}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / 'zip', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / 'torchscript')
    torch.save(torch.rand(3), folder / 'tensor')
    torch.save([1, 2], folder / 'list')
    torch.save(nn.Linear(2, 2).state_dict(), folder / 'weights')
    torch.save(nn.Linear(2, 2).state_dict(), folder / 'old weights', _use_new_zipfile_serialization=False)
    torch.save({'epoch': 1, 'model': nn.Linear(2, 2), 'label_map': LABEL_MAP}, folder / 'module')
    return sorted(folder.iterdir())


@pytest.mark.filterwarnings('ignore')  # TorchScript is deprecated
def test_files_of_other_kinds_are_refused_in_one_sentence(tmp_path):
    for path in foreign_files(tmp_path):
        sentence = refusal(path, "can't be loaded|isn't a checkpoint of this project")
        if path.name == 'module':
            assert "'torch.nn.modules.linear.Linear'" in sentence


WRONG_PARTS = {
    'epoch': [-1, True, 2.0, '3', None, [1]],
    'model': [[], None, {'weight': [1.0]}, {3: torch.zeros(1)}],
    'label_map': [[], None, {}, {'dog': 1}, {'background': 0, 'dog': 2}, {'background': 1, 'dog': 0},
                  {'background': 0, 'dog': '1'}, {'background': 0, 1: 1}, {'background': 0, 'dog': 1, 'cat': 1},
                  {'background': False, 'dog': True}],
    'optimizer': [[], None], 'scheduler': [3, None], 'settings': ['', None],
}


@pytest.mark.parametrize('part', WRONG_PARTS)
def test_a_checkpoint_whose_parts_are_of_wrong_types_is_refused(part, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    right = {'epoch': 0, 'model': {'weight': torch.zeros(1)}, 'optimizer': {}, 'scheduler': {}, 'label_map': LABEL_MAP,
             'settings': {}}
    torch.save(right, path)
    load_checkpoint(path)
    for wrong in WRONG_PARTS[part]:
        torch.save({**right, part: wrong}, path)
        refusal(path, "isn't a checkpoint of this project")


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize(('function', 'name'), [
    (os.system, f'{os.system.__module__}.system'), (eval, 'eval'), (exec, 'exec'), (getattr, 'getattr'),
    (torch.hub.load, 'torch.hub.load'), (torch.load, 'torch.serialization.load'), (make_folder, 'utils.make_folder')])
@pytest.mark.parametrize('part', ['epoch', 'model', 'optimizer', 'settings'])
def test_a_checkpoint_with_a_hostile_pickle_is_refused_by_name_and_its_payload_does_not_run(function, name, part,
                                                                                            tmp_path):
    path, harm = tmp_path / 'checkpoint.pth', tmp_path / 'harm'
    payload = {eval: f'open({str(harm)!r}, "w")', exec: f'open({str(harm)!r}, "w")', make_folder: str(harm)}.get(
        function, f'touch {harm}')
    torch.save({'epoch': 1, 'model': {}, 'optimizer': {}, 'label_map': LABEL_MAP, 'settings': {},
                part: {'deep': [Call(function, payload)]}}, path)
    # PyTorch 2.4 says 'builtins.eval' where later ones say 'eval'.
    assert re.search(rf"'(builtins\.)?{re.escape(name)}'", refusal(path, 'nothing of it was run'))
    assert not harm.exists()


def test_the_payload_of_such_a_pickle_would_run_where_it_is_not_refused(tmp_path):
    path, harm = tmp_path / 'checkpoint.pth', tmp_path / 'harm'
    torch.save({'epoch': Call(make_folder, str(harm))}, path)
    torch.load(path, weights_only=False)
    assert harm.exists()
