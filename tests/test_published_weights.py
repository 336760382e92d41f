"""The tutorial's published checkpoint: a whole network and a whole optimizer, pickled by the PyTorch of 2018."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE, make_voc
from PIL import Image, ImageChops
from torch import nn

import detect
import eval as evaluation
import model as networks
import train
import utils
from utils import InputError, convert_checkpoint, create_data_lists, load_checkpoint

# ------------------------------------------------------------------- files that torch.save itself has written

# The tutorial's classes as far as torch.save sees them, and what PyTorch 0.4 did otherwise than today's.
TUTORIAL_MODEL = '''
import torch
from torch import nn

class VGGBase(nn.Module):
    """VGG base convolutions to produce lower-level feature maps."""
    def __init__(self, width):
        super().__init__()
        channels, block = 3, 1
        for out in (64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512, 'M', 512, 512, 512, 'M'):
            if out == 'M':
                setattr(self, f'pool{block}', nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=block == 3))
                block += 1
            else:
                i = 1 + sum(name.startswith(f'conv{block}_') for name in self._modules)
                setattr(self, f'conv{block}_{i}', nn.Conv2d(channels, out // width, kernel_size=3, padding=1))
                channels = out // width
        self.conv6 = nn.Conv2d(512 // width, 1024 // width, kernel_size=3, padding=6, dilation=6)
        self.conv7 = nn.Conv2d(1024 // width, 1024 // width, kernel_size=1)

class AuxiliaryConvolutions(nn.Module):
    def __init__(self, width):
        super().__init__()
        channels = 1024
        layers = (('conv8_1', 256, 1, 0, 1), ('conv8_2', 512, 3, 1, 2), ('conv9_1', 128, 1, 0, 1),
                  ('conv9_2', 256, 3, 1, 2), ('conv10_1', 128, 1, 0, 1), ('conv10_2', 256, 3, 0, 1),
                  ('conv11_1', 128, 1, 0, 1), ('conv11_2', 256, 3, 0, 1))
        for name, out, size, padding, stride in layers:
            setattr(self, name, nn.Conv2d(channels // width, out // width, size, stride, padding))
            channels = out

class PredictionConvolutions(nn.Module):
    def __init__(self, n_classes, width):
        super().__init__()
        self.n_classes = n_classes
        maps = (('conv4_3', 512, 4), ('conv7', 1024, 6), ('conv8_2', 512, 6), ('conv9_2', 256, 6), ('conv10_2', 256, 4),
                ('conv11_2', 256, 4))
        for kind, values in (('loc', 4), ('cl', n_classes)):
            for name, channels, n_boxes in maps:
                setattr(self, f'{kind}_{name}', nn.Conv2d(channels // width, n_boxes * values, 3, padding=1))

class SSD300(nn.Module):
    """The SSD300 network – encapsulates the base VGG network, auxiliary, and prediction convolutions."""
    def __init__(self, n_classes, width):
        super().__init__()
        self.n_classes = n_classes
        self.base = VGGBase(width)
        self.aux_convs = AuxiliaryConvolutions(width)
        self.pred_convs = PredictionConvolutions(n_classes, width)
        self.rescale_factors = nn.Parameter(torch.FloatTensor(1, 512 // width, 1, 1))
        nn.init.constant_(self.rescale_factors, 20)
        self.priors_cxcy = torch.rand(8732, 4)  # a plain attribute, on the GPU
'''
WRITE = '''
import sys
import types

import torch
from torch import nn

from model import SSD300

class Backend:
    def __reduce__(self):
        return thnn._get_thnn_function_backend, ()

thnn = types.ModuleType('torch.nn.backends.thnn')
exec('def _get_thnn_function_backend(): pass', vars(thnn))
sys.modules['torch.nn.backends'], sys.modules[thnn.__name__] = types.ModuleType('torch.nn.backends'), thnn

path, age, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.manual_seed(0)
model = SSD300(21, width)
optimizer = torch.optim.SGD([{'params': [p for n, p in model.named_parameters() if n.endswith('.bias')], 'lr': 2e-3},
                             {'params': [p for n, p in model.named_parameters() if not n.endswith('.bias')]}],
                            lr=1e-3, momentum=0.9, weight_decay=5e-4)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()  # makes the momentum buffers, as keys of which the parameters serve
torch.save(model.state_dict(), path + '.state_dict')
torch.serialization.location_tag = lambda storage: 'cuda:0'

if age != 'today':
    since = {'_backward_pre_hooks', '_forward_hooks_always_called', '_forward_hooks_with_kwargs',
             '_forward_pre_hooks_with_kwargs', '_is_full_backward_hook', '_load_state_dict_post_hooks',
             '_load_state_dict_pre_hooks', '_non_persistent_buffers_set', '_reversed_padding_repeated_twice',
             '_state_dict_hooks', '_state_dict_pre_hooks', 'padding_mode'}
    for module in model.modules():
        for name in since & vars(module).keys():
            del vars(module)[name]
        vars(module)['_backend'] = Backend()
    nn.Parameter.__reduce_ex__ = lambda self, protocol: (nn.Parameter, (self.data, self.requires_grad))
    torch.optim.SGD.__getstate__ = lambda self: {'state': self.state, 'param_groups': self.param_groups}
content = {'epoch': 231, 'model': model, 'optimizer': optimizer}
if age == 'older':
    content.update(loss=2.5, best_loss=torch.tensor(2.25), epochs_since_improvement=3)
torch.save(content, path, _use_new_zipfile_serialization=False)
'''


def write_published(folder, age, width):
    """A checkpoint such as the published one, and what its weights are."""
    (folder / 'model.py').write_text(TUTORIAL_MODEL, encoding='utf-8')
    (folder / 'write.py').write_text(WRITE, encoding='utf-8')
    path = folder / 'checkpoint_ssd300.pth.tar'
    subprocess.run([sys.executable, 'write.py', path, age, str(width)], cwd=folder, check=True)
    return path, torch.load(f'{path}.state_dict', weights_only=True)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A checkpoint in the published one's format and size, with random weights."""
    path, _ = write_published(tmp_path_factory.mktemp('published'), 'published', 1)
    return path


@pytest.fixture(scope='module')
def same_weights(published, tmp_path_factory):
    """The weights of `published` in a checkpoint of our own."""
    path = tmp_path_factory.mktemp('same_weights') / 'checkpoint_ssd300.pth'
    torch.save({'epoch': 232, 'model': torch.load(f'{published}.state_dict', weights_only=True),
                'label_map': utils.label_map, 'settings': {}}, path)
    return path


def assert_same_tensors(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_published_checkpoint_gives_its_71_tensors_bit_for_bit(published, same_weights):
    content = published.read_bytes()
    for trait in (b'cuda:0', b'_get_thnn_function_backend', b'class SSD300(nn.Module)', b'torch.optim.sgd\nSGD'):
        assert trait in content, 'the file of the test is not like the published one'
    loaded, expected = load_checkpoint(published), load_checkpoint(same_weights)
    assert loaded.keys() == {'epoch', 'model', 'label_map'}
    assert (loaded['epoch'], loaded['label_map']) == (232, utils.label_map)
    assert len(loaded['model']) == 71
    assert_same_tensors(loaded['model'], expected['model'])
    assert all(tensor.device.type == 'cpu' and tensor.dtype == torch.float32 for tensor in loaded['model'].values())


@pytest.mark.parametrize('age', ['older', 'today'])
def test_what_older_and_newer_pytorch_pickles_beside_the_weights_does_not_matter(age, tmp_path):
    path, expected = write_published(tmp_path, age, 32)
    assert_same_tensors(load_checkpoint(path)['model'], expected)
    with pytest.raises(InputError, match="doesn't hold the weights of an SSD300 with 21 classes"):
        networks.load_model(path)  # a 32nd of the channels


def test_a_network_finds_the_same_objects_with_the_published_format_as_with_ours(published, same_weights):
    images = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    results = []
    for path in (published, same_weights):
        network, label_map = networks.load_model(path)
        assert label_map == utils.label_map
        with torch.no_grad():
            results.append(network.detect_objects(*network(images), min_score=0.01, max_overlap=0.45, top_k=200))
    for one, other in zip(*results):
        assert len(one[0]) > 0
        assert torch.equal(one[0], other[0])


def test_detect_draws_the_same_with_the_published_checkpoint_as_with_ours(published, same_weights, monkeypatch):
    photo = Image.open(SAMPLE / 'VOC2007' / 'JPEGImages' / '000001.jpg')
    drawn = []
    for path in (published, same_weights):
        monkeypatch.setattr(detect, 'checkpoint', str(path))
        drawn.append(detect.detect(photo, min_score=0.01, max_overlap=0.5, top_k=5))
    assert ImageChops.difference(drawn[0], photo.convert('RGB')).getbbox()
    assert not ImageChops.difference(*drawn).getbbox()


@pytest.mark.filterwarnings('ignore:no objects to be found')
def test_eval_measures_the_same_with_the_published_checkpoint_as_with_ours(published, same_weights, tmp_path,
                                                                           monkeypatch, capsys):
    voc = make_voc(make_voc(tmp_path / 'VOC', {'1': [('dog', (5, 5, 40, 40), 0)]}),
                   {'2': [('cat', (1, 1, 60, 44), 0)]}, 'test')
    create_data_lists(voc, None, tmp_path)
    for name, value in {'data_folder': tmp_path, 'output_folder': tmp_path / 'evaluation', 'workers': 0}.items():
        monkeypatch.setattr(evaluation, name, value)
    tables = []
    capsys.readouterr()
    for path in (published, same_weights):
        monkeypatch.setattr(evaluation, 'checkpoint', str(path))
        evaluation.main()
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert 'mAP of 1 image' in tables[0]


def test_training_does_not_go_on_from_the_published_checkpoint(published, sample_lists, tmp_path, monkeypatch):
    for name, value in {'data_folder': sample_lists, 'output_folder': tmp_path, 'checkpoint': str(published)}.items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(InputError, match='holds weights but no training to go on with') as caught:
        train.main()
    assert str(published) in str(caught.value)


def test_one_line_turns_the_published_checkpoint_into_our_format(published, same_weights, tmp_path):
    target = tmp_path / 'checkpoint_ssd300.pth'
    assert 'utils.convert_checkpoint(' in convert_checkpoint.__doc__
    convert_checkpoint(published, target)
    loaded = torch.load(target, weights_only=True)
    assert (loaded['epoch'], loaded['label_map']) == (232, utils.label_map)
    assert_same_tensors(loaded['model'], load_checkpoint(same_weights)['model'])
    assert_same_tensors(load_checkpoint(target)['model'], loaded['model'])


# ------------------------------------------------------------------------ files written byte by byte, for harm

class Persistent:
    """Is pickled as a persistent id: to torch.save, a class or a storage."""

    def __init__(self, *saved_id):
        self.saved_id = saved_id


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class LegacyPickler(pickle._Pickler):
    def persistent_id(self, thing):
        return thing.saved_id if isinstance(thing, Persistent) else None


def pickled(content, protocol=2):
    file = io.BytesIO()
    LegacyPickler(file, protocol).dump(content)
    return file.getvalue()


def storage(key, n=6, kind=torch.FloatStorage, view=None):
    return Persistent('storage', kind, key, 'cuda:0', n, view)


def tensor(key, size=(2, 3), stride=(3, 1), offset=0, **more):
    return Call(torch._utils._rebuild_tensor_v2, storage(key, **more), offset, size, stride, False, OrderedDict())


def module(kind, parameters, modules, **state):
    instance = kind.__new__(kind)
    vars(instance).update(_parameters=OrderedDict(parameters), _modules=OrderedDict(modules), **state)
    return instance


@pytest.fixture(scope='module')
def names(model):
    """The names of an SSD300's 71 tensors."""
    return list(model.state_dict())


def network(tensors, **state):
    """A pickled SSD300 with these tensors, {name: tensor}; `state` is added to the attributes of its first layer."""
    parts = {}
    for name, value in tensors.items():
        *path, parameter = name.split('.')
        part, layer = path or (None, None)
        parts.setdefault(part, {}).setdefault(layer, {})[parameter] = value
    own = parts.pop(None)[None]
    kinds = {'base': networks.VGGBase, 'aux_convs': networks.AuxiliaryConvolutions,
             'pred_convs': networks.PredictionConvolutions}
    children = {part: module(kinds[part], {}, {layer: module(nn.Conv2d, parameters, {})
                                               for layer, parameters in layers.items()})
                for part, layers in parts.items()}
    vars(children['base']._modules['conv1_1']).update(state)
    return module(networks.SSD300, own, children)


START = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled({'little_endian': True})


def data(keys, n=6):
    """What follows the objects: the keys of the storages, and for each its number of values and the values."""
    return pickled(list(keys)) + b''.join(struct.pack(f'<q{n}f', n, *range(i, i + n)) for i in range(len(keys)))


def plain_tensors(names):
    return {name: tensor(name) for name in names}


def refusal(path, content):
    """The sentence with which a file of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert len(sentence.splitlines()) == 1
    return sentence


def test_a_file_of_that_format_written_byte_by_byte_is_read(names, tmp_path):
    path = tmp_path / 'checkpoint'
    path.write_bytes(START + pickled({'epoch': 0, 'model': network(plain_tensors(names))}) + data(names))
    loaded = load_checkpoint(path)
    assert loaded['epoch'] == 1
    assert set(loaded['model']) == set(names)
    for i, name in enumerate(names):
        assert torch.equal(loaded['model'][name], torch.arange(i, i + 6).float().view(2, 3))


def test_strides_and_offsets_within_a_storage_are_followed(names, tmp_path):
    path = tmp_path / 'checkpoint'
    tensors = plain_tensors(names)
    tensors[names[5]] = tensor(names[5], size=(2, 2), stride=(1, 2), offset=1)
    path.write_bytes(START + pickled({'epoch': 0, 'model': network(tensors)}) + data(names))
    assert load_checkpoint(path)['model'][names[5]].tolist() == [[6, 8], [7, 9]]  # of 5, 6, 7, 8, 9, 10


HARMFUL = [
    ('os', 'system'), ('posix', 'system'), ('nt', 'system'), ('subprocess', 'Popen'), ('shutil', 'rmtree'),
    ('builtins', 'eval'), ('builtins', 'exec'), ('builtins', 'getattr'), ('builtins', '__import__'),
    ('builtins', 'open'), ('__builtin__', 'eval'), ('functools', 'partial'), ('operator', 'attrgetter'),
    ('copyreg', '_reconstructor'), ('pickle', 'loads'), ('webbrowser', 'open'), ('collections', 'namedtuple'),
    ('collections', 'OrderedDict.fromkeys'), ('torch', 'load'), ('torch', 'FloatTensor'), ('torch.hub', 'load'),
    ('torch.jit', 'load'), ('torch.storage', '_load_from_bytes'), ('torch.nn.modules.conv', 'ConvTranspose2d'),
    ('torch.nn.modules.conv', 'Conv2d.__init__'), ('torch._utils', '_rebuild_device_tensor_from_numpy'),
    ('model', 'load_weights'), ('__main__', 'main'), ('utils', 'replaced_file'), ('', ''),
]


@pytest.mark.parametrize(('module_name', 'name'), HARMFUL)
def test_a_name_that_no_weights_need_is_refused_by_name(module_name, name, names, tmp_path):
    harm = f'touch {tmp_path}/harm'.encode()
    wanted = f'{module_name}\n{name}\n'.encode()
    call = b'\x80\x02c%s(X%s%stR.' % (wanted, struct.pack('<I', len(harm)), harm)
    assert repr(f'{module_name}.{name}') in refusal(tmp_path / 'checkpoint', START + call + data(names))
    assert not (tmp_path / 'harm').exists()


def test_harm_is_refused_by_name_wherever_it_hides(names, tmp_path):
    harm = Call(os.system, f'touch {tmp_path}/harm')
    tensors = plain_tensors(names)
    whole = {'epoch': 0, 'model': network(tensors)}
    one = names[7]
    magic = pickled(0x1950A86A20F9469CFC6C)
    hiding_places = {
        'version': magic + pickled(harm) + pickled({}),
        'properties of the computer': magic + pickled(1001) + pickled({'little_endian': harm}),
        'optimizer': START + pickled({**whole, 'optimizer': {'state': [harm]}}),
        'key of a dictionary': START + pickled({**whole, Persistent('module', harm, 'file', 'source'): 1}),
        'layer': START + pickled({'epoch': 0, 'model': network(tensors, _backend=harm)}),
        'parameter': START + pickled({'epoch': 0, 'model': network({**tensors, one: harm})}),
        'class record': START + pickled({**whole, 'class': Persistent('module', networks.SSD300, harm, harm)}),
        'class': START + pickled({**whole, 'class': Persistent('module', harm, 'file', 'source')}),
        'storage type': START + pickled({'epoch': 0, 'model': network({**tensors, one: tensor(one, kind=harm)})}),
        'storage key': START + pickled({'epoch': 0, 'model': network({**tensors, one: tensor(harm)})}),
        'size': START + pickled({'epoch': 0, 'model': network({**tensors, one: tensor(one, size=harm)})}),
        'tensor': START + pickled({'epoch': 0, 'model': network({**tensors, one: Call(
            torch._utils._rebuild_parameter, harm, True, OrderedDict())})}),
        'list of storages': START + pickled(whole) + pickled([*names, harm]),
    }
    for place, content in hiding_places.items():
        sentence = refusal(tmp_path / 'checkpoint', content + data(names))
        assert repr(f'{os.system.__module__}.system') in sentence, place
        assert not (tmp_path / 'harm').exists(), place


@pytest.mark.parametrize('kind', ['storage kept', 'unknown', 17, None])
def test_persistent_ids_of_other_kinds_are_refused(kind, names, tmp_path):
    content = {'epoch': 0, 'model': network(plain_tensors(names)), 'more': Persistent(kind, 1, 2, 3, 4, None)}
    refusal(tmp_path / 'checkpoint', START + pickled(content) + data(names))


def test_a_class_record_makes_nobody_read_the_file_that_it_names(names, tmp_path):
    secret, path = tmp_path / 'secret.py', tmp_path / 'checkpoint'
    secret.write_text('class Secret: pass')
    content = {'epoch': 0, 'model': network(plain_tensors(names)),
               'class': Persistent('module', networks.SSD300, str(secret), 'class Secret: other source')}
    path.write_bytes(START + pickled(content) + data(names))
    opened, watching = [], True

    def watch(event, args):
        if watching and event in ('open', 'os.system', 'exec', 'compile', 'subprocess.Popen', 'pickle.find_class'):
            opened.append((event, str(args[0])))

    sys.addaudithook(watch)
    load_checkpoint(path)
    watching = False
    assert opened == [('open', str(path))]


BAD_TENSORS = {
    'a stride beyond the storage': {'stride': (6, 1)},
    'an offset beyond the storage': {'offset': 1},
    'an offset far beyond it': {'offset': 2 ** 40},
    'an offset before it': {'offset': -1},
    'a negative stride': {'stride': (-3, 1), 'offset': 3},
    'a negative size': {'size': (-2, 3)},
    'sizes that overflow': {'size': (2 ** 62, 2 ** 62), 'stride': (2 ** 62, 1)},
    'a size of billions by a stride of nothing': {'size': (2 ** 40, 3), 'stride': (0, 1)},
    'fewer strides than sizes': {'stride': (3,)},
    'a size that is no number': {'size': ('2', 3)},
    'a fractional stride': {'stride': (0.5, 1)},
    'a stride that is no list': {'stride': 3},
    'more values than are there': {'n': 7},
    'fewer values than are there': {'n': 5},
    'a negative number of values': {'n': -6},
    'billions of values': {'n': 2 ** 50},
    'values of another type': {'kind': torch.DoubleStorage},
    'values of an unknown type': {'kind': nn.Conv2d},
    'a view of a storage': {'view': ('other', 0, 6)},
}


@pytest.mark.parametrize('what', BAD_TENSORS)
def test_tensors_that_do_not_lie_within_a_storage_of_their_own_are_refused(what, names, tmp_path):
    tensors = plain_tensors(names)
    tensors['base.conv1_1.weight'] = tensor(**{'key': 'base.conv1_1.weight', **BAD_TENSORS[what]})
    refusal(tmp_path / 'checkpoint', START + pickled({'epoch': 0, 'model': network(tensors)}) + data(names))


def test_tensors_that_share_a_storage_are_refused(names, tmp_path):
    """Seventy-one tensors of a storage that fills a file would fill seventy-one times the memory."""
    tensors = {**plain_tensors(names), names[3]: tensor(names[2])}
    others = [name for name in names if name != names[3]]
    refusal(tmp_path / 'checkpoint', START + pickled({'epoch': 0, 'model': network(tensors)}) + data(others))


def test_a_storage_without_values_is_refused(names, tmp_path):
    content = {'epoch': 0, 'model': network(plain_tensors(names))}
    refusal(tmp_path / 'checkpoint', START + pickled(content) + data(names[1:]))


def test_a_storage_larger_than_the_file_is_refused_though_both_places_claim_it(names, tmp_path):
    for n in (2 ** 40, 2 ** 62, -2 ** 40):
        tensors = {**plain_tensors(names), names[-1]: tensor(names[-1], n=n)}
        content = START + pickled({'epoch': 0, 'model': network(tensors)}) + data(names)
        refusal(tmp_path / 'checkpoint', content[:-8 - 6 * 4] + struct.pack('<q', n) + bytes(100))


def within_itself(names):
    ssd = network(plain_tensors(names))
    ssd._modules['again'] = ssd
    return ssd


def nested(depth, names='ab'):
    child = module(networks.VGGBase, {}, {})
    for _ in range(depth):
        child = module(networks.VGGBase, {}, dict.fromkeys(names, child))
    return child


LINUX = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads the memory in use from /proc')


@contextmanager
def peak_memory():
    """Gives a function that says by how many bytes the process' memory had grown at most."""
    def read(name):
        with open('/proc/self/status') as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

    Path('/proc/self/clear_refs').write_text('5')  # sets the peak back to what is in use
    before = read('VmRSS')
    yield lambda: read('VmHWM') - before


BOMBS = {
    'a memo of billions': b'\x80\x02Nr\xff\xff\xff\x7f.',  # LONG_BINPUT
    'a bytearray of billions': b'\x80\x05\x96' + struct.pack('<Q', 2 ** 31) + b'.',
    'a text of billions': b'\x80\x02X' + struct.pack('<I', 2 ** 32 - 1) + b'.',
    'a text of quintillions': b'\x80\x04\x8d' + struct.pack('<Q', 2 ** 60) + b'.',
    'a number of billions of digits': b'\x80\x02\x8b' + struct.pack('<i', 2 ** 31 - 1) + b'.',
    'a frame of quintillions': b'\x80\x04\x95' + struct.pack('<Q', 2 ** 60) + b'.',
    # The hash of a tuple comes from its items' hashes: a million deep, it overflows the C stack.
    'a key of tuples a million deep': b'\x80\x02})' + b'\x85' * 10 ** 6 + b'Ns.',
    'a key of tuples that doubles forty times': b'\x80\x02})' + b'q\x00h\x00\x86' * 40 + b'Ns.',
    'a list a million deep': b'\x80\x02]' + b'\x85' * 10 ** 6 + b'.',
    'ten thousand arguments, ten thousand times':
        b'\x80\x02](' + b'N' * 10 ** 4 + b'eq\x00' + b'ccollections\nOrderedDict\nh\x00R' * 10 ** 4 + b'.',
    'a mark that is missing': b'\x80\x02t.',
    'a stack that is empty': b'\x80\x02R.',
    'a protocol of the future': b'\x80\xff.',
    'another unpickler\'s language': b'\x80\x02cos\nsystem\n\x93.',
    'nothing at all': b'',
}


@LINUX
@pytest.mark.parametrize('what', BOMBS)
def test_a_few_bytes_can_not_claim_memory_or_crash_python(what, names, tmp_path):
    with peak_memory() as peak:
        refusal(tmp_path / 'checkpoint', START + BOMBS[what] + data(names))
    assert peak() < 300e6


def test_modules_within_modules_can_not_keep_the_reader_busy(names, tmp_path):
    path, recursion_limit = tmp_path / 'checkpoint', sys.getrecursionlimit()
    path.write_bytes(START + pickled({'epoch': 0, 'model': within_itself(names)}) + data(names))
    assert set(load_checkpoint(path)['model']) == set(names)
    for depth in (60, 1000):
        sys.setrecursionlimit(10 ** 6)  # for the writer alone
        try:
            content = pickled({'epoch': 0, 'model': nested(depth)})
        finally:
            sys.setrecursionlimit(recursion_limit)
        refusal(path, START + content + data([]))


@LINUX
def test_names_in_modules_can_not_fill_the_memory(tmp_path):
    # Each name is in the file but once.
    name, keys = 'x' * 500000, [str(i) for i in range(2000)]
    in_each_other = nested(60, [name])
    beside_each_other = module(networks.VGGBase, {}, {key: module(nn.Conv2d, {name: tensor(key)}, {}) for key in keys})
    for ssd, content in ((in_each_other, data([])), (beside_each_other, data(keys))):
        with peak_memory() as peak:
            refusal(tmp_path / 'checkpoint', START + pickled({'epoch': 0, 'model': ssd}) + content)
        assert peak() < 300e6


@pytest.mark.parametrize('content', [None, [], {}, {'epoch': 3}, {'model': 4}, {'epoch': 'x', 'model': {}}, 'text', 12])
def test_other_content_in_that_format_is_refused(content, tmp_path):
    refusal(tmp_path / 'checkpoint', START + pickled(content) + data([]))


def test_a_network_with_one_tensor_more_or_less_is_refused(names, tmp_path):
    for changed in (names[:-1], [*names, 'base.conv8_1.weight']):
        content = {'epoch': 0, 'model': network(plain_tensors(changed))}
        refusal(tmp_path / 'checkpoint', START + pickled(content) + data(changed))


@pytest.mark.parametrize('epoch', [-2, 1.5, '231', None, [0]])
def test_an_epoch_that_is_no_number_of_epochs_is_refused(epoch, names, tmp_path):
    content = {'epoch': epoch, 'model': network(plain_tensors(names))}
    refusal(tmp_path / 'checkpoint', START + pickled(content) + data(names))


def test_a_file_cut_off_anywhere_is_refused(names, tmp_path):
    whole = START + pickled({'epoch': 0, 'model': network(plain_tensors(names))}) + data(names)
    luck = random.Random(0)
    for length in [0, 1, len(whole) - 1, len(START), *(luck.randrange(len(whole)) for _ in range(200))]:
        refusal(tmp_path / 'checkpoint', whole[:length])


def test_a_file_with_any_wrong_byte_loads_or_is_refused_in_one_sentence(names, tmp_path):
    whole = START + pickled({'epoch': 0, 'model': network(plain_tensors(names))}) + data(names)
    luck, path, n_refused = random.Random(0), tmp_path / 'checkpoint', 0
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(luck.choice((1, 1, 4))):
            damaged[luck.randrange(len(whole) - 71 * 32)] = luck.randrange(256)  # in the pickles, not in the weights
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
            n_refused += 1
        else:
            assert len(loaded['model']) == 71
            assert all(value.dtype == torch.float32 for value in loaded['model'].values())
    assert 250 < n_refused < 500
