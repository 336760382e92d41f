"""Measures what everything around the convolutions costs, beside the convolutions.

    python tests/benchmark.py                    # all stages, some minutes on two cores
    python tests/benchmark.py --only transform   # stages whose name holds this word

Prints a table: what a stage takes per image, the ratio to its yardstick in the same run (medians, and the range of
the repeats), and whether the ratio meets its goal. Absolute times tell about the machine, ratios about the code; run it
on a machine that does nothing else. Writes nothing.
"""

import contextlib
import io
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torchvision
import torchvision.transforms.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from datasets import PascalVOCDataset  # noqa: E402
from model import SSD300, MultiBoxLoss  # noqa: E402
from utils import (IMAGENET_MEAN, IMAGENET_STD, IMAGE_SIZE, autocast, calculate_mAP, choose_dtype,  # noqa: E402
                   create_data_lists, make_label_map, place_network, read_image, run_script, transform, voc_labels)

repeats: int = 5  # measurements of each stage and of its yardstick, in turn
n_photos: int = 40  # pictures per measurement of the transforms
n_pictures: int = 1200  # per measurement of the loader: so many that starting the workers hardly counts
n_test_images: int = 4952  # of the mAP stage; VOC 2007 test has so many
only: str | None = None  # a word in the names of the stages to measure; None: all

SAMPLE = ROOT / 'img' / 'emoji_voc'


def timed(function, n=1):
    """Seconds per call of n calls."""
    start = time.perf_counter()
    for _ in range(n):
        function()
    return (time.perf_counter() - start) / n


def in_turn(stage, yardstick, scale=1.0):
    """Measures stage and yardstick alternately, so that a machine that slows down slows both.

    Returns the stage's times and the ratios stage / (scale · yardstick), one per repeat.
    """
    stage(), yardstick()  # the first call warms up
    times, ratios = [], []
    for _ in range(repeats):
        times.append(stage())
        ratios.append(times[-1] / (scale * yardstick()))
    return times, ratios


def measure_transform():
    """transform(…, 'TRAIN') with reading, against reading and resizing alone; one thread."""
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photos(Path(folder))
        boxes = torch.tensor([[20., 30., 220., 330.], [150., 80., 440., 310.], [330., 40., 410., 120.]])
        labels, difficulties = torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.bool)

        def plain():
            for path in paths:
                image = Image.open(path).convert('RGB').resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
                F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)

        def augmented():
            for path in paths:
                transform(read_image(path), boxes, labels, difficulties, 'TRAIN')

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        times, ratios = in_turn(lambda: timed(augmented) / len(paths), lambda: timed(plain) / len(paths))
        torch.set_num_threads(threads)
    return times, ratios


def make_photos(folder):
    """JPEG files of 500×375, VOC's usual size, made of the photographs in img/photos."""
    photos = [read_image(path) for path in sorted((ROOT / 'img' / 'photos').glob('*.jpg'))]
    paths = []
    for i in range(n_photos):
        paths.append(folder / f'{i}.jpg')
        photos[i % len(photos)].resize((500, 375), Image.Resampling.LANCZOS).save(paths[-1], quality=90)
    return paths


def measure_detection(background):
    """Detection in one image: offsets as after some training, random logits with an advantage of the background."""
    model = make_model()
    locs = torch.randn(1, len(model.priors_cxcy), 4)
    scores = torch.randn(1, len(model.priors_cxcy), model.n_classes) * 2
    scores[..., 0] += background
    return in_turn(lambda: timed(lambda: model.detect_objects(locs, scores, 0.01, 0.45, 200), n=5), forward_pass(model))


def measure_loss():
    model = make_model().train()
    criterion = MultiBoxLoss(model.priors_cxcy)
    images = torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE)
    boxes = [torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.3, 0.2, 0.9, 0.9], [0.6, 0.1, 0.7, 0.3]])] * 8
    labels = [torch.tensor([1, 2, 3])] * 8
    locs = torch.randn(8, len(model.priors_cxcy), 4, requires_grad=True)
    scores = torch.randn(8, len(model.priors_cxcy), 21, requires_grad=True)
    times, ratios = in_turn(lambda: timed(lambda: criterion(locs, scores, boxes, labels).backward(), n=3),
                            lambda: timed(train_step(model, images)))
    return [seconds / 8 for seconds in times], ratios


def make_detections(n_images):
    """200 random detections and 3 objects for each image, as calculate_mAP takes them."""
    def random_boxes(n):
        corners = torch.rand(n_images, n, 2) * 0.7
        return torch.cat((corners, corners + 0.05 + torch.rand(n_images, n, 2) * 0.25), dim=2).unbind()

    return (random_boxes(200), torch.randint(1, 21, (n_images, 200)).unbind(), torch.rand(n_images, 200).unbind(),
            random_boxes(3), torch.randint(1, 21, (n_images, 3)).unbind(), (torch.rand(n_images, 3) < 0.2).unbind())


def measure_map():
    arguments = make_detections(n_test_images)
    times, ratios = in_turn(lambda: timed(lambda: calculate_mAP(*arguments)), forward_pass(make_model()), scale=20)
    return [seconds / n_test_images for seconds in times], ratios


def measure_map_growth():
    large, small = make_detections(4 * n_test_images), make_detections(n_test_images)
    times, ratios = in_turn(lambda: timed(lambda: calculate_mAP(*large)), lambda: timed(lambda: calculate_mAP(*small)))
    return [seconds / (4 * n_test_images) for seconds in times], ratios


def measure_script():
    """detect.py as a process, against importing what it needs and one forward pass."""
    model = make_model()
    forward = median(forward_pass(model)() for _ in range(repeats))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_untrained(model, folder)
        picture = SAMPLE / 'VOC2007' / 'JPEGImages' / '000001.jpg'
        command = [sys.executable, ROOT / 'detect.py', '--checkpoint', checkpoint, '--image', picture, '--output',
                   folder, '--min_score', '0.9']
        imports = [sys.executable, '-c', 'import torch, torchvision']
        return in_turn(lambda: timed(lambda: run(command)), lambda: timed(lambda: run(imports)) + forward)


def measure_workers(hand_over=True):
    """Images per second with 2 workers, against without. Unless they hand over their batches, they only tell of them
    how long they are: this is what workers can gain at most."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = PascalVOCDataset(make_lists(folder, n_pictures), 'TRAIN')

    def load(workers):
        loader = DataLoader(dataset, batch_size=8, num_workers=workers,
                            collate_fn=dataset.collate_fn if hand_over else len)
        return timed(lambda: [None for _ in loader]) / len(dataset)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker has one thread, too
    times, ratios = in_turn(lambda: load(2), lambda: load(0))
    torch.set_num_threads(threads)
    return times, [1 / ratio for ratio in ratios]


def make_lists(folder, n):
    """Data lists of n training and n test pictures, by repeating the sample's. Returns the folder."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        create_data_lists(SAMPLE / 'VOC2007', SAMPLE / 'VOC2012', folder)
    for name in ('TRAIN_images', 'TRAIN_objects', 'TEST_images', 'TEST_objects'):
        path = Path(folder, f'{name}.json')
        entries = json.loads(path.read_text())
        path.write_text(json.dumps([entries[i % len(entries)] for i in range(n)]))
    return folder


def compare_peaks(*commands):
    """The peak memory of a script with its first arguments, against with its second ones; "times" are bytes here."""
    peaks = [peak_memory([sys.executable, *command]) for command in commands]
    return peaks[:1], [peaks[0] / peaks[1]]


def measure_memory():
    """eval.py on 64 pictures, against on 16."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / 'eval.py', '--checkpoint', save_untrained(make_model(), folder), '--workers', '0',
                   '--output_folder', folder, '--data_folder']
        return compare_peaks(*([*command, make_lists(Path(folder, str(n)), n)] for n in (64, 16)))


def measure_frozen_memory(n_blocks):
    """train.py in a step of 8 images with VGG blocks frozen, against without."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / 'train.py', '--data_folder', make_lists(folder, 8), '--output_folder', folder, '--workers',
                   '0', '--finetune', save_untrained(make_model(), folder), '--epochs', '1', '--eval_every', 'None',
                   '--overwrite']
        return compare_peaks(*([*command, '--freeze', str(n)] for n in (n_blocks, 0)))


def train_step(model, images):
    """A function that runs a forward and a backward pass, without a loss."""
    def step():
        predicted_locs, predicted_scores = model(images)
        (predicted_locs.mean() + predicted_scores.mean()).backward()
    return step


def measure_step(precision, n_blocks):
    """A training step of 8 pictures with VGG blocks frozen: reading, network, loss, clipping, SGD, one after the other.
    The ratio is the share of all that isn't the network's forward and backward pass."""
    device, criterion = torch.device('cpu'), MultiBoxLoss(SSD300.create_prior_boxes())
    dtype, model = choose_dtype(device, precision), make_model().train()
    model.base.freeze_blocks(n_blocks)
    place_network(model, device, dtype, training=True)
    optimizer = train.make_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        dataset = PascalVOCDataset(make_lists(folder, 8), 'TRAIN')

    def step():
        start = time.perf_counter()
        images, boxes, labels, _, n_objects = dataset.collate_fn([dataset[i] for i in range(8)])
        forward = time.perf_counter()
        with autocast(device, dtype):
            predictions = model(images)
        loss_start = time.perf_counter()
        loss = criterion(*predictions, boxes.split(n_objects), labels.split(n_objects))
        optimizer.zero_grad()
        backward = time.perf_counter()
        loss.backward()
        update = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        total = time.perf_counter() - start
        return total / 8, 1 - (loss_start - forward + update - backward) / total

    step()  # warms up
    return tuple(zip(*(step() for _ in range(repeats))))


def measure_peer(training):
    """Four pictures in float32, against torchvision's SSD300: forward, loss and backward pass, or detection."""
    model, device = make_model(), torch.device('cpu')
    peer = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21)
    place_network(model, device, torch.float32, training)
    criterion = MultiBoxLoss(model.priors_cxcy)
    images, boxes = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.tensor([[0.1, 0.1, 0.5, 0.6]])
    labels = torch.tensor([1])
    targets = [{'boxes': boxes * IMAGE_SIZE, 'labels': labels}] * 4
    if training:
        stages = (lambda: criterion(*model(images), [boxes] * 4, [labels] * 4).backward(),
                  lambda: sum(peer(list(images), targets).values()).backward())
    else:
        peer.eval()
        stages = (torch.no_grad()(lambda: model.detect_objects(*model(images), 0.01, 0.45, 200)),
                  torch.no_grad()(lambda: peer(list(images))))
    times, ratios = in_turn(*(lambda stage=stage: timed(stage) for stage in stages))
    return [seconds / 4 for seconds in times], ratios


# A process inherits the peak of the one that starts it: so a small one in between starts it and looks.
LAUNCHER = '''import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'''


def peak_memory(command) -> int:
    """The most bytes that a process has had in memory."""
    return 1024 * int(subprocess.check_output([sys.executable, '-c', LAUNCHER, *command]))


def save_untrained(model, folder):
    """A checkpoint of a network, as train.py would write it."""
    path = Path(folder, 'checkpoint.pth')
    torch.save({'epoch': 1, 'model': model.state_dict(), 'label_map': make_label_map(voc_labels), 'settings': {}}, path)
    return path


def run(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_model():
    torch.manual_seed(0)
    return SSD300(n_classes=21).eval()


def forward_pass(model):
    """A function that measures one forward pass of one image."""
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)

    @torch.no_grad()
    def measure():
        return timed(lambda: model(image), n=2)
    return measure


# name: function, goal for the ratio (None: measured only to compare with), whether a higher ratio is better
STAGES = {
    'transform for training / plain resizing': (measure_transform, 1.8, False),
    'detect_objects, 5,700 candidates / forward pass': (lambda: measure_detection(background=9.6), 0.05, False),
    'detect_objects, 86,000 candidates / forward pass': (lambda: measure_detection(background=0), 0.08, False),
    'MultiBoxLoss, 8 images / network, forward and backward': (measure_loss, 0.01, False),
    'calculate_mAP, VOC 2007 test / 20 forward passes': (measure_map, 1, False),
    'calculate_mAP, four times the images / once': (measure_map_growth, 4.5, False),
    'detect.py / imports and one forward pass': (measure_script, 1.3, False),
    'images per second, 2 workers / none': (measure_workers, 1.6, True),
    'images per second, 2 workers / none, nothing handed over': (lambda: measure_workers(hand_over=False), None, True),
    'peak memory of eval.py, 64 pictures / 16': (measure_memory, 1.15, False),
    **{f'share of a step outside of the network, {precision}, {n_blocks} VGG blocks frozen':
       (partial(measure_step, precision, n_blocks), 0.15, False)
       for precision in ('auto', 'float32') for n_blocks in (0, 3, 4)},
    "training step / torchvision's": (lambda: measure_peer(training=True), 1, False),
    "detection / torchvision's": (lambda: measure_peer(training=False), 1, False),
    'peak memory of train.py, 2 VGG blocks frozen / none': (lambda: measure_frozen_memory(2), None, False),
    'peak memory of train.py, 3 VGG blocks frozen / none': (lambda: measure_frozen_memory(3), None, False),
}


def main():
    random.seed(0)
    torch.manual_seed(0)
    stages = {name: stage for name, stage in STAGES.items() if not only or only in name}
    rows = []
    for name, (measure, goal, higher) in tqdm(stages.items(), unit='stage'):
        times, ratios = measure()
        ratio = median(ratios)
        met = '' if goal is None else 'yes' if (ratio >= goal if higher else ratio <= goal) else 'NO'
        amount = f'{median(times) / 2**20:,.0f} MiB in all' if 'memory' in name else f'{1e3 * median(times):.2f} ms'
        sign = '' if goal is None else f'{"≥" if higher else "≤"} {goal}'
        rows.append((name, amount, f'{ratio:.3f} ({min(ratios):.3f}–{max(ratios):.3f})', sign, met))

    print(f'{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads')
    print(f'Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, '
          f'Pillow {Image.__version__}')
    header = ('stage / yardstick', 'per image', 'ratio (range)', 'goal', 'met')
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == '__main__':
    run_script(sys.modules[__name__])
