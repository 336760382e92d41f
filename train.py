"""Trains SSD300.

    python train.py                                               # the paper's recipe, on whatever device there is
    python train.py --checkpoint checkpoint_ssd300.pth            # goes on where that run stopped
    python train.py --no-pretrained --no-augment --grad_clip 10   # every setting below can be changed by its name
    torchrun --nproc_per_node=4 train.py                          # four GPUs, each with batch_size images per step

Needs the data lists of create_data_lists.py. After each epoch it writes checkpoint_ssd300.pth and adds a line to
training_log.csv, both in output_folder.
"""

import csv
import io
import itertools
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss, load_weights, start_from_checkpoint
from utils import (DelayedCtrlC, InputError, autocast, check_label_map, current_settings, ignore_ctrl_c, join_processes,
                   load_checkpoint, make_folder, replaced_file, require, run_script, save_checkpoint,
                   warn_about_workers)

# Data
data_folder: str = 'data'  # where create_data_lists.py put the data lists
keep_difficult: bool = True  # train on objects marked as difficult, too; without them it is faster, but a bit worse
augment: bool = True  # zoom, crop, mirror and distort colours at random (paper, section 2.2)
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself
prefetch: int = 2  # batches that each worker reads ahead; more evens out slow disks, and takes memory

# Model
pretrained: bool = True  # start from VGG-16 trained on ImageNet; without, from random weights
checkpoint: str | None = None  # checkpoint of a run to go on with; None: a new run
finetune: str | None = None  # checkpoint whose weights a new run starts from; its class heads only if the classes agree
output_folder: str = '.'  # where checkpoint_ssd300.pth and training_log.csv go

# Learning: section 3.1 of the paper; its iterations of 32 images are epochs here
batch_size: int = 8  # images per step and process; the paper uses 32, the published 77.2 mAP came from 8
epochs: int = 232  # passes through the training data; the paper's 120,000 iterations
lr: float = 1e-3  # learning rate of weights; that of biases is twice as high, as in the authors' Caffe code
decay_lr_at: list[int] = [154, 193]  # epochs after which the learning rate falls; iterations 80,000 and 100,000
decay_lr_to: float = 0.1  # what is left of the learning rate each time
momentum: float = 0.9  # of SGD
weight_decay: float = 5e-4  # of SGD, on weights and biases
grad_clip: float | None = None  # largest norm of the gradient; None: no limit; 10 helps where training diverges
precision: str = 'float32'  # or 'bfloat16', for GPUs and CPUs that compute in it
seed: int = 0  # of all that is drawn by lot: on a CPU, the same seed gives the same weights

CHECKPOINT_NAME, LOG_NAME = 'checkpoint_ssd300.pth', 'training_log.csv'


def main():
    check_settings()
    rank, n_processes, device = join_processes()
    is_main = rank == 0
    mixed_precision = autocast(device, precision)
    # Channels last suits tensor cores and bfloat16; in float32 on a CPU, backward passes are slower with it.
    memory_format = torch.contiguous_format if (device.type, precision) == ('cpu', 'float32') else torch.channels_last
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try which algorithm is fastest
    checkpoint_path, log_path = Path(output_folder, CHECKPOINT_NAME), Path(output_folder, LOG_NAME)
    make_folder(output_folder)

    dataset = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult, augment)
    require(len(dataset) > 0, f"the data lists in '{data_folder}' have no training pictures: make others with "
                              'create_data_lists.py')
    seed_everything(seed)  # for the initial weights
    model = SSD300(n_classes=len(dataset.label_map))
    resumed = load_checkpoint(checkpoint) if checkpoint else None
    if resumed:
        check_label_map(resumed['label_map'], dataset.label_map)
        load_weights(model, resumed, checkpoint)
    elif finetune:
        start_from_checkpoint(model, finetune, dataset.label_map)
    elif pretrained and is_main:  # DistributedDataParallel gives the other processes the first one's weights
        model.base.load_pretrained_layers()
    model.to(device, memory_format=memory_format)
    network = DistributedDataParallel(model) if n_processes > 1 else model
    criterion = MultiBoxLoss(model.priors_cxcy).to(device)

    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    optimizer = torch.optim.SGD([{'params': biases, 'lr': 2 * lr}, {'params': others}], lr=lr, momentum=momentum,
                                weight_decay=weight_decay)
    scheduler = MultiStepLR(optimizer, milestones=decay_lr_at, gamma=decay_lr_to)
    first_epoch = restore(resumed, optimizer, scheduler) if resumed else 0
    if is_main and not (resumed and checkpoint_path.exists() and checkpoint_path.samefile(checkpoint)):
        keep_previous_run(checkpoint_path, log_path)
    log = read_log(log_path, first_epoch) if is_main else []
    board = open_board() if is_main else None

    print(f'{len(dataset):,} images, epochs {first_epoch + 1} to {epochs}, on {n_processes} × {device.type}')
    sampler = DistributedSampler(dataset, n_processes, rank, seed=seed)  # shuffles, and deals to the processes
    saved = f'epoch {first_epoch} in {checkpoint}' if resumed else None
    ctrl_c = DelayedCtrlC()
    try:
        for epoch in range(first_epoch, epochs):
            # An epoch is the same whether it follows another one or a resume.
            sampler.set_epoch(epoch)
            seed_everything(seed + epoch + 1_000_003 * rank)
            # A list, which tells of what pictures a batch was made, should its loss fail.
            batches = list(BatchSampler(sampler, batch_size, drop_last=False))
            loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                                prefetch_factor=prefetch if workers else None, worker_init_fn=ignore_ctrl_c,
                                pin_memory=device.type == 'cuda')
            progress = Progress(loader, epoch, optimizer, device, n_processes, is_main, board, ctrl_c)
            with progress.bar:  # closed, whatever ends the epoch, before a message about it is printed
                train_epoch(loader, network, criterion, optimizer, device, mixed_precision, progress)
            check_weights(model, epoch)
            scheduler.step()
            log.append(progress.summary())
            if is_main:
                write_log(log_path, log)
                save_checkpoint(checkpoint_path, epoch + 1, model, optimizer, scheduler, dataset.label_map,
                                current_settings(sys.modules[__name__]))
            saved = f'epoch {epoch + 1} in {checkpoint_path}'
            if ctrl_c.pressed and epoch + 1 < epochs:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(f'Stopped: go on from the end of {saved} by naming it as --checkpoint' if saved
                 else 'Stopped before the end of the first epoch: nothing is saved yet')
    finally:
        ctrl_c.end()
    if n_processes > 1:
        distributed.destroy_process_group()
    print(f'Saved {checkpoint_path}')


def train_epoch(loader, network, criterion, optimizer, device, mixed_precision, progress):
    """Trains on all pictures once."""
    network.train()
    for images, boxes, labels, _ in loader:
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
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
        optimizer.step()
        progress.update(criterion.parts, len(images))


class Progress:
    """An epoch's losses: shown in a bar, checked, sent to TensorBoard if it is there, and summed up for the log."""

    def __init__(self, loader, epoch, optimizer, device, n_processes, is_main, board, ctrl_c):
        self.loader, self.epoch, self.n_processes, self.board, self.ctrl_c = loader, epoch, n_processes, board, ctrl_c
        self.lr = optimizer.param_groups[1]['lr']
        # To read a loss, the CPU must wait for the GPU: there, twenty are read at once.
        self.read_every = 1 if device.type == 'cpu' else 20
        self.unread, self.losses, self.n_images, self.start = [], [], 0, time.monotonic()
        self.bar = tqdm(total=len(loader), desc=f'Epoch {epoch + 1}/{epochs}', unit='step', disable=not is_main)

    def update(self, parts, n_images):
        """Takes note of a step: both parts of its loss (2), still on its device, and its number of images. Raises
        KeyboardInterrupt after Ctrl-C, but not after the last step: then, the epoch is worth saving."""
        self.unread.append(parts)
        self.n_images += n_images * self.n_processes
        self.bar.update()
        last = len(self.losses) + len(self.unread) == len(self.loader)
        if len(self.unread) == self.read_every or last:
            self.read()
        if self.ctrl_c.pressed and not last:
            raise KeyboardInterrupt

    def read(self):
        parts = torch.stack(self.unread)  # (n_unread, 2)
        if self.n_processes > 1:
            distributed.all_reduce(parts)
        losses = (parts / self.n_processes).tolist()
        self.check_losses(losses)
        self.losses += losses
        self.unread = []
        speed = self.n_images / (time.monotonic() - self.start)
        self.bar.set_postfix({'loss': f'{sum(self.losses[-1]):.3f}', 'lr': f'{self.lr:g}', 'images/s': f'{speed:.1f}'})
        if self.board:
            confidence, localization = self.losses[-1]
            values = {'loss': confidence + localization, 'loss/confidence': confidence,
                      'loss/localization': localization, 'lr': self.lr, 'images_per_second': speed}
            for name, value in values.items():
                self.board.add_scalar(name, value, self.epoch * len(self.loader) + len(self.losses))

    def check_losses(self, losses):
        """Stops at the first of the newest steps whose loss is nan or infinite: from there on, so are the weights."""
        for step, (confidence, localization) in enumerate(losses, start=len(self.losses) + 1):
            if not math.isfinite(confidence + localization):
                pictures = ', '.join(self.loader.dataset.images[i] for i in self.loader.batch_sampler[step - 1])
                raise InputError(f'the loss is no longer finite in epoch {self.epoch + 1}, step {step} (confidence '
                                 f'{confidence:g}, localization {localization:g}; pictures: {pictures}): look at these '
                                 "pictures' boxes, or try --grad_clip 10 or a lower lr; checkpoints are untouched")

    def summary(self) -> dict:
        """The epoch's line of the log."""
        confidence, localization = torch.tensor(self.losses).mean(dim=0).tolist()
        return {'epoch': self.epoch + 1, 'loss': confidence + localization, 'confidence_loss': confidence,
                'localization_loss': localization, 'lr': self.lr,
                'images_per_second': self.n_images / (time.monotonic() - self.start)}


def open_board():
    """A writer for TensorBoard where that is installed, otherwise None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(Path(output_folder, 'runs'))


def check_weights(model, epoch):
    """A loss is that of the weights before its step: it can't tell what the last step has made of them."""
    require(all(parameter.isfinite().all() for parameter in model.parameters()),
            f'the weights are no longer finite after epoch {epoch + 1}, though its losses are: try --grad_clip 10 or a '
            'lower lr; checkpoints are untouched')


def restore(resumed, optimizer, scheduler):
    """Takes over optimizer and schedule from a checkpoint. Returns the number of epochs that it has behind it."""
    require({'optimizer', 'scheduler', 'settings'} <= resumed.keys(),
            f"checkpoint '{checkpoint}' holds weights but no training to go on with")
    require(resumed['epoch'] < epochs,
            f"checkpoint '{checkpoint}' has {resumed['epoch']} epochs behind it already: set epochs to more than that")
    try:
        optimizer.load_state_dict(resumed['optimizer'])
        scheduler.load_state_dict(resumed['scheduler'])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"checkpoint '{checkpoint}' holds another optimizer than train.py's ({error}): name one that "
                         'train.py wrote') from None
    for name in ('lr', 'decay_lr_at', 'decay_lr_to', 'momentum', 'weight_decay'):
        now, then = globals()[name], resumed['settings'].get(name)
        if now != then:
            print(f'The run goes on with the {name} of its checkpoint, {then}, not with {now}')
    return resumed['epoch']


def keep_previous_run(*paths):
    """A new run doesn't overwrite what days of training may have made: it moves it aside, each time to other names."""
    def aside(path, number):
        return path.with_name(f'previous_{number}_{path.name}')

    number = next(number for number in itertools.count(1) if not any(aside(path, number).exists() for path in paths))
    for path in paths:
        if path.exists():
            os.replace(path, aside(path, number))
            print(f'{path} of an earlier run is now {aside(path, number)}')


def read_log(path, last_epoch):
    """The log's lines up to an epoch. Those of later ones, from before a resume, are dropped."""
    if not path.exists():
        return []
    try:
        with open(path, newline='', encoding='utf-8') as file:
            return [line for line in csv.DictReader(file) if int(line['epoch']) <= last_epoch]
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise InputError(f"log '{path}' can't be read ({error}): repair it or move it away") from None


def write_log(path, lines):
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=lines[-1], extrasaction='ignore')
    writer.writeheader()
    writer.writerows(lines)
    with replaced_file(path) as file:
        file.write(text.getvalue().encode())


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)  # on all devices; DataLoader derives its workers' seeds from it


def check_settings():
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(epochs >= 1, f'epochs must be at least 1, not {epochs}')
    warn_about_workers(workers)
    require(prefetch >= 1, f'prefetch must be at least 1, not {prefetch}')
    require(not (checkpoint and finetune), 'set checkpoint to go on with a run, or finetune for a new one, not both')
    autocast(torch.device('cpu'), precision)  # refuses a precision that it doesn't know
    require(0 < lr < math.inf, f'lr must be greater than 0, not {lr}')
    require(all(a < b for a, b in zip([0, *decay_lr_at], decay_lr_at)),
            f'decay_lr_at must be epochs in rising order, not {decay_lr_at}')
    require(0 < decay_lr_to <= 1, f'decay_lr_to must be above 0 and at most 1, not {decay_lr_to}')
    require(0 <= momentum < 1, f'momentum must be at least 0 and less than 1, not {momentum}')
    require(0 <= weight_decay < math.inf, f'weight_decay must be 0 or more, not {weight_decay}')
    require(0 <= seed < 2 ** 32, f'seed must be between 0 and 2³² − 1, not {seed}')
    require(grad_clip is None or grad_clip > 0, f'grad_clip must be None or greater than 0, not {grad_clip}')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
