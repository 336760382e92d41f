"""Trains SSD300.

    python train.py                                               # the paper's recipe, on whatever device there is
    python train.py --checkpoint checkpoint_ssd300.pth            # goes on where that run stopped
    python train.py --no-pretrained --no-augment --grad_clip 10   # every setting below can be changed by its name

Needs the data lists of create_data_lists.py. After each epoch it writes checkpoint_ssd300.pth and adds a line to
training_log.csv, both in output_folder.
"""

import csv
import io
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import SSD300, MultiBoxLoss, load_weights
from utils import (InputError, check_label_map, current_settings, load_checkpoint, make_folder, replaced_file, require,
                   run_script, save_checkpoint)

# Data
data_folder: str = 'data'  # where create_data_lists.py put the data lists
keep_difficult: bool = True  # train on objects marked as difficult, too; without them it is faster, but a bit worse
augment: bool = True  # zoom, crop, mirror and distort colours at random (paper, section 2.2)
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself

# Model
pretrained: bool = True  # start from VGG-16 trained on ImageNet; without, from random weights
checkpoint: str | None = None  # checkpoint of a run to go on with; None: a new run
output_folder: str = '.'  # where checkpoint_ssd300.pth and training_log.csv go

# Learning: section 3.1 of the paper; its iterations of 32 images are epochs here
batch_size: int = 8  # images per step; the paper uses 32, the published 77.2 mAP came from 8
epochs: int = 232  # passes through the training data; the paper's 120,000 iterations
lr: float = 1e-3  # learning rate of weights; that of biases is twice as high, as in the authors' Caffe code
decay_lr_at: list[int] = [154, 193]  # epochs after which the learning rate falls; iterations 80,000 and 100,000
decay_lr_to: float = 0.1  # what is left of the learning rate each time
momentum: float = 0.9  # of SGD
weight_decay: float = 5e-4  # of SGD, on weights and biases
grad_clip: float | None = None  # largest norm of the gradient; None: no limit; 10 helps where training diverges
seed: int = 0  # of all that is drawn by lot: on a CPU, the same seed gives the same weights

CHECKPOINT_NAME, LOG_NAME = 'checkpoint_ssd300.pth', 'training_log.csv'


def main():
    check_settings()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    # Channels last suits tensor cores; on a CPU, backward passes are slower with it.
    memory_format = torch.channels_last if device.type == 'cuda' else torch.contiguous_format
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try which algorithm is fastest
    checkpoint_path, log_path = Path(output_folder, CHECKPOINT_NAME), Path(output_folder, LOG_NAME)
    make_folder(output_folder)

    dataset = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult, augment)
    seed_everything(seed)  # for the initial weights
    model = SSD300(n_classes=len(dataset.label_map))
    resumed = load_checkpoint(checkpoint) if checkpoint else None
    if resumed:
        check_label_map(resumed['label_map'], dataset.label_map)
        load_weights(model, resumed, checkpoint)
    elif pretrained:
        model.base.load_pretrained_layers()
    model.to(device, memory_format=memory_format)
    criterion = MultiBoxLoss(model.priors_cxcy).to(device)

    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    optimizer = torch.optim.SGD([{'params': biases, 'lr': 2 * lr}, {'params': others}], lr=lr, momentum=momentum,
                                weight_decay=weight_decay)
    scheduler = MultiStepLR(optimizer, milestones=decay_lr_at, gamma=decay_lr_to)
    first_epoch = restore(resumed, optimizer, scheduler) if resumed else 0
    if not resumed:
        keep_previous_run(checkpoint_path, log_path)

    print(f'{len(dataset):,} images, epochs {first_epoch + 1} to {epochs}, on {device}')
    sampler = RandomSampler(dataset)
    saved = f'epoch {first_epoch} in {checkpoint}' if resumed else None
    try:
        for epoch in range(first_epoch, epochs):
            seed_everything(seed + epoch)  # an epoch is the same whether it follows another one or a resume
            # The list says which pictures a batch was made of, should its loss fail.
            batches = list(BatchSampler(sampler, batch_size, drop_last=False))
            loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                                pin_memory=device.type == 'cuda')
            log = train_epoch(loader, model, criterion, optimizer, epoch, device)
            scheduler.step()
            add_to_log(log_path, log)
            save_checkpoint(checkpoint_path, epoch + 1, model, optimizer, scheduler, dataset.label_map,
                            current_settings(sys.modules[__name__]))
            saved = f'epoch {epoch + 1} in {checkpoint_path}'
    except KeyboardInterrupt:
        sys.exit(f'Stopped: go on from the end of {saved} by naming it as --checkpoint' if saved
                 else 'Stopped before the end of the first epoch: nothing is saved yet')
    print(f'Saved {checkpoint_path}')


def train_epoch(loader, model, criterion, optimizer, epoch, device):
    """Trains on all pictures once. Returns the epoch's line of the log. Raises InputError if the loss isn't finite."""
    model.train()
    # To read a loss, the CPU must wait for the GPU: there, twenty are read at once.
    read_every = 1 if device.type == 'cpu' else 20
    unread, losses, n_images, start = [], [], 0, time.monotonic()
    bar = tqdm(loader, desc=f'Epoch {epoch + 1}/{epochs}', unit='step')
    for step, (images, boxes, labels, _) in enumerate(bar, start=1):
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        boxes = [image_boxes.to(device, non_blocking=True) for image_boxes in boxes]  # N × (n_objects, 4)
        labels = [image_labels.to(device, non_blocking=True) for image_labels in labels]  # N × (n_objects)

        # Forward
        predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)  # scalar

        # Backward
        optimizer.zero_grad()
        loss.backward()
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)

        # Update
        optimizer.step()

        # Report
        n_images += len(images)
        unread.append(criterion.parts)  # (2): confidence and localisation
        if len(unread) == read_every or step == len(loader):
            losses += torch.stack(unread).tolist()
            unread = []
            check_finite(losses, loader, epoch)
            bar.set_postfix({'loss': f'{sum(losses[-1]):.3f}', 'lr': f'{optimizer.param_groups[1]["lr"]:g}',
                             'images/s': f'{n_images / (time.monotonic() - start):.1f}'})

    confidence, localization = torch.tensor(losses).mean(dim=0).tolist()
    return {'epoch': epoch + 1, 'loss': confidence + localization, 'confidence_loss': confidence,
            'localization_loss': localization, 'lr': optimizer.param_groups[1]['lr'],
            'images_per_second': n_images / (time.monotonic() - start)}


def check_finite(losses, loader, epoch):
    """Stops at the first step whose loss is nan or infinite: from there on, so are the weights."""
    for step, (confidence, localization) in enumerate(losses, start=1):
        if not math.isfinite(confidence + localization):
            pictures = ', '.join(loader.dataset.images[i] for i in loader.batch_sampler[step - 1])
            raise InputError(f'the loss is no longer finite in epoch {epoch + 1}, step {step} (confidence '
                             f'{confidence:g}, localization {localization:g}; pictures: {pictures}): look at these '
                             f"pictures' boxes, or try --grad_clip 10 or a lower lr; checkpoints are untouched")


def restore(resumed, optimizer, scheduler):
    """Takes over optimizer and schedule from a checkpoint. Returns the number of epochs that it has behind it."""
    require('optimizer' in resumed, f"checkpoint '{checkpoint}' holds weights but no training to go on with")
    require(resumed['epoch'] < epochs,
            f"checkpoint '{checkpoint}' has {resumed['epoch']} epochs behind it already: set epochs to more than that")
    optimizer.load_state_dict(resumed['optimizer'])
    scheduler.load_state_dict(resumed['scheduler'])
    for name in ('lr', 'decay_lr_at', 'decay_lr_to', 'momentum', 'weight_decay'):
        now, then = globals()[name], resumed['settings'].get(name)
        if now != then:
            print(f'The run goes on with the {name} of its checkpoint, {then}, not with {now}')
    return resumed['epoch']


def keep_previous_run(*paths):
    """A new run doesn't overwrite what days of training may have made: it moves it aside."""
    for path in paths:
        if path.exists():
            aside = path.with_name(f'previous_{path.name}')
            os.replace(path, aside)
            print(f'{path} of an earlier run is now {aside}')


def add_to_log(path, line):
    """Adds an epoch's line to the log. Lines of the same or of later epochs, from before a resume, are dropped."""
    lines = []
    if path.exists():
        with open(path, newline='') as file:
            lines = [old for old in csv.DictReader(file) if int(old['epoch']) < line['epoch']]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=line)
    writer.writeheader()
    writer.writerows([*lines, line])
    with replaced_file(path) as file:
        file.write(text.getvalue().encode())


def seed_everything(seed):
    random.seed(seed)
    torch.manual_seed(seed)  # on all devices; DataLoader derives its workers' seeds from it


def check_settings():
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(epochs >= 1, f'epochs must be at least 1, not {epochs}')
    require(workers >= 0, f'workers must be 0 or more, not {workers}')
    require(0 < lr < math.inf, f'lr must be greater than 0, not {lr}')
    require(all(a < b for a, b in zip([0, *decay_lr_at], decay_lr_at)),
            f'decay_lr_at must be epochs in rising order, not {decay_lr_at}')
    require(0 < decay_lr_to <= 1, f'decay_lr_to must be above 0 and at most 1, not {decay_lr_to}')
    require(0 <= momentum < 1, f'momentum must be at least 0 and less than 1, not {momentum}')
    require(0 <= weight_decay < math.inf, f'weight_decay must be 0 or more, not {weight_decay}')
    require(grad_clip is None or grad_clip > 0, f'grad_clip must be None or greater than 0, not {grad_clip}')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
