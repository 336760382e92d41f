"""The network: its weights, its priors and what it computes."""

import copy
import math
import tempfile
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms.functional import normalize

from model import SSD300, PredictionConvolutions, VGGBase, from_torchvision
from utils import InputError, decimate

# Output and input channels and kernel size of every convolution of the network.
CONVOLUTIONS = {
    'base.conv1_1': (64, 3, 3), 'base.conv1_2': (64, 64, 3),
    'base.conv2_1': (128, 64, 3), 'base.conv2_2': (128, 128, 3),
    'base.conv3_1': (256, 128, 3), 'base.conv3_2': (256, 256, 3), 'base.conv3_3': (256, 256, 3),
    'base.conv4_1': (512, 256, 3), 'base.conv4_2': (512, 512, 3), 'base.conv4_3': (512, 512, 3),
    'base.conv5_1': (512, 512, 3), 'base.conv5_2': (512, 512, 3), 'base.conv5_3': (512, 512, 3),
    'base.conv6': (1024, 512, 3), 'base.conv7': (1024, 1024, 1),
    'aux_convs.conv8_1': (256, 1024, 1), 'aux_convs.conv8_2': (512, 256, 3),
    'aux_convs.conv9_1': (128, 512, 1), 'aux_convs.conv9_2': (256, 128, 3),
    'aux_convs.conv10_1': (128, 256, 1), 'aux_convs.conv10_2': (256, 128, 3),
    'aux_convs.conv11_1': (128, 256, 1), 'aux_convs.conv11_2': (256, 128, 3),
    'pred_convs.loc_conv4_3': (16, 512, 3), 'pred_convs.cl_conv4_3': (84, 512, 3),
    'pred_convs.loc_conv7': (24, 1024, 3), 'pred_convs.cl_conv7': (126, 1024, 3),
    'pred_convs.loc_conv8_2': (24, 512, 3), 'pred_convs.cl_conv8_2': (126, 512, 3),
    'pred_convs.loc_conv9_2': (24, 256, 3), 'pred_convs.cl_conv9_2': (126, 256, 3),
    'pred_convs.loc_conv10_2': (16, 256, 3), 'pred_convs.cl_conv10_2': (84, 256, 3),
    'pred_convs.loc_conv11_2': (16, 256, 3), 'pred_convs.cl_conv11_2': (84, 256, 3),
}

# Positions per side, and the widths and heights of the priors at each position before they are cut at 1.
SQUARES = ((38, 0.1, 0.2), (19, 0.2, 0.375), (10, 0.375, 0.55), (5, 0.55, 0.725), (3, 0.725, 0.9), (1, 0.9, 1.0))


def sizes_at_a_position(grid, scale, next_scale):
    ratios = (2, 3, 0.5, 0.333) if grid in (19, 10, 5) else (2, 0.5)
    return ([(scale, scale), (math.sqrt(scale * next_scale),) * 2]
            + [(scale * math.sqrt(ratio), scale / math.sqrt(ratio)) for ratio in ratios])


PRIORS = [((column + 0.5) / grid, (row + 0.5) / grid, w, h)
          for grid, scale, next_scale in SQUARES
          for row in range(grid)
          for column in range(grid)
          for w, h in sizes_at_a_position(grid, scale, next_scale)]


# ------------------------------------------------------------------------------------------------ weights

def test_the_state_dict_has_71_tensors_under_the_names_of_the_published_weights(model):
    expected = {'rescale_factors': (1, 512, 1, 1)}
    for name, (out_channels, in_channels, kernel_size) in CONVOLUTIONS.items():
        expected[f'{name}.weight'] = (out_channels, in_channels, kernel_size, kernel_size)
        expected[f'{name}.bias'] = (out_channels,)
    assert len(expected) == 71
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert {name for name, _ in model.named_parameters()} == expected.keys()


def test_all_biases_start_at_0_and_the_rescale_factors_at_20(model):
    assert model.rescale_factors.eq(20).all()
    for name in CONVOLUTIONS:
        assert model.get_submodule(name).bias.eq(0).all(), name


def test_the_base_starts_from_he_initialisation(model):
    for name, (_, in_channels, kernel_size) in CONVOLUTIONS.items():
        if name.startswith('base.'):
            std = math.sqrt(2 / (in_channels * kernel_size ** 2))
            weight = model.get_submodule(name).weight
            assert weight.std().item() == pytest.approx(std, rel=0.06), name  # conv1_1 has but 1728 values
            assert weight.abs().max() > 2.5 * std, name  # normal: a uniform distribution ends at √3 of it


def test_the_other_convolutions_start_from_uniform_xavier_initialisation(model):
    for name, (out_channels, in_channels, kernel_size) in CONVOLUTIONS.items():
        if not name.startswith('base.'):
            bound = math.sqrt(6 / ((in_channels + out_channels) * kernel_size ** 2))
            weight = model.get_submodule(name).weight
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name


# ------------------------------------------------------------------------------------- pretrained weights

@pytest.fixture(scope='module')
def pretrained():
    """A stand-in for ImageNet's VGG-16, where torch.hub would have put the download; and a base that took it over."""
    with tempfile.TemporaryDirectory() as folder:  # 550 MB, which pytest's tmp_path would keep
        (Path(folder) / 'checkpoints').mkdir()
        torch.manual_seed(1)
        weights = vgg16(weights=None).state_dict()
        for name, bias in weights.items():
            if name.endswith('bias'):
                nn.init.normal_(bias)
        torch.save(weights, Path(folder) / 'checkpoints' / 'vgg16-397923af.pth')
        before = torch.hub.get_dir()
        torch.hub.set_dir(folder)
        try:
            base = VGGBase()
            base.load_pretrained_layers()
        finally:
            torch.hub.set_dir(before)
    return weights, base


def test_the_thirteen_convolutions_of_vgg_are_taken_over_in_order(pretrained):
    weights, base = pretrained
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torchvision's `features`
    names = [name.removeprefix('base.') for name in CONVOLUTIONS if name.startswith('base.')][:13]
    for name, place in zip(names, places, strict=True):
        conv = base.get_submodule(name)
        assert torch.equal(conv.weight, weights[f'features.{place}.weight']), name
        assert torch.equal(conv.bias, weights[f'features.{place}.bias']), name


def test_conv6_is_every_fourth_output_and_every_third_row_and_column_of_fc6(pretrained):
    weights, base = pretrained
    fc6, conv6 = weights['classifier.0.weight'], base.conv6
    for row, column in ((row, column) for row in range(3) for column in range(3)):
        # fc6 sees pool5's map (512, 7, 7) flattened: channel by channel, row by row.
        inputs = [49 * channel + 7 * (3 * row) + 3 * column for channel in range(512)]
        assert torch.equal(conv6.weight[:, :, row, column], fc6[0:4096:4][:, inputs])
    assert torch.equal(conv6.bias, weights['classifier.0.bias'][0:4096:4])


def test_conv7_is_every_fourth_output_and_every_fourth_input_of_fc7(pretrained):
    weights, base = pretrained
    assert torch.equal(base.conv7.weight[:, :, 0, 0], weights['classifier.3.weight'][0:4096:4, 0:4096:4])
    assert torch.equal(base.conv7.bias, weights['classifier.3.bias'][0:4096:4])


def test_taken_over_weights_are_still_trained(pretrained):
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in pretrained[1].parameters())


def test_a_constructor_neither_downloads_nor_reads_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('a constructor asked for weights')

    monkeypatch.setattr('torch.load', refuse)
    monkeypatch.setattr('torch.hub.urlopen', refuse)
    monkeypatch.setattr('torchvision.models.VGG16_Weights.get_state_dict', refuse)
    assert len(SSD300(n_classes=2).state_dict()) == 71
    with pytest.raises(AssertionError, match='asked for weights'):
        VGGBase.load_pretrained_layers(None)


def test_a_failed_download_says_in_one_sentence_what_to_do(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise URLError('no route to host')

    monkeypatch.setattr('torch.hub.urlopen', fail)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('torch.hub._hub_dir', None)
    with pytest.raises(InputError) as error:
        VGGBase.load_pretrained_layers(None)
    message = str(error.value)
    for part in ('no route to host', '--no-pretrained', 'vgg16-397923af.pth', str(tmp_path / 'hub' / 'checkpoints')):
        assert part in message
    assert '\n' not in message


def test_a_fully_connected_layer_is_a_convolution_as_large_as_its_input():
    maps, linear = torch.randn(2, 5, 7, 7), nn.Linear(5 * 7 * 7, 12)
    convolved = F.conv2d(maps, linear.weight.view(12, 5, 7, 7), linear.bias)  # (2, 12, 1, 1)
    torch.testing.assert_close(convolved.flatten(1), linear(maps.flatten(1)), atol=1e-5, rtol=1e-5)


def test_a_decimated_convolution_skips_the_inputs_whose_weights_went():
    weight, maps = torch.randn(8, 5, 7, 7), torch.randn(2, 5, 7, 7)
    thinned = torch.zeros_like(weight)
    thinned[:, :, ::3, ::3] = weight[:, :, ::3, ::3]
    decimated = F.conv2d(maps, decimate(weight, m=(4, None, 3, 3)), dilation=3)  # (2, 2, 1, 1)
    torch.testing.assert_close(decimated, F.conv2d(maps, thinned)[:, ::4], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- priors

def test_there_are_8732_priors_as_the_table_of_feature_maps_has_them(model):
    assert model.priors_cxcy.shape == (8732, 4)
    counts = [grid ** 2 * len(sizes_at_a_position(grid, 1, 1)) for grid, _, _ in SQUARES]
    assert counts == [5776, 2166, 600, 150, 36, 4]
    ends = torch.tensor(counts).cumsum(0).tolist()
    for (grid, _, _), start, end in zip(SQUARES, [0, *ends], ends):
        centers = model.priors_cxcy[start:end, :2]
        assert len(centers.unique(dim=0)) == grid ** 2
        # The first and the last tile of the map.
        torch.testing.assert_close(centers[0], torch.full((2,), 0.5 / grid))
        torch.testing.assert_close(centers[-1], torch.full((2,), 1 - 0.5 / grid))


def test_priors_come_map_by_map_row_by_row_and_position_by_position(model):
    expected = torch.tensor(PRIORS).clamp(max=1)
    torch.testing.assert_close(model.priors_cxcy, expected, atol=1e-6, rtol=0)


def test_priors_at_a_position_are_square_extra_wide_and_high(model):
    w, h = model.priors_cxcy[5776:5782, 2:].unbind(dim=1)  # conv7's first position
    torch.testing.assert_close(w / h, torch.tensor([1, 1, 2, 3, 0.5, 0.333]))
    torch.testing.assert_close(w[:2], torch.tensor([0.2, math.sqrt(0.2 * 0.375)]))
    w, h = model.priors_cxcy[:4, 2:].unbind(dim=1)  # conv4_3's
    torch.testing.assert_close(w / h, torch.tensor([1, 1, 2, 0.5]))
    # conv11_2's only position: the long sides would be 0.9·√2 = 1.27.
    short = 0.9 / math.sqrt(2)
    expected = torch.tensor([[0.9, 0.9], [math.sqrt(0.9), math.sqrt(0.9)], [1, short], [short, 1]])
    torch.testing.assert_close(model.priors_cxcy[-4:, 2:], expected)


def test_the_area_of_a_prior_is_its_scale_squared_unless_it_is_cut(model):
    w, h = model.priors_cxcy[:, 2:].unbind(dim=1)
    squares = [side * side
               for grid, scale, next_scale in SQUARES
               for _ in range(grid ** 2)
               for side in [scale, math.sqrt(scale * next_scale)] + [scale] * (4 if grid in (19, 10, 5) else 2)]
    cut = torch.tensor(PRIORS)[:, 2:].gt(1).any(dim=1)
    torch.testing.assert_close((w * h)[~cut], torch.tensor(squares)[~cut])
    assert (w * h)[cut].lt(torch.tensor(squares)[cut]).all()


def test_20_priors_are_cut_to_the_image_and_2740_overshoot_it(model):
    before = torch.tensor(PRIORS)
    assert (before[:, 2:] > 1).any(dim=1).sum() == 20
    assert model.priors_cxcy[:, 2:].max() == 1
    assert (model.priors_cxcy - before).abs().gt(1e-6).any(dim=1).sum() == 20
    # 1e-6: rounding alone is no overshooting.
    center, half = model.priors_cxcy[:, :2], model.priors_cxcy[:, 2:] / 2
    overshoots = ((center - half < -1e-6) | (center + half > 1 + 1e-6)).any(dim=1)
    assert overshoots.sum() == 2740


def test_priors_move_with_the_network_but_are_not_saved(model):
    assert 'priors_cxcy' not in model.state_dict()
    assert copy.deepcopy(model).to('meta').priors_cxcy.device.type == 'meta'
    assert model.priors_cxcy.device.type == 'cpu'
    assert not model.priors_cxcy.requires_grad


def test_predictions_come_in_the_order_of_the_priors():
    heads, features, expected = PredictionConvolutions(n_classes=3), [], []
    for name, (grid, scale, next_scale) in zip(('conv4_3', 'conv7', 'conv8_2', 'conv9_2', 'conv10_2', 'conv11_2'),
                                               SQUARES):
        # Channel 0 of the map says where we are, row by row; the bias which output channel it is.
        loc, cl = heads.get_submodule(f'loc_{name}'), heads.get_submodule(f'cl_{name}')
        feature = torch.zeros(1, loc.in_channels, grid, grid)
        feature[0, 0] = torch.arange(grid ** 2).view(grid, grid)
        features.append(feature)
        for conv in (loc, cl):
            nn.init.zeros_(conv.weight)
            conv.weight.data[:, 0, 1, 1] = 100
            conv.bias.data = torch.arange(conv.out_channels).float()
        expected += [(100 * (grid * row + column), prior, (column + 0.5) / grid, (row + 0.5) / grid, *size)
                     for row in range(grid)
                     for column in range(grid)
                     for prior, size in enumerate(sizes_at_a_position(grid, scale, next_scale))]
    locs, scores = heads(*features)
    position, prior = torch.tensor([row[:2] for row in expected])[:, :, None].unbind(dim=1)
    assert torch.equal(locs[0], position + 4 * prior + torch.arange(4))
    assert torch.equal(scores[0], position + 3 * prior + torch.arange(3))
    # The very same list is the priors'.
    assert [row[2:] for row in expected] == PRIORS


# ------------------------------------------------------------------------------------------------ forward

@pytest.fixture(scope='module')
def network(model):
    """A network whose biases and rescale factors are as different as if it had been trained."""
    network = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        network.rescale_factors.uniform_(10, 30, generator=generator)
        for name in CONVOLUTIONS:
            network.get_submodule(name).bias.normal_(0, 0.3, generator=generator)
    return network


@pytest.fixture(scope='module')
def passed(network):
    """Two images, what the network made of them, and the shapes and maps on the way."""
    images = torch.randn(2, 3, 300, 300, generator=torch.Generator().manual_seed(2))
    inputs = {}
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
             for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        locs, scores = network(images)
    for hook in hooks:
        hook.remove()
    return images, locs, scores, inputs


def test_the_network_gives_offsets_and_scores_for_each_prior(passed):
    _, locs, scores, _ = passed
    assert locs.shape == (2, 8732, 4)
    assert scores.shape == (2, 8732, 21)
    assert locs.isfinite().all()
    assert scores.isfinite().all()


def test_the_six_feature_maps_have_the_tables_sizes(passed):
    *_, inputs = passed
    sizes = Counter(tuple(feature.shape[1:]) for name, feature in inputs.items() if name.startswith('pred_convs.'))
    assert sizes == {(512, 38, 38): 2, (1024, 19, 19): 2, (512, 10, 10): 2, (256, 5, 5): 2, (256, 3, 3): 2,
                     (256, 1, 1): 2}


def test_pool3_rounds_75_halves_up_to_38_and_pool5_keeps_19(passed):
    *_, inputs = passed
    sides = [inputs[f'base.{name}'].shape[-1] for name in ('conv1_1', 'conv2_1', 'conv3_1', 'conv4_1', 'conv5_1',
                                                           'conv6', 'conv7')]
    assert sides == [300, 150, 75, 38, 19, 19, 19]


def test_conv4_3_is_brought_to_length_1_and_rescaled_for_prediction_alone(network, passed):
    *_, inputs = passed
    with torch.no_grad():
        conv4_3 = F.relu(network.base.conv4_3(inputs['base.conv4_3']))  # (2, 512, 38, 38)
    lengths = conv4_3.pow(2).sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(inputs['pred_convs.loc_conv4_3'], network.rescale_factors * conv4_3 / lengths)
    torch.testing.assert_close(inputs['base.conv5_1'], F.max_pool2d(conv4_3, 2))


def test_a_conv4_3_of_nothing_but_zeros_gives_finite_predictions(model, monkeypatch):
    dead = nn.Parameter(torch.zeros_like(model.base.conv4_3.weight))
    monkeypatch.setitem(model.base.conv4_3._parameters, 'weight', dead)
    with torch.no_grad():
        assert all(prediction.isfinite().all() for prediction in model(torch.ones(1, 3, 300, 300)))


def test_an_image_gets_the_same_predictions_alone_and_in_a_batch(network, passed):
    images, locs, scores, _ = passed
    with torch.no_grad():
        alone_locs, alone_scores = network(images[1:])
    torch.testing.assert_close(alone_locs, locs[1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone_scores, scores[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('shape', [(1, 3, 300, 299), (1, 3, 512, 512), (1, 1, 300, 300), (3, 300, 300), (300, 300)])
def test_images_of_another_shape_are_refused_in_words(model, shape):
    with pytest.raises(ValueError, match=r'\(N, 3, 300, 300\)'):
        model(torch.zeros(shape))


def test_the_network_agrees_with_torchvisions(network, passed):
    images, locs, scores, _ = passed
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21).eval()
    # Their convolutions in the order of their definition: base, auxiliary, all heads for classes, all for boxes.
    convs = [module for module in theirs.modules() if isinstance(module, nn.Conv2d)]
    maps = ('conv4_3', 'conv7', 'conv8_2', 'conv9_2', 'conv10_2', 'conv11_2')
    names = ([name for name in CONVOLUTIONS if not name.startswith('pred_convs.')]
             + [f'pred_convs.cl_{name}' for name in maps] + [f'pred_convs.loc_{name}' for name in maps])
    # Their priors at a position: 1, extra, 2, 1/2, 3, 1/3; ours: 1, extra, 2, 3, 1/2, 1/3.
    swapped = {4: [0, 1, 2, 3], 6: [0, 1, 2, 4, 3, 5]}
    with torch.no_grad():
        theirs.backbone.scale_weight.copy_(network.rescale_factors.flatten())
        for conv, name in zip(convs, names, strict=True):
            ours, order = network.get_submodule(name), torch.arange(conv.out_channels)
            if name.startswith('pred_convs.'):
                n_priors = 4 if name.endswith(('conv4_3', 'conv10_2', 'conv11_2')) else 6
                order = order.view(n_priors, -1)[swapped[n_priors]].flatten()
            conv.weight.copy_(ours.weight[order])
            conv.bias.copy_(ours.bias[order])
        their_predictions = theirs.head(list(theirs.backbone(images[:1]).values()))

    # Where in their list our i-th prior stands.
    place, start = [], 0
    for grid, _, _ in SQUARES:
        n_priors = 6 if grid in (19, 10, 5) else 4
        for position in range(grid ** 2):
            place += [start + position * n_priors + swapped[n_priors][prior] for prior in range(n_priors)]
        start += grid ** 2 * n_priors
    torch.testing.assert_close(their_predictions['bbox_regression'][:, place], locs[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(their_predictions['cls_logits'][:, place], scores[:1], atol=1e-4, rtol=1e-4)


def test_torchvisions_ssd300_as_one_of_ours_detects_the_same_objects():
    # With this seed no two scores are so close that rounding could swap them.
    generator = torch.Generator().manual_seed(5)
    # As many candidates per class as ours, which has no such limit.
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4, score_thresh=0.9, topk_candidates=8732)
    with torch.no_grad():
        theirs.backbone.scale_weight.uniform_(10, 30, generator=generator)
        for name, parameter in theirs.named_parameters():
            if name.startswith('backbone') and parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity='relu', generator=generator)
            elif name.startswith('head'):
                # conv4_3 has values around 1, the other maps, which aren't normalised, a hundred times as much.
                parameter.normal_(0, 0.02 if 'module_list.0' in name else 1e-4, generator=generator)
        images = torch.rand(2, 3, 300, 300, generator=generator)
        expected = theirs.eval()(list(images))
        ours = from_torchvision(theirs.state_dict()).eval()
        locs, scores = ours(normalize(images, ours.image_mean, ours.image_std))
        found = ours.detect_objects(locs, scores, min_score=0.9, max_overlap=0.45, top_k=200)
    assert min(len(theirs_of_image['boxes']) for theirs_of_image in expected) > 5
    for theirs_of_image, boxes, box_labels, box_scores in zip(expected, *found):
        assert torch.equal(box_labels, theirs_of_image['labels'])
        torch.testing.assert_close(box_scores, theirs_of_image['scores'], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(300 * boxes, theirs_of_image['boxes'], atol=0.01, rtol=1e-4)
