"""Checkpoints: nothing is lost when saving them fails or is killed, and no code is run by loading them."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import train
from model import SSD300, load_model
from utils import InputError, current_settings, load_checkpoint, make_label_map, save_checkpoint

LABEL_MAP = make_label_map(['dog', 'cat'])


class SmallNetwork(nn.Sequential):
    """A few thousand weights, and what a network has besides them."""
    image_mean, image_std, clip_boxes = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], True
    priors_cxcy = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))


def save(path, epoch=3):
    """Saves a small network and its optimizer in the middle of a training; returns them."""
    torch.manual_seed(0)
    network = SmallNetwork(nn.Conv2d(3, 8, 3), nn.Linear(50, 50))
    optimizer = torch.optim.SGD([{'params': [network[0].bias, network[1].bias], 'lr': 2e-3},
                                 {'params': [network[0].weight, network[1].weight]}], lr=1e-3, momentum=0.9)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    save_checkpoint(path, epoch, network, optimizer, LABEL_MAP, current_settings(train))
    return network, optimizer


# ------------------------------------------------------------------------------------------------ what is in it

def test_a_checkpoint_comes_back_as_it_was_saved_also_from_a_gpu_and_without_running_code(tmp_path, monkeypatch):
    path = tmp_path / 'checkpoint.pth'
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')  # as if saved on a GPU
    network, optimizer = save(path)
    assert b'cuda:0' in path.read_bytes()
    loaded = load_checkpoint(path)
    assert loaded.keys() == torch.load(path, map_location='cpu', weights_only=True).keys()
    assert (loaded['format'], loaded['epoch'], loaded['label_map']) == (3, 3, LABEL_MAP)
    assert loaded['settings'] == current_settings(train)
    assert (loaded['image_mean'], loaded['image_std']) == (network.image_mean, network.image_std)
    assert loaded['clip_boxes'] and torch.equal(loaded['priors_cxcy'], network.priors_cxcy)
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded['model'][name], tensor) and loaded['model'][name].device.type == 'cpu'
    for number, state in optimizer.state_dict()['state'].items():
        assert torch.equal(loaded['optimizer']['state'][number]['momentum_buffer'], state['momentum_buffer'])


def test_priors_normalization_and_clipping_travel_with_the_network(model, tmp_path):
    torch.manual_seed(0)
    network = SSD300(n_classes=3)
    network.priors_cxcy.copy_(torch.rand(8732, 4))
    network.image_mean, network.image_std, network.clip_boxes = [0.5, 0.4, 0.3], [1 / 255] * 3, True
    path = tmp_path / 'checkpoint.pth'
    save_checkpoint(path, 1, network, torch.optim.SGD(network.parameters()), LABEL_MAP, {})
    loaded, label_map = load_model(path)
    assert label_map == LABEL_MAP
    assert torch.equal(loaded.priors_cxcy, network.priors_cxcy)
    assert (loaded.image_mean, loaded.image_std, loaded.clip_boxes) == ([0.5, 0.4, 0.3], [1 / 255] * 3, True)
    content = load_checkpoint(path)
    for name in ('format', 'priors_cxcy', 'image_mean', 'image_std', 'clip_boxes'):
        del content[name]  # as older checkpoints are
    torch.save(content, path)
    loaded, _ = load_model(path)
    assert torch.equal(loaded.priors_cxcy, model.priors_cxcy)
    assert (loaded.image_mean, loaded.clip_boxes) == (model.image_mean, False)


# --------------------------------------------------------------------------------------------- when saving fails

@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    save(path)
    before = path.read_bytes()
    path.with_name('checkpoint.pth.tmp').symlink_to('/dev/full')  # the kernel says ENOSPC to whatever is written there
    with pytest.raises(InputError, match='No space left on device') as caught:
        save(path, epoch=4)
    assert str(path) in str(caught.value) and 'what was there before is unchanged' in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


# Saves for ever in a child process, epoch after epoch with all weights equal to the epoch, and kills it at a random
# moment; then looks at what is left.
KILL = '''
import itertools, os, random, signal, sys, time
sys.path.insert(0, 'tests')
import torch
from torch import nn
from test_checkpoints import SmallNetwork
from utils import load_checkpoint, save_checkpoint

torch.set_num_threads(1)
path, network, luck, last, n_halves = sys.argv[1], SmallNetwork(nn.Linear(700, 700)), random.Random(0), 0, 0
optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

def save(epoch):
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, epoch)
    save_checkpoint(path, epoch, network, optimizer, {'background': 0}, {})

save(last)
for _ in range(30):
    child = os.fork()
    if child == 0:
        for epoch in itertools.count(last + 1):
            save(epoch)
    time.sleep(luck.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    n_halves += os.path.exists(path + '.tmp')
    loaded = load_checkpoint(path)
    assert loaded['epoch'] >= last, (loaded['epoch'], last)
    last = loaded['epoch']
    assert all((tensor == last).all() for tensor in loaded['model'].values()), last
save(last + 1)
print(n_halves, last, os.listdir(os.path.dirname(path)))
'''


@pytest.mark.slow
def test_kill_9_at_any_moment_of_saving_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    (tmp_path / 'run').mkdir()
    process = subprocess.run([sys.executable, '-c', KILL, tmp_path / 'run' / 'checkpoint.pth'], cwd=ROOT,
                             capture_output=True, text=True, timeout=120, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert process.returncode == 0, process.stderr
    n_halves, epoch, files = process.stdout.split(maxsplit=2)
    assert int(n_halves) >= 5 and int(epoch) > 10, 'hardly any kill hit a save'
    assert files.strip() == "['checkpoint.pth']"  # the next save clears what a killed one has left


# ------------------------------------------------------------------------------------------------ when loading fails

def refusal(path, match):
    with pytest.raises(InputError, match=match) as caught:
        load_checkpoint(path)
    sentence, = str(caught.value).splitlines()
    assert str(path) in sentence


def test_what_is_no_checkpoint_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    refusal(path, "isn't there: train one with train.py")
    save(path)
    path.write_bytes(path.read_bytes()[:10000])
    refusal(path, "can't be loaded")
    path.write_bytes(b'epoch 3\n')
    refusal(path, "can't be loaded")
    for content in ([1, 2], nn.Linear(2, 2).state_dict(), {'epoch': 1, 'model': None, 'label_map': LABEL_MAP}):
        torch.save(content, path)
        refusal(path, "isn't a checkpoint of this project")


class Harm:
    """Is pickled as the call of a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_checkpoint_with_a_hostile_pickle_runs_nothing_of_it(zipped, tmp_path):
    path, harm = tmp_path / 'checkpoint.pth', tmp_path / 'harm'
    content = {'epoch': 1, 'model': {}, 'label_map': LABEL_MAP, 'optimizer': {'deep': [Harm(harm)]}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refusal(path, 'checkpoint')
    assert not harm.exists()
    torch.load(path, weights_only=False)  # where it isn't refused, it does run
    assert harm.exists()


@pytest.mark.filterwarnings('ignore')  # TorchScript is deprecated
def test_a_torchscript_archive_is_refused_before_it_is_run(tmp_path, monkeypatch):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'script.pth')
    monkeypatch.setattr(torch.jit, 'load', lambda *_, **__: pytest.fail('run'))
    refusal(tmp_path / 'script.pth', "can't be loaded")
