"""The command line: constants at a script's top that it can override, and one sentence for what is wrong with it."""

import importlib.util
import io
import os
import subprocess
import sys
import typing
import warnings

import pytest
import torch
from conftest import ROOT

import create_data_lists
import detect
import eval as evaluation
import train
import utils
from utils import InputError, as_flags, choose_device, choose_dtype, current_settings, override_settings

SCRIPTS = {'create_data_lists': create_data_lists, 'train': train, 'eval': evaluation, 'detect': detect}

SMALL_SCRIPT = '''"""A small script: 100 % documented."""

count: int = 3  # how many there are; at most 50 % of all
name: str = 'x # y'  # what it is called
flag: bool = True  # whether to do it
limit: float | None = None  # no limit: None
rates: list[float] = [0.5]  # how much, each time
words: list[str] | None = None  # which

PLAIN = 5
calls = []


def main():
    calls.append((count, name))
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A small script of its own, imported."""
    path = tmp_path / 'small.py'
    path.write_text(SMALL_SCRIPT)
    spec = importlib.util.spec_from_file_location('small', path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'small', module)
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)  # run_script sets another one
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command_line(monkeypatch):
    def set_arguments(*arguments):
        monkeypatch.setattr(sys, 'argv', ['small.py', *arguments])
    return set_arguments


# --------------------------------------------------------------------------------------- the command line

def test_settings_are_overridden_by_their_own_names_and_printed_as_one_types_them(script, command_line):
    typed = ['--count', '7', '--no-flag', '--limit', '0.5', '--rates', '1.0', '2.0', '--words', 'None']
    command_line(*typed)
    override_settings(script)
    changed = {'count': 7, 'flag': False, 'limit': 0.5, 'rates': [1.0, 2.0], 'words': None}
    assert current_settings(script) == {**changed, 'name': 'x # y'}
    assert as_flags(changed).split() == typed


@pytest.mark.parametrize('arguments', ['--cnt 1', '--coun 1', '--PLAIN 1', '--count many'])
def test_unknown_names_abbreviations_and_wrong_types_are_refused_in_one_line(arguments, script, command_line, capsys):
    command_line(*arguments.split())
    with pytest.raises(SystemExit, match='2'):
        utils.run_script(script)
    line, = capsys.readouterr().err.splitlines()
    assert arguments.split()[0] in line and '--help lists the settings' in line and script.calls == []


def test_main_runs_with_the_settings_and_an_input_error_and_ctrl_c_become_one_line(script, command_line, monkeypatch):
    command_line('--count', '9')
    utils.run_script(script)
    assert script.calls == [(9, 'x # y')]
    for error, line in ((InputError('no such thing: take another'), 'Error: no such thing: take another'),
                        (KeyboardInterrupt(), 'Stopped.')):
        monkeypatch.setattr(script, 'main', lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as exit_:
            utils.run_script(script)
        assert exit_.value.code == line
    monkeypatch.setattr(sys, 'stdout', io.BytesIO())  # of a notebook, say: it can't be reconfigured
    with pytest.raises(SystemExit):
        utils.run_script(script)


@pytest.mark.parametrize(('error', 'advice'), [
    (torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate'), 'lower batch_size'),
    (RuntimeError('unable to allocate shared memory(shm) for file </torch_9>: No space left'), 'set workers to 0'),
    (RuntimeError('something else'), None)])
def test_too_little_memory_is_one_sentence_that_tells_how_to_need_less(error, advice):
    said = utils.explain(error)
    assert said is None if advice is None else advice in said and '\n' not in said


def test_a_device_or_a_precision_that_is_not_here_is_refused_by_name(monkeypatch):
    for name in ('nonsense', 'cuda:99', 'meta'):
        with pytest.raises(InputError, match=f"^device '{name}' can't be used here"):
            choose_device(name)
    cpu = torch.device('cpu')
    assert choose_device('cpu') == cpu and choose_dtype(cpu, 'float32') == torch.float32
    for capabilities, auto in (({}, torch.float32), ({'amx_bf16': True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', capabilities.copy, raising=False)
        assert choose_dtype(cpu, 'auto') == auto
        for name in ('float16',) if capabilities else ('float16', 'bfloat16'):
            with pytest.raises(InputError, match=f"^precision '{name}' has no hardware support on this cpu"):
                choose_dtype(cpu, name)


# ---------------------------------------------------------------------------------------- the real scripts

IMPORT_ALL = '''
import os, random, sys, warnings
import torch, torchvision, torchvision.models.detection, PIL, tqdm

def watch(event, arguments):
    writes = event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+')
    if writes or event.startswith(('socket.', 'subprocess.', 'os.mkdir', 'os.remove', 'os.rename', 'os.system')):
        print(event, arguments)

def state():
    return (random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.backends.cudnn.benchmark, warnings.formatwarning, dict(os.environ), sys.stdout)

before = state()
sys.addaudithook(watch)
import create_data_lists, train, eval, detect
assert state() == before, 'changed'
assert not torch.cuda.is_initialized(), 'device'
'''


@pytest.mark.slow
def test_importing_the_scripts_does_nothing(tmp_path):
    process = subprocess.run([sys.executable, '-c', IMPORT_ALL, '--epochs', 'nonsense'], cwd=tmp_path, text=True,
                             capture_output=True, timeout=120, check=False,
                             env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'})
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_setting_is_of_its_own_type_and_explained_by_a_comment(name, command_line, capsys, monkeypatch):
    script = SCRIPTS[name]
    for setting, kind in typing.get_type_hints(script).items():
        value, choices = getattr(script, setting), typing.get_args(kind) or (kind,)
        if value is None:
            assert type(None) in choices
        else:
            assert type(value) in {typing.get_origin(choice) or choice for choice in (*choices, kind)}
    monkeypatch.setenv('COLUMNS', '250')
    command_line('--help')
    with pytest.raises(SystemExit):
        override_settings(script)
    text = capsys.readouterr().out
    for setting, value in current_settings(script).items():
        lines = text[text.index(f'\n  --{setting}'):].split('\n  --', 2)[1]
        assert f'(default: {value})' in ' '.join(lines.split()), setting
        assert len(lines.split('(default:')[0].split()) > 2, f'{setting} has no comment'  # beside name and kind


def test_what_one_script_writes_is_what_the_next_one_reads():
    assert create_data_lists.output_folder == train.data_folder == evaluation.data_folder
    assert evaluation.checkpoint == detect.checkpoint == train.CHECKPOINT_NAME == 'checkpoint_ssd300.pth'
    assert all((ROOT / path).is_file() for path in detect.image)


@pytest.mark.parametrize(('script', 'name', 'value'), [
    (train, 'batch_size', 0), (train, 'epochs', 0), (train, 'workers', -1), (train, 'lr', float('nan')),
    (train, 'decay_lr_at', [154, 193]), (train, 'precision', 'float8'), (train, 'localization', 'l2'),
    (evaluation, 'report_threshold', 1.5), (evaluation, 'split', 'val'), (detect, 'min_score', 1.0)])
def test_a_setting_out_of_range_is_refused_by_name_and_value(script, name, value, monkeypatch, sample_lists):
    monkeypatch.setattr(script, 'data_folder', str(sample_lists), raising=False)
    monkeypatch.setattr(script, name, value)
    with pytest.raises(InputError) as refused:
        script.main()
    message, = str(refused.value).splitlines()
    assert name in message and str(value) in message


@pytest.fixture
def refusal(tmp_path, monkeypatch, command_line):
    """Runs a script in this process and in an empty folder; returns the one sentence with which it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, 'formatwarning', warnings.formatwarning)  # run_script sets another one

    def run(script, *arguments):
        command_line(*map(str, arguments))
        for name in script.__annotations__:
            monkeypatch.setattr(script, name, getattr(script, name))  # restored afterwards
        with pytest.raises(SystemExit) as exit_:
            utils.run_script(script)
        sentence, = exit_.value.code.splitlines()
        return sentence

    return run


def test_what_is_not_there_or_in_the_way_is_one_sentence_that_tells_what_to_do(refusal, sample_lists, tmp_path):
    sentence = refusal(train)
    assert 'data list' in sentence and 'run create_data_lists.py first' in sentence
    assert 'nowhere' in refusal(create_data_lists, '--voc07_path', 'nowhere')
    sentence = refusal(detect, '--image', ROOT / detect.image[0])
    assert "checkpoint 'checkpoint_ssd300.pth' isn't there: train one with train.py" in sentence
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
