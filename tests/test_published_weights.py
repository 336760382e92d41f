"""Weights from elsewhere: the original code's pickled networks, and other implementations' state dicts."""

import copy
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16

import train
import utils
from model import SSD300, load_any_checkpoint, load_model, start_from_checkpoint
from utils import InputError, load_checkpoint, make_label_map

# ------------------------------------------------------- the original code's networks, as torch.save has written them

class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# What PyTorch 0.4 knew nothing of.
SINCE = {'_backward_pre_hooks', '_forward_hooks_always_called', '_forward_hooks_with_kwargs',
         '_forward_pre_hooks_with_kwargs', '_is_full_backward_hook', '_load_state_dict_post_hooks',
         '_load_state_dict_pre_hooks', '_non_persistent_buffers_set', '_reversed_padding_repeated_twice',
         '_state_dict_hooks', '_state_dict_pre_hooks', 'padding_mode'}


def write_original(path, network, harm, published, monkeypatch):
    """A checkpoint such as the original code writes: the whole network, pickled; its classes have the names of ours.
    Beside it is the call of a command that makes a file `harm`."""
    network = copy.deepcopy(network)
    network.__dict__['priors_cxcy'] = network._buffers.pop('priors_cxcy')  # a plain attribute there
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    network.rescale_factors.grad = torch.ones_like(network.rescale_factors)
    optimizer.step()  # makes a momentum, as key of which the parameter serves
    content = {'epoch': 231, 'model': network, 'optimizer': optimizer, 'loss': Call(os.system, f'touch {harm}')}
    with monkeypatch.context() as context:
        context.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
        if published:  # by PyTorch 0.4
            thnn = types.ModuleType('torch.nn.backends.thnn')
            exec('def _get_thnn_function_backend(): pass', vars(thnn))
            context.setitem(sys.modules, 'torch.nn.backends', types.ModuleType('torch.nn.backends'))
            context.setitem(sys.modules, 'torch.nn.backends.thnn', thnn)
            context.setattr(nn.Parameter, '__reduce_ex__', lambda self, _: (nn.Parameter, (self.data, True)))
            for module in network.modules():
                for name in SINCE & vars(module).keys():
                    del vars(module)[name]
                vars(module)['_backend'] = Call(thnn._get_thnn_function_backend)
        torch.save(content, path, _use_new_zipfile_serialization=not published)
    return dict(network.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of torch.save: about sources
@pytest.mark.parametrize('published', [True, False])
def test_the_original_codes_checkpoints_are_read_bit_for_bit_in_both_formats_and_run_nothing(
        published, model, sample_lists, tmp_path, monkeypatch):
    path, harm = tmp_path / 'checkpoint_ssd300.pth.tar', tmp_path / 'harm'
    expected = write_original(path, model, harm, published, monkeypatch)
    if published:
        for trait in (b'cuda:0', b'_get_thnn_function_backend', b'class SSD300(nn.Module)', b'torch.optim.sgd\nSGD'):
            assert trait in path.read_bytes(), 'the file of the test is not like the published one'
    loaded = load_checkpoint(path)
    assert {'epoch', 'model', 'label_map'} <= loaded.keys() and 'optimizer' not in loaded
    assert (loaded['epoch'], loaded['label_map']) == (232, utils.label_map)
    assert len(loaded['model']) == 71 and list(loaded['model']) == list(expected)
    assert all(torch.equal(loaded['model'][name], expected[name]) for name in expected)
    assert all(tensor.device.type == 'cpu' and not tensor.requires_grad for tensor in loaded['model'].values())

    network, label_map = load_model(path)
    assert label_map == utils.label_map and not network.training
    assert all(torch.equal(network.state_dict()[name], expected[name]) for name in expected)
    for name, value in {'data_folder': sample_lists, 'output_folder': tmp_path, 'checkpoint': str(path)}.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(InputError, match='has weights but no training state to resume'):
        train.main()
    assert not harm.exists()
    if not published:
        torch.load(path, map_location='cpu', weights_only=False)  # an ordinary unpickler does run it
        assert harm.exists()


# ------------------------------------------------------- other implementations, built here in the order of their layers

class PeerSSD(nn.Module):
    """SSD300 as amdegroot and lufficc have it: VGG with its pooling layers and ReLUs in one list, and so on."""

    def __init__(self, n_classes):
        super().__init__()
        self.n_classes, layers, channels = n_classes, [], 3
        for out in (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'C', 512, 512, 512, 'M', 512, 512, 512):
            if out in ('M', 'C'):
                layers.append(nn.MaxPool2d(2, 2, ceil_mode=out == 'C'))
            else:
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
                channels = out
        layers += [nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.ReLU(),
                   nn.Conv2d(1024, 1024, 1), nn.ReLU()]
        self.vgg = nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.full((512,), 20.0))
        self.extras = nn.ModuleList([
            nn.Conv2d(1024, 256, 1), nn.Conv2d(256, 512, 3, 2, 1), nn.Conv2d(512, 128, 1), nn.Conv2d(128, 256, 3, 2, 1),
            nn.Conv2d(256, 128, 1), nn.Conv2d(128, 256, 3), nn.Conv2d(256, 128, 1), nn.Conv2d(128, 256, 3)])
        maps = ((512, 4), (1024, 6), (512, 6), (256, 6), (256, 4), (256, 4))
        self.loc = nn.ModuleList(nn.Conv2d(channels, n * 4, 3, padding=1) for channels, n in maps)
        self.conf = nn.ModuleList(nn.Conv2d(channels, n * n_classes, 3, padding=1) for channels, n in maps)

    def forward(self, images):
        """RGB images in [0, 1] (N, 3, 300, 300) → boxes (N, 8732, 4), probabilities (N, 8732, n_classes), both in the
        peer's own order of priors."""
        out = 255 * images - torch.tensor([123., 117., 104.]).view(3, 1, 1)
        sources = []
        for i, layer in enumerate(self.vgg):
            out = layer(out)
            if i == 22:  # behind conv4_3's ReLU
                norm = out.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
                sources.append(out / norm * self.scale.view(1, 512, 1, 1))
        sources.append(out)
        for i, layer in enumerate(self.extras):
            out = F.relu(layer(out))
            if i % 2:
                sources.append(out)
        locs, scores = (torch.cat([head(source).permute(0, 2, 3, 1).reshape(len(images), -1, size)
                                   for head, source in zip(heads, sources)], dim=1)
                        for heads, size in ((self.loc, 4), (self.conf, self.n_classes)))
        priors = torch.tensor(peer_priors()).clamp(0, 1)
        centers = priors[:, :2] + locs[..., :2] * 0.1 * priors[:, 2:]
        sizes = priors[:, 2:] * torch.exp(locs[..., 2:] * 0.2)
        return torch.cat((centers - sizes / 2, centers + sizes / 2), dim=2), scores.softmax(dim=2)


def peer_priors():
    """(c_x, c_y, w, h) in the peer's order: at each position 1, extra, 2, 1/2, 3, 1/3."""
    priors, few, many = [], (2,), (2, 3)
    for grid, step, low, high, ratios in ((38, 8, 30, 60, few), (19, 16, 60, 111, many), (10, 32, 111, 162, many),
                                          (5, 64, 162, 213, many), (3, 100, 213, 264, few), (1, 300, 264, 315, few)):
        for i in range(grid):
            for j in range(grid):
                center = (j + 0.5) * step / 300, (i + 0.5) * step / 300
                sizes = [(low, low), ((low * high) ** 0.5,) * 2]
                for ratio in ratios:
                    sizes += [(low * ratio ** 0.5, low / ratio ** 0.5), (low / ratio ** 0.5, low * ratio ** 0.5)]
                priors += [(*center, w / 300, h / 300) for w, h in sizes]
    return priors


def in_our_order(rows):
    """Rows (N, 8732, …) of the peer's order of priors in ours: 1, extra, 2, 3, 1/2, 1/3."""
    place, start = [], 0
    for grid, n in ((38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)):
        order = [0, 1, 2, 4, 3, 5] if n == 6 else [0, 1, 2, 3]
        place += [start + position * n + i for position in range(grid ** 2) for i in order]
        start += grid ** 2 * n
    return rows[:, place]


AMDEGROOT = {'scale': 'L2Norm.weight'}
LUFFICC = {'scale': 'backbone.l2_norm.weight', 'vgg': 'backbone.vgg', 'extras': 'backbone.extras',
           'loc': 'box_head.predictor.reg_headers', 'conf': 'box_head.predictor.cls_headers'}


def renamed(state_dict, names):
    return {'.'.join([names.get(name.split('.')[0], name.split('.')[0]), *name.split('.')[1:]]): tensor
            for name, tensor in state_dict.items()}


@pytest.fixture(scope='module')
def peer():
    """An amdegroot-like network with weights that give signals of a usual size, an image, and what it predicts."""
    torch.manual_seed(0)
    network = PeerSSD(21)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 4 and not name.startswith(('loc', 'conf')):
            nn.init.kaiming_normal_(parameter, nonlinearity='relu')
        elif name.startswith(('loc', 'conf')):
            # conv4_3 is normalized; the maps above it have values of the images' size, about a hundred.
            nn.init.normal_(parameter, std=0.02 if name.split('.')[1] == '0' else 1e-4)
    image = torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        return network, image, [in_our_order(rows) for rows in network(image)]


@pytest.mark.slow
@pytest.mark.parametrize(('names', 'wrap'), [(AMDEGROOT, False), (LUFFICC, True)])
def test_weights_of_amdegroot_and_lufficc_predict_what_their_networks_do(names, wrap, peer, tmp_path):
    network, image, (boxes, probabilities) = peer
    weights = renamed(network.state_dict(), names)
    path = tmp_path / 'ssd300.pth'
    beside = {'optimizer': {'whatever': Path('an object')}, 'iteration': 120000}  # is ignored
    torch.save({'model': weights, **beside} if wrap else weights, path)
    ours, label_map = load_model(path)
    assert label_map == utils.label_map and not ours.clip_boxes
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.image_mean, ours.image_std))
    with torch.no_grad():
        our_boxes, our_probabilities = ours.decode(*ours((image - mean) / std))
    assert probabilities.amax(dim=1)[0, 1:].max() > 0.2  # they say something
    torch.testing.assert_close(our_probabilities, probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_boxes, boxes, rtol=0, atol=1e-5)
    tuned = SSD300(n_classes=3)
    start_from_checkpoint(tuned, path, make_label_map(['cat', 'dog']))
    assert torch.equal(tuned.priors_cxcy, ours.priors_cxcy) and tuned.image_std == [1 / 255] * 3
    assert torch.equal(tuned.base.conv1_1.weight, ours.base.conv1_1.weight)


@pytest.mark.slow
def test_torchvisions_weights_for_coco_predict_what_its_network_does(tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91).eval()
    for name, parameter in theirs.named_parameters():
        if 'module_list' in name and name.endswith('weight'):
            nn.init.normal_(parameter, std=0.02 if '.0.weight' in name else 1e-3)
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / SSD300_VGG16_Weights.COCO_V1.url.rsplit('/', 1)[1])  # as if downloaded
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    ours, label_map = load_model('coco')
    assert len(label_map) == 91 and label_map['person'] == 1 and label_map['toothbrush'] == 90
    image = torch.rand(3, 300, 300)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.image_mean, ours.image_std))
    with torch.no_grad():
        seen, _ = theirs.transform([image])
        torch.testing.assert_close((image - mean) / std, seen.tensors[0], rtol=0, atol=1e-4)
        features = list(theirs.backbone(seen.tensors).values())
        output, (anchors,) = theirs.head(features), theirs.anchor_generator(seen, features)
        boxes = theirs.box_coder.decode_single(output['bbox_regression'][0], anchors).clamp(0, 300) / 300
        our_boxes, our_probabilities = ours.decode(*ours(seen.tensors))
    probabilities = in_our_order(output['cls_logits'].softmax(dim=2))
    assert probabilities[0, :, 1:].max() > 0.1  # they say something
    torch.testing.assert_close(our_probabilities, probabilities, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_boxes, in_our_order(boxes[None]), rtol=0, atol=1e-5)


def test_weights_that_are_not_known_or_of_other_classes_are_refused_in_one_sentence(tmp_path):
    path, others = tmp_path / 'weights.pth', r"of amdegroot/ssd\.pytorch aren't those of its SSD300"
    with torch.device('meta'):  # weights without values
        peer_of_5_classes = renamed(PeerSSD(5).state_dict(), AMDEGROOT)
    for weights, complaint in (
            ({'layer1.weight': torch.rand(3)}, r'weights\.pth.*no weights of a known kind.*amdegroot.*lufficc'),
            ({'L2Norm.weight': torch.rand(512), 'vgg.0.weight': torch.rand(64, 3, 3, 3)}, others),
            (peer_of_5_classes, others)):
        torch.save(weights, path)
        with pytest.raises(InputError, match=complaint):
            load_any_checkpoint(path)


# ------------------------------------------------------------------------------------------------------ export

class DetectorForExport(torch.nn.Module):
    """The network with its decoding, as the tutorial shows it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.decode(*self.model(images))


@pytest.mark.slow
@pytest.mark.parametrize('format', ['torch.export', 'ONNX'])
def test_the_exported_network_decodes_and_takes_any_batch(format, model, tmp_path):
    detector, images, path = DetectorForExport(model).eval(), torch.rand(2, 3, 300, 300), tmp_path / 'ssd300.onnx'
    any_batch = {'images': {0: torch.export.Dim('batch')}}
    if format == 'torch.export':
        exported = torch.export.export(detector, (images,), dynamic_shapes=any_batch).module()
    else:
        for name in ('onnx', 'onnxscript'):
            pytest.importorskip(name)
        runtime = pytest.importorskip('onnxruntime')
        torch.onnx.export(detector, (images,), str(path), dynamo=True, dynamic_shapes=any_batch)

        def exported(images):
            return map(torch.from_numpy, runtime.InferenceSession(path).run(None, {'images': images.numpy()}))

    with torch.no_grad():
        for ours, theirs in zip(detector(images[:1]), exported(images[:1]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
