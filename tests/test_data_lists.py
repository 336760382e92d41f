"""From VOC's annotations to data lists."""

import codecs
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_annotation, make_voc, noise, random_boxes
from PIL import Image
from references import iou

import create_data_lists as script
import utils
from utils import InputError, create_data_lists, parse_annotation, voc_labels

LISTS = ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects', 'label_map')
CAT, DOG, PERSON = (utils.label_map[label] for label in ('cat', 'dog', 'person'))

# An annotation as in VOC 2007: a person with parts, and objects that differ from it in form.
VOC_XML = """<annotation>
	<folder>VOC2007</folder><filename>000005.jpg</filename>
	<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>
	<owner><flickrid>Fried Camels</flickrid><name>cat</name></owner>
	<size><width>500</width><height>375</height><depth>3</depth></size><segmented>0</segmented>
	<object>
		<name>person</name><pose>Rear</pose><truncated>0</truncated><difficult>0</difficult>
		<bndbox><xmin>263</xmin><ymin>211</ymin><xmax>324</xmax><ymax>339</ymax></bndbox>
		<part><name>head</name><bndbox><xmin>270</xmin><ymin>211</ymin><xmax>290</xmax><ymax>230</ymax></bndbox></part>
		<part><name>dog</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
	</object>
	<object>
		<part><name>hand</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
		<bndbox><ymax>44</ymax><xmax>33</xmax><ymin>22</ymin><xmin>11</xmin></bndbox>
		<difficult>1</difficult><name>cat</name>
	</object>
</annotation>
"""


def parse(folder, xml, **arguments):
    """What parse_annotation makes of a text."""
    (folder / 'picture.xml').write_text(xml)
    return parse_annotation(folder / 'picture.xml', **arguments)


def read_lists(folder):
    return {name: json.loads((Path(folder) / f'{name}.json').read_text(encoding='utf-8')) for name in LISTS}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def voc(tmp_path):
    """A small VOC: two pictures for training in each year and one for the test."""
    make_voc(tmp_path / 'VOC2007', {'000005': [('cat', (1, 1, 11, 11), 0), ('dog', (5, 6, 20, 21), 1)], '000002': []})
    names = tmp_path / 'VOC2007' / 'ImageSets' / 'Main' / 'trainval.txt'
    names.write_bytes(codecs.BOM_UTF8 + b'000005\r\n\r\n 000002 \r\n')  # as an editor on Windows saves it
    make_voc(tmp_path / 'VOC2007', {'000009': [('person', (2, 3, 64, 48), 0)]}, split='test')
    make_voc(tmp_path / 'VOC2012', {'2008_000001': [('dog', (1, 1, 30, 30), None)], '2007_000027': []})
    return tmp_path


# ------------------------------------------------------------------------------------------- annotations

def test_boxes_are_counted_from_zero_and_parts_and_owners_are_no_objects(tmp_path):
    assert parse(tmp_path, VOC_XML) == {'boxes': [[262, 210, 323, 338], [10, 21, 32, 43]], 'labels': [PERSON, CAT],
                                        'difficulties': [0, 1]}
    assert parse(tmp_path, '<annotation/>') == {'boxes': [], 'labels': [], 'difficulties': []}


def test_decimals_capitals_blanks_and_a_missing_difficult_are_read(tmp_path):
    xml = make_annotation([(' Cat\n', (' 12.0', '3.5 ', '\n40.25\n', '4e1'), ' 1 '), ('DOG', (1, 1, 9, 9), None)])
    assert parse(tmp_path, xml) == {'boxes': [[11.0, 2.5, 39.25, 39.0], [0, 0, 8, 8]], 'labels': [CAT, DOG],
                                    'difficulties': [1, 0]}


@pytest.mark.parametrize('box', [(9, 1, 9, 20), (1, 20, 20, 10), ('nan', 1, 9, 9), ('10.0000001', 1, '10.0000002', 9)])
def test_boxes_without_area_are_left_out_and_noted_with_the_file(tmp_path, box):
    findings = utils.Findings()
    objects = parse(tmp_path, make_annotation([('cat', (1, 1, 9, 9), 0), ('dog', box, 0)]), findings=findings)
    assert objects == {'boxes': [[0, 0, 8, 8]], 'labels': [CAT], 'difficulties': [0]}
    (note,), = findings.notes.values()
    assert note == f"'{tmp_path / 'picture.xml'}' dog ({', '.join(map(str, box))})"
    assert findings.labels == {'cat': 1, 'dog': 1}


def test_boxes_are_cut_at_the_edges_of_the_picture_and_those_outside_left_out(tmp_path):
    boxes = [(0, 0, 65, 49), (-7, 5, 10, 400), (60, 40, 1e300, 48.5), (1, 1, 64, 48)]
    outside = [(65, 1, 80, 20), (1, 49, 20, 90), (-20, 1, 0, 20), (64, 1, 99, 20)]
    objects = parse(tmp_path, make_annotation([('cat', box, 0) for box in boxes + outside]), size=(64, 48))
    assert objects['boxes'] == [[0, 0, 63, 47], [0, 4, 9, 47], [59, 39, 63, 47], [0, 0, 63, 47]]
    assert len(objects['labels']) == len(objects['difficulties']) == 4


CAT_XML = make_annotation([('cat', (1, 2, 30, 40), 0)])


@pytest.mark.parametrize(('xml', 'reason'), [
    (VOC_XML[:700], 'line 10'), ('<html>404 Not Found</html>', 'its root is <html>'),
    (CAT_XML.replace('xmax', 'right'), 'an object without bndbox/xmax'), (CAT_XML.replace('30', 'far'), "'far'")])
def test_what_is_no_annotation_is_refused_in_one_line_that_says_why(tmp_path, xml, reason):
    with pytest.raises(InputError) as refused:
        parse(tmp_path, xml)
    message, = str(refused.value).splitlines()
    assert str(tmp_path / 'picture.xml') in message and reason in message and 'repair it' in message


# -------------------------------------------------------------------------------------------- data lists

def test_the_five_lists_hold_2007_before_2012_with_absolute_paths(voc, capsys, monkeypatch):
    monkeypatch.chdir(voc)
    create_data_lists('VOC2007', 'VOC2012', 'lists')
    paths = [f'{voc}/VOC2007/JPEGImages/000005.jpg', f'{voc}/VOC2007/JPEGImages/000002.jpg',
             f'{voc}/VOC2012/JPEGImages/2008_000001.jpg', f'{voc}/VOC2012/JPEGImages/2007_000027.jpg']
    nothing = {'boxes': [], 'labels': [], 'difficulties': []}
    assert read_lists('lists') == {
        'TRAIN_images': paths,
        'TRAIN_objects': [{'boxes': [[0, 0, 10, 10], [4, 5, 19, 20]], 'labels': [CAT, DOG], 'difficulties': [0, 1]},
                          nothing, {'boxes': [[0, 0, 29, 29]], 'labels': [DOG], 'difficulties': [0]}, nothing],
        'TEST_images': [f'{voc}/VOC2007/JPEGImages/000009.jpg'],
        'TEST_objects': [{'boxes': [[1, 2, 63, 47]], 'labels': [PERSON], 'difficulties': [0]}],
        'label_map': {'background': 0, **{label: i + 1 for i, label in enumerate(voc_labels)}}}
    assert sorted(snapshot('lists')) == sorted(f'{name}.json' for name in LISTS)
    assert capsys.readouterr().out.splitlines() == [
        'TRAIN: 4 pictures with 3 objects', 'TEST: 1 pictures with 1 objects',
        f"The data lists are in '{voc}/lists'", '2 training pictures have no object of these labels: they teach '
        "nothing without train.py's min_negatives; --skip_empty leaves them out"]


def test_pictures_without_objects_are_left_out_of_the_training_lists_alone_if_asked_for(voc, capsys, monkeypatch):
    monkeypatch.chdir(voc)
    more = ['VOC2012', 'VOC2012']  # as many folders as one likes
    boxes, labels = create_data_lists('VOC2007', more, 'lists', labels=['Cow', ' dog'], skip_empty=True)
    lists = read_lists('lists')
    assert lists['label_map'] == {'background': 0, 'Cow': 1, 'dog': 2}
    assert [Path(path).stem for path in lists['TRAIN_images']] == ['000005', '2008_000001', '2008_000001']
    assert lists['TRAIN_objects'][0] == {'boxes': [[4, 5, 19, 20]], 'labels': [2], 'difficulties': [1]}
    assert len(lists['TEST_images']) == 1  # without a dog
    said = capsys.readouterr().out
    assert '3 training pictures have no object of these labels: left out' in said
    assert 'Left out the objects of other labels: cat (1), person (1)' in said
    assert labels.tolist() == [2, 2, 2]
    torch.testing.assert_close(boxes[:2], torch.tensor([[4 / 64, 5 / 48, 19 / 64, 20 / 48], [0, 0, 29 / 64, 29 / 48]]))
    (voc / 'VOC2012' / 'Annotations' / '2007_000027.xml').unlink()
    create_data_lists('VOC2007', 'VOC2012', 'lists', keep_unannotated=True)
    assert read_lists('lists')['TRAIN_objects'][3] == {'boxes': [], 'labels': [], 'difficulties': []}
    with pytest.raises(InputError, match='labels must be names that differ'):
        create_data_lists('VOC2007', None, 'lists', labels=['cow', 'Cow '])


@pytest.mark.parametrize(('name', 'content'), [
    ('VOC2012', None), ('VOC2007/ImageSets/Main/test.txt', b'\n \n'), ('VOC2007/ImageSets/Main/test.txt', None),
    ('VOC2007/ImageSets/Main/trainval.txt', b'\xff'), ('VOC2012/Annotations/2007_000027.xml', b'<a/>'),
    ('VOC2007/JPEGImages/000009.jpg', None), ('VOC2012/JPEGImages/2008_000001.jpg', b'not a picture')])
def test_whatever_is_missing_or_broken_is_named_and_the_old_lists_stay(voc, name, content):
    create_data_lists(voc / 'VOC2007', None, voc / 'lists')
    before = snapshot(voc / 'lists')
    if content is None:
        (voc / name).rename(voc / 'elsewhere')
    else:
        (voc / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        create_data_lists(voc / 'VOC2007', voc / 'VOC2012', voc / 'lists')
    message, = str(refused.value).splitlines()
    assert str(voc / name).removesuffix('.jpg') in message
    assert snapshot(voc / 'lists') == before


@pytest.mark.filterwarnings('error')
def test_boxes_of_a_turned_photo_are_cut_at_the_edges_of_the_upright_one(tmp_path):
    voc = make_voc(tmp_path / 'VOC', {'a': make_annotation([('cat', (1, 1, 64, 64), 0)], (48, 64))})
    make_voc(voc, {'b': []}, split='test')
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (64, 48)).save(voc / 'JPEGImages' / 'a.jpg', exif=exif)  # as the sensor saw it
    create_data_lists(voc, None, tmp_path / 'lists')
    assert read_lists(tmp_path / 'lists')['TRAIN_objects'][0]['boxes'] == [[0, 0, 47, 63]]
    noise(64, 48).save(tmp_path / 'a.png', exif=exif)
    (tmp_path / 'a.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-999])  # the header alone is read
    assert utils.picture_size(tmp_path / 'a.png') == (48, 64)


# ------------------------------------------------------------------------------------------ anybody's data

THING = make_annotation([('thing', (5, 6, 30, 40), 0)])
FLAT = make_annotation([('thing', (5, 6, 5, 6), 0)] * 4)
LARGER = make_annotation([('thing', (150, 6, 180, 40), 0)], size=(200, 150))
JPEGS, XMLS, JPG_A, XML_A = 'JPEGImages', 'Annotations', 'JPEGImages/a.jpg', 'Annotations/a.xml'
TRAINVAL, TEST = 'ImageSets/Main/trainval.txt', 'ImageSets/Main/test.txt'
PICTURE, NO_FOLDERS = Image.new('RGB', (64, 48)), {JPEGS: None, XMLS: None, 'ImageSets': None}


@pytest.mark.parametrize(('files', 'names', 'said'), [
    ({'ImageSets': None, f'{JPEGS}/._a.jpg': '', **{f'{JPEGS}/{n}.jpg': PICTURE for n in 'def'}, **{
        f'{XMLS}/{n}.xml': THING for n in 'def'}}, 'b c d e | a f', "^'.* has no lists .* every fifth .*, 2 of them"),
    ({TRAINVAL: 'a.jpg\nb.JPG\n', TEST: 'c.jpg -1'}, 'a b | c', '^TRAIN'),
    ({TRAINVAL: 'a\r\nb\r\n'.encode('utf-16'), TEST: codecs.BOM_UTF8 + b'c'}, 'a b | c', '^TRAIN'),
    ({JPG_A: None, f'{JPEGS}/a.JPG': PICTURE, f'{JPEGS}/c.jpg': None, f'{JPEGS}/c.png': PICTURE}, 'a b | c', '^TRAIN'),
    ({f'{JPEGS}/x/a.webp': PICTURE, f'{XMLS}/x/a.xml': THING, TRAINVAL: 'x\\a.webp 1\na\nb'}, 'x/a a b | c', '^TRAIN'),
    ({**NO_FOLDERS, 'a.jpg': PICTURE, 'a.xml': THING, 'b.tif': PICTURE, 'b.xml': THING}, 'b | a', 'every fifth'),
    ({**NO_FOLDERS, 'train/1.jpg': PICTURE, 'train/1.xml': THING, 'Test/1.jpg': PICTURE, 'Test/1.xml': THING,
      'valid/2.jpg': PICTURE, 'valid/2.xml': THING}, 'train/1 | Test/1', 'test/ for testing, all else is left out'),
    ({**NO_FOLDERS, 'p/train/1.png': PICTURE, 'p/train/1.xml': THING, 'p/valid/2.jpg': PICTURE, 'p/valid/2.xml': THING},
     'p/train/1 | p/valid/2', 'train/ is for training, valid/ for testing'),
    ({TEST: 'b\nc'}, 'a b | b c', "1 test pictures are training pictures, too: .*too high: '.*b.jpg'"),
    ({XML_A: LARGER}, 'a b | c', r"1 annotations have a <size>.*a\.xml' \(200×150, not 64×48\)\nTRAIN"),
    ({XML_A: FLAT}, 'a b | c', r"4 boxes have no area.*('.*a\.xml' thing \(5, 6, 5, 6\), ){3}…\nTRAIN"),
    ({f'{XMLS}/b.xml': None}, 'a | c', r"1 pictures have no XML file.*--keep_unannotated.*b\.jpg'\nTRAIN: 1"),
    ({'ImageSets': None, f'{XMLS}/d.xml': THING}, 'b c | a', r"1 XML files have no picture of that name: '.*d\.xml'"),
    ({JPG_A: None, f'{JPEGS}/c.jpg': None}, None, "of 3 pictures 2 can't be used: .*a' isn't there, .*c' isn't there"),
    ({f'{JPEGS}/c.jpg': noise(64, 48)}, None, r"of 3 pictures 1 can't be used: .*c\.jpg' can't be read \(.*truncated"),
    ({f'{JPEGS}/a.PNG': PICTURE}, None, r"of 3 pictures 1 .*a\.PNG' and '.*a\.jpg' have the same name"),
    ({XML_A: '<?xml version="1.0" encoding="GB2312"?>' + THING}, None, r"a\.xml' can't be read \(multi-byte.*UTF-8"),
    ({f'{XMLS}/{name}.xml': CAT_XML for name in 'abc'}, None, r'an object of thing: .* \(others there: cat \(3\)\)'),
    ({f'{XMLS}/{name}.xml': None for name in 'abc'}, None, '3 pictures and 0 XML files.*export.*as Pascal VOC')])
def test_data_of_any_tool_are_read_or_it_is_said_what_is_wrong(tmp_path, capsys, files, names, said):
    voc = make_voc(make_voc(tmp_path / 'own', {'a': THING, 'b': THING}), {'c': THING}, 'test')
    for name, content in files.items():
        path = voc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif isinstance(content, Image.Image):
            content.save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if 'truncated' in said:
        path.write_bytes(path.read_bytes()[:-200])
    found = text = None
    with warnings.catch_warnings(record=True) as warned:
        try:
            create_data_lists(voc, None, tmp_path / 'lists', labels=['thing'])
            root, lists = voc / JPEGS if (voc / JPEGS).exists() else voc, read_lists(tmp_path / 'lists')
            found = ' | '.join(' '.join(Path(path).relative_to(root).with_suffix('').as_posix() for path in lists[name])
                               for name in ('TRAIN_images', 'TEST_images'))
        except InputError as error:
            text = str(error)
    assert found == names
    assert re.search(said, ''.join(f'{warning.message}\n' for warning in warned) + (text or capsys.readouterr().out))
    assert len(warned) <= 1


def test_the_samples_second_folder_does_not_join_other_data(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(script, 'output_folder', str(tmp_path / 'lists'))
    for path, n_pictures in ((script.voc07_path, 8), (str(voc / 'VOC2007'), 2)):
        monkeypatch.setattr(script, 'voc07_path', path)
        script.main()
        assert len(read_lists(tmp_path / 'lists')['TRAIN_images']) == n_pictures


# ---------------------------------------------------------------------------------------------- download

def test_a_download_fetches_the_three_parts_of_voc_or_says_in_one_sentence_which_failed(tmp_path, monkeypatch):
    # torchvision's own VOCDetection, with its network and its archives replaced.
    from torchvision.datasets import voc as torchvision_voc

    def extract(url, root, **_):
        year = '2012' if '2012' in url else '2007'
        split = 'test' if 'test' in url.lower() else 'trainval'
        folder = Path(root, 'VOCdevkit', f'VOC{year}')
        make_voc(folder, {f'{year}_{split}': [('cat', (1, 1, 9, 9), 0)]}, split=split)

    def fail(url, root, **_):
        raise RuntimeError('File not found or corrupted.')

    for name, value in (('download', True), ('download_folder', str(tmp_path / 'new' / 'voc')),
                        ('output_folder', str(tmp_path / 'lists'))):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(torchvision_voc, 'download_and_extract_archive', fail)
    with pytest.raises(InputError, match=r'VOC 2007 trainval.*new/voc.*corrupted'):
        script.main()
    assert not (tmp_path / 'lists').exists()
    monkeypatch.setattr(torchvision_voc, 'download_and_extract_archive', extract)
    script.main()
    lists = read_lists(tmp_path / 'lists')
    assert [Path(path).stem for path in lists['TRAIN_images']] == ['2007_trainval', '2012_trainval']
    assert [Path(path).stem for path in lists['TEST_images']] == ['2007_test']


# -------------------------------------------------------------------------------------- what the priors can find

PRIORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])


def test_the_table_of_what_priors_can_find_worked_out_on_paper(capsys):
    boxes = torch.tensor([[0, 0, 0.5, 0.5],  # a prior itself: 1
                          [0, 0, 0.5, 0.3],  # 0.3 / 0.5 = 0.6 of a prior, and smaller than it
                          [0, 0, 0.1, 0.1],  # 0.01 / 0.25 = 0.04, smaller
                          [0, 0, 1, 1]])  # 0.25 / 1
    rows = script.coverage(boxes, torch.tensor([1, 1, 2, 2]), ['cat', 'dog', 'emu'], PRIORS)
    assert rows['cat'] == pytest.approx((2, 1, 0.8, 0.5))
    assert rows['dog'] == pytest.approx((2, 0, (0.04 + 0.25) / 2, 0.5))
    assert rows['emu'][0] == 0 and all(math.isnan(value) for value in rows['emu'][1:])
    assert rows['all'] == pytest.approx((4, 0.5, (0.25 + 0.6) / 2, 0.5))
    script.print_coverage(rows)
    said = capsys.readouterr().out
    assert 'cat                        2       100.0%         0.80      50.0%' in said.splitlines()
    assert 'Fewer than 80% find a prior: dog.' in said
    script.print_coverage({**rows, 'dgo': (0, math.nan, math.nan, math.nan)})
    assert re.search(r'dgo +0  no object: is it misspelled\?', capsys.readouterr().out)


def test_the_best_overlaps_of_many_objects_agree_with_the_definition():
    boxes, priors = random_boxes(230), utils.xy_to_cxcy(random_boxes(7, seed=1))  # more than are done at a time
    best = script.best_prior_overlaps(boxes, priors)
    priors_xy = utils.cxcy_to_xy(priors).tolist()
    expected = [max(iou(box, prior) for prior in priors_xy) for box in boxes.tolist()]
    torch.testing.assert_close(best, torch.tensor(expected), atol=1e-5, rtol=1e-4)
