"""README.md can't go stale: its links, pictures, snippets, commands and numbers are those of the code."""

import ast
import base64
import contextlib
import csv
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageChops
from torch.utils.flop_counter import FlopCounterMode

from model import FEATURE_MAPS
from utils import override_settings, parse_annotation

README, TESTS_README, IMG_README = ((ROOT / folder / 'README.md').read_text(encoding='utf-8')
                                    for folder in ('', 'tests', 'img'))
PROSE = re.sub(r'```.*?```', '', README, flags=re.DOTALL)
PICTURES = re.findall(r'!\[([^\]]*)\]\(([^)]*)\)', PROSE)
EXCERPTS = re.findall(r'```python\n# in (\w+\.py), ([\w.]+)(?:\(\))?\n(.*?)```', README, flags=re.DOTALL)
SNIPPETS = re.findall(r'```python\n(?!# in )(.*?)```(?:\n```\n(.*?)```)?', README, flags=re.DOTALL)
EMBEDDED = rb'(?<=base64,)[^"]*'  # the pictures inside an SVG
COMMANDS = [line.split('  #')[0].strip() for block in re.findall(r'```bash\n(.*?)```', README + TESTS_README, re.DOTALL)
            for line in re.sub(r'\\\n\s*', '', block).splitlines()]


def anchors(markdown):
    """The anchors that GitHub gives to headings: lower case, without punctuation, hyphens for blanks."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', markdown, flags=re.DOTALL), flags=re.MULTILINE)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


def links():
    """(page, text, target) of the links of all pages that lead to a place in the repository."""
    link = r'(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*(?:\([^()]*\)[^()\s]*)*)\)'
    pages = {'README.md': PROSE, 'tests/README.md': TESTS_README, 'img/README.md': IMG_README}
    return sorted({(page, text, target) for page, content in pages.items()
                   for text, target in re.findall(link, content) if not target.startswith('http')})


@pytest.mark.parametrize(('page', 'text', 'target'), links())
def test_every_link_leads_somewhere_and_what_it_names_is_defined_there(page, text, target):
    file, _, anchor = target.partition('#')
    path = (ROOT / page).parent / file if file else ROOT / page
    assert path.exists()
    if anchor:
        assert path.suffix == '.md' and anchor in anchors(path.read_text(encoding='utf-8'))  # and no line counts
    name = re.search(r'`(\w+)', text)
    if path.suffix == '.py' and name and path.name not in text:
        defined = rf'^\s*(def|class) {name[1]}\b|^{name[1]}(: .*)? = '
        assert re.search(defined, path.read_text(encoding='utf-8'), re.MULTILINE)


def test_headings_have_anchors_of_their_own_and_the_contents_name_every_part_and_every_chapter_of_the_story():
    assert len(anchors(README)) == len(set(anchors(README))) > 30
    contents = re.findall(r'\[([^\]]*)\]', README.split('# Contents')[1].split('\n# ')[0])
    headings = re.findall(r'^(##?) (.*)$', re.sub(r'```.*?```', '', README, flags=re.DOTALL), flags=re.MULTILINE)
    parts = [name for level, name in headings if level == '#'][2:]  # after the title and "Contents"
    story = README.split('\n# Overview\n')[1].split('\n# Implementation\n')[0]
    assert contents == [name for level, name in headings
                        if name in parts or (level == '##' and f'\n## {name}\n' in story)]


def test_the_page_is_finished_and_stays_short():
    assert '@@' not in README
    assert len(README.split()) <= 12_000


def test_every_drawn_picture_is_shown_with_a_text_that_tells_what_it_shows_and_all_stay_small():
    drawn = {path.name for path in (ROOT / 'img').iterdir() if path.suffix in ('.svg', '.jpg', '.png')}
    assert drawn == {Path(path).name for _, path in PICTURES} and len(drawn) == len(PICTURES) <= 36
    for text, path in PICTURES:
        assert (ROOT / path).is_file(), path
        assert len(text) > 40 and text.endswith('.'), path
    assert sum(path.stat().st_size for path in (ROOT / 'img').rglob('*') if path.is_file()) < 6e6


def test_formulas_that_stand_alone_are_fenced():
    assert '$$' not in README and README.count('```math') > 3


def source_of(file, name):
    """The lines of a function or class, or of a method given as Class.method or by its name alone, dedented."""
    content = (ROOT / file).read_text(encoding='utf-8')
    node = ast.parse(content)
    for part in name.split('.'):
        node = next(inner for inner in ast.walk(node) if getattr(inner, 'name', None) == part)
    first = min([node, *node.decorator_list], key=lambda part: part.lineno).lineno
    return textwrap.dedent('\n'.join(content.splitlines()[first - 1:node.end_lineno])).splitlines()


def is_excerpt(excerpt, source) -> bool:
    """Whether the excerpt's lines stand together in the source, with gaps only where the excerpt has a line of "…"."""
    for indent in range(0, 24, 4):
        place = 0  # in the source
        for part in re.split(r'^ *(?:# )?…\n', excerpt, flags=re.MULTILINE):
            lines = textwrap.indent(part.strip('\n'), ' ' * indent).splitlines()
            places = (i for i in range(place or 0, len(source)) if source[i:i + len(lines)] == lines)
            place = next(places, None) if lines and place is not None else place
            place = place + len(lines) if place is not None else None
        if place is not None:
            return True
    return False


@pytest.mark.parametrize(('file', 'name', 'excerpt'), EXCERPTS, ids=[f'{file} {name}' for file, name, _ in EXCERPTS])
def test_every_excerpt_stands_in_the_code_line_by_line(file, name, excerpt):
    assert is_excerpt(excerpt, source_of(file, name)), excerpt


def test_an_excerpt_with_another_character_or_a_gap_would_be_noticed():
    source = ['def f(x):', '    for y in x:', '        z = y  # (N)', '        print(z)', '    return z']
    assert is_excerpt('for y in x:\n    z = y  # (N)\n    # …\nreturn z\n', source)
    assert is_excerpt('def f(x):\n    …\n    return z\n', source)
    for wrong in ('z = y  # (M)\n', 'z = y\n', 'for y in x:\n    print(z)\n', 'for y in x:\nz = y  # (N)\n',
                  'return z\n…\ndef f(x):\n'):
        assert not is_excerpt(wrong, source), wrong
    assert source_of('utils.py', 'decimate')[0] == 'def decimate(tensor, m):'
    assert source_of('model.py', 'SSD300.create_prior_boxes')[:2] == ['@staticmethod', 'def create_prior_boxes():']


class Camera:
    """Stands in for OpenCV's VideoCapture: two frames, then the end of the film."""

    def __init__(self, source):
        self.frames = [(True, numpy.zeros((48, 64, 3), dtype='uint8'))] * 2

    def read(self):
        return self.frames.pop() if self.frames else (False, None)


def write_fruit(folder):
    """Annotations of the same box in COCO's and in YOLO's form, each beside a picture of 100 × 50 pixels."""
    for part in ('train', 'images', 'labels'):
        (folder / part).mkdir(parents=True)
    for path in ('train/a.jpg', 'images/b.png'):
        Image.new('RGB', (100, 50)).save(folder / path)
    (folder / 'train' / '_annotations.coco.json').write_text(json.dumps({
        'images': [{'id': 7, 'file_name': 'a.jpg', 'width': 100, 'height': 50}],
        'categories': [{'id': 3, 'name': 'pear'}],
        'annotations': [{'image_id': 7, 'category_id': 3, 'bbox': [10, 20, 40, 10]}]}))
    (folder / 'labels' / 'b.txt').write_text('1 0.3 0.5 0.4 0.2\n')


@pytest.mark.slow
def test_every_snippet_prints_what_is_shown(monkeypatch, tmp_path, sample_lists):
    assert README.count('```python') == len(SNIPPETS) + len(EXCERPTS) > 10
    monkeypatch.chdir(tmp_path)
    Path('img').symlink_to(ROOT / 'img')
    Path('data').symlink_to(sample_lists)
    write_fruit(tmp_path / 'fruit')
    monkeypatch.setitem(sys.modules, 'cv2', types.SimpleNamespace(VideoCapture=Camera))
    torch.manual_seed(0)
    namespace, fruit_map = {}, {'background': 0, 'apple': 1, 'pear': 2, 'plum': 3}
    for code, shown in SNIPPETS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace('/data/fruit', f'{tmp_path}/fruit').replace('range(1, 61)', 'range(1, 3)'), namespace)
        if 'range(1, 61)' in code:  # sixty steps take minutes, and end in other digits on other processors
            step, loss = printed.getvalue().split()
            assert step == '1' and float(loss) == pytest.approx(float(shown.split()[1]), abs=0.3)
        else:
            assert printed.getvalue() == shown, code
        if '/data/fruit' in code:
            found = [parse_annotation(path, fruit_map) for path in (tmp_path / 'fruit').rglob('*.xml')]
            found, = (objects for objects in found if objects['labels'])
            assert found['labels'] == [2]
            assert found['boxes'] == [pytest.approx([10, 20, 49, 29])]
    assert {f'true_{i}.jpg' for i in range(8)} <= {path.name for path in tmp_path.iterdir()}
    assert namespace['there'] is False and namespace['annotated'].size == (64, 48)


@pytest.mark.parametrize('command', sorted({part.strip() for command in COMMANDS for part in command.split('&&')
                                            if '.py' in part}))
def test_every_command_has_settings_that_exist(command, monkeypatch):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith('.py'))
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module = importlib.import_module(Path(script).stem)
    for name in module.__annotations__:
        monkeypatch.setattr(module, name, getattr(module, name))  # restored afterwards
    monkeypatch.setattr(sys, 'argv', words[words.index(script):])
    override_settings(module)
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--batchsize', '3'])
    with pytest.raises(SystemExit):
        override_settings(module)  # a wrong name would be noticed


def test_the_test_command_is_the_one_that_is_run_automatically():
    command = 'pip install -r requirements.txt pytest && python -m pytest'
    assert command in COMMANDS
    assert command in (ROOT / '.ci' / 'run').read_text().splitlines()


@pytest.mark.slow
def test_the_quick_start_runs_as_it_stands_though_for_one_epoch(tmp_path):
    quick_start, = (command for command in COMMANDS if command.startswith('pip install -r requirements.txt &&'))
    for name in ('img', *(path.name for path in ROOT.glob('*.py'))):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = [part.strip() for part in quick_start.split('&&')][1:]
    assert [shlex.split(command)[1] for command in commands] == ['create_data_lists.py', 'train.py', 'eval.py',
                                                                'detect.py']
    printed = ''
    for command in commands:
        words = [sys.executable, *shlex.split(command)[1:]] + ['--epochs', '1'] * ('train.py' in command)
        process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert process.returncode == 0, process.stderr
        printed += process.stdout
    assert 'mAP of 8 pictures: ' in printed and 'drawn in detections' in printed
    assert sum(line.startswith(('dog ', 'cat ', 'person ')) for line in printed.splitlines()) >= 3
    checkpoint = torch.load(tmp_path / 'quick_start' / 'checkpoint_ssd300.pth', weights_only=True)
    assert (checkpoint['epoch'], len(checkpoint['model']), checkpoint['settings']['pretrained']) == (1, 71, False)
    assert 'mAP' in (tmp_path / 'evaluation' / 'report.json').read_text()
    made = {path.name for path in tmp_path.iterdir() if not path.is_symlink()} - {'__pycache__'}
    assert made == {'data', 'quick_start', 'evaluation', 'detections'}  # a real training's files stay as they are


def test_the_table_of_priors_is_that_of_the_code():
    rows = re.findall(r'^\| `(conv\w+)` \| (\d+) × (\d+) \| ([\d.]+) \| (.*?) \| (\d) \| (\d+) \|$', README,
                      flags=re.MULTILINE)
    assert len(rows) == 6
    for row, feature_map in zip(rows, FEATURE_MAPS):
        name, height, width, scale, ratios, per_position, total = row
        assert (name, float(scale), int(per_position)) == (feature_map.name, feature_map.scale, feature_map.n_priors)
        assert int(height) == int(width) == feature_map.grid
        assert int(total) == feature_map.grid ** 2 * feature_map.n_priors
        numbers = [eval(ratio) for ratio in ratios.removesuffix(', extra 1').split(', ')]
        assert sorted(numbers) == pytest.approx(sorted(feature_map.ratios), abs=1e-3)
    assert '**8732**' in README and sum(int(row[-1]) for row in rows) == 8732


def test_the_numbers_in_the_text_are_computed_by_the_code(model):
    overshooting = ((model.priors_cxcy[:, :2] - model.priors_cxcy[:, 2:] / 2 < 0)
                    | (model.priors_cxcy[:, :2] + model.priors_cxcy[:, 2:] / 2 > 1)).any(dim=1).sum().item()
    assert f'{overshooting} of the 8732 do' in README
    fc_weights = 4096 * 512 * 7 * 7 + 4096 * 4096
    assert f'{fc_weights / 1e6:.1f} million weights' in README
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 300, 300))
    assert f'{counter.get_total_flops() / 1e9:.1f} billion floating-point operations' in TESTS_README
    # Each layer's kernel widens the field by (kernel − 1) · dilation · what one step on its input means in pixels.
    field, jump = 1, 1
    for block, n_convs in enumerate((2, 2, 3, 3), start=1):
        field += 2 * jump * n_convs
        if block < 4:
            field, jump = field + jump, jump * 2
    field += 2 * jump
    assert f'{field} pixels wide, {field / 300:.2f} of the image' in README


def test_the_healthy_run_is_the_published_log():
    log = dict(enumerate(csv.DictReader((ROOT / 'img/results/voc/gluoncv.csv').open()), start=1))
    epochs, losses, mAPs = ([float(cell) for cell in line.split('|')[2:-1]] for line in re.findall(
        r'^\| (?:after epoch|loss|mAP) \|.*\d.*\|$', README, flags=re.MULTILINE))
    for epoch, loss, mAP in zip(epochs, losses, mAPs, strict=True):
        row = {name: float(value) for name, value in log[int(epoch)].items()}
        assert loss == round(row['confidence_loss'] + row['localization_loss_paper_units'] / 4, 1)
        assert mAP == round(100 * row['mAP'], 1)


def test_the_recipe_is_that_of_the_settings():
    import train
    assert (train.momentum, train.weight_decay, train.lr, train.batch_size, train.epochs, train.warmup,
            train.localization) == (0.9, 5e-4, 1e-3, 8, 232, 500, 'smooth_l1')
    for item in ('SGD, momentum 0.9, weight decay 5e-4 ', 'a learning rate of 1e-3, for biases 2e-3 ', 'batches of 8 ',
                 '232 epochs, with a tenth of the rate after epochs 154 and 193 ', 'smooth L1 ',
                 'a warm-up over the first 500 steps, at most one epoch, '):
        assert f'\n- {item}' in README


@pytest.mark.slow
def test_the_figures_are_drawn_again_as_they_are(tmp_path):
    process = subprocess.run([sys.executable, ROOT / 'img' / 'draw_figures.py', '--output_folder', tmp_path],
                             capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    for _, path in PICTURES:
        drawn, committed = (folder.read_bytes() for folder in (tmp_path / Path(path).name, ROOT / path))
        assert re.sub(EMBEDDED, b'', drawn) == re.sub(EMBEDDED, b'', committed), path
        for new, old in zip(re.findall(EMBEDDED, drawn), re.findall(EMBEDDED, committed)):
            if new != old:  # another version of Pillow may round differently
                new, old = (Image.open(io.BytesIO(base64.b64decode(picture))).convert('L') for picture in (new, old))
                difference = ImageChops.difference(new, old)
                assert sum(level * n for level, n in enumerate(difference.histogram())) < new.width * new.height
