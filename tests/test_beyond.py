"""Beyond VOC: mixed precision, other classes, other priors."""

import copy
import json

import pytest
import torch
from conftest import make_voc

import eval as evaluation
from model import FEATURE_MAPS, SSD300, start_from_checkpoint
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


@pytest.mark.slow
def test_in_bfloat16_the_network_detects_nearly_the_same(model):
    torch.manual_seed(1)
    image = torch.rand(1, 3, 300, 300).to(memory_format=torch.channels_last)
    network = copy.deepcopy(model).to(memory_format=torch.channels_last)  # other tests need the model unchanged
    with torch.no_grad():
        locs, scores = network(image)
        with autocast(image.device, torch.bfloat16):
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


@pytest.mark.parametrize('labels', [('person',), ('dog', *FRUIT, 'cat'), (*voc_labels, 'unicorn')])
@torch.no_grad()
def test_fine_tuning_keeps_everything_but_the_class_heads_of_new_labels(labels, untrained_checkpoint, model, capsys):
    label_map, voc_map = make_label_map(labels), make_label_map(voc_labels)
    torch.manual_seed(7)
    features = [torch.rand(1, channels, grid, grid) for _, channels, grid, *_ in FEATURE_MAPS]
    tuned = SSD300(n_classes=len(label_map))
    fresh = tuned.pred_convs(*features)[1]  # scores (1, 8732, n_classes)
    start_from_checkpoint(tuned, untrained_checkpoint, label_map)
    for name, tensor in tuned.state_dict().items():
        assert name.startswith('pred_convs.cl_') or torch.equal(tensor, model.state_dict()[name]), name
    old_scores, scores = (network.pred_convs(*features)[1] for network in (model, tuned))
    for label, i in label_map.items():
        expected = old_scores[..., voc_map[label]] if label in voc_map else fresh[..., i]
        torch.testing.assert_close(scores[..., i], expected)
    new = [label for label in labels if label not in voc_map]
    assert capsys.readouterr().out.endswith(f'from scratch for {", ".join(new)}\n' if new else 'checkpoint.pth\n')


@pytest.mark.slow
def test_fine_tuning_says_that_the_checkpoints_priors_replace_those_of_feature_maps(model, tmp_path, capsys,
                                                                                  monkeypatch):
    path, label_map = tmp_path / 'checkpoint.pth', make_label_map(voc_labels)
    torch.save({'epoch': 1, 'model': model.state_dict(), 'label_map': label_map, 'priors_cxcy': model.priors_cxcy,
                'image_mean': [0.5] * 3, 'image_std': [0.5] * 3, 'clip_boxes': True}, path)
    for scale in (0.1, 0.05):
        monkeypatch.setattr('model.FEATURE_MAPS', (FEATURE_MAPS[0]._replace(scale=scale), *FEATURE_MAPS[1:]))
        tuned = SSD300(n_classes=21)
        start_from_checkpoint(tuned, path, label_map)
        assert ('not those of FEATURE_MAPS' in capsys.readouterr().out) == (scale == 0.05)
        assert torch.equal(tuned.priors_cxcy, model.priors_cxcy) and tuned.clip_boxes and tuned.image_mean == [0.5] * 3
    monkeypatch.setattr('model.FEATURE_MAPS', (FEATURE_MAPS[0]._replace(ratios=(1, 2)), *FEATURE_MAPS[1:]))
    with pytest.raises(InputError, match=r"checkpoint\.pth' aren't those of .* 21 classes and these FEATURE_MAPS"):
        start_from_checkpoint(SSD300(n_classes=21), path, label_map)


def test_eval_takes_the_classes_from_the_checkpoint(fruit_lists, tmp_path, monkeypatch):
    torch.manual_seed(0)
    checkpoint = tmp_path / 'fruit.pth'
    torch.save({'epoch': 1, 'model': SSD300(n_classes=4).state_dict(), 'label_map': make_label_map(FRUIT)}, checkpoint)
    for name, value in {'data_folder': fruit_lists, 'checkpoint': checkpoint, 'workers': 0,
                        'output_folder': tmp_path}.items():
        monkeypatch.setattr(evaluation, name, value)
    with pytest.warns(UserWarning, match='no objects to be found of apple, plum'):
        evaluation.main()
    classes = json.loads((tmp_path / 'report.json').read_text())['classes']
    assert {label: row['objects'] for label, row in classes.items()} == {'apple': 0, 'Pear': 1, 'plum': 0}
    assert classes['plum']['AP'] is None  # no objects, no AP


def test_a_checkpoint_for_other_classes_than_the_data_is_refused_with_both_maps(fruit_lists, untrained_checkpoint,
                                                                               monkeypatch):
    monkeypatch.setattr(evaluation, 'data_folder', fruit_lists)
    monkeypatch.setattr(evaluation, 'checkpoint', untrained_checkpoint)
    with pytest.raises(InputError) as refused:
        evaluation.main()
    assert str(make_label_map(FRUIT)) in str(refused.value) and str(make_label_map(voc_labels)) in str(refused.value)
