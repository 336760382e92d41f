"""Beyond VOC: mixed precision, other classes."""

import copy
import json

import pytest
import torch
from conftest import make_voc, run_script
from PIL import Image

import eval as evaluation
from model import SSD300, start_from_checkpoint
from utils import InputError, autocast, create_data_lists, find_jaccard_overlap, make_label_map, voc_labels

FRUIT = ('apple', 'Pear', 'plum')


@pytest.fixture(scope='module')
def fruit_lists(tmp_path_factory):
    """Data lists of four training pictures and one test picture with classes of their own."""
    folder = tmp_path_factory.mktemp('fruit')
    boxes = [(5, 5, 30, 40), (20, 10, 60, 44), (2, 20, 25, 46)]
    pictures = {f'{i}': [(FRUIT[j].lower(), boxes[j], 0) for j in range(3) if j != i] for i in range(4)}
    make_voc(make_voc(folder / 'fruit', pictures), {'test': [('pear', boxes[0], 0), ('kiwi', boxes[1], 0)]}, 'test')
    create_data_lists(folder / 'fruit', None, folder / 'lists', labels=FRUIT)
    return folder / 'lists'


# ----------------------------------------------------------------------------------------- mixed precision

@pytest.mark.slow
def test_in_bfloat16_the_network_detects_nearly_the_same(model):
    torch.manual_seed(1)
    image = torch.rand(1, 3, 300, 300).to(memory_format=torch.channels_last)
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)  # others want the model as it is
    with torch.no_grad():
        locs, scores = network(image)
        with autocast(image.device, 'bfloat16'):
            low_locs, low_scores = network(image)
    assert low_locs.dtype == low_scores.dtype == torch.bfloat16
    assert (locs - low_locs).abs().max() < 0.05 * locs.abs().max()
    # Scores of random weights are close to each other: a bias makes some of them clear, as training would.
    scores[0, ::700, 3] += 12
    low_scores[0, ::700, 3] += 12
    found, low_found = (model.detect_objects(*output, 0.5, 0.45, 200)
                        for output in ((locs, scores), (low_locs, low_scores)))
    assert low_found[0][0].dtype == low_found[2][0].dtype == torch.float32  # decoded in float32
    assert len(found[0][0]) == len(low_found[0][0]) > 5
    # Nearly all have their counterpart; of duplicates with equal scores, another one may have been suppressed.
    assert (find_jaccard_overlap(found[0][0], low_found[0][0]).amax(dim=1) > 0.95).float().mean() > 0.9


# ------------------------------------------------------------------------------------------- other classes


def test_fine_tuning_keeps_everything_but_the_class_heads_of_other_classes(untrained_checkpoint, model, capsys):
    torch.manual_seed(7)
    tuned = SSD300(n_classes=4)
    fresh = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    start_from_checkpoint(tuned, untrained_checkpoint, make_label_map(FRUIT))
    assert 'class heads start anew' in capsys.readouterr().out
    for name, tensor in tuned.state_dict().items():
        expected = fresh[name] if name.startswith('pred_convs.cl_') else model.state_dict()[name]
        assert torch.equal(tensor, expected), name
    tuned = SSD300(n_classes=21)
    start_from_checkpoint(tuned, untrained_checkpoint, make_label_map(voc_labels))
    assert 'anew' not in capsys.readouterr().out
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tuned.state_dict().items())


@pytest.mark.slow
def test_eval_takes_the_classes_from_the_checkpoint(fruit_lists, tmp_path):
    torch.manual_seed(0)
    checkpoint = tmp_path / 'fruit.pth'
    torch.save({'epoch': 1, 'model': SSD300(n_classes=4).state_dict(), 'label_map': make_label_map(FRUIT)}, checkpoint)
    evaluated = run_script('eval.py', '--data_folder', fruit_lists, '--checkpoint', checkpoint, '--workers', 0,
                           '--output_folder', tmp_path / 'report')
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((tmp_path / 'report' / 'report.json').read_text())
    assert list(report['classes']) == list(FRUIT)
    assert {label: row['objects'] for label, row in report['classes'].items()} == {'apple': 0, 'Pear': 1, 'plum': 0}
    assert report['classes']['plum']['AP'] is None  # no objects, no AP
    curves = Image.open(tmp_path / 'report' / 'precision_recall.png')
    assert min(curves.size) > 100


def test_a_checkpoint_for_other_classes_than_the_data_is_refused_with_both_maps(fruit_lists, untrained_checkpoint,
                                                                               monkeypatch):
    monkeypatch.setattr(evaluation, 'data_folder', fruit_lists)
    monkeypatch.setattr(evaluation, 'checkpoint', untrained_checkpoint)
    with pytest.raises(InputError) as refused:
        evaluation.main()
    assert str(make_label_map(FRUIT)) in str(refused.value) and str(make_label_map(voc_labels)) in str(refused.value)
