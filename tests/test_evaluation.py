"""Average precision against the plain reference and worked out on paper; reports, result files, several processes."""

import json
import math
import random
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import make_voc, run_script
from PIL import Image
from references import area, devkit_average_precision, eleven_points, precision_recall

import eval as evaluation
from datasets import PascalVOCDataset
from eval import draw_plots
from utils import calculate_mAP, create_data_lists, rank_detections, voc_labels

# An object, and boxes that overlap with it by a known part.
OBJECT, FAIR, HALF, MISS = [0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [20, 20, 30, 30]


def arguments(detections, objects, n_classes=1):
    """Those of calculate_mAP, from a list per image of (box, label, score), and one of (box, label, difficult)."""
    def columns(images, dtypes):
        return [[torch.tensor([row[i] for row in image], dtype=dtype).view(-1, *(4,) * (i == 0)) for image in images]
                for i, dtype in enumerate(dtypes)]

    classes = {'background': 0, **{f'class {i}': i for i in range(1, n_classes + 1)}}
    return (*columns(detections, (torch.float, torch.long, torch.float)),
            *columns(objects, (torch.float, torch.long, torch.long)), classes)


def report(detections, objects, report_threshold=0.5):
    """The report's row of the only class in one image, from (box, score) and (box, difficult)."""
    ranked = rank_detections(*arguments([[(box, 1, score) for box, score in detections]],
                                        [[(box, 1, difficult) for box, difficult in objects]]), evaluation.OVERLAPS)
    return evaluation.make_report(ranked, report_threshold)['classes']['class 1']


# ---------------------------------------------------------------------------------------- cases on paper

@pytest.mark.parametrize(('outcomes', 'n_objects', 'eleven'), [
    ('T', 1, [1] * 11), ('TTT', 3, [1] * 11), ('F', 1, [0] * 11), ('', 1, [0] * 11), ('FT', 1, [1 / 2] * 11),
    ('TF', 1, [1] * 11),  # what comes after the last object costs nothing
    # Precision 1 up to recall 1/3, 2/3 up to 2/3, then nothing.
    ('TFT', 3, [1] * 4 + [2 / 3] * 3 + [0] * 4),
    # A precision counts for lower recalls, too, if it is higher than theirs, here 1/2 and 2/3, and 1/2.
    ('FTTT', 3, [3 / 4] * 11), ('TFFTT', 3, [1] * 4 + [3 / 5] * 7),
    # A recall of exactly 3/10 reaches 0.3, one of 7/10 reaches 0.7; but 3 · 0.1 > 0.3 in floating point.
    ('TTT', 10, [1] * 4 + [0] * 7), ('T' * 6, 10, [1] * 7 + [0] * 4), ('T' * 7, 10, [1] * 8 + [0] * 3),
    ('TTTFFF', 30, [1] * 2 + [0] * 9), ('T' * 21, 30, [1] * 8 + [0] * 3),
])
def test_eleven_points_worked_out_on_paper(outcomes, n_objects, eleven):
    # Highest score first: each 'T' finds an object of its own and each 'F' finds nothing.
    objects = [([20 * i, 0, 20 * i + 10, 10], 0) for i in range(n_objects)]
    free = iter(objects)
    detections = [(next(free)[0] if outcome == 'T' else [0, 50, 10, 60], 0.9 - i / 100)
                  for i, outcome in enumerate(outcomes)]
    assert report(detections, objects)['AP'] == pytest.approx(sum(eleven) / 11)


@pytest.mark.parametrize(('detections', 'objects', 'expected'), [
    # Of several detections of an object the best scored alone is true, however little it overlaps.
    ([(FAIR, 0.9), (OBJECT, 0.8), (MISS, 0.7)], [(OBJECT, 0), (MISS, 0)], (6 + 5 * 2 / 3) / 11),
    ([(FAIR, 0.9), (OBJECT, 0.8)], [(OBJECT, 0)], 1),
    # An overlap of exactly a half finds nothing.
    ([(HALF, 0.9)], [(OBJECT, 0)], 0), ([([0, 0, 10, 5.001], 0.9)], [(OBJECT, 0)], 1),
    # The second one overlaps with both objects by more than a half, most with the one already found.
    ([(OBJECT, 0.9), (OBJECT, 0.8)], [(OBJECT, 0), ([0, 1, 10, 11], 0)], 6 / 11),
    # Detections of a difficult object count neither way, however many there are, though they have the better score.
    ([(MISS, 0.9), (MISS, 0.85), (OBJECT, 0.8)], [(OBJECT, 0), (MISS, 1)], 1),
    ([(OBJECT, 0.8)], [(OBJECT, 0), (MISS, 1)], 1),  # nor is it missed
    ([(MISS, 0.9), (OBJECT, 0.8)], [(OBJECT, 0)], 1 / 2),  # as a false detection would cost
])
def test_true_and_false_detections_of_a_class_worked_out_on_paper(detections, objects, expected):
    assert report(detections, objects)['AP'] == pytest.approx(expected)


def test_a_class_without_objects_is_nan_named_in_a_warning_and_left_out_of_the_mean():
    detections = [[(OBJECT, 1, 0.9), (OBJECT, 2, 0.9), (OBJECT, 3, 0.9)]]
    objects = [[(OBJECT, 1, 0), (MISS, 2, 0), (OBJECT, 4, 1)]]  # class 4 has only a difficult one
    with pytest.warns(UserWarning, match='class 3, class 4'):
        precisions, mean = calculate_mAP(*arguments(detections, objects, n_classes=4))
    assert list(precisions.values()) == pytest.approx([1, 0, math.nan, math.nan], nan_ok=True)
    assert mean == pytest.approx(1 / 2)
    with pytest.warns(UserWarning, match='class 1'):  # nothing to find at all
        assert math.isnan(calculate_mAP(*arguments([[(OBJECT, 1, 0.9)], []], [[(OBJECT, 1, 1)], []]))[1])


# --------------------------------------------------------------------------------------- reports and curves

def test_the_report_shows_what_was_worked_out_on_paper():
    # Four cats. By score: found, nothing there, found, found; the fourth cat is missed.
    cats = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    detections = [(cats[0], 0.9), ([0, 50, 10, 60], 0.8), (cats[1], 0.7), (cats[2], 0.5)]
    row = report(detections, [(cat, 0) for cat in cats], report_threshold=0.6)
    assert row['objects'] == 4 and row['recall'] == 2 / 4 and row['precision'] == pytest.approx(2 / 3)  # T F T
    assert row['AP_area'] == row['AP_50_95'] == pytest.approx((1 + 3 / 4 + 3 / 4) / 4)
    # Recall 0, 0.1, 0.2: precision 1; 0.3 to 0.7: 3/4; 0.8 to 1: never reached.
    assert row['AP'] == pytest.approx((3 * 1 + 5 * 3 / 4) / 11)
    row = report([], [(OBJECT, 0)])  # without detections, there is no precision
    assert row['AP'] == row['AP_area'] == row['AP_50_95'] == row['recall'] == 0 and math.isnan(row['precision'])
    assert json.loads(json.dumps(evaluation.without_nan(row), allow_nan=False))['precision'] is None


def test_curves_are_drawn_where_matplotlib_is_installed_without_points_that_are_not_known(tmp_path, monkeypatch):
    figure = pytest.importorskip('matplotlib.figure')
    drawn = []
    monkeypatch.setattr(figure.Figure, 'add_subplot', lambda _, *place, title: drawn.append((title, place)) or axes)
    axes = Mock()
    plots = {'loss': {'sum': ([1, 2, 3], [5.0, 4.0, 3.0]), 'part': ([1, 2], [1.0, 1.0])},
             'mAP': {'': ([1, 2, 3], [None, 0.5, None])}}
    draw_plots(tmp_path / 'curves.png', plots)
    assert drawn == [('loss', (1, 2, 1)), ('mAP', (1, 2, 2))]
    assert [call.args[:2] for call in axes.plot.call_args_list] == [([1, 2, 3], [5.0, 4.0, 3.0]), ([1, 2], [1.0, 1.0]),
                                                                    ([2], [0.5])]
    monkeypatch.undo()
    draw_plots(tmp_path / 'curves.png', plots)
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)  # importing it fails
    draw_plots(tmp_path / 'none.png', plots)
    assert not (tmp_path / 'none.png').exists()


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
                found = [*found[:2], found[2] + rng.choice((0, 0, 1, 2)), found[3] + rng.choice((0, 0, 1, 2))]
            detections[-1].append((found, label, rng.randint(1, 9) / 10))
    return detections, objects


@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_average_precision_agrees_with_its_definition():
    for seed in range(200):
        detections, objects = random_case(seed)
        precisions, mean = calculate_mAP(*arguments(detections, objects, n_classes=3))
        images = range(len(objects))
        by_class = [([(i, score, box) for i in images for box, found, score in detections[i] if found == label],
                     [(i, box, difficult) for i in images for box, true, difficult in objects[i] if true == label])
                    for label in (1, 2, 3)]
        expected = [eleven_points(precision_recall(*pair)) for pair in by_class]
        assert list(precisions.values()) == pytest.approx(expected, nan_ok=True), seed
        present = [value for value in expected if not math.isnan(value)] or [math.nan]
        assert mean == pytest.approx(sum(present) / len(present), nan_ok=True), seed
        ranked = rank_detections(*arguments(detections, objects, 3), evaluation.OVERLAPS)
        for row, pair in zip(evaluation.make_report(ranked, 0.5)['classes'].values(), by_class):
            areas = [area(precision_recall(*pair, lambda highest, least=least: highest > least))
                     for least in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
            assert [row['AP_area'], row['AP_50_95']] == pytest.approx([areas[0], sum(areas) / 10], nan_ok=True), seed


# --------------------------------------------------------------- several processes, training, result files

SIZES = (300, 200), (320, 410), (500, 375), (240, 240), (411, 307)


def make_objects():
    """{name: [(label, box in pixels counted from 1, difficult)]} for pictures of SIZES. The last box of the first three
    reaches from edge to edge."""
    rng, pictures = random.Random(0), {}
    for number, (width, height) in enumerate(SIZES):
        boxes = [(left, rng.randint(1, 9), left + rng.randint(60, 100), rng.randint(70, 99))
                 for left in range(1, width - 120, 120)] + [(1, 1, width, height)] * (number < 3)
        pictures[f'{number:06}'] = [(rng.choice(('cat', 'dog')), box, int(rng.random() < 0.3)) for box in boxes]
    return pictures


@pytest.fixture(scope='module')
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp('evaluation')
    pictures = {name: (Image.new('RGB', size, f'hsl({sum(size)}, 80%, 50%)'), objects)
                for size, (name, objects) in zip(SIZES, make_objects().items())}
    voc = make_voc(folder / 'voc', {'a': [('cat', (1, 1, 30, 30), 0)]})  # for training
    create_data_lists(make_voc(voc, pictures, 'test'), None, folder / 'lists')
    return folder / 'lists'


@pytest.fixture(scope='module')
def dataset(lists):
    return PascalVOCDataset(lists, 'TEST', keep_difficult=True, augment=False)


def read_results(folder, label):
    return (folder / f'comp4_det_test_{label}.txt').read_text().splitlines()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_two_processes_write_the_very_files_of_one(lists, untrained_checkpoint, tmp_path, one_thread, monkeypatch):
    settings = {'data_folder': lists, 'checkpoint': untrained_checkpoint, 'workers': 0, 'batch_size': 2,
                'output_folder': tmp_path / 'two'}
    two = run_script('eval.py', '--save_results', *(word for name, value in settings.items()
                                                    for word in (f'--{name}', value)), n_processes=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count('mAP of 5 pictures') == 1  # the first process alone reports
    for name, value in (settings | {'output_folder': tmp_path / 'one', 'save_results': True}).items():
        monkeypatch.setattr(evaluation, name, value)
    evaluation.main()
    files, others = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob('*.*')}
                     for name in ('one', 'two'))
    assert files == others and len(files) >= 1 + 20  # curves, too, where matplotlib is installed
    assert sum(len(read_results(tmp_path / 'two' / 'results', label)) for label in voc_labels) == 5 * 200


class Oracle(torch.nn.Module):
    """Stands for an SSD300 that finds the very objects of a dataset, difficult ones included."""
    image_mean, image_std = [9.0] * 3, [1.0] * 3

    def __init__(self, dataset):
        super().__init__()
        self.register_buffer('priors_cxcy', torch.zeros(8732, 4))
        self.truth = (dataset[i] for i in range(len(dataset)))

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.highest, self.is_mixed = images.max(), torch.is_autocast_enabled('cpu')
        return images, images

    def detect_objects(self, images, _, *settings):
        self.settings = settings
        _, boxes, labels, _ = zip(*(next(self.truth) for _ in images))
        return boxes, labels, [torch.full((len(image_labels),), 0.9) for image_labels in labels]


@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_evaluate_leaves_mode_and_random_numbers_as_they_were(dataset):
    for training in (True, False):
        network = Oracle(dataset).train(training)
        before = torch.get_rng_state(), random.getstate()
        precisions, mean = evaluation.evaluate(evaluation.make_test_loader(dataset, 2, workers=1), network)
        assert precisions['cat'] == precisions['dog'] == mean == 1 and network.training == training
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_eval_py_keeps_to_vocs_rules_and_to_normalization_and_precision(dataset, lists, tmp_path, monkeypatch):
    network = Oracle(dataset)
    monkeypatch.setattr(evaluation, 'load_model', lambda _: (network, dataset.label_map))
    monkeypatch.setattr(evaluation, 'choose_dtype', lambda *_: torch.bfloat16)
    for name, value in {'data_folder': lists, 'output_folder': tmp_path, 'workers': 0, 'batch_size': 2}.items():
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setattr(evaluation, 'draw_plots', lambda path, plots: curves.update(plots))
    curves = {}
    evaluation.main()
    assert {'cat 100.0%', 'dog 100.0%'} < curves.keys() and len(curves) == 20
    assert network.settings == (0.01, 0.45, 200)  # lowest score, largest overlap, number of detections
    assert network.highest <= -8 and network.is_mixed  # mean 9
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['mAP'] == 1 and report['images'] == 5  # finding a difficult object is no error
    assert sum(row['objects'] for row in report['classes'].values()) < sum(map(len, make_objects().values()))


@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_vocs_development_kit_would_score_the_result_files_as_we_do(dataset, tmp_path):
    # Detections overlap by much or by little: near 0.5, the kit's additional pixel would make a difference.
    rng, results = random.Random(1), [[] for _ in range(6)]
    for (width, height), (_, boxes, labels, difficulties) in zip(SIZES, [dataset[i] for i in range(len(SIZES))]):
        boxes, labels = boxes.repeat(3, 1), labels.repeat(3)
        shifts = torch.tensor([rng.choice((2, -1, 60)) for _ in boxes])[:, None] / torch.tensor([width, height] * 2)
        scores, n = torch.tensor([rng.random() for _ in boxes]), len(difficulties)
        for result, values in zip(results, (boxes + shifts, labels, scores, boxes[:n], labels[:n], difficulties)):
            result.append(values)
    precisions, _ = calculate_mAP(*results)
    evaluation.write_results(results, dataset, list(make_objects()), tmp_path)
    for label in ('cat', 'dog'):
        objects = [(name, box, difficult) for name, objects in make_objects().items()
                   for object_label, box, difficult in objects if object_label == label]
        assert 0.2 < precisions[label] < 0.95
        assert devkit_average_precision(read_results(tmp_path, label), objects) == pytest.approx(precisions[label])
