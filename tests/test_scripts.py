"""What the scripts say to wrong input. That they run one after the other, test_readme.py proves by the quick start."""

import json
import sys
import warnings

import pytest
from conftest import make_voc, run_script

import create_data_lists
import detect
import train
import utils


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    """A folder with VOC of two training and two test pictures."""
    folder = tmp_path_factory.mktemp('voc') / 'VOC2007'
    make_voc(folder, {'000001': [('dog', (5, 5, 40, 40), 0)], '000002': [('cat', (1, 1, 60, 44), 0)]})
    return make_voc(folder, {'000003': [('dog', (9, 9, 50, 40), 0)], '000004': [('cat', (10, 5, 60, 40), 1)]}, 'test')


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """Runs a script in this process and in an empty folder; returns the one sentence with which it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)  # run_script sets another one

    def run(script, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *map(str, arguments)])
        for name in script.__annotations__:
            monkeypatch.setattr(script, name, getattr(script, name))  # restored afterwards
        with pytest.raises(SystemExit) as exit_:
            utils.run_script(script)
        sentence, = exit_.value.code.splitlines()
        return sentence

    return run


def test_what_is_not_there_is_one_sentence_that_tells_how_to_make_it(refusal, voc, tmp_path):
    sentence = refusal(train)
    assert 'data list' in sentence and 'run create_data_lists.py first' in sentence
    assert 'nowhere' in refusal(create_data_lists, '--voc07_path', 'nowhere')
    sentence = refusal(detect, '--image', voc / 'JPEGImages' / '000001.jpg')
    assert "checkpoint 'checkpoint_ssd300.pth' isn't there: train one with train.py" in sentence


def test_a_file_in_the_way_of_the_output_folder_is_one_sentence(refusal, sample_lists, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    sentence = refusal(train, '--data_folder', sample_lists, '--output_folder', 'file')
    assert "can't make the folder 'file'" in sentence and 'choose another one' in sentence


def test_pretrained_weights_that_can_not_be_downloaded_are_one_sentence_with_a_way_out(refusal, sample_lists, tmp_path,
                                                                                      monkeypatch):
    # Whatever this machine reaches: nobody answers at that address.
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    sentence = refusal(train, '--data_folder', sample_lists)
    for part in ('vgg16-397923af.pth', '--no-pretrained', str(tmp_path / 'hub' / 'checkpoints')):
        assert part in sentence


@pytest.mark.slow
def test_a_picture_that_a_worker_can_not_read_is_one_sentence(voc, tmp_path):
    utils.create_data_lists(voc, None, tmp_path / 'data')
    images = json.loads((tmp_path / 'data' / 'TRAIN_images.json').read_text())
    (tmp_path / 'data' / 'TRAIN_images.json').write_text(json.dumps([images[0], str(tmp_path / 'gone.jpg')]))
    process = run_script('train.py', '--no-pretrained', '--workers', 1, '--batch_size', 2, folder=tmp_path)
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(f"Error: picture '{tmp_path / 'gone.jpg'}' isn't there")
    assert not (tmp_path / 'checkpoint_ssd300.pth').exists()
