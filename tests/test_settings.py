"""Settings: constants at a script's top that the command line can override."""

import importlib.util
import math
import os
import subprocess
import sys
import typing
import warnings

import pytest
from conftest import ROOT, assert_one_sentence, run_script

import create_data_lists
import detect
import eval as evaluation
import train
import utils
from utils import InputError, current_settings, override_settings, warn_about_workers

SCRIPTS = {'create_data_lists': create_data_lists, 'train': train, 'eval': evaluation, 'detect': detect}

SMALL_SCRIPT = '''"""A small script: 100 % documented."""

from typing import Optional

count: int = 3  # how many there are; at most 50 % of all
rate: float = 0.5  # a share: of 1
name: str = 'x # y'  # what it is called
flag: bool = True  # whether to do it
off: bool = False  # whether to do the other thing
limit: float | None = None  # no limit: None
most: int | None = 7  # at most so many
old: Optional[str] = None  # as it was written in former times
steps: list[int] = [1, 2]  # when
rates: list[float] = []  # how much, each time
words: list[str] | None = None  # which
bare: int = 1

PLAIN = 5
plain = 'y'
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


def refusal(script, capsys):
    """The one line with which the command line is refused."""
    before = current_settings(script)
    with pytest.raises(SystemExit) as exit_:
        override_settings(script)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ''
    line, = captured.err.splitlines()
    assert current_settings(script) == before
    return line


# --------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize('arguments, name, value', [
    ('--count 4', 'count', 4), ('--count=4', 'count', 4), ('--count -4', 'count', -4),
    ('--count 1 --count 2', 'count', 2),
    ('--rate 2', 'rate', 2.0), ('--rate 1e-4', 'rate', 1e-4), ('--rate -0.5', 'rate', -0.5),
    ('--name some', 'name', 'some'), ('--name None', 'name', 'None'), ('--name=-x', 'name', '-x'),
    ('--name 7', 'name', '7'), ('--name=', 'name', ''),
    ('--flag', 'flag', True), ('--no-flag', 'flag', False), ('--off', 'off', True), ('--no-off', 'off', False),
    ('--limit 10', 'limit', 10.0), ('--limit None', 'limit', None), ('--most None', 'most', None),
    ('--most 8', 'most', 8), ('--old new', 'old', 'new'), ('--old None', 'old', None),
    ('--steps 154 193', 'steps', [154, 193]), ('--steps 5', 'steps', [5]), ('--steps', 'steps', []),
    ('--rates 0.1 1e-2 3', 'rates', [0.1, 0.01, 3.0]), ('--words cat dog', 'words', ['cat', 'dog']),
    ('--words None', 'words', None), ('--words cat', 'words', ['cat']), ('--words', 'words', []),
    ('--bare 2', 'bare', 2)])
def test_a_setting_is_overridden_by_its_own_name(script, command_line, arguments, name, value):
    expected = {**current_settings(script), name: value}
    command_line(*arguments.split())
    override_settings(script)
    assert current_settings(script) == expected
    assert type(getattr(script, name)) is type(value)


def test_several_settings_can_be_overridden_together(script, command_line):
    command_line('--steps', '3', '4', '--count', '9', '--no-flag', '--words', 'a', 'b', '--limit', '1')
    override_settings(script)
    assert (script.steps, script.count, script.flag, script.words, script.limit) == ([3, 4], 9, False, ['a', 'b'], 1.0)


def test_without_arguments_all_settings_stay_as_they_are(script, command_line):
    before = current_settings(script)
    command_line()
    override_settings(script)
    assert current_settings(script) == before


@pytest.mark.parametrize('arguments, offender', [
    ('--typo 3', '--typo'), ('--coun 3', '--coun'), ('--c 3', '--c'), ('--no-fla', '--no-fla'),
    ('--Count 3', '--Count'), ('--PLAIN 6', '--PLAIN'), ('--plain z', '--plain'), ('--calls 1', '--calls'),
    ('--main 1', '--main'), ('stray', 'stray'), ('--count 3 stray', 'stray'), ('--no-count', '--no-count'),
    ('-c 3', '-c')])
def test_unknown_names_abbreviations_and_strays_are_refused_by_name(script, command_line, capsys, arguments, offender):
    command_line(*arguments.split())
    assert offender in refusal(script, capsys)


@pytest.mark.parametrize('arguments, name, value', [
    ('--count x', 'count', 'x'), ('--count 4.0', 'count', '4.0'), ('--count None', 'count', 'None'),
    ('--count 1e3', 'count', '1e3'), ('--rate fast', 'rate', 'fast'), ('--rate None', 'rate', 'None'),
    ('--limit none', 'limit', 'none'), ('--most 7.5', 'most', '7.5'), ('--steps 1 two', 'steps', 'two'),
    ('--steps 1,2', 'steps', '1,2'), ('--steps None', 'steps', 'None'), ('--flag=1', 'flag', '1'),
    ('--flag True', 'True', 'True'), ('--count', 'count', 'expected one argument')])
def test_values_of_a_wrong_type_are_refused_with_name_and_value(script, command_line, capsys, arguments, name, value):
    command_line(*arguments.split())
    line = refusal(script, capsys)
    assert name in line and value in line and '--help' in line


def test_help_shows_every_setting_with_its_default_and_its_comment(script, command_line, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    command_line('--help')
    with pytest.raises(SystemExit) as exit_:
        override_settings(script)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert 'A small script: 100 % documented.' in text
    for line in ('--count INT', 'how many there are; at most 50 % of all (default: 3)', '--no-flag',
                 'a share: of 1 (default: 0.5)', 'what it is called (default: x # y)', 'no limit: None (default: None)',
                 'when (default: [1, 2])', '--steps [INT ...]', '--bare INT', '(default: 1)'):
        assert line in text
    assert 'PLAIN' not in text and '--plain' not in text and 'calls' not in text


# --------------------------------------------------------------------------------------- running a script

def test_main_runs_with_the_settings_of_the_command_line(script, command_line):
    command_line('--count', '11')
    utils.run_script(script)
    assert script.calls == [(11, 'x # y')]


def test_a_refused_command_line_does_not_run_main(script, command_line, capsys):
    command_line('--count', 'many')
    with pytest.raises(SystemExit):
        utils.run_script(script)
    assert script.calls == [] and 'many' in capsys.readouterr().err


@pytest.mark.parametrize(('error', 'line'), [
    (InputError("picture 'a.jpg' isn't there: copy it there"), "Error: picture 'a.jpg' isn't there: copy it there"),
    (KeyboardInterrupt(), 'Stopped.')])
def test_an_input_error_and_ctrl_c_become_one_line_instead_of_a_traceback(error, line, script, command_line,
                                                                          monkeypatch):
    def stop():
        raise error

    command_line()
    monkeypatch.setattr(script, 'main', stop)
    with pytest.raises(SystemExit) as exit_:
        utils.run_script(script)
    assert exit_.value.code == line


def test_an_error_of_the_program_itself_keeps_its_traceback(script, command_line, monkeypatch):
    command_line()
    monkeypatch.setattr(script, 'main', lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        utils.run_script(script)


def test_a_warning_is_one_line_without_the_code_that_gave_it(script, command_line, monkeypatch):
    command_line()
    monkeypatch.setattr(script, 'main', lambda: None)
    utils.run_script(script)
    assert warnings.formatwarning('two boxes', UserWarning, 'utils.py', 7, line='...') == 'Warning: two boxes\n'


@pytest.mark.parametrize('name, arguments, offender', [
    ('train.py', ['--batch_size', '0'], 'batch_size'), ('train.py', ['--learning_rate', '1'], '--learning_rate')])
def test_a_real_script_refuses_before_it_does_anything(name, arguments, offender, tmp_path):
    process = run_script(name, *arguments, folder=tmp_path)
    assert_one_sentence(process, offender)
    assert len(process.stderr.splitlines()) == 1 and process.stdout == ''
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------- the real scripts

IMPORT_ALL = '''
import os, random, sys, warnings
import torch, torchvision, torchvision.models.detection, PIL, tqdm

def watch(event, arguments):
    writes = event == 'open' and isinstance(arguments[1], str) and set(arguments[1]) & set('wax+')
    if writes or event.startswith(('socket.', 'subprocess.', 'os.mkdir', 'os.remove', 'os.rename', 'os.system')):
        print(event, arguments)

def state():
    return (random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.get_default_device(), torch.backends.cudnn.benchmark, torch.is_grad_enabled(), warnings.formatwarning,
            dict(os.environ), sys.stdout, sys.stderr, list(sys.argv))

before = state()
sys.addaudithook(watch)
import create_data_lists, train, eval, detect
assert state() == before, 'changed'
assert not torch.cuda.is_initialized(), 'device'
'''


def test_importing_the_scripts_does_nothing(tmp_path):
    process = subprocess.run([sys.executable, '-c', IMPORT_ALL, '--epochs', 'nonsense'], cwd=tmp_path, text=True,
                             capture_output=True, timeout=120, check=False,
                             env={**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'})
    assert (process.returncode, process.stdout, process.stderr) == (0, '', '')
    assert list(tmp_path.iterdir()) == []


NAMES = {
    'create_data_lists': 'voc07_path voc12_path output_folder download',
    'train': 'data_folder keep_difficult pretrained augment checkpoint batch_size epochs workers lr decay_lr_at '
             'decay_lr_to momentum weight_decay grad_clip seed',
    'eval': 'data_folder checkpoint split batch_size workers',
    'detect': 'checkpoint image min_score max_overlap top_k suppress output',
}


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_settings_of_the_design_are_there(name):
    assert set(NAMES[name].split()) <= set(current_settings(SCRIPTS[name]))


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
        name_and_kind = 2
        assert len(lines.split('(default:')[0].split()) > name_and_kind, f'{setting} has no comment'


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_defaults_of_the_real_scripts_pass_through_the_command_line(name, command_line):
    script = SCRIPTS[name]
    before = current_settings(script)
    command_line()
    override_settings(script)
    assert current_settings(script) == before


def test_the_recipe_is_that_of_the_design():
    expected = {'keep_difficult': True, 'pretrained': True, 'augment': True, 'checkpoint': None, 'batch_size': 8,
                'epochs': 232, 'lr': 1e-3, 'decay_lr_at': [154, 193], 'decay_lr_to': 0.1, 'momentum': 0.9,
                'weight_decay': 5e-4, 'grad_clip': None}
    assert {name: getattr(train, name) for name in expected} == expected
    assert train.workers >= 0 and evaluation.workers >= 0 and isinstance(train.seed, int)


def test_results_compare_with_the_papers():
    assert (evaluation.MIN_SCORE, evaluation.MAX_OVERLAP, evaluation.TOP_K) == (0.01, 0.45, 200)
    assert evaluation.split == 'test'
    assert (create_data_lists.download, detect.suppress) == (False, None)


def test_what_one_script_writes_is_what_the_next_one_reads():
    assert create_data_lists.output_folder == train.data_folder == evaluation.data_folder
    assert evaluation.checkpoint == detect.checkpoint == train.CHECKPOINT_NAME == 'checkpoint_ssd300.pth'
    assert all((ROOT / path).is_file() for path in detect.image)


# -------------------------------------------------------------------------- settings that can't be followed

nan, inf = math.nan, math.inf
REFUSED = {
    train: {'batch_size': [0, -1], 'epochs': [0, -5], 'workers': [-1], 'prefetch': [0], 'lr': [0.0, -1e-3, nan, inf],
            'decay_lr_at': [[193, 154], [5, 5], [0, 3], [-1], [1, 3, 2]], 'decay_lr_to': [0.0, -0.1, 1.5, nan],
            'momentum': [1.0, -0.1, nan, inf], 'weight_decay': [-5e-4, nan, inf], 'grad_clip': [0.0, -10.0, nan]},
    evaluation: {'batch_size': [0, -1], 'workers': [-1], 'prefetch': [0, -1]},
    detect: {'min_score': [-0.1, 1.0, 1.5, nan, inf], 'max_overlap': [-0.1, 1.1, nan], 'top_k': [0, -3]},
}
ACCEPTED = {
    train: {'batch_size': [1, 1000], 'epochs': [1], 'lr': [1e-9, 5.0], 'decay_lr_at': [[], [1], [154, 193, 5000]],
            'decay_lr_to': [1.0, 1e-9], 'momentum': [0.0], 'weight_decay': [0.0], 'grad_clip': [None, 10.0, inf],
            'workers': [0, 1]},
    evaluation: {'batch_size': [1], 'workers': [0]},
    detect: {'min_score': [0.0, 0.99], 'max_overlap': [0.0, 1.0], 'top_k': [1, 10 ** 6]},
}


def cases(table):
    return [pytest.param(script, name, value, id=f'{script.__name__} {name} {value}')
            for script, settings in table.items() for name, values in settings.items() for value in values]


@pytest.mark.parametrize('script, name, value', cases(REFUSED))
def test_a_setting_out_of_range_is_refused_by_name_and_value_before_any_work(script, name, value, monkeypatch):
    monkeypatch.setattr(script, name, value)
    for work in ('make_folder', 'PascalVOCDataset', 'SSD300', 'load_model', 'load_checkpoint', 'load_detector',
                 'read_image', 'join_processes'):
        monkeypatch.setattr(script, work, lambda *_, **__: pytest.fail('work'), raising=False)
    with pytest.raises(InputError) as refused:
        script.main()
    message, = str(refused.value).splitlines()
    assert name in message and str(value) in message


@pytest.mark.parametrize('script, name, value', cases(ACCEPTED))
def test_a_setting_at_the_edge_of_its_range_is_accepted(script, name, value, monkeypatch):
    monkeypatch.setattr(script, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        script.check_settings()


@pytest.mark.parametrize('split', ['val', 'trainval', ''])
def test_a_split_that_does_not_exist_is_refused_before_the_network_is_loaded(split, monkeypatch, sample_lists):
    monkeypatch.setattr(evaluation, 'split', split)
    monkeypatch.setattr(evaluation, 'data_folder', str(sample_lists))
    monkeypatch.setattr(evaluation, 'load_model', lambda *_: pytest.fail('work'))
    with pytest.raises(InputError, match=f"'{split}'"):
        evaluation.main()


@pytest.mark.parametrize('cores', [1, 4, None])
def test_far_more_workers_than_cores_are_only_warned_about(cores, monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: cores)
    cores = cores or 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for workers in (0, 1, cores, 2 * cores):
            warn_about_workers(workers)
    with pytest.warns(UserWarning, match=f'{2 * cores + 1} workers on {cores} CPU cores'):
        warn_about_workers(2 * cores + 1)


@pytest.mark.parametrize('script', [train, evaluation])
def test_training_and_evaluation_warn_about_too_many_workers(script, monkeypatch):
    monkeypatch.setattr(script, 'workers', 2 * os.cpu_count() + 1)
    with pytest.warns(UserWarning, match='workers'):
        script.check_settings()


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(InputError, match='workers must be 0 or more, not -2'):
        warn_about_workers(-2)
