"""From VOC's annotations to data lists."""

import codecs
import errno
import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_annotation, make_voc
from PIL import Image
from references import iou

import create_data_lists as script
import utils
from utils import InputError, create_data_lists, make_label_map, parse_annotation, picture_size, voc_labels

LISTS = ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects', 'label_map')
CAT, DOG, PERSON = (utils.label_map[label] for label in ('cat', 'dog', 'person'))

# An annotation as in VOC 2007: a person with parts, and objects that differ from it in form.
VOC_XML = """<annotation>
	<folder>VOC2007</folder>
	<filename>000005.jpg</filename>
	<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>
	<owner><flickrid>Fried Camels</flickrid><name>cat</name></owner>
	<size><width>500</width><height>375</height><depth>3</depth></size>
	<segmented>0</segmented>
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
    """What parse_annotation makes of a text or of bytes."""
    path = folder / 'picture.xml'
    path.write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    return parse_annotation(path, **arguments)


def refusal(folder, xml):
    """The one line with which parse_annotation refuses a text."""
    with pytest.raises(InputError) as refused:
        parse(folder, xml)
    message, = str(refused.value).splitlines()
    assert str(folder / 'picture.xml') in message and 'repair it' in message
    return message


def read_lists(folder):
    return {name: json.loads((Path(folder) / f'{name}.json').read_text(encoding='utf-8')) for name in LISTS}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def voc(tmp_path):
    """A small VOC: two pictures for training in each year and one for the test."""
    make_voc(tmp_path / 'VOC2007', {'000005': [('cat', (1, 1, 11, 11), 0), ('dog', (5, 6, 20, 21), 1)], '000002': []})
    make_voc(tmp_path / 'VOC2007', {'000009': [('person', (2, 3, 64, 48), 0)]}, split='test')
    make_voc(tmp_path / 'VOC2012', {'2008_000001': [('dog', (1, 1, 30, 30), None)], '2007_000027': []})
    return tmp_path


# ------------------------------------------------------------------------------------------- annotations

def test_coordinates_counted_from_one_become_coordinates_counted_from_zero(tmp_path):
    assert parse(tmp_path, VOC_XML)['boxes'][0] == [262, 210, 323, 338]


def test_parts_and_owners_are_not_objects_and_the_order_of_tags_does_not_matter(tmp_path):
    assert parse(tmp_path, VOC_XML) == {'boxes': [[262, 210, 323, 338], [10, 21, 32, 43]], 'labels': [PERSON, CAT],
                                        'difficulties': [0, 1]}


def test_decimals_capitals_and_blanks_are_read(tmp_path):
    xml = make_annotation([(' Cat\n', (' 12.0', '3.5 ', '\n40.25\n', '4e1'), ' 1 ')])
    assert parse(tmp_path, xml) == {'boxes': [[11.0, 2.5, 39.25, 39.0]], 'labels': [CAT], 'difficulties': [1]}


@pytest.mark.parametrize('difficult, expected', [(None, 0), ('', 0), ('0', 0), ('1', 1)])
def test_an_object_is_difficult_only_if_it_says_so(tmp_path, difficult, expected):
    assert parse(tmp_path, make_annotation([('cat', (1, 1, 9, 9), difficult)]))['difficulties'] == [expected]


def test_an_annotation_without_objects_gives_empty_lists(tmp_path):
    assert parse(tmp_path, '<annotation/>') == {'boxes': [], 'labels': [], 'difficulties': []}


def test_labels_outside_the_map_are_counted_and_their_objects_left_out(tmp_path):
    counts = Counter({'yeti': 1})
    objects = parse(tmp_path, make_annotation([('yeti', (1, 1, 9, 9), 0), ('cat', (1, 1, 9, 9), 0),
                                               ('Unicorn', (1, 1, 9, 9), 1), ('yeti', (5, 5, 1, 1), 0)]),
                    unknown_labels=counts)
    assert objects['labels'] == [CAT]
    assert counts == {'yeti': 3, 'Unicorn': 1}


def test_labels_of_ones_own_are_found_whatever_their_capitals(tmp_path):
    objects = parse(tmp_path, make_annotation([('zebra', (1, 1, 9, 9), 0), ('CAT', (1, 1, 9, 9), 0)]),
                    label_map=make_label_map(['Cat', 'Zebra']))
    assert objects['labels'] == [2, 1]


@pytest.mark.parametrize('box', [(9, 1, 9, 20), (1, 9, 20, 9), (20, 1, 10, 20), (1, 20, 20, 10), ('nan', 1, 9, 9),
                                 (1, 1, 'inf', 9), ('-inf', 1, 9, 9), (1, 'NaN', 9, 'nan'),
                                 ('10.0000001', 1, '10.0000002', 9)])
def test_boxes_without_area_are_left_out_with_a_warning_that_names_the_file(tmp_path, box):
    with pytest.warns(UserWarning) as warned:
        objects = parse(tmp_path, make_annotation([('cat', (1, 1, 9, 9), 0), ('dog', box, 0)]))
    assert objects == {'boxes': [[0, 0, 8, 8]], 'labels': [CAT], 'difficulties': [0]}
    message, = (str(warning.message) for warning in warned)
    assert str(tmp_path / 'picture.xml') in message and 'dog' in message and '\n' not in message


@pytest.mark.parametrize('missing', ['name', 'bndbox', 'bndbox/xmin', 'bndbox/ymin', 'bndbox/xmax', 'bndbox/ymax'])
def test_an_object_without_a_name_or_a_side_is_refused_by_naming_the_tag(tmp_path, missing):
    xml = make_annotation([('cat', (1, 2, 30, 40), 0)])
    for tag, text in (('name', 'cat'), ('xmin', 1), ('ymin', 2), ('xmax', 30), ('ymax', 40)):
        if missing.endswith(tag):
            xml = xml.replace(f'<{tag}>{text}</{tag}>', '')
    if missing == 'bndbox':
        xml = xml.replace('bndbox', 'box')
    assert missing in refusal(tmp_path, xml)


@pytest.mark.parametrize('side', ['', ' ', 'twelve', '1,5', '0x10', '1 2'])
def test_a_side_that_is_no_number_is_refused(tmp_path, side):
    assert 'float' in refusal(tmp_path, make_annotation([('cat', (1, 1, side, 9), 0)]))


@pytest.mark.parametrize('xml', [
    b'', b'\0\0\0', b'no xml at all', VOC_XML[:700].encode(), b'<annotation><object></annotation>',
    b'<annotation>&nbsp;</annotation>', '<annotation><object><name>Bär</name></object></annotation>'.encode('latin-1'),
    b'<?xml version="1.0" encoding="klingon"?><annotation/>', b'<annotation/><annotation/>',
    Image.new('RGB', (2, 2)).tobytes(), b'<html><body>404 Not Found</body></html>'])
def test_a_file_that_is_no_annotation_is_refused(tmp_path, xml):
    assert "isn't a VOC annotation" in refusal(tmp_path, xml)


LAUGHS = '<!ENTITY lol0 "lol">' + ''.join(
    f'<!ENTITY lol{i} "{f"&lol{i - 1};" * 10}">' for i in range(1, 13))
BOMBS = {
    'billion laughs': f'<!DOCTYPE annotation [{LAUGHS}]><annotation><object><name>&lol12;</name></object></annotation>',
    'laughs in an attribute': f'<!DOCTYPE annotation [{LAUGHS}]><annotation name="&lol12;"/>',
    'quadratic': f'<!DOCTYPE annotation [<!ENTITY a "{"a" * 50_000}">]><annotation>{"&a;" * 50_000}</annotation>',
    'external entity': '<!DOCTYPE annotation [<!ENTITY secret SYSTEM "SECRET">]><annotation><object><name>&secret;'
                       '</name><bndbox/></object></annotation>',
    'external document type': '<!DOCTYPE annotation SYSTEM "SECRET"><annotation/>',
    'parameter entity': '<!DOCTYPE annotation [<!ENTITY % p SYSTEM "SECRET"> %p;]><annotation/>',
}


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
        'TRAIN: 4 images with 3 objects', 'TEST: 1 images with 1 objects',
        '2 training pictures have no object of these labels: --skip_empty leaves them out',
        f"The data lists are in '{voc}/lists'"]


def test_pictures_without_objects_are_left_out_of_the_training_lists_alone_if_asked_for(voc, capsys, monkeypatch):
    monkeypatch.chdir(voc)
    boxes, labels = create_data_lists('VOC2007', 'VOC2012', 'lists', labels=['cat'], skip_empty=True)
    lists = read_lists('lists')
    assert [Path(path).stem for path in lists['TRAIN_images']] == ['000005']
    assert lists['TRAIN_objects'] == [{'boxes': [[0, 0, 10, 10]], 'labels': [1], 'difficulties': [0]}]
    assert len(lists['TEST_images']) == 1  # without a cat
    assert '3 training pictures have no object of these labels: left out' in capsys.readouterr().out
    assert labels.tolist() == [1]
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 10 / 64, 10 / 48]]))
    with pytest.raises(InputError, match='no training picture has an object of horse'):
        create_data_lists('VOC2007', 'VOC2012', 'lists', labels=['horse'], skip_empty=True)


def test_without_2012_the_training_data_are_2007_alone(voc):
    create_data_lists(voc / 'VOC2007', None, voc / 'lists')
    assert [Path(path).stem for path in read_lists(voc / 'lists')['TRAIN_images']] == ['000005', '000002']


def test_the_printed_counts_are_those_of_the_lists_and_unknown_labels_are_told(tmp_path, capsys):
    cats = [('cat', (1, 1, 9, 9), 0)] * 700
    make_voc(tmp_path / 'VOC2007', {'a': cats, 'b': [*cats, ('yeti', (1, 1, 9, 9), 0)],
                                    'c': [('Eraser', (1, 1, 2, 2), 0)]})
    make_voc(tmp_path / 'VOC2007', {'d': [('yeti', (1, 1, 9, 9), 0), ('dog', (1, 1, 9, 9), 1)]}, split='test')
    create_data_lists(tmp_path / 'VOC2007', None, tmp_path / 'lists')
    train, test, _, yeti, eraser, _ = capsys.readouterr().out.splitlines()
    assert (train, test) == ('TRAIN: 3 images with 1,400 objects', 'TEST: 1 images with 1 objects')
    assert "'yeti'" in yeti and '2' in yeti.split() and "'Eraser'" in eraser and '1' in eraser.split()


def test_labels_of_ones_own_make_the_label_map(tmp_path):
    make_voc(tmp_path / 'VOC', {'a': [('zebra', (1, 1, 9, 9), 0), ('cat', (1, 1, 9, 9), 0)]})
    make_voc(tmp_path / 'VOC', {'b': []}, split='test')
    create_data_lists(tmp_path / 'VOC', None, tmp_path / 'lists', labels=['yak', 'zebra'])
    lists = read_lists(tmp_path / 'lists')
    assert lists['label_map'] == {'background': 0, 'yak': 1, 'zebra': 2}
    assert lists['TRAIN_objects'][0]['labels'] == [2]


BREAKAGES = {
    'the VOC folder of 2007': ('VOC2007', None),
    'the VOC folder of 2012': ('VOC2012', None),
    'the list of 2007 trainval': ('VOC2007/ImageSets/Main/trainval.txt', None),
    'the list of 2007 test': ('VOC2007/ImageSets/Main/test.txt', None),
    'the list of 2012 trainval': ('VOC2012/ImageSets/Main/trainval.txt', None),
    'the folder of lists': ('VOC2007/ImageSets', None),
    'an empty list': ('VOC2007/ImageSets/Main/test.txt', b'\n \n'),
    'a list that is no text': ('VOC2012/ImageSets/Main/trainval.txt', b'\xff\xfe\x00\x81'),
    'an annotation': ('VOC2007/Annotations/000002.xml', None),
    'an annotation of the test': ('VOC2007/Annotations/000009.xml', None),
    'a broken annotation': ('VOC2012/Annotations/2007_000027.xml', b'<annotation>'),
    'a picture': ('VOC2007/JPEGImages/000009.jpg', None),
    'a broken picture': ('VOC2012/JPEGImages/2008_000001.jpg', b'not a picture'),
    'an empty picture': ('VOC2007/JPEGImages/000005.jpg', b''),
}


@pytest.mark.parametrize('breakage', BREAKAGES)
@pytest.mark.parametrize('earlier', [False, True], ids=['without lists', 'with older lists'])
def test_whatever_is_missing_or_broken_is_named_and_nothing_is_written(voc, breakage, earlier):
    if earlier:
        create_data_lists(voc / 'VOC2007', None, voc / 'lists')
        before = snapshot(voc / 'lists')
    name, content = BREAKAGES[breakage]
    if content is None:
        (voc / name).rename(voc / 'elsewhere')
    else:
        (voc / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        create_data_lists(voc / 'VOC2007', voc / 'VOC2012', voc / 'lists')
    message, = str(refused.value).splitlines()
    assert str(voc / name) in message
    assert snapshot(voc / 'lists') == before if earlier else not (voc / 'lists').exists()


@pytest.mark.parametrize('when', [1, 3, 5])
def test_a_disk_that_fills_up_leaves_all_five_old_lists_as_they_were(voc, when, monkeypatch):
    create_data_lists(voc / 'VOC2007', None, voc / 'lists')
    before = snapshot(voc / 'lists')
    encoded = []

    def dumps(content):
        encoded.append(content)
        if len(encoded) == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return json_dumps(content)

    json_dumps = json.dumps
    monkeypatch.setattr(json, 'dumps', dumps)
    with pytest.raises(InputError, match='No space left'):
        create_data_lists(voc / 'VOC2007', voc / 'VOC2012', voc / 'lists')
    assert snapshot(voc / 'lists') == before


def test_boxes_are_cut_at_the_edges_of_the_picture(tmp_path):
    boxes = [(0, 0, 65, 49), (-7, 5, 10, 400), (60, 40, 1e300, 48.5), (1, 1, 64, 48)]
    make_voc(tmp_path / 'VOC', {'a': [('cat', box, 0) for box in boxes]})
    make_voc(tmp_path / 'VOC', {'b': []}, split='test')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        create_data_lists(tmp_path / 'VOC', None, tmp_path / 'lists')
    assert read_lists(tmp_path / 'lists')['TRAIN_objects'][0]['boxes'] == [
        [0, 0, 63, 47], [0, 4, 9, 47], [59, 39, 63, 47], [0, 0, 63, 47]]


@pytest.mark.parametrize('box', [(65, 1, 80, 20), (1, 49, 20, 90), (-20, 1, 0, 20), (1, -9, 20, 1), (64, 1, 99, 20),
                                 (200, 200, 300, 300)])
def test_boxes_outside_of_the_picture_are_left_out_with_a_warning_that_names_the_file(tmp_path, box):
    make_voc(tmp_path / 'VOC', {'a': [('cat', box, 1), ('dog', (1, 1, 9, 9), 0)]})
    make_voc(tmp_path / 'VOC', {'b': []}, split='test')
    with pytest.warns(UserWarning, match=r'a\.xml.*64×48'):
        create_data_lists(tmp_path / 'VOC', None, tmp_path / 'lists')
    assert read_lists(tmp_path / 'lists')['TRAIN_objects'] == [
        {'boxes': [[0, 0, 8, 8]], 'labels': [DOG], 'difficulties': [0]}]


def turned_picture(path, orientation, image_format='JPEG'):
    """Saves a picture of 64×48 as seen by the sensor, with an orientation in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (64, 48), 'gray').save(path, image_format, exif=exif)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_boxes_of_a_turned_photo_are_cut_at_the_edges_of_the_upright_one(tmp_path, orientation):
    voc = make_voc(tmp_path / 'VOC', {'a': [('cat', (1, 1, 64, 64), 0)]})
    make_voc(voc, {'b': []}, split='test')
    turned_picture(voc / 'JPEGImages' / 'a.jpg', orientation)
    create_data_lists(voc, None, tmp_path / 'lists')
    expected = [0, 0, 47, 63] if orientation >= 5 else [0, 0, 63, 47]
    assert read_lists(tmp_path / 'lists')['TRAIN_objects'][0]['boxes'] == [expected]


def test_lists_of_names_written_on_windows_are_read(voc):
    (voc / 'VOC2007/ImageSets/Main/trainval.txt').write_bytes(codecs.BOM_UTF8 + b'000002\r\n\r\n 000005 \r\n')
    create_data_lists(voc / 'VOC2007', None, voc / 'lists')
    assert [Path(path).stem for path in read_lists(voc / 'lists')['TRAIN_images']] == ['000002', '000005']


# ------------------------------------------------------------------------------- the sample and real VOC

def test_the_sample_has_eight_pictures_with_21_objects_for_each_split(sample_lists):
    lists = read_lists(sample_lists)
    for split in ('TRAIN', 'TEST'):
        assert len(lists[f'{split}_images']) == 8
        assert sum(len(objects['boxes']) for objects in lists[f'{split}_objects']) == 21
    assert sum('VOC2012' in path for path in lists['TRAIN_images']) == 2


@pytest.mark.parametrize('split', ['TRAIN', 'TEST'])
def test_each_class_of_the_sample_is_in_both_splits_and_can_be_found(sample_lists, split):
    countable = {label for objects in read_lists(sample_lists)[f'{split}_objects']
                 for label, difficult in zip(objects['labels'], objects['difficulties']) if not difficult}
    assert countable == set(range(1, 21))


def test_a_picture_of_the_sample_is_in_portrait_format_and_one_or_two_objects_are_difficult(sample_lists):
    lists = read_lists(sample_lists)
    sizes = [picture_size(path) for path in lists['TRAIN_images'] + lists['TEST_images']]
    assert any(height > width for width, height in sizes)
    difficulties = [d for objects in lists['TRAIN_objects'] + lists['TEST_objects'] for d in objects['difficulties']]
    assert 1 <= sum(difficulties) <= 2


def recorder(used):
    """In place of create_data_lists(): notes its arguments."""
    def record(*arguments):
        used.append(arguments)
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    return record


def test_download_fetches_the_three_parts_of_voc_and_uses_their_folders(tmp_path, monkeypatch):
    fetched, used = [], []
    monkeypatch.setattr(script, 'VOCDetection', lambda root, **arguments: fetched.append((root, arguments)))
    monkeypatch.setattr(script, 'create_data_lists', recorder(used))
    monkeypatch.setattr(script, 'download', True)
    monkeypatch.setattr(script, 'download_folder', str(tmp_path / 'new' / 'voc'))
    monkeypatch.setattr(script, 'output_folder', 'lists')
    script.main()
    root = str(tmp_path / 'new' / 'voc')
    assert fetched == [(root, {'year': year, 'image_set': image_set, 'download': True})
                       for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval'))]
    folders = Path(root, 'VOCdevkit', 'VOC2007'), Path(root, 'VOCdevkit', 'VOC2012')
    assert used == [(*folders, 'lists', list(voc_labels), False)]


def test_without_download_nothing_is_fetched(monkeypatch):
    used = []
    monkeypatch.setattr(script, 'VOCDetection', lambda *_, **__: pytest.fail('a download'))
    monkeypatch.setattr(script, 'create_data_lists', recorder(used))
    script.main()
    assert used == [(script.voc07_path, script.voc12_path, script.output_folder, script.labels, script.skip_empty)]


@pytest.mark.parametrize('error', [OSError('Network is unreachable'), RuntimeError('File not found or corrupted.'),
                                   EOFError('Compressed file ended')])
def test_a_download_that_fails_ends_in_one_sentence_and_writes_no_list(tmp_path, monkeypatch, error):
    def fail(root, year, **_):
        if year == '2012':
            raise error

    monkeypatch.setattr(script, 'VOCDetection', fail)
    monkeypatch.setattr(script, 'download', True)
    monkeypatch.setattr(script, 'download_folder', str(tmp_path / 'voc'))
    monkeypatch.setattr(script, 'output_folder', str(tmp_path / 'lists'))
    with pytest.raises(InputError) as refused:
        script.main()
    message, = str(refused.value).splitlines()
    assert 'VOC 2012 trainval' in message and str(tmp_path / 'voc') in message and str(error) in message
    assert not (tmp_path / 'lists').exists()


def test_the_calls_to_torchvision_fit_its_downloader(tmp_path, monkeypatch):
    # The real VOCDetection with its network and its archives replaced: the folders that it reads are those we use.
    from torchvision.datasets import voc as torchvision_voc
    pictures = {'2007': 'VOC2007', '2012': 'VOC2012'}

    def extract(url, root, **_):
        year = '2012' if '2012' in url else '2007'
        split = 'test' if 'test' in url.lower() else 'trainval'
        make_voc(Path(root, 'VOCdevkit', pictures[year]), {f'{year}_{split}': [('cat', (1, 1, 9, 9), 0)]}, split=split)

    monkeypatch.setattr(torchvision_voc, 'download_and_extract_archive', extract)
    monkeypatch.setattr(script, 'download', True)
    monkeypatch.setattr(script, 'download_folder', str(tmp_path / 'voc'))
    monkeypatch.setattr(script, 'output_folder', str(tmp_path / 'lists'))
    script.main()
    lists = read_lists(tmp_path / 'lists')
    assert [Path(path).stem for path in lists['TRAIN_images']] == ['2007_trainval', '2012_trainval']
    assert [Path(path).stem for path in lists['TEST_images']] == ['2007_test']


# -------------------------------------------------------------------------------------- what the priors can find

PRIORS = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]])


def test_the_table_of_what_priors_can_find_worked_out_on_paper():
    boxes = torch.tensor([[0, 0, 0.5, 0.5],  # a prior itself: 1
                          [0, 0, 0.5, 0.3],  # 0.3 / 0.5 = 0.6 of a prior, and smaller than it
                          [0, 0, 0.1, 0.1],  # 0.01 / 0.25 = 0.04, smaller
                          [0, 0, 1, 1]])  # 0.25 / 1
    rows = script.coverage(boxes, torch.tensor([1, 1, 2, 2]), ['cat', 'dog', 'emu'], PRIORS)
    assert rows['cat'] == pytest.approx((2, 1, 0.8, 0.5))
    assert rows['dog'] == pytest.approx((2, 0, (0.04 + 0.25) / 2, 0.5))
    assert rows['emu'][0] == 0 and all(math.isnan(value) for value in rows['emu'][1:])
    assert rows['all'] == pytest.approx((4, 0.5, (0.25 + 0.6) / 2, 0.5))


def test_the_best_overlaps_of_many_objects_agree_with_the_definition():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1100, 2, 2, generator=generator).sort(dim=1).values
    boxes = corners.flatten(1)  # (1100, 4)
    priors = torch.rand(7, 4, generator=generator) + 0.05
    best = utils.best_prior_overlaps(boxes, priors)
    priors_xy = utils.cxcy_to_xy(priors).tolist()
    expected = [max(iou(box, prior) for prior in priors_xy) for box in boxes.tolist()]
    torch.testing.assert_close(best, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_a_class_of_which_few_objects_find_a_prior_gets_a_line_of_advice(capsys):
    script.print_coverage({'cat': (10, 0.81, 0.7, 0.0), 'ant': (10, 0.2, 0.3, 0.9), 'all': (20, 0.5, 0.6, 0.4)})
    said = capsys.readouterr().out
    assert 'Of ant, fewer than 80 % find a prior' in said
    assert 'ant                       10        20.0%         0.30      90.0%' in said.splitlines()
    script.print_coverage({'cat': (10, 0.81, 0.7, 0.0), 'all': (10, 0.81, 0.6, 0.4)})
    assert 'fewer than' not in capsys.readouterr().out
