"""No operation mixes devices.

Fake tensors know their shape, type and device, but hold no values: with them, what would happen on a GPU can be tried
on a computer without one. An operation on tensors of two devices raises, as it would there.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import SSD300, MultiBoxLoss

pytestmark = pytest.mark.skipif(torch.__version__ < '2.5', reason="PyTorch 2.4's fake tensors start a real GPU")


@pytest.fixture(scope='module')
def fake_gpu():
    """A mode for `with`. Only modules are built under torch.device: in forward, a tensor that the code makes without
    naming a device must land on the CPU and be noticed."""
    return FakeTensorMode()


@pytest.fixture(scope='module')
def network_on_gpu(fake_gpu):
    with fake_gpu, torch.device('cuda'):
        return SSD300(n_classes=3).eval()


def predictions(n_images=2):
    return torch.zeros(n_images, 8732, 4, device='cuda'), torch.zeros(n_images, 8732, 3, device='cuda')


def objects(device='cuda'):
    """Boxes and labels of two images, the second of which has none."""
    return ([torch.zeros(n, 4, device=device) for n in (2, 0)],
            [torch.ones(n, dtype=torch.long, device=device) for n in (2, 0)])


def test_the_network_and_its_decoding_work_on_the_device_of_its_weights(fake_gpu, network_on_gpu):
    with fake_gpu:
        locs, scores = network_on_gpu(torch.zeros(2, 3, 300, 300, device='cuda'))
        assert locs.shape == (2, 8732, 4)
        assert locs.device.type == scores.device.type == network_on_gpu.priors_cxcy.device.type == 'cuda'
        assert [tensor.device.type for tensor in network_on_gpu.decode(locs, scores)] == ['cuda', 'cuda']


@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_the_loss_works_on_the_device_of_its_priors(fake_gpu, network_on_gpu, localization):
    with fake_gpu:
        criterion = MultiBoxLoss(network_on_gpu.priors_cxcy, localization=localization)
        parts = criterion.parts(*predictions(), *objects())
        assert [part.device.type for part in parts] == ['cuda', 'cuda']


@pytest.mark.parametrize('slip', ['image', 'priors', 'objects', 'scores'])
def test_a_tensor_left_on_the_cpu_would_be_noticed(fake_gpu, network_on_gpu, slip):
    with fake_gpu:
        locs, scores = predictions()
        with pytest.raises(RuntimeError, match='cpu'):
            if slip == 'image':
                network_on_gpu(torch.zeros(2, 3, 300, 300))
            elif slip == 'priors':
                MultiBoxLoss(torch.zeros(8732, 4))(locs, scores, *objects())
            elif slip == 'objects':
                MultiBoxLoss(network_on_gpu.priors_cxcy)(locs, scores, *objects('cpu'))
            else:
                network_on_gpu.decode(locs.cpu(), scores)
