"""VOC 2007's average precision, against the plain reference and worked out on paper."""

import json
import math
import random
import warnings

import pytest
import torch
from references import average_precision

import eval as evaluation
from utils import calculate_mAP, label_map, rank_detections

# An object and boxes that overlap with it by a known part.
OBJECT = [0, 0, 10, 10]
GOOD, FAIR, HALF, MISS = [0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 5], [20, 20, 30, 30]


def mean_average_precision(detections, objects, n_classes=1):
    """calculate_mAP for lists with a list per image: of (box, label, score), and of (box, label, difficult)."""
    def columns(images, dtypes):
        return [[torch.tensor([row[i] for row in image], dtype=dtype).view(-1, *((4,) if i == 0 else ()))
                 for image in images]
                for i, dtype in enumerate(dtypes)]

    classes = {'background': 0, **{f'class {i}': i for i in range(1, n_classes + 1)}}
    return calculate_mAP(*columns(detections, (torch.float, torch.long, torch.float)),
                         *columns(objects, (torch.float, torch.long, torch.long)), label_map=classes)


def ap(detections, objects):
    """AP of the only class in one image, from (box, score) and (box, difficult)."""
    precisions, mean = mean_average_precision([[(box, 1, score) for box, score in detections]],
                                              [[(box, 1, difficult) for box, difficult in objects]])
    assert precisions == {'class 1': mean}
    return mean


def ranked(outcomes, n_objects):
    """AP of detections by falling score, each 'T' finding an object of its own and each 'F' finding nothing."""
    objects = [([20 * i, 0, 20 * i + 10, 10], 0) for i in range(n_objects)]
    free = iter(objects)
    return ap([(next(free)[0] if outcome == 'T' else [0, 50, 10, 60], 0.9 - i / 100)
               for i, outcome in enumerate(outcomes)], objects)


# ---------------------------------------------------------------------------------------- cases on paper

@pytest.mark.parametrize(('outcomes', 'n_objects', 'eleven'), [
    ('T', 1, [1] * 11),
    ('TTT', 3, [1] * 11),
    ('F', 1, [0] * 11),
    ('', 1, [0] * 11),
    # Precision 1 up to recall 1/3, 2/3 up to 2/3, then nothing.
    ('TFT', 3, [1] * 4 + [2 / 3] * 3 + [0] * 4),
    ('FT', 1, [1 / 2] * 11),
    ('TF', 1, [1] * 11),  # what comes after the last object costs nothing
    # A precision counts for lower recalls, too, if it is higher than theirs, here 1/2 and 2/3, and 1/2.
    ('FTTT', 3, [3 / 4] * 11),
    ('TFFTT', 3, [1] * 4 + [3 / 5] * 7),
    # A recall of exactly 3/10 reaches 0.3, one of 7/10 reaches 0.7; but 3 · 0.1 > 0.3 in floating point.
    ('TTT', 10, [1] * 4 + [0] * 7),
    ('T' * 6, 10, [1] * 7 + [0] * 4),
    ('T' * 7, 10, [1] * 8 + [0] * 3),
    ('TTTFFF', 30, [1] * 2 + [0] * 9),
    ('T' * 21, 30, [1] * 8 + [0] * 3),
])
def test_eleven_points_worked_out_on_paper(outcomes, n_objects, eleven):
    assert ranked(outcomes, n_objects) == pytest.approx(sum(eleven) / 11)


def test_a_second_detection_of_an_object_is_false():
    detections = [(GOOD, 0.9), (OBJECT, 0.8), (MISS, 0.7)]
    assert ap(detections, [(OBJECT, 0), (MISS, 0)]) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_of_several_detections_of_an_object_the_best_scored_is_true_however_little_it_overlaps():
    # The other order, by overlap, would cost precision.
    assert ap([(FAIR, 0.9), (OBJECT, 0.8)], [(OBJECT, 0)]) == 1


def test_an_overlap_of_exactly_a_half_finds_nothing():
    assert ap([(HALF, 0.9)], [(OBJECT, 0)]) == 0
    assert ap([([0, 0, 10, 5.001], 0.9)], [(OBJECT, 0)]) == 1


def test_a_detection_finds_only_the_object_that_it_overlaps_most():
    # The second detection overlaps with both objects by more than a half, most with the one already found.
    objects = [([0, 0, 10, 10], 0), ([0, 1, 10, 11], 0)]
    assert ap([([0, 0, 10, 10], 0.9), ([0, 0, 10, 10], 0.8)], objects) == pytest.approx(6 / 11)
    assert ap([([0, 0, 10, 10], 0.9), ([0, 1, 10, 11], 0.8)], objects) == 1


def test_an_object_of_another_class_is_not_found():
    precisions, mean = mean_average_precision([[(OBJECT, 2, 0.9)]], [[(OBJECT, 1, 0), (MISS, 2, 0)]], n_classes=2)
    assert precisions == {'class 1': 0, 'class 2': 0}
    assert mean == 0


def test_an_object_of_another_class_does_not_hide_one_of_the_right_class():
    precisions, _ = mean_average_precision([[(OBJECT, 2, 0.9)]], [[(OBJECT, 1, 0), (FAIR, 2, 0)]], n_classes=2)
    assert precisions == {'class 1': 0, 'class 2': 1}


def test_an_object_in_another_image_is_not_found():
    _, mean = mean_average_precision([[(OBJECT, 1, 0.9)], []], [[], [(OBJECT, 1, 0)]])
    assert mean == 0
    _, mean = mean_average_precision([[], [(OBJECT, 1, 0.9)]], [[], [(OBJECT, 1, 0)]])
    assert mean == 1


def test_a_detection_of_a_difficult_object_counts_neither_way():
    easy, difficult = (OBJECT, 0), (MISS, 1)
    # However many there are of it, and though it has the better score.
    assert ap([(MISS, 0.9), (MISS, 0.85), (OBJECT, 0.8)], [easy, difficult]) == 1
    # Nor is a difficult object missed.
    assert ap([(OBJECT, 0.8)], [easy, difficult]) == 1
    # A false detection in its place would cost half of the precision.
    assert ap([(MISS, 0.9), (OBJECT, 0.8)], [easy]) == pytest.approx(1 / 2)


def test_detections_of_all_images_are_ranked_together():
    objects = [[(OBJECT, 1, 0)], [(OBJECT, 1, 0)]]
    _, mean = mean_average_precision([[(OBJECT, 1, 0.3), (MISS, 1, 0.2)], [(OBJECT, 1, 0.9)]], objects)
    assert mean == 1
    _, mean = mean_average_precision([[(OBJECT, 1, 0.3), (MISS, 1, 0.5)], [(OBJECT, 1, 0.9)]], objects)
    assert mean == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_perfect_detections_have_a_mean_of_1_over_all_classes():
    objects = [[(OBJECT, 1 + i % 3, 0), (MISS, 1 + (i + 1) % 3, 0)] for i in range(6)]
    detections = [[(box, label, 1 - i / 10) for box, label, _ in image] for i, image in enumerate(objects)]
    precisions, mean = mean_average_precision(detections, objects, n_classes=3)
    assert precisions == {'class 1': 1, 'class 2': 1, 'class 3': 1}
    assert mean == 1


def test_no_detections_at_all_have_a_mean_of_0():
    assert mean_average_precision([[], []], [[(OBJECT, 1, 0)], []]) == ({'class 1': 0}, 0)


def test_a_class_without_objects_is_nan_named_in_a_warning_and_left_out_of_the_mean():
    detections = [[(OBJECT, 1, 0.9), (OBJECT, 2, 0.9), (OBJECT, 3, 0.9)]]
    objects = [[(OBJECT, 1, 0), (MISS, 2, 0), (OBJECT, 4, 1)]]  # class 4 has but a difficult one
    with pytest.warns(UserWarning, match='class 3, class 4'):
        precisions, mean = mean_average_precision(detections, objects, n_classes=4)
    assert (precisions['class 1'], precisions['class 2']) == (1, 0)
    assert math.isnan(precisions['class 3'])
    assert math.isnan(precisions['class 4'])
    assert mean == pytest.approx(1 / 2)


def test_there_is_no_warning_if_every_class_has_objects():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mean_average_precision([[(OBJECT, 1, 0.9)]], [[(OBJECT, 1, 0), (OBJECT, 2, 0)]], n_classes=2)


@pytest.mark.parametrize(('detections', 'objects'), [
    ([[]], [[]]),
    ([[(OBJECT, 1, 0.9)], []], [[], []]),
    ([[(OBJECT, 1, 0.9)]], [[(OBJECT, 1, 1)]]),  # a difficult one alone
])
def test_without_any_object_to_be_found_the_mean_is_nan(detections, objects):
    with pytest.warns(UserWarning, match='class 1'):
        precisions, mean = mean_average_precision(detections, objects)
    assert math.isnan(precisions['class 1'])
    assert math.isnan(mean)


def test_the_labels_are_vocs_unless_others_are_given():
    boxes, labels = [torch.tensor([OBJECT] * 20).float()], [torch.arange(1, 21)]
    arguments = boxes, labels, [torch.full((20,), 0.5)], boxes, labels, [torch.zeros(20)]
    precisions, mean = calculate_mAP(*arguments)
    assert list(precisions) == list(label_map)[1:]
    assert set(precisions.values()) == {mean} == {1}


@pytest.mark.parametrize('dtype', [torch.uint8, torch.bool, torch.long, torch.float])
def test_difficulties_may_be_of_any_type(dtype):
    boxes, labels = [torch.tensor([OBJECT, MISS]).float()], [torch.tensor([1, 1])]
    _, mean = calculate_mAP([boxes[0][:1]], [labels[0][:1]], [torch.tensor([0.5])], boxes, labels,
                            [torch.tensor([0, 1]).to(dtype)], label_map={'background': 0, 'thing': 1})
    assert mean == 1


# ------------------------------------------------------------------------------------------------- reports

def test_the_report_tells_what_was_worked_out_on_paper():
    # Four cats in one picture. By score: found, nothing there, found, found; the fourth cat is missed.
    cats = torch.tensor([[0.0, 0.0, 0.2, 0.2], [0.3, 0.0, 0.5, 0.2], [0.6, 0.0, 0.8, 0.2], [0.0, 0.5, 0.2, 0.7]])
    boxes = torch.stack((cats[0], torch.tensor([0.7, 0.7, 0.9, 0.9]), cats[1], cats[2]))
    ranked = rank_detections([boxes], [torch.tensor([1, 1, 1, 1])], [torch.tensor([0.9, 0.8, 0.7, 0.5])],
                             [cats], [torch.tensor([1, 1, 1, 1])], [torch.zeros(4)], {'background': 0, 'cat': 1})
    row = evaluation.make_report(ranked, 0.6)['classes']['cat']
    assert row['objects'] == 4
    assert row['precision'] == pytest.approx(2 / 3) and row['recall'] == pytest.approx(2 / 4)  # above 0.6: T F T
    assert row['AP_area'] == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
    # Recall 0, 0.1, 0.2: precision 1; 0.3 to 0.7: 3/4; 0.8 to 1: never reached.
    assert row['AP'] == pytest.approx((3 * 1 + 5 * 3 / 4) / 11)


def test_a_report_warns_of_classes_without_objects():
    cat = [torch.rand(1, 4)], [torch.tensor([1])]
    with pytest.warns(UserWarning, match='no objects to be found of dog:'):
        rank_detections(*cat, [torch.rand(1)], *cat, [torch.zeros(1)], {'background': 0, 'cat': 1, 'dog': 2})


def test_a_class_without_detections_has_no_precision_and_its_report_is_json():
    empty = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
    ranked = rank_detections(*empty, [torch.rand(1, 4)], [torch.tensor([1])], [torch.zeros(1)], {'bg': 0, 'cat': 1})
    row = evaluation.make_report(ranked, 0.6)['classes']['cat']
    assert row['AP'] == row['AP_area'] == row['recall'] == 0 and math.isnan(row['precision'])
    assert json.loads(json.dumps(evaluation.without_nan(row), allow_nan=False))['precision'] is None


# ------------------------------------------------------------------------------------------ random cases

def random_case(seed, n_classes=3):
    """Few images with few objects, and detections near them; whole coordinates and tenths of a score, so that many
    overlaps and scores are exactly equal."""
    rng = random.Random(seed)

    def box():
        x, y = rng.randint(0, 6), rng.randint(0, 6)
        return [x, y, x + rng.randint(1, 6), y + rng.randint(1, 6)]

    # Some classes may have no objects, some images may have neither objects nor detections.
    classes = rng.sample(range(1, n_classes + 1), rng.randint(1, n_classes))
    objects = [[(box(), rng.choice(classes), int(rng.random() < 0.3)) for _ in range(rng.choice((0, 1, 2, 5)))]
               for _ in range(rng.randint(1, 4))]
    detections = []
    for image in objects:
        detections.append([])
        for _ in range(rng.choice((0, 1, 3, 8, 12))):
            found, label = box(), rng.randint(1, n_classes)
            if image and rng.random() < 0.8:
                found, label, _ = rng.choice(image)
                if rng.random() < 0.5:
                    found = [found[0], found[1], found[2] + rng.randint(0, 2), found[3] + rng.randint(0, 2)]
            detections[-1].append((found, label, rng.randint(1, 9) / 10))
    return detections, objects


@pytest.mark.filterwarnings('ignore:no objects to be found')
@pytest.mark.parametrize('seeds', [range(start, start + 500) for start in range(0, 2500, 500)])
def test_average_precision_agrees_with_its_definition(seeds):
    for seed in seeds:
        detections, objects = random_case(seed)
        precisions, mean = mean_average_precision(detections, objects, n_classes=3)
        expected = [average_precision([(i, score, box)
                                       for i, image in enumerate(detections)
                                       for box, detected_label, score in image if detected_label == label],
                                      [(i, box, difficult)
                                       for i, image in enumerate(objects)
                                       for box, object_label, difficult in image if object_label == label])
                    for label in (1, 2, 3)]
        assert list(precisions.values()) == pytest.approx(expected, nan_ok=True), seed
        present = [value for value in expected if not math.isnan(value)]
        assert mean == pytest.approx(sum(present) / len(present) if present else math.nan, nan_ok=True), seed


def test_nothing_of_the_caller_is_changed():
    tensors = [torch.tensor([OBJECT, MISS]).float(), torch.tensor([1, 2]), torch.tensor([0.3, 0.8]),
               torch.tensor([MISS, OBJECT]).float(), torch.tensor([2, 1]), torch.tensor([0, 1])]
    copies = [tensor.clone() for tensor in tensors]
    with pytest.warns(UserWarning):
        calculate_mAP(*[[tensor] for tensor in tensors])
    for tensor, copied in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copied)
