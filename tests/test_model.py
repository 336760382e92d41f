"""The network: its weights, its priors and what it computes."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from references import ssd300
from torch import nn
from torchvision.models import VGG16_Weights, vgg16

from model import FEATURE_MAPS, SSD300, PredictionConvolutions, VGGBase
from utils import decimate

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


def literal_priors():
    """The text's rules, one after the other, without the cap at 1: [c_x, c_y, w, h] of 8732 priors."""
    grids = {'conv4_3': 38, 'conv7': 19, 'conv8_2': 10, 'conv9_2': 5, 'conv10_2': 3, 'conv11_2': 1}
    scales = {'conv4_3': 0.1, 'conv7': 0.2, 'conv8_2': 0.375, 'conv9_2': 0.55, 'conv10_2': 0.725, 'conv11_2': 0.9}
    aspect_ratios = {name: [1., 2., 0.5] for name in grids}
    for name in ('conv7', 'conv8_2', 'conv9_2'):
        aspect_ratios[name] = [1., 2., 3., 0.5, .333]
    names, priors = list(grids), []
    for k in range(6):
        for i in range(grids[names[k]]):
            for j in range(grids[names[k]]):
                center = [(j + 0.5) / grids[names[k]], (i + 0.5) / grids[names[k]]]
                for ratio in aspect_ratios[names[k]]:
                    scale = scales[names[k]]
                    priors.append([*center, scale * math.sqrt(ratio), scale / math.sqrt(ratio)])
                    if ratio == 1.:
                        # The last map has no next one: there, the published weights have a prior of 1.0 × 1.0.
                        extra = 1.0 if k == 5 else math.sqrt(scale * scales[names[k + 1]])
                        priors.append([*center, extra, extra])
    return torch.tensor(priors)


# ------------------------------------------------------------------------------------------------ weights

def test_the_state_dict_has_71_tensors_under_the_names_of_the_published_weights(model):
    expected = {'rescale_factors': (1, 512, 1, 1)}
    for name, (out_channels, in_channels, kernel_size) in CONVOLUTIONS.items():
        expected[f'{name}.weight'] = (out_channels, in_channels, kernel_size, kernel_size)
        expected[f'{name}.bias'] = (out_channels,)
    assert len(expected) == 71
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert {name for name, _ in model.named_parameters()} == expected.keys()


def test_base_starts_from_he_the_rest_from_xavier_biases_from_0_and_rescale_factors_from_20(model):
    assert model.rescale_factors.eq(20).all()
    for name, (out_channels, in_channels, kernel_size) in CONVOLUTIONS.items():
        weight = model.get_submodule(name).weight
        assert model.get_submodule(name).bias.eq(0).all(), name
        if name.startswith('base.'):
            std = math.sqrt(2 / (in_channels * kernel_size ** 2))
            assert weight.std().item() == pytest.approx(std, rel=0.06), name  # conv1_1 has but 1728 values
            assert weight.abs().max() > 2.5 * std, name  # normal: a uniform distribution ends at √3 of it
        else:
            bound = math.sqrt(6 / ((in_channels + out_channels) * kernel_size ** 2))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name


# ------------------------------------------------------------------------------------- pretrained weights

@pytest.fixture(scope='module')
def pretrained():
    """A stand-in for ImageNet's VGG-16, and a base that loaded it."""
    with torch.device('meta'):
        shapes = {name: tensor.shape for name, tensor in vgg16(weights=None).state_dict().items()}
    torch.manual_seed(1)  # a random number for each output channel, plus one for each place within it
    weights = {name: torch.rand(shape[0], *[1] * len(shape[1:])) + torch.rand(shape[1:])
               for name, shape in shapes.items()}
    with pytest.MonkeyPatch.context() as context:
        context.setattr('model.download_weights', {VGG16_Weights.IMAGENET1K_V1: weights}.get)
        base = VGGBase()
        base.load_pretrained_layers()
    return weights, base


def test_the_thirteen_convolutions_of_vgg_are_loaded_in_order_and_all_are_still_trained(pretrained):
    weights, base = pretrained
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions in torchvision's `features`
    names = [name.removeprefix('base.') for name in CONVOLUTIONS if name.startswith('base.')][:13]
    for name, place in zip(names, places, strict=True):
        conv = base.get_submodule(name)
        assert torch.equal(conv.weight, weights[f'features.{place}.weight']), name
        assert torch.equal(conv.bias, weights[f'features.{place}.bias']), name
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in base.parameters())


def test_conv6_and_conv7_are_every_fourth_output_and_the_right_inputs_of_fc6_and_fc7(pretrained):
    weights, base = pretrained
    fc6, fc7 = weights['classifier.0.weight'], weights['classifier.3.weight']
    for row, column in ((row, column) for row in range(3) for column in range(3)):
        # Every third row and column. fc6 sees pool5's map (512, 7, 7) channel by channel, row by row.
        inputs = [49 * channel + 7 * (3 * row) + 3 * column for channel in range(512)]
        assert torch.equal(base.conv6.weight[:, :, row, column], fc6[0:4096:4][:, inputs])
    assert torch.equal(base.conv6.bias, weights['classifier.0.bias'][0:4096:4])
    assert torch.equal(base.conv7.weight[:, :, 0, 0], fc7[0:4096:4, 0:4096:4])
    assert torch.equal(base.conv7.bias, weights['classifier.3.bias'][0:4096:4])


def test_a_decimated_convolution_skips_the_inputs_whose_weights_went():
    weight, maps = torch.randn(8, 5, 7, 7), torch.randn(2, 5, 7, 7)
    thinned = torch.zeros_like(weight)
    thinned[:, :, ::3, ::3] = weight[:, :, ::3, ::3]
    decimated = F.conv2d(maps, decimate(weight, m=(4, None, 3, 3)), dilation=3)  # (2, 2, 1, 1)
    torch.testing.assert_close(decimated, F.conv2d(maps, thinned)[:, ::4], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- priors

def test_the_8732_priors_are_exactly_those_of_the_texts_rules(model):
    assert model.priors_cxcy.shape == (8732, 4)
    expected = literal_priors()
    assert (expected[:, 2:] > 1).any(dim=1).sum() == 20
    expected[:, 2:] = expected[:, 2:].clamp(max=1)
    assert torch.equal(model.priors_cxcy, expected)
    assert model.priors_cxcy[8729].tolist() == [0.5, 0.5, 1, 1]


def test_the_first_ratio_of_a_map_counts_and_comes_before_the_extra_prior(monkeypatch):
    changed = FEATURE_MAPS[3]._replace(ratios=(4, 0.25))  # conv9_2, of scale 0.55
    monkeypatch.setattr('model.FEATURE_MAPS', (*FEATURE_MAPS[:3], changed, *FEATURE_MAPS[4:]))
    first, extra, last = SSD300.create_prior_boxes()[8542:8545, 2:].tolist()
    assert first == [1, pytest.approx(0.275)] and last == [pytest.approx(0.275), 1]  # 1.1 is capped
    assert extra == pytest.approx([math.sqrt(0.55 * 0.725)] * 2)


def test_predictions_come_in_the_order_of_the_priors():
    heads, features, rows = PredictionConvolutions(n_classes=3), [], []
    for feature_map in FEATURE_MAPS:
        # Channel 0 of the map says where we are, row by row; the bias which output channel it is.
        feature = torch.zeros(1, feature_map.channels, feature_map.grid, feature_map.grid)
        feature[0, 0] = torch.arange(feature_map.grid ** 2).view(feature_map.grid, feature_map.grid)
        features.append(feature)
        for kind in ('loc', 'cl'):
            conv = heads.get_submodule(f'{kind}_{feature_map.name}')
            nn.init.zeros_(conv.weight)
            conv.weight.data[:, 0, 1, 1] = 100
            conv.bias.data = torch.arange(conv.out_channels).float()
        rows += [(100 * position, prior) for position in range(feature_map.grid ** 2)
                 for prior in range(feature_map.n_priors)]
    locs, scores = heads(*features)
    position, prior = torch.tensor(rows)[:, :, None].unbind(dim=1)  # (8732, 1) each
    assert torch.equal(locs[0], position + 4 * prior + torch.arange(4))
    assert torch.equal(scores[0], position + 3 * prior + torch.arange(3))


# ------------------------------------------------------------------------------------------------ forward

def test_the_network_computes_what_its_weights_say_layer_by_layer_for_each_image_of_a_batch_alone(model):
    network, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 300, 300, generator=generator)
    with torch.no_grad():
        network.rescale_factors.uniform_(10, 30, generator=generator)  # as different as if they had been trained
        for name in CONVOLUTIONS:
            network.get_submodule(name).bias.normal_(0, 0.3, generator=generator)
        predictions = network(images)
        expected = ssd300(network.state_dict(), images[1:], n_classes=21)
    assert expected[0].shape == (1, 8732, 4) and expected[1].shape == (1, 8732, 21)
    for ours, theirs in zip(predictions, expected):
        torch.testing.assert_close(ours[1:], theirs, atol=1e-3, rtol=1e-3)


def test_a_batch_without_images_gives_empty_predictions_and_detections(model):
    with torch.no_grad():
        locs, scores = model(torch.zeros(0, 3, 300, 300))
    assert locs.shape == (0, 8732, 4) and scores.shape == (0, 8732, 21)
    assert model.detect_objects(locs, scores, 0.01, 0.45, 200) == ([], [], [])


def test_a_conv4_3_of_nothing_but_zeros_gives_finite_predictions(model, monkeypatch):
    monkeypatch.setattr(model.base, 'forward', lambda _: (torch.zeros(1, 512, 38, 38), torch.ones(1, 1024, 19, 19)))
    with torch.no_grad():
        assert all(prediction.isfinite().all() for prediction in model(torch.ones(1, 3, 300, 300)))


@pytest.mark.parametrize('shape', [(1, 3, 300, 299), (1, 1, 300, 300), (3, 300, 300)])
def test_images_of_another_shape_are_refused_in_words(model, shape):
    with pytest.raises(ValueError, match=r'\(N, 3, 300, 300\)'):
        model(torch.zeros(shape))
