"""From the network's output to objects, against suppression of everything by everything."""

import math
import re

import pytest
import torch
from benchmark import ROOT
from conftest import random_boxes
from references import non_maximum_suppression
from torch import nn
from torchvision.ops import nms

from model import SSD300, suppress_duplicates
from utils import cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy


class FewPriors(SSD300):
    """What detection needs of an SSD300, with other priors and without a network."""

    def __init__(self, priors_cxcy):
        nn.Module.__init__(self)
        self.register_buffer('priors_cxcy', priors_cxcy, persistent=False)


def plain_decode(detector, locs, scores):
    """All boxes (N, P, 4) and all classes' scores but the background's (N, P, n_classes − 1)."""
    return cxcy_to_xy(gcxgcy_to_cxcy(locs, detector.priors_cxcy)), scores.softmax(dim=2)[:, :, 1:]


def as_tuples(boxes, labels, scores):
    return list(zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True))


def random_case(seed, n_images=2, n_priors=30, n_classes=4, grid=None):
    """A detector and its predictions; on a grid, many overlaps are exactly equal."""
    generator = torch.Generator().manual_seed(seed)
    center, size = torch.rand(2, n_priors, 2, generator=generator).unbind()
    locs = torch.randn(n_images, n_priors, 4, generator=generator)
    scores = 2 * torch.randn(n_images, n_priors, n_classes, generator=generator)
    if grid:
        priors = torch.cat(((center * grid).floor() / grid, ((size * grid / 2).floor() + 1) / grid), dim=1)
        return FewPriors(priors), torch.zeros_like(locs), scores
    return FewPriors(torch.cat((center, 0.1 + 0.5 * size), dim=1)), locs, scores


@pytest.mark.parametrize('grid', [None, 4])
def test_detection_is_greedy_suppression_class_by_class(grid):
    for seed in range(90):
        detector, locs, scores = random_case(seed, n_images=1 + seed % 3, grid=grid)
        settings = {'min_score': (0.01, 0.25, 0.5)[seed % 3],
                    'max_overlap': (0.45, 0.0, 0.25, 0.5, 1.0)[seed % 5],
                    'top_k': (200, 1, 5, 20)[seed % 4]}
        detections = zip(*detector.detect_objects(locs, scores, **settings), strict=True)
        decoded = zip(*plain_decode(detector, locs, scores), strict=True)
        for detected, (boxes, class_scores) in zip(detections, decoded, strict=True):
            assert as_tuples(*detected) == non_maximum_suppression(boxes.tolist(), class_scores.tolist(), **settings)


def test_the_seven_lines_of_the_tutorial_keep_the_same_boxes():
    lines, = re.findall(r'^def suppress\(.*?^    return kept\n', (ROOT / 'README.md').read_text(encoding='utf-8'),
                        flags=re.DOTALL | re.MULTILINE)
    namespace = {'find_jaccard_overlap': find_jaccard_overlap}
    exec(lines, namespace)
    for seed in range(20):
        boxes, scores = random_boxes(200, seed=seed), torch.rand(200, generator=torch.Generator().manual_seed(seed))
        kept = namespace['suppress'](boxes, scores, 0.3)
        found, _, found_scores = suppress_duplicates(boxes, scores[:, None], 0, 0.3, 200)
        assert len(kept) < 100 and torch.equal(found, boxes[kept]) and torch.equal(found_scores, scores[kept])


def suppress_everything(boxes, class_scores, min_score, max_overlap):
    """What is left of the 400 best candidates of each class, by torchvision's suppression in float64."""
    detections = []
    for label in range(1, class_scores.shape[1] + 1):
        scores, order = class_scores[:, label - 1].sort(descending=True, stable=True)
        best = order[:min(400, int((scores > min_score).sum()))]
        kept = best[nms(boxes[best].double(), class_scores[best, label - 1].double(), max_overlap)]
        detections += [(-class_scores[i, label - 1].item(), label, i.item()) for i in kept]
    return [(boxes[i].tolist(), label, -score) for score, label, i in sorted(detections)]


def test_of_all_candidates_of_an_untrained_network_the_400_best_of_each_class_compete(model):
    generator = torch.Generator().manual_seed(0)
    locs = 0.5 * torch.randn(1, 8732, 4, generator=generator)
    scores = 0.1 * torch.randn(1, 8732, 21, generator=generator)
    boxes, class_scores = (decoded[0] for decoded in plain_decode(model, locs, scores))
    assert (class_scores > 0.01).sum(dim=0).min() > 8000
    expected = suppress_everything(boxes, class_scores, min_score=0.01, max_overlap=0.45)
    assert len(expected) > 5000
    for top_k in (200, 10**6):
        detected = as_tuples(*(tensors[0] for tensors in model.detect_objects(locs, scores, 0.01, 0.45, top_k)))
        assert [score for *_, score in detected] == [score for *_, score in expected[:top_k]]
    assert sorted(detected) == sorted(expected)  # some scores are equal: their order may be another


# ---------------------------------------------------------------------------------------- cases on paper

def detect(boxes, probabilities, min_score=0.01, max_overlap=0.5, top_k=200):
    """Detection where the boxes and the probabilities of the classes, background first, are given."""
    boxes, probabilities = torch.tensor(boxes, dtype=torch.float), torch.tensor(probabilities)
    detector = FewPriors(xy_to_cxcy(boxes))
    found = detector.detect_objects(torch.zeros(1, len(boxes), 4), probabilities.log()[None], min_score, max_overlap,
                                    top_k)
    return tuple(tensors[0] for tensors in found)


APART = [[0, 0, 0.25, 0.25], [0.5, 0, 0.75, 0.25], [0, 0.5, 0.25, 0.75]]


FOUR_FIFTHS = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.4]]  # an overlap of 0.8
HALF = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.25]]  # of exactly 0.5
CHAIN = [[0, 0, 0.5, 0.5], [0, 0.125, 0.5, 0.625], [0, 0.25, 0.5, 0.75]]  # 0.6 with the next, a third with the last


@pytest.mark.parametrize(('boxes', 'probabilities', 'settings', 'expected'), [
    # The better of two overlapping boxes is kept if they are of one class.
    (FOUR_FIFTHS, [[0.4, 0.5, 0.1], [0.3, 0.7, 0]], {'min_score': 0.2}, [(1, 0.7)]),
    (FOUR_FIFTHS, [[0.4, 0.5, 0.1], [0.3, 0, 0.7]], {'min_score': 0.2}, [(2, 0.7), (1, 0.5)]),
    # A suppressed box suppresses no other.
    (CHAIN, [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], {}, [(1, 0.9), (1, 0.7)]),
    # An overlap of exactly max_overlap does not suppress.
    (HALF, [[0.2, 0.8], [0.4, 0.6]], {'max_overlap': 0.5}, [(1, 0.8), (1, 0.6)]),
    (HALF, [[0.2, 0.8], [0.4, 0.6]], {'max_overlap': 0.4999}, [(1, 0.8)]),
    # A score must be greater than min_score. The softmax of equal ones is exactly 0.5.
    (APART[:1], [[0.5, 0.5]], {'min_score': 0.5}, []), (APART[:1], [[0.5, 0.5]], {'min_score': 0.4999}, [(1, 0.5)]),
    # A prior can be an object of several classes but never background.
    (APART[:1], [[0.5, 0.2, 0.3]], {}, [(2, 0.3), (1, 0.2)]), (APART, [[0.99, 0.004, 0.006]] * 3, {}, []),
    # Of equal boxes with equal scores, one stays.
    (APART[:1] * 3, [[0.5, 0.5]] * 3, {}, [(1, 0.5)])])
def test_what_is_kept_worked_out_on_paper(boxes, probabilities, settings, expected):
    found, labels, scores = detect(boxes, probabilities, **settings)
    assert len(found) == len(expected)
    assert list(zip(labels.tolist(), scores.tolist())) == [(label, pytest.approx(score)) for label, score in expected]


def test_an_image_gives_the_same_objects_alone_and_in_a_batch_or_empty_tensors():
    detector, locs, scores = random_case(1, n_images=4)
    scores[1, :, 0] = 100  # nothing but background
    batch = detector.detect_objects(locs, scores, 0.1, 0.45, 20)
    assert all(isinstance(tensors, list) and len(tensors) == 4 for tensors in batch)
    assert [tensors[1].shape for tensors in batch] == [(0, 4), (0,), (0,)]
    for i in range(4):
        alone = detector.detect_objects(locs[i:i + 1], scores[i:i + 1], 0.1, 0.45, 20)
        assert (len(batch[0][i]) == 0) == (i == 1)
        for tensors, (tensor,), dtype in zip(batch, alone, (torch.float, torch.long, torch.float), strict=True):
            torch.testing.assert_close(tensors[i], tensor)
            assert tensor.dtype == dtype


@pytest.mark.parametrize('wild', [200, math.nan, math.inf])  # unlimited, 200 would be exp(40) times as large
def test_a_wild_prediction_of_one_prior_does_not_switch_off_suppression(wild, model):
    locs, scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 21)
    scores[..., 0] = 20  # background
    scores[0, :4, 7] = 40  # four priors of one position, of which the first three overlap by more than 0.45
    scores[0, 4:8, 7] = 39
    expected = model.detect_objects(locs, scores, 0.5, 0.45, 200)
    locs[0, 5000] = wild
    scores[0, 5000, 7] = 30
    scores[0, 6000] = math.nan
    boxes, *_ = model.detect_objects(locs, scores, 0.5, 0.45, 200)
    n = len(expected[0][0])
    assert 0 < n < 8 and torch.equal(boxes[0][:n], expected[0][0])
    assert len(boxes[0]) == n + (wild == 200)  # what isn't a number is no object
