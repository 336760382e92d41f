"""Trains SSD300.

    python train.py                                               # the paper's recipe, on whatever device there is
    python train.py --checkpoint checkpoint_ssd300.pth            # goes on where that run stopped, with its settings
    python train.py --no-pretrained --no-augment --grad_clip 10   # every setting below can be changed by its name
    torchrun --nproc_per_node=4 train.py                          # four GPUs, each with batch_size images per step

Needs the data lists of create_data_lists.py. After each epoch it writes checkpoint_ssd300.pth and adds a line to
training_log.csv, drawn as training_log.png. Every eval_every epochs it measures the mAP and keeps the best network
so far as best_checkpoint_ssd300.pth. All of them are in output_folder.
"""

import csv
import inspect
import io
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from tqdm import tqdm

from datasets import PascalVOCDataset
from eval import Plot, draw_plots, evaluate, make_test_loader
from model import SSD300, MultiBoxLoss, load_weights, start_from_checkpoint
from utils import (DelayedCtrlC, InputError, autocast, check_label_map, check_precision, current_settings,
                   ignore_ctrl_c, join_processes, load_checkpoint, make_folder, replaced_file, require, run_script,
                   save_checkpoint)

# Each annotated constant is a setting: `--batch_size 4` on the command line changes it for one run.

# Data
data_folder: str = 'data'  # where create_data_lists.py put the data lists
keep_difficult: bool = True  # train on objects marked as difficult, too; without them it is faster, but a bit worse
augment: bool = True  # zoom, crop, mirror and distort colors at random (paper, sections 2.2 and 3.6)
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself

# Model
pretrained: bool = True  # start from VGG-16 trained on ImageNet; without, from random weights
freeze: int = 0  # VGG blocks that keep their pretrained weights, 0 to 5; 2 or 3 suit small data and small machines
checkpoint: str | None = None  # checkpoint of a run to go on with; None: a new run
finetune: str | None = None  # checkpoint whose weights a new run starts from; its class heads only if the classes agree
output_folder: str = '.'  # where checkpoints, training_log.csv and training_log.png go

# Learning: sections 3 and 3.6 of the paper; its iterations of 32 images are epochs here
batch_size: int = 8  # images per step and process; the paper uses 32, the published 77.2 mAP came from 8
epochs: int = 232  # passes through the training data; the paper's 120,000 iterations
lr: float = 1e-3  # learning rate of weights; that of biases is twice as high, as in the authors' Caffe code
warmup: int = 500  # steps over which the learning rate rises to lr, at most the first epoch; 0: none, as the tutorial
decay_lr_at: list[float] = [2 / 3, 5 / 6]  # parts of the training after which it falls; iterations 80,000 and 100,000
decay_lr_to: float = 0.1  # what is left of the learning rate each time
momentum: float = 0.9  # of SGD
weight_decay: float = 5e-4  # of SGD, on weights and biases
grad_clip: float | None = None  # largest norm of the gradient; None: no limit; 10 helps where training diverges
localization: str = 'smooth_l1'  # loss of the boxes, as in the paper; 'l1' is what the published 77.2 mAP came from
precision: str = 'float32'  # 'bfloat16' for GPUs and CPUs that compute in it; 'auto': bfloat16 where that is so
seed: int = 0  # of everything random: on a CPU, the same seed gives the same weights

# Watching
eval_every: int | None = 10  # epochs between measurements of the mAP on the test pictures; None: never

# With --checkpoint, these are today's; all others are the checkpoint's unless the command line has them.
PLACE_SETTINGS = {'data_folder', 'workers', 'checkpoint', 'finetune', 'output_folder', 'eval_every'}


def main(given=()):
    """:param given: names of the settings that the command line has"""
    rank, n_processes, device = join_processes()
    resumed = load_checkpoint(checkpoint) if checkpoint else None
    if resumed:
        take_over_settings(resumed, given)
    check_settings()
    make_folder(output_folder)
    mixed_precision = autocast(device, precision)
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try which algorithm is fastest

    dataset = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult, augment, seed)
    # DistributedSampler shuffles, and deals the pictures to the processes. To its seed it adds the epoch, which
    # must not lead to the order of another seed.
    sampler = DistributedSampler(dataset, n_processes, rank, seed=seed * 1_000_003)
    model = make_model(dataset.label_map, resumed, rank == 0).to(device, memory_format=torch.channels_last)
    dataset.normalize_for(model)
    test_loader = make_watching_loader(model, rank, n_processes, device) if eval_every else None
    network = share_gradients(model) if n_processes > 1 else model
    criterion = MultiBoxLoss(model.priors_cxcy, localization=localization).to(device)
    optimizer = make_optimizer(model, resumed)
    first_epoch = resumed['epoch'] if resumed else 0
    files = RunFiles(first_epoch) if rank == 0 else None
    print(f'{len(dataset):,} images, epochs {first_epoch + 1} to {epochs}, on {n_processes} × {device.type}')

    stopped = 'Stopped: go on from the end of epoch {} in {} by naming it as --checkpoint'
    with DelayedCtrlC('Stopped before the end of the first epoch: nothing is saved yet') as ctrl_c:
        if resumed:
            ctrl_c.message = stopped.format(first_epoch, checkpoint)
        for epoch in range(first_epoch, epochs):
            loader = make_loader(dataset, sampler, epoch, device)
            progress = Progress(loader, epoch, device, n_processes, files, ctrl_c)
            with progress.bar:  # closed, whatever ends the epoch, before a message about it is printed
                train_epoch(loader, network, criterion, optimizer, epoch, mixed_precision, progress)
            check_weights(model, epoch)
            state = epoch + 1, model, optimizer, dataset.label_map, current_settings(sys.modules[__name__])
            if files:
                files.save_epoch(progress.summary(), state)
            ctrl_c.message = stopped.format(epoch + 1, Path(output_folder, CHECKPOINT_NAME))
            if ctrl_c.pressed and epoch + 1 < epochs:
                raise KeyboardInterrupt
            if eval_every and ((epoch + 1) % eval_every == 0 or epoch + 1 == epochs):
                with mixed_precision:
                    measured = evaluate(test_loader, model, dataset.label_map)
                if files:
                    files.save_mAP(measured[1], state)
    if n_processes > 1:
        distributed.destroy_process_group()
    print(f'Saved {Path(output_folder, CHECKPOINT_NAME)}')


def make_loader(dataset, sampler, epoch, device):
    """Gives an epoch's batches, the same whether it follows another epoch or a resume."""
    dataset.set_epoch(epoch)
    sampler.set_epoch(epoch)
    # A list, which tells of what pictures a batch was made, should its loss fail.
    batches = list(BatchSampler(sampler, batch_size, drop_last=False))
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                      worker_init_fn=ignore_ctrl_c, pin_memory=device.type == 'cuda')


def train_epoch(loader, network, criterion, optimizer, epoch, mixed_precision, progress):
    """Trains on all pictures once."""
    network.train()
    device = criterion.priors_cxcy.device
    for step, (images, boxes, labels, _) in enumerate(loader, start=epoch * len(loader)):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)  # (N, 3, 300, 300)
        boxes = [image_boxes.to(device, non_blocking=True) for image_boxes in boxes]  # N × (n_objects, 4)
        labels = [image_labels.to(device, non_blocking=True) for image_labels in labels]  # N × (n_objects)

        # Forward
        with mixed_precision:
            predicted_locs, predicted_scores = network(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)  # scalar

        # Backward
        optimizer.zero_grad()
        loss.backward()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)

        # Update
        rate = learning_rate(step, len(loader))
        biases, weights = optimizer.param_groups
        biases['lr'], weights['lr'] = 2 * rate, rate
        optimizer.step()
        progress.update(criterion.parts, len(images), rate)


def learning_rate(step, steps_per_epoch) -> float:
    """The learning rate of a step, counted from 0 over the whole training. It follows from the settings and the
    step alone: a resume has nothing to restore."""
    warmup_steps = min(warmup, steps_per_epoch)
    rate = lr * min(1, (step + 1) / warmup_steps) if warmup_steps else lr
    for part in decay_lr_at:
        # Falls at the end of an epoch, at 232 epochs after 154 and 193, but not before there was one. What is
        # added to the product keeps rounding errors from making it an epoch less.
        if step // steps_per_epoch >= max(1, int(part * epochs + 1e-9)):
            rate *= decay_lr_to
    return rate


def take_over_settings(resumed, given):
    """Makes the settings of the learning those of a checkpoint, but for those that the command line gives."""
    require({'optimizer', 'settings'} <= resumed.keys(),
            f"checkpoint '{checkpoint}' holds weights but no training to go on with: start from it by --finetune")
    script, before = sys.modules[__name__], dict(resumed['settings'])
    if any(part > 1 for part in before.get('decay_lr_at', [])):  # older checkpoints counted epochs
        before['decay_lr_at'] = [epoch / before['epochs'] for epoch in before['decay_lr_at']]
    for name, today in current_settings(script).items():
        if name in PLACE_SETTINGS or before.get(name, today) == today:
            continue
        if name in given:
            print(f'{name} is {today} from now on; the checkpoint had {before[name]}')
        else:
            setattr(script, name, before[name])
    require(resumed['epoch'] < epochs,
            f"checkpoint '{checkpoint}' has {resumed['epoch']} epochs behind it already: set epochs to more than that")


def make_watching_loader(model, rank, n_processes, device):
    """Gives the test pictures, difficult objects included: finding one must not be counted as an error."""
    dataset = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
    dataset.normalize_for(model)
    return make_test_loader(dataset, batch_size, workers, rank, n_processes, device.type == 'cuda')


def make_model(label_map, resumed, is_main):
    """The network with the weights from which training starts or goes on."""
    torch.manual_seed(seed)
    model = SSD300(n_classes=len(label_map))
    if resumed:
        check_label_map(resumed['label_map'], label_map)
        load_weights(model, resumed, checkpoint)
    elif finetune:
        start_from_checkpoint(model, finetune, label_map)
    elif pretrained and is_main:  # DistributedDataParallel gives the other processes the first one's weights
        model.base.load_pretrained_layers()
    model.base.freeze_blocks(freeze)
    return model


def share_gradients(model):
    """The network as one of several processes trains it."""
    # The only buffers are priors, which never change: no need to send them around before each step.
    known = inspect.signature(DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # in older PyTorch
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})


def make_optimizer(model, resumed):
    """SGD with two groups of parameters, biases and weights, since their learning rates differ. From a checkpoint
    it takes the momentum, but no setting."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    optimizer = torch.optim.SGD([{'params': biases}, {'params': weights}], lr=lr, momentum=momentum,
                                weight_decay=weight_decay)
    if resumed:
        settings_of_today = optimizer.state_dict()['param_groups']
        try:
            optimizer.load_state_dict({'state': resumed['optimizer']['state'], 'param_groups': settings_of_today})
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"checkpoint '{checkpoint}' holds another optimizer than train.py's ({error}): name one "
                             'that train.py wrote') from None
    return optimizer


class Progress:
    """An epoch's losses: shown in a bar, checked, sent to TensorBoard if it is there, and summed up for the log."""

    def __init__(self, loader, epoch, device, n_processes, files, ctrl_c):
        self.loader, self.epoch, self.n_processes, self.files, self.ctrl_c = loader, epoch, n_processes, files, ctrl_c
        # To read a loss, the CPU must wait for the GPU: there, twenty are read at once.
        self.read_every = 1 if device.type == 'cpu' else 20
        self.unread, self.losses, self.n_images, self.start = [], [], 0, time.monotonic()
        self.bar = tqdm(total=len(loader), desc=f'Epoch {epoch + 1}/{epochs}', unit='step', disable=files is None)

    def update(self, parts, n_images, rate):
        """Takes note of a step: both parts of its loss (2), still on its device, its number of images, and its
        learning rate. Raises KeyboardInterrupt after Ctrl-C, but not after the last step: then, the epoch is worth
        saving."""
        self.unread.append(parts)
        self.n_images += n_images * self.n_processes
        self.rate = rate
        self.bar.update()
        last = len(self.losses) + len(self.unread) == len(self.loader)
        if len(self.unread) == self.read_every or last:
            self.read()
        if self.ctrl_c.pressed and not last:
            raise KeyboardInterrupt

    def read(self):
        own = torch.stack(self.unread)  # (n_unread, 2)
        of_all = own.clone()
        if self.n_processes > 1:
            distributed.all_reduce(of_all)
        losses = (of_all / self.n_processes).tolist()
        self.check_losses(losses, own.tolist())
        self.losses += losses
        self.unread = []
        confidence, localization = losses[-1]
        speed = self.n_images / (time.monotonic() - self.start)
        self.bar.set_postfix({'loss': f'{confidence + localization:.3f}', 'lr': f'{self.rate:.2g}',
                              'images/s': f'{speed:.1f}'})
        if self.files:
            self.files.show({'loss': confidence + localization, 'loss/confidence': confidence,
                             'loss/localization': localization, 'lr': self.rate, 'images_per_second': speed},
                            self.epoch * len(self.loader) + len(self.losses))

    def check_losses(self, losses, own_losses):
        """Stops at the first of the newest steps whose loss is nan or infinite: from there on, so are the weights.
        Of several processes, the one whose pictures did it tells so."""
        for step, (loss, own) in enumerate(zip(losses, own_losses), start=len(self.losses) + 1):
            if not math.isfinite(sum(loss)):
                if math.isfinite(sum(own)):
                    time.sleep(60)  # until torchrun, after the other process's message, ends this one as well
                    sys.exit(1)
                pictures = ', '.join(self.loader.dataset.images[i] for i in self.loader.batch_sampler[step - 1])
                raise InputError(f'the loss is no longer finite in epoch {self.epoch + 1}, step {step} (confidence '
                                 f'{own[0]:g}, localization {own[1]:g}; pictures: {pictures}): look at these '
                                 "pictures' boxes, or try --grad_clip 10 or a lower lr; checkpoints are untouched")

    def summary(self) -> dict:
        """The epoch's line of the log. Its mAP isn't known yet, and often never."""
        confidence, localization = torch.tensor(self.losses).mean(dim=0).tolist()
        return {'epoch': self.epoch + 1, 'loss': confidence + localization, 'confidence_loss': confidence,
                'localization_loss': localization, 'lr': self.rate,
                'images_per_second': self.n_images / (time.monotonic() - self.start), 'mAP': None}


CHECKPOINT_NAME, BEST_NAME = 'checkpoint_ssd300.pth', 'best_checkpoint_ssd300.pth'
LOG_NAME, LOG_PICTURE_NAME = 'training_log.csv', 'training_log.png'


class RunFiles:
    """What a run leaves in output_folder: its last checkpoint and its best, its log, and a picture of that. And what
    TensorBoard reads, where that is installed."""

    def __init__(self, first_epoch):
        self.checkpoint, self.best, self.log, self.picture = paths = [
            Path(output_folder, name) for name in (CHECKPOINT_NAME, BEST_NAME, LOG_NAME, LOG_PICTURE_NAME)]
        if not (checkpoint and self.checkpoint.exists() and self.checkpoint.samefile(checkpoint)):
            keep_previous_run(paths)
        self.lines = read_log(self.log, first_epoch)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(Path(output_folder, 'runs'))

    def show(self, values, step):
        """Sends values to TensorBoard. Steps count from 1 over the whole training."""
        self.step = step
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def save_epoch(self, line, state):
        """Saves the log with a new line, and the last checkpoint; `state` is what save_checkpoint() takes."""
        self.lines.append(line)
        self.write_log()
        save_checkpoint(self.checkpoint, *state)

    def save_mAP(self, mAP, state):
        """Adds the epoch's mAP to the log, and saves the best checkpoint if this is it."""
        print(f'mAP after epoch {self.lines[-1]["epoch"]}: {mAP:.4f}')
        earlier = [float(line['mAP']) for line in self.lines if line.get('mAP') not in (None, '')]
        self.lines[-1]['mAP'] = mAP
        self.write_log()
        self.show({'mAP': mAP}, self.step)
        if not math.isnan(mAP) and mAP > max(earlier, default=-1):
            save_checkpoint(self.best, *state)

    def write_log(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.lines[-1], extrasaction='ignore')
        writer.writeheader()
        writer.writerows(self.lines)
        with replaced_file(self.log) as file:
            file.write(text.getvalue().encode())
        with replaced_file(self.picture) as file:
            draw_log(self.lines).save(file, 'PNG')


def draw_log(lines):
    """A picture of the log: losses, learning rate and mAP over the epochs."""
    def curve(column):
        return [(int(line['epoch']), float(line[column])) for line in lines if line.get(column) not in (None, '')]

    colors = {'loss': 'black', 'confidence_loss': 'darkorange', 'localization_loss': 'steelblue'}
    losses = [(name.replace('_loss', ''), color, curve(name)) for name, color in colors.items()]
    return draw_plots([Plot('loss', losses),
                       Plot('learning rate', [(None, 'black', curve('lr'))]),
                       Plot('mAP', [(None, 'seagreen', curve('mAP'))], None, (0, 1))])


def check_weights(model, epoch):
    """A loss is that of the weights before its step: it can't tell what the last step has made of them."""
    require(all(parameter.isfinite().all() for parameter in model.parameters()),
            f'the weights are no longer finite after epoch {epoch + 1}, though its losses are: try --grad_clip 10 or a '
            'lower lr; checkpoints are untouched')


def keep_previous_run(paths):
    """A new run doesn't overwrite what days of training may have made: it moves that to a folder of its own."""
    left = [path for path in paths if path.exists()]
    if left:
        folder = next(folder for number in itertools.count(1)
                      if not (folder := Path(output_folder, f'previous_run_{number}')).exists())
        folder.mkdir()
        for path in left:
            path.rename(folder / path.name)
        print(f'What an earlier run left in {output_folder} is now in {folder}')


def read_log(path, last_epoch):
    """The log's lines up to an epoch. Those of later ones, from before a resume, are dropped."""
    if not path.exists():
        return []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            return [line for line in csv.DictReader(file) if int(line['epoch']) <= last_epoch]
    except (LookupError, ValueError) as error:
        raise InputError(f"log '{path}' can't be read ({error}): repair it or move it away") from None


def check_settings():
    require(workers >= 0, f'workers must be 0 or more, not {workers}')
    require(not (checkpoint and finetune), 'set checkpoint to go on with a run, or finetune for a new one, not both')
    require(not freeze or pretrained or finetune or checkpoint,
            'freeze would keep random weights as they are: set pretrained, finetune or checkpoint')
    check_precision(precision)
    for name, value, right, range_text in (
            ('batch_size', batch_size, batch_size >= 1, 'at least 1'),
            ('epochs', epochs, epochs >= 1, 'at least 1'),
            ('freeze', freeze, 0 <= freeze <= 5, 'a number of VGG blocks, 0 to 5'),
            ('lr', lr, 0 < lr < math.inf, 'greater than 0'),
            ('warmup', warmup, warmup >= 0, '0 or more steps'),
            ('decay_lr_at', decay_lr_at,
             decay_lr_at == sorted(decay_lr_at) and all(0 < part <= 1 for part in decay_lr_at),
             'parts of the training in rising order, like 0.667 for two thirds'),
            ('decay_lr_to', decay_lr_to, 0 < decay_lr_to <= 1, 'above 0 and at most 1'),
            ('momentum', momentum, 0 <= momentum < 1, 'at least 0 and less than 1'),
            ('weight_decay', weight_decay, 0 <= weight_decay < math.inf, '0 or more'),
            ('grad_clip', grad_clip, grad_clip is None or grad_clip > 0, 'None or greater than 0'),
            ('localization', localization, localization in ('smooth_l1', 'l1'), "'smooth_l1' or 'l1'"),
            ('seed', seed, 0 <= seed < 2 ** 32, 'between 0 and 2³² − 1'),
            ('eval_every', eval_every, eval_every is None or eval_every >= 1, 'None or at least 1 epoch')):
        require(right, f'{name} must be {range_text}, not {value}')


if __name__ == '__main__':
    run_script(sys.modules[__name__], pass_given=True)
