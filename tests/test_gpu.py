"""On a GPU: the same network, loss, matching and detections as on the CPU, without a single wait in a training step."""

import copy
from unittest.mock import Mock

import pytest
import torch
from conftest import run_script

import train
from model import MultiBoxLoss
from utils import autocast, choose_dtype, load_checkpoint, place_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')

BOXES = [[[0.1, 0.2, 0.5, 0.7]], [], [[0.0, 0.1, 0.9, 0.9], [0.6, 0.6, 0.7, 0.8]], [[0.3, 0.3, 0.4, 0.5]]]
LABELS = [[12], [], [15, 5], [1]]


def objects(device):
    return ([torch.tensor(boxes, device=device).view(-1, 4) for boxes in BOXES],
            [torch.tensor(labels, dtype=torch.long, device=device) for labels in LABELS])


@pytest.fixture(scope='module')
def images():
    return torch.randn(4, 3, 300, 300, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def on_gpu(model):
    on_gpu = copy.deepcopy(model)
    place_network(on_gpu, torch.device('cuda'), torch.float32)
    return on_gpu


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """TF32, which convolutions use by default, keeps 10 bits: for a comparison too few."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)


@torch.no_grad()
def test_network_loss_matching_and_detections_are_those_of_the_cpu(model, on_gpu, images):
    locs, scores = model(images)
    gpu_locs, gpu_scores = on_gpu(images.cuda())
    torch.testing.assert_close(gpu_locs.cpu(), locs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu_scores.cpu(), scores, rtol=1e-3, atol=1e-3)

    criterion, gpu_criterion = MultiBoxLoss(model.priors_cxcy), MultiBoxLoss(on_gpu.priors_cxcy)
    for image, gpu_image in zip(zip(*objects('cpu')), zip(*objects('cuda'))):
        for ours, theirs in zip(criterion.match(*image), gpu_criterion.match(*gpu_image)):
            assert torch.equal(ours, theirs.cpu())
    # The same predictions from here on: what is compared is the loss and the detection.
    loss = criterion(locs, scores, *objects('cpu'))
    torch.testing.assert_close(gpu_criterion(locs.cuda(), scores.cuda(), *objects('cuda')).cpu(), loss)
    found = model.detect_objects(locs, scores, 0.06, 0.45, 200)
    gpu_found = on_gpu.detect_objects(locs.cuda(), scores.cuda(), 0.06, 0.45, 200)
    for ours, theirs in zip(found[2], gpu_found[2]):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('precision', ['float32', 'auto', 'float16'])
def test_a_training_step_never_waits_for_the_gpu(on_gpu, images, precision, monkeypatch):
    device, network = torch.device('cuda'), copy.deepcopy(on_gpu)
    dtype = choose_dtype(device, precision)
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)
    criterion, optimizer = MultiBoxLoss(network.priors_cxcy), train.make_optimizer(network)
    boxes, labels = objects('cpu')
    batch = (images.pin_memory(), torch.cat(boxes).pin_memory(), torch.cat(labels).pin_memory(), None,
             [len(numbers) for numbers in labels])
    monkeypatch.setattr(train, 'grad_clip', 10.0)
    progress = Mock(batches=lambda: [batch], first_step=0, n_steps=10)

    def one_step():
        train.train_epoch(network, criterion, optimizer, scaler, autocast(device, dtype), progress)

    one_step()  # chooses algorithms, makes the momentum
    torch.cuda.synchronize()
    # GradScaler itself must know whether the gradient is finite before the step: one wait, for float16 alone.
    torch.cuda.set_sync_debug_mode('default' if scaler.is_enabled() else 'error')
    try:
        one_step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def run_train(sample_lists, folder, *settings, n_processes=1):
    process = run_script('train.py', '--data_folder', sample_lists, '--workers', 0, '--output_folder', folder,
                         '--eval_every', 'None', *settings, n_processes=n_processes)
    assert process.returncode == 0, process.stderr
    return load_checkpoint(folder / 'checkpoint_ssd300.pth')


def assert_close_training(one, other):
    assert one['epoch'] == other['epoch']
    for name, weights in one['model'].items():
        torch.testing.assert_close(weights, other['model'][name], rtol=1e-2, atol=1e-3)


def test_a_resumed_run_is_close_to_one_in_one_go(sample_lists, tmp_path):
    flags = ['--no-pretrained', '--batch_size', 4, '--grad_clip', 10, '--decay_lr_at', 1.0]
    in_one_go = run_train(sample_lists, tmp_path / 'in_one_go', *flags, '--epochs', 2)
    run_train(sample_lists, tmp_path / 'resumed', *flags, '--epochs', 1)
    resumed = run_train(sample_lists, tmp_path / 'resumed', '--checkpoint',
                        tmp_path / 'resumed' / 'checkpoint_ssd300.pth', '--epochs', 2)
    assert_close_training(in_one_go, resumed)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='no two CUDA devices')
def test_two_gpus_with_batches_of_2_make_the_steps_of_one_with_batches_of_4(sample_lists, tmp_path):
    flags = ['--no-pretrained', '--epochs', 1, '--grad_clip', 10]
    one = run_train(sample_lists, tmp_path / 'one', *flags, '--batch_size', 4)
    two = run_train(sample_lists, tmp_path / 'two', *flags, '--batch_size', 2, n_processes=2)
    assert_close_training(one, two)
