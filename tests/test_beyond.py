"""Beyond VOC and one GPU: several processes, mixed precision, other classes, reports, COCO."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_one_sentence, make_voc, run_script
from PIL import Image
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16

from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss, load_model, start_from_checkpoint
from utils import (InputError, autocast, create_data_lists, find_jaccard_overlap, make_label_colors, make_label_map,
                   voc_labels)

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


def save_checkpoint(path, model, label_map):
    torch.save({'epoch': 1, 'model': model.state_dict(), 'label_map': label_map, 'settings': {}}, path)
    return path


# ----------------------------------------------------------------------------------------- mixed precision

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


def test_in_bfloat16_the_loss_is_computed_in_float32_and_training_learns():
    torch.manual_seed(0)
    priors = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]])
    network = torch.nn.Linear(8, 3 * 7)
    criterion = MultiBoxLoss(priors)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        with autocast(torch.device('cpu'), 'bfloat16'):
            output = network(torch.ones(1, 8)).view(1, 3, 7)
        assert output.dtype == torch.bfloat16
        loss = criterion(output[..., :4], output[..., 4:], [torch.tensor([[0.1, 0.1, 0.5, 0.5]])], [torch.tensor([2])])
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(('capabilities', 'enabled'), [({'avx512_bf16': True}, True), ({'avx2': True}, False)])
def test_auto_is_bfloat16_where_the_cpu_computes_in_it(capabilities, enabled, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    with autocast(torch.device('cpu'), 'auto'):
        assert torch.is_autocast_enabled('cpu') == enabled


# ------------------------------------------------------------------------------------------- other classes

def test_labels_of_ones_own_travel_in_the_data_lists(fruit_lists):
    dataset = PascalVOCDataset(fruit_lists, 'TEST')
    assert dataset.label_map == {'background': 0, 'apple': 1, 'Pear': 2, 'plum': 3}
    assert dataset[0][2].tolist() == [2]  # pear; the kiwi is none of the three


def test_objects_of_other_classes_are_counted_and_reported(tmp_path, capsys):
    folder = make_voc(tmp_path / 'voc', {'1': [('kiwi', (1, 1, 9, 9), 0), ('apple', (1, 1, 9, 9), 0)]})
    make_voc(folder, {'2': [('kiwi', (1, 1, 9, 9), 0)]}, 'test')
    create_data_lists(folder, None, tmp_path / 'lists', labels=FRUIT)
    assert "label 'kiwi', which is none of these labels: 2" in capsys.readouterr().out


@pytest.mark.parametrize('labels', [(), ('apple', 'Apple '), ('background', 'apple'), ('apple', ' ')])
def test_labels_that_cannot_be_told_apart_are_refused(labels, tmp_path):
    with pytest.raises(InputError, match='labels must be'):
        create_data_lists(tmp_path, None, tmp_path / 'lists', labels=labels)


def test_more_folders_than_two_can_be_trained_on(tmp_path):
    for name in ('a', 'b', 'c'):
        make_voc(tmp_path / name, {f'{name}1': [('cat', (1, 1, 9, 9), 0)]})
    make_voc(tmp_path / 'a', {'a2': []}, 'test')
    create_data_lists(tmp_path / 'a', [tmp_path / 'b', tmp_path / 'c'], tmp_path / 'lists')
    assert [Path(path).stem for path in PascalVOCDataset(tmp_path / 'lists', 'TRAIN').images] == ['a1', 'b1', 'c1']


def test_colors_differ_for_a_hundred_classes():
    colors = make_label_colors(make_label_map(f'class {i}' for i in range(100)))
    assert len(set(colors.values())) == 101


def test_fine_tuning_on_other_classes_keeps_all_but_the_class_heads(untrained_checkpoint, model, capsys):
    torch.manual_seed(7)
    tuned = SSD300(n_classes=4)
    fresh = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    start_from_checkpoint(tuned, untrained_checkpoint, make_label_map(FRUIT))
    assert 'class heads start anew' in capsys.readouterr().out
    for name, tensor in tuned.state_dict().items():
        expected = fresh[name] if name.startswith('pred_convs.cl_') else model.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_fine_tuning_on_the_same_classes_keeps_everything(untrained_checkpoint, model, capsys):
    tuned = SSD300(n_classes=21)
    start_from_checkpoint(tuned, untrained_checkpoint, make_label_map(voc_labels))
    assert 'anew' not in capsys.readouterr().out
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in tuned.state_dict().items())


@pytest.mark.slow
def test_eval_and_detect_take_the_classes_from_the_checkpoint(fruit_lists, tmp_path):
    torch.manual_seed(0)
    network = SSD300(n_classes=4)
    checkpoint = save_checkpoint(tmp_path / 'fruit.pth', network, make_label_map(FRUIT))
    evaluated = run_script('eval.py', '--data_folder', fruit_lists, '--checkpoint', checkpoint, '--workers', 0,
                           '--output_folder', tmp_path / 'report')
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((tmp_path / 'report' / 'report.json').read_text())
    assert list(report['classes']) == list(FRUIT)
    assert {label: row['objects'] for label, row in report['classes'].items()} == {'apple': 0, 'Pear': 1, 'plum': 0}
    assert report['classes']['plum']['AP'] is None  # no objects, no AP
    curves = Image.open(tmp_path / 'report' / 'precision_recall.png')
    assert min(curves.size) > 100

    picture = PascalVOCDataset(fruit_lists, 'TEST').images[0]
    found = run_script('detect.py', '--checkpoint', checkpoint, '--image', picture, '--min_score', 0.2, '--output',
                       tmp_path, '--top_k', 3, '--save_json')
    assert found.returncode == 0, found.stderr
    objects, = json.loads((tmp_path / 'detections.json').read_text()).values()
    assert objects and {entry['label'] for entry in objects} <= set(FRUIT)
    refused = run_script('detect.py', '--checkpoint', checkpoint, '--suppress', 'cat')
    assert_one_sentence(refused, 'cat', 'apple, Pear, plum')


# ------------------------------------------------------------------------------------------------- COCO

@pytest.mark.slow
def test_coco_as_checkpoint_runs_torchvisions_weights_with_its_labels(tmp_path, monkeypatch):
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=91)
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    torch.save(theirs.state_dict(), folder / SSD300_VGG16_Weights.COCO_V1.url.rsplit('/', 1)[1])
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    loaded, label_map = load_model('coco')
    assert len(label_map) == 91 and label_map['person'] == 1
    assert torch.equal(loaded.base.conv1_1.weight, theirs.backbone.features[0].weight)


def test_coco_weights_that_cannot_be_downloaded_are_told_in_one_sentence(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    with pytest.raises(InputError, match=f'no network.*{tmp_path}'):
        load_model('coco')


@pytest.mark.slow
def test_a_checkpoint_for_other_classes_than_the_data_is_refused_with_both_maps(fruit_lists, untrained_checkpoint):
    _, label_map = load_model(untrained_checkpoint)
    process = run_script('eval.py', '--data_folder', fruit_lists, '--checkpoint', untrained_checkpoint)
    assert_one_sentence(process, label_map, make_label_map(FRUIT))
