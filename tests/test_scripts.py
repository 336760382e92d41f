"""The four scripts as real processes, one after the other as a reader runs them, and what they say to wrong input."""

import csv
import json
import os

import pytest
import torch
from conftest import assert_one_sentence, make_voc, run_script
from PIL import Image

from utils import create_data_lists


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    """A folder with VOC of two training and two test pictures."""
    folder = tmp_path_factory.mktemp('voc') / 'VOC2007'
    make_voc(folder, {'000001': [('dog', (5, 5, 40, 40), 0)], '000002': [('cat', (1, 1, 60, 44), 0)]})
    return make_voc(folder, {'000003': [('dog', (9, 9, 50, 40), 0)], '000004': [('cat', (10, 5, 60, 40), 1)]}, 'test')


@pytest.fixture(scope='module')
def workshop(voc, tmp_path_factory):
    """A folder in which all four scripts were run with a handful of settings, and the finished processes."""
    folder = tmp_path_factory.mktemp('workshop')
    commands = (('create_data_lists.py', '--voc07_path', voc, '--voc12_path', 'None'),
                ('train.py', '--no-pretrained', '--epochs', 1, '--batch_size', 2, '--workers', 1, '--grad_clip', 10),
                ('eval.py', '--workers', 1),
                ('detect.py', '--image', voc / 'JPEGImages' / '000003.jpg', '--min_score', 0.01, '--top_k', 3))
    return folder, {name: run_script(name, *arguments, folder=folder) for name, *arguments in commands}


def test_the_four_scripts_run_one_after_the_other_from_an_empty_folder(workshop):
    for name, process in workshop[1].items():
        assert process.returncode == 0, (name, process.stderr)
        assert 'Traceback' not in process.stderr


def test_the_scripts_write_what_they_promise_and_nothing_else(workshop):
    folder, _ = workshop
    lists = {'TRAIN_images.json', 'TRAIN_objects.json', 'TEST_images.json', 'TEST_objects.json', 'label_map.json'}
    assert set(os.listdir(folder / 'data')) == lists
    assert len(json.loads((folder / 'data' / 'TRAIN_images.json').read_text())) == 2
    checkpoint = torch.load(folder / 'checkpoint_ssd300.pth', weights_only=True)
    assert (checkpoint['epoch'], len(checkpoint['model'])) == (1, 71)
    assert (checkpoint['settings']['batch_size'], checkpoint['settings']['pretrained']) == (2, False)
    with open(folder / 'training_log.csv', newline='') as file:
        assert [line['epoch'] for line in csv.DictReader(file)] == ['1']
    with Image.open(folder / 'detections' / '000003.jpg') as image:
        assert image.size == (64, 48)
    assert 'mAP' in (folder / 'evaluation' / 'report.json').read_text()
    assert set(os.listdir(folder)) - {'runs'} == {  # TensorBoard's, where that is installed
        'data', 'checkpoint_ssd300.pth', 'best_checkpoint_ssd300.pth', 'training_log.csv', 'training_log.png',
        'evaluation', 'detections'}


def test_the_scripts_say_what_they_have_done(workshop):
    said = {name: process.stdout for name, process in workshop[1].items()}
    assert '2 images' in said['create_data_lists.py']
    assert '2 images, epochs 1 to 1' in said['train.py']
    assert 'checkpoint_ssd300.pth' in said['train.py']
    assert 'Epoch 1/1: 100%' in workshop[1]['train.py'].stderr
    assert 'mAP of 2 images: ' in said['eval.py']
    assert sum(line.startswith(('dog ', 'cat ', 'person ')) for line in said['eval.py'].splitlines()) == 3
    assert '3 objects' in said['detect.py']
    assert '000003.jpg' in said['detect.py']


# ------------------------------------------------------------------------------------------------------- wrong input

def test_without_data_lists_train_says_how_to_make_them(tmp_path):
    process = run_script('train.py', folder=tmp_path)
    assert_one_sentence(process, 'data list', os.path.join('data', 'T'), 'run create_data_lists.py first')
    assert process.returncode == 1


def test_a_voc_folder_that_is_not_there_is_one_sentence(tmp_path):
    assert_one_sentence(run_script('create_data_lists.py', '--voc07_path', 'nowhere', folder=tmp_path), 'nowhere')


def test_a_missing_checkpoint_is_one_sentence(voc, tmp_path):
    process = run_script('detect.py', '--image', voc / 'JPEGImages' / '000001.jpg', folder=tmp_path)
    assert_one_sentence(process, "checkpoint 'checkpoint_ssd300.pth' isn't there: train one with train.py")


def test_a_truncated_checkpoint_is_one_sentence(workshop, tmp_path):
    path = tmp_path / 'truncated.pth'
    path.write_bytes((workshop[0] / 'checkpoint_ssd300.pth').read_bytes()[:100000])
    process = run_script('eval.py', '--data_folder', workshop[0] / 'data', '--checkpoint', path, folder=tmp_path)
    assert_one_sentence(process, path, 'it is damaged')


@pytest.mark.parametrize(('name', 'setting', 'value', 'complaint'), [
    ('eval.py', '--batch', 4, 'unrecognized arguments: --batch 4'),  # neither a setting nor taken for batch_size
    ('train.py', '--epochs', 'many', "invalid int value: 'many'")])
def test_an_unknown_or_ill_typed_setting_is_one_sentence(name, setting, value, complaint, tmp_path):
    process = run_script(name, setting, value, folder=tmp_path)
    assert_one_sentence(process, complaint, '--help lists the settings')
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1


def test_pretrained_weights_that_can_not_be_downloaded_are_one_sentence_with_a_way_out(workshop, tmp_path):
    # Whatever this machine reaches: nobody answers at that address.
    process = run_script('train.py', '--data_folder', workshop[0] / 'data', folder=tmp_path, TORCH_HOME=str(tmp_path),
                         https_proxy='http://127.0.0.1:9')
    assert_one_sentence(process, 'vgg16-397923af.pth', '--no-pretrained', tmp_path / 'hub' / 'checkpoints')


def test_a_picture_that_a_worker_can_not_read_is_one_sentence(voc, tmp_path):
    create_data_lists(voc, None, tmp_path / 'data')
    images = json.loads((tmp_path / 'data' / 'TRAIN_images.json').read_text())
    (tmp_path / 'data' / 'TRAIN_images.json').write_text(json.dumps([images[0], str(tmp_path / 'gone.jpg')]))
    process = run_script('train.py', '--no-pretrained', '--workers', 1, '--batch_size', 2, folder=tmp_path)
    assert_one_sentence(process, f"Error: picture '{tmp_path / 'gone.jpg'}' isn't there")
    assert not (tmp_path / 'checkpoint_ssd300.pth').exists()


def test_an_output_folder_that_can_not_be_made_is_one_sentence(workshop, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    process = run_script('train.py', '--data_folder', workshop[0] / 'data', '--output_folder', 'file', folder=tmp_path)
    assert_one_sentence(process, "can't make the folder 'file'", 'choose another one')
