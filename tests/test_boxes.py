"""Forms of boxes and their overlaps."""

import math

import pytest
import torch
from conftest import random_boxes
from references import iou, offsets
from torchvision.ops import box_convert, box_iou

from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_intersection, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy


def test_center_size_coordinates_are_the_middle_and_the_sides():
    torch.testing.assert_close(xy_to_cxcy(torch.tensor([[0.1, 0.2, 0.5, 0.8]])), torch.tensor([[0.3, 0.5, 0.4, 0.6]]))
    torch.testing.assert_close(cxcy_to_xy(torch.tensor([[0.3, 0.5, 0.4, 0.6]])), torch.tensor([[0.1, 0.2, 0.5, 0.8]]))


@pytest.mark.parametrize('shape', [(1000,), (0,), (), (3, 50), (2, 3, 5)])
def test_conversions_agree_with_torchvision_and_bring_the_boxes_back(shape):
    boxes = random_boxes(*shape)
    cxcy = xy_to_cxcy(boxes)
    torch.testing.assert_close(cxcy, box_convert(boxes, 'xyxy', 'cxcywh'))
    torch.testing.assert_close(cxcy_to_xy(cxcy), box_convert(cxcy, 'cxcywh', 'xyxy'))
    torch.testing.assert_close(cxcy_to_xy(cxcy), boxes)


def test_offsets_worked_out_on_paper():
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.6, 0.48, 0.4, 0.2]])
    # Half a prior to the right and a twentieth up, times 10; twice as wide and half as high, times 5.
    expected = torch.tensor([[5, -0.5, 5 * math.log(2), -5 * math.log(2)]])
    torch.testing.assert_close(cxcy_to_gcxgcy(box, prior), expected)
    torch.testing.assert_close(gcxgcy_to_cxcy(expected, prior), box)
    # However wild the prediction, a box is at most 62.5 times its prior.
    wild = gcxgcy_to_cxcy(torch.tensor([[0.0, 0, 1000, 1000]]), prior)
    torch.testing.assert_close(wild[:, 2:], 62.5 * prior[:, 2:])


def test_offsets_agree_with_their_definition_and_decoding_them_gives_the_boxes_back():
    boxes, priors = random_boxes(200), xy_to_cxcy(random_boxes(200, seed=1))
    expected = [offsets(box, prior) for box, prior in zip(boxes.tolist(), priors.tolist())]
    encoded = cxcy_to_gcxgcy(xy_to_cxcy(boxes), priors)
    torch.testing.assert_close(encoded, torch.tensor(expected), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gcxgcy_to_cxcy(encoded, priors), xy_to_cxcy(boxes), atol=1e-5, rtol=1e-5)
    assert cxcy_to_gcxgcy(priors, priors).eq(0).all()  # a prior has no offset from itself


@pytest.mark.parametrize(('a', 'b', 'shared', 'together'), [
    ((0, 0, 4, 4), (2, 2, 6, 6), 4, 28),
    ((0, 0, 4, 4), (1, 1, 2, 3), 2, 16),  # inside
    ((0, 0, 4, 4), (0, 0, 4, 4), 16, 16),  # the same
    ((0, 0, 4, 4), (0, 0, 4, 2), 8, 16),  # half
    ((0, 0, 2, 2), (2, 0, 4, 2), 0, 8),  # side by side
    ((0, 0, 2, 2), (3, 3, 4, 4), 0, 5),  # apart: no product of two negative sides
    ((-3, -3, -1, -1), (-2, -2, 0, 0), 1, 7),
    ((0, 1, 6, 2), (2, 0, 3, 6), 1, 11),  # a cross: no corner of one lies in the other
])
def test_overlaps_worked_out_on_paper(a, b, shared, together):
    a, b = torch.tensor([a, b], dtype=torch.float).split(1)
    assert find_intersection(a, b).item() == find_intersection(b, a).item() == shared
    assert find_jaccard_overlap(a, b).item() == find_jaccard_overlap(b, a).item() == pytest.approx(shared / together)


def test_overlaps_agree_with_torchvision_and_with_the_definition():
    set_1, set_2 = random_boxes(40), random_boxes(60, seed=1)
    overlaps = find_jaccard_overlap(set_1, set_2)
    assert overlaps.shape == (40, 60)
    torch.testing.assert_close(overlaps, box_iou(set_1, set_2))
    torch.testing.assert_close(overlaps, torch.tensor([[iou(a, b) for b in set_2.tolist()] for a in set_1.tolist()]))


def test_overlaps_are_found_image_by_image_and_one_set_of_boxes_serves_a_whole_batch():
    batch, priors = random_boxes(3, 5), random_boxes(7, seed=1)
    overlaps = find_jaccard_overlap(batch, priors)
    assert overlaps.shape == (3, 5, 7)
    for i in range(3):
        torch.testing.assert_close(overlaps[i], box_iou(batch[i], priors))
    torch.testing.assert_close(find_jaccard_overlap(priors, batch), overlaps.transpose(1, 2))


def test_boxes_without_area_overlap_by_0_and_no_boxes_give_an_empty_matrix():
    flat = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.5, 0.2, 0.5, 0.8]])
    assert find_jaccard_overlap(flat, torch.cat((flat, torch.tensor([[0.0, 0.0, 1.0, 1.0]])))).eq(0).all()
    assert find_jaccard_overlap(torch.empty(0, 4), random_boxes(3)).shape == (0, 3)


@pytest.mark.parametrize('function', [xy_to_cxcy, cxcy_to_xy, cxcy_to_gcxgcy, gcxgcy_to_cxcy, find_intersection,
                                      find_jaccard_overlap])
def test_boxes_of_whole_numbers_give_what_the_same_boxes_in_floating_point_give(function):
    boxes = [torch.tensor([[1, 2, 30, 41], [5, 5, 9, 10]]), torch.tensor([[3, 1, 7, 9]])]
    boxes = boxes[:1 if function in (xy_to_cxcy, cxcy_to_xy) else 2]
    torch.testing.assert_close(function(*boxes), function(*map(torch.Tensor.float, boxes)), check_dtype=False)


def test_a_box_that_is_no_number_overlaps_nothing_and_leaves_the_others_alone():
    boxes = random_boxes(3)
    expected = box_iou(boxes, boxes)
    boxes[1, 2] = math.nan
    expected[1] = expected[:, 1] = 0
    torch.testing.assert_close(find_jaccard_overlap(boxes, boxes), expected)
