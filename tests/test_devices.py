"""No operation mixes devices.

Fake tensors know their shape, type and device, but hold no values: with them, what would happen on a GPU can be tried
on a computer without one. An operation on tensors of two devices raises, as it would there.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchvision.ops import nms

from model import SSD300, MultiBoxLoss

pytestmark = pytest.mark.skipif(torch.__version__ < '2.5', reason="PyTorch 2.4's fake tensors start a real GPU")


@pytest.fixture(scope='module')
def fake_gpu():
    """A mode for `with`. Only modules are built under torch.device: in forward, a tensor that the code makes without
    naming a device must land on the CPU and be noticed."""
    return FakeTensorMode(shape_env=ShapeEnv())


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


def test_the_network_works_on_the_device_of_its_weights(fake_gpu, network_on_gpu):
    with fake_gpu:
        locs, scores = network_on_gpu(torch.zeros(2, 3, 300, 300, device='cuda'))
        assert locs.shape == (2, 8732, 4)
        assert locs.device.type == scores.device.type == network_on_gpu.priors_cxcy.device.type == 'cuda'


@pytest.mark.parametrize('localization', ['smooth_l1', 'l1'])
def test_the_loss_works_on_the_device_of_its_priors(fake_gpu, network_on_gpu, localization):
    with fake_gpu:
        criterion = MultiBoxLoss(network_on_gpu.priors_cxcy, localization=localization)
        loss = criterion(*predictions(), *objects())
        assert loss.device.type == criterion.parts.device.type == 'cuda'


@pytest.mark.filterwarnings('ignore:.*create_unbacked_symint')  # torchvision's own
def test_detection_works_on_the_device_of_the_predictions(fake_gpu, network_on_gpu, monkeypatch):
    # How many candidates there are and how many are kept is unknown without values, but both is asked for on the way.
    def find_many(mask, as_tuple):
        return tuple(mask.new_zeros(3000, dtype=torch.long) for _ in range(mask.dim()))

    def keep_three(boxes, scores, labels, max_overlap):
        return nms(boxes + labels[:, None], scores, max_overlap).new_zeros(3)

    monkeypatch.setattr(torch.Tensor, 'nonzero', find_many)
    monkeypatch.setattr('model.batched_nms', keep_three)
    with fake_gpu:
        found = network_on_gpu.detect_objects(*predictions(), min_score=0.2, max_overlap=0.5, top_k=3)
        assert [tensor.shape for tensor in found[0]] == [(3, 4)] * 2
        assert [tensor.device.type for tensors in found for tensor in tensors] == ['cuda'] * 6


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
                network_on_gpu.detect_objects(locs.cpu(), scores, min_score=0.2, max_overlap=0.5, top_k=3)
