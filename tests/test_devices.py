"""No operation mixes devices.

Fake tensors know their shape, type and device, but hold no values: with them, what would happen on a GPU can be tried
on a computer without one. An operation on tensors of two devices raises, as it would there.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import SSD300, MultiBoxLoss

pytestmark = pytest.mark.skipif(torch.__version__ < '2.5', reason="PyTorch 2.4's fake tensors start a real GPU")


def test_network_decoding_and_loss_work_on_the_device_of_their_weights_and_priors():
    fake_gpu = FakeTensorMode()
    # Only these are built under torch.device: in forward, a tensor that the code makes without naming a device must
    # land on the CPU and be noticed.
    with fake_gpu, torch.device('cuda'):
        network = SSD300(n_classes=3).eval()
        images = torch.zeros(2, 3, 300, 300)
        boxes, labels = [torch.zeros(2, 4), torch.zeros(0, 4)], [torch.ones(n, dtype=torch.long) for n in (2, 0)]
    with fake_gpu:
        criterion = MultiBoxLoss(network.priors_cxcy)
        locs, scores = network(images)
        assert locs.shape == (2, 8732, 4) and network.priors_cxcy.device.type == 'cuda'
        results = locs, scores, *network.decode(locs, scores), *criterion.parts(locs, scores, boxes, labels)
        assert {tensor.device.type for tensor in results} == {'cuda'} and len(results) == 6
