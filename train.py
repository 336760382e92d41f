"""Trains SSD300.

    python train.py                                               # the settings below, on the device at hand
    python train.py --checkpoint checkpoint_ssd300.pth            # goes on where that run stopped
    python train.py --no-pretrained --no-augment --grad_clip 10   # each setting is a flag
    torchrun --nproc_per_node=4 train.py                          # four GPUs, batch_size images each

Needs the data lists of create_data_lists.py. After each epoch it writes checkpoint_ssd300.pth and adds a line to
training_log.csv, drawn as training_log.png. Every eval_every epochs it measures the mAP and keeps the best network
as best_checkpoint_ssd300.pth. All of them are in output_folder.
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
from eval import draw_log, evaluate, make_test_loader
from model import SSD300, MultiBoxLoss, load_weights, start_from_checkpoint
from utils import (DelayedCtrlC, InputError, autocast, check_label_map, check_precision, current_settings,
                   ignore_ctrl_c, join_processes, load_checkpoint, make_folder, replaced_file, require,
                   run_script, save_checkpoint)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

# Data and results
data_folder: str = 'data'  # where create_data_lists.py put the data lists
output_folder: str = '.'  # where checkpoints, training_log.csv and training_log.png go
keep_difficult: bool = True  # train on objects marked as difficult, too; without them faster, but a bit worse
augment: bool = True  # zoom, crop, mirror and distort colors at random (paper, sections 2.2 and 3.6)
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself
eval_every: int | None = 10  # epochs between measurements of the mAP on the test pictures; None: never

# Model
pretrained: bool = True  # start from VGG-16 trained on ImageNet; without, from random weights
freeze: int = 0  # VGG blocks that keep their weights, 0 to 5; 2 or 3 suit small data and small machines
checkpoint: str | None = None  # checkpoint of a run to go on with; None: a new run
finetune: str | None = None  # checkpoint whose weights a new run starts from; class heads only if classes agree

# Learning: sections 3 and 3.6 of the paper; its iterations of 32 images are epochs here
batch_size: int = 8  # images per step and process; the paper uses 32, the published 77.2 mAP came from 8
epochs: int = 232  # passes through the training data; the paper's 120,000 iterations
lr: float = 1e-3  # learning rate of weights; biases learn at twice this rate, as in the authors' Caffe code
warmup: int = 500  # steps over which the rate rises to lr, at most the first epoch; 0: none, as the tutorial
decay_lr_at: list[float] = [2 / 3, 5 / 6]  # parts of the training after which it falls; 80,000 and 100,000 steps
decay_lr_to: float = 0.1  # what is left of the learning rate each time
momentum: float = 0.9  # of SGD
weight_decay: float = 5e-4  # of SGD, on weights and biases
grad_clip: float | None = None  # largest norm of the gradient; None: no limit; 10 helps where training diverges
localization: str = 'smooth_l1'  # loss of the boxes, as in the paper; the published 77.2 mAP came from 'l1'
precision: str = 'float32'  # 'bfloat16' for hardware that computes in it; 'auto': bfloat16 where that is so
seed: int = 0  # random seed: on a CPU, the same seed gives the same weights

# With --checkpoint, these keep their own values; all others come from the checkpoint unless given as flags.
PLACE_SETTINGS = {'data_folder', 'workers', 'checkpoint', 'finetune', 'output_folder', 'eval_every'}
CHECKPOINT_NAME = 'checkpoint_ssd300.pth'


def main(given=()):  # names of the settings that the command line has
    rank, n_processes, device = join_processes()
    resumed = load_checkpoint(checkpoint) if checkpoint else None
    if resumed:
        take_over_settings(resumed, given)
    check_settings()
    make_folder(output_folder)
    mixed_precision = autocast(device, precision)
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try what is fastest

    dataset = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult, augment, seed)
    model = make_model(dataset.label_map, resumed, rank == 0).to(device, memory_format=torch.channels_last)
    dataset.normalize_for(model)
    network = share_gradients(model) if n_processes > 1 else model
    criterion = MultiBoxLoss(model.priors_cxcy, localization=localization).to(device)
    optimizer = make_optimizer(model, resumed)
    if eval_every:  # difficult objects included: finding one must not be counted as an error
        test_dataset = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
        test_dataset.normalize_for(model)
        test_loader = make_test_loader(test_dataset, batch_size, workers, rank, n_processes)
    first_epoch = resumed['epoch'] if resumed else 0
    files = RunFiles(first_epoch) if rank == 0 else None
    print(f'{len(dataset):,} images, epochs {first_epoch + 1} to {epochs}, on {n_processes} × {device.type}')

    stopped = 'Stopped: go on from the end of epoch {} in {} by naming it as --checkpoint'
    with DelayedCtrlC(stopped.format(first_epoch, checkpoint) if resumed else
                      'Stopped before the end of the first epoch: nothing is saved yet') as ctrl_c:
        for epoch in range(first_epoch, epochs):
            loader = make_loader(dataset, epoch, rank, n_processes)
            progress = Progress(loader, epoch, device, n_processes, files, ctrl_c)
            with progress.bar:  # closed, whatever ends the epoch, before a message about it is printed
                train_epoch(loader, network, criterion, optimizer, epoch, mixed_precision, progress)
            check_weights(model, epoch)
            state = epoch + 1, model, optimizer, dataset.label_map, current_settings(sys.modules[__name__])
            if files:
                files.save_epoch(progress.summary(progress.losses), state)
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


def make_loader(dataset, epoch, rank, n_processes):
    """An epoch's batches, shuffled and dealt to the processes: the same after another epoch or after a resume."""
    dataset.set_epoch(epoch)
    # Seeds lie far apart, or the second epoch of one would have the order of the next one's first.
    sampler = DistributedSampler(dataset, n_processes, rank, seed=seed * 1_000_003 + epoch)
    batches = list(BatchSampler(sampler, batch_size, drop_last=False))  # a list: Progress looks into it
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate_fn,
                      worker_init_fn=ignore_ctrl_c, pin_memory=torch.cuda.is_available())


def train_epoch(loader, network, criterion, optimizer, epoch, mixed_precision, progress):
    """Trains on all images once."""
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

        # Update, with the rate that is due in this step: twice as high for biases as for weights
        rate = learning_rate(step, len(loader))
        biases, weights = optimizer.param_groups  # as make_optimizer() has grouped them
        biases['lr'], weights['lr'] = 2 * rate, rate
        optimizer.step()
        progress.update(criterion.parts, len(images), rate)


def learning_rate(step, steps_per_epoch) -> float:
    """The learning rate of a step, counted from 0 over the whole training: a resume has nothing to restore."""
    warmup_steps = min(warmup, steps_per_epoch)
    rate = lr * min(1, (step + 1) / warmup_steps) if warmup_steps else lr
    for part in decay_lr_at:
        # At the end of an epoch, of 232 after 154 and 193, but never before the first one's; 1e-9 is for rounding.
        if step // steps_per_epoch >= max(1, int(part * epochs + 1e-9)):
            rate *= decay_lr_to
    return rate


def make_model(label_map, resumed, is_main):
    """The network with the weights from which training starts or goes on."""
    torch.manual_seed(seed)
    model = SSD300(n_classes=len(label_map))
    if resumed:
        check_label_map(resumed['label_map'], label_map)
        load_weights(model, resumed, checkpoint)
    elif finetune:
        start_from_checkpoint(model, finetune, label_map)
    elif pretrained and is_main:  # the others get its weights
        model.base.load_pretrained_layers()
    model.base.freeze_blocks(freeze)
    return model


def share_gradients(model):
    """The network as one of several processes trains it: on images of its own, with the mean of all gradients."""
    # The only buffers are priors, which never change: no need to send them around before each step.
    known = inspect.signature(DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'  # in older PyTorch
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})


def make_optimizer(model, resumed):
    """SGD with two groups of parameters, since each group has a learning rate of its own: first the biases,
    then the weights. From a checkpoint it takes over the momentum, but no setting."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    optimizer = torch.optim.SGD([{'params': biases}, {'params': weights}], lr, momentum, weight_decay=weight_decay)
    if resumed:
        try:
            optimizer.load_state_dict({**optimizer.state_dict(), 'state': resumed['optimizer']['state']})
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"checkpoint '{checkpoint}' holds another optimizer than train.py's ({error}): name one "
                             'that train.py wrote') from None
    return optimizer


def check_weights(model, epoch):
    """A loss reflects the weights before its step; what the last step made of them must still be checked."""
    require(all(parameter.isfinite().all() for parameter in model.parameters()), 'the weights are no longer finite '
            f'after epoch {epoch + 1}: try --grad_clip 10 or a lower lr; checkpoints are untouched')


class Progress:
    """An epoch's losses: shown in a bar, checked, sent to TensorBoard, and averaged for the log."""

    def __init__(self, loader, epoch, device, n_processes, files, ctrl_c):
        self.loader, self.epoch, self.n_processes, self.files, self.ctrl_c = loader, epoch, n_processes, files, ctrl_c
        # To read a loss, the CPU must wait for the GPU: there, twenty are read at once.
        self.read_every = 1 if device.type == 'cpu' else 20
        self.unread, self.losses, self.n_images, self.start = [], [], 0, time.monotonic()
        self.bar = tqdm(total=len(loader), desc=f'Epoch {epoch + 1}/{epochs}', unit='step', disable=files is None)

    def update(self, parts, n_images, rate):
        """Takes note of a step: both parts of its loss (2), its number of images, and its learning rate."""
        self.unread.append(parts)
        self.n_images += n_images * self.n_processes
        self.rate = rate
        self.bar.update()
        last = len(self.losses) + len(self.unread) == len(self.loader)
        if last or len(self.unread) == self.read_every:
            self.read()
        if self.ctrl_c.pressed and not last:  # after the last step, the epoch is worth saving
            raise KeyboardInterrupt

    def read(self):
        """Adds the unread losses, averaged over the processes, to those of the epoch, and shows the last."""
        own = torch.stack(self.unread)  # (n_unread, 2)
        mean = own / self.n_processes  # (n_unread, 2)
        if self.n_processes > 1:
            distributed.all_reduce(mean)  # adds up those of all processes
        self.unread = []
        for own_loss, loss in zip(own.tolist(), mean.tolist()):
            self.losses.append(loss)
            if not math.isfinite(sum(loss)):
                self.stop(own_loss)
        values = self.summary(self.losses[-1:])
        self.bar.set_postfix({'loss': values['loss'], 'lr': self.rate, 'images/s': values['images_per_second']})
        if self.files:
            self.files.show(values, step=self.epoch * len(self.loader) + len(self.losses))

    def stop(self, own_loss):
        """Ends the training at a loss that isn't finite: from there on, the weights aren't either."""
        if math.isfinite(sum(own_loss)):
            sys.exit()  # the loss is that of another process, which reports it
        batch = self.loader.batch_sampler[len(self.losses) - 1]
        pictures = ', '.join(self.loader.dataset.images[i] for i in batch)
        raise InputError(f'the loss is no longer finite in epoch {self.epoch + 1}, step {len(self.losses)} '
                         f'(confidence {own_loss[0]:g}, localization {own_loss[1]:g}; pictures: {pictures}): look at '
                         "these pictures' boxes, or try --grad_clip 10 or a lower lr; checkpoints are untouched")

    def summary(self, losses) -> dict:
        """A line of the log: the mean of some of the epoch's losses, and how training goes."""
        confidence, localization = torch.tensor(losses).mean(dim=0).tolist()
        return {'epoch': self.epoch + 1, 'loss': confidence + localization, 'confidence_loss': confidence,
                'localization_loss': localization, 'lr': self.rate,
                'images_per_second': self.n_images / (time.monotonic() - self.start)}


class RunFiles:
    """The files of a run in output_folder: checkpoints, the log, its picture, and TensorBoard's if it is installed."""

    def __init__(self, first_epoch):
        self.checkpoint, self.best, self.log, self.picture = paths = [Path(output_folder, name) for name in (
            CHECKPOINT_NAME, f'best_{CHECKPOINT_NAME}', 'training_log.csv', 'training_log.png')]
        left = [path for path in paths if path.exists()]
        if left and not (checkpoint and Path(checkpoint).resolve() == self.checkpoint.resolve()):
            folders = (Path(output_folder, f'previous_run_{number}') for number in itertools.count(1))
            folder = next(folder for folder in folders if not folder.exists())
            folder.mkdir()  # a new run overwrites nothing: it may be the work of days
            for path in left:
                path.rename(folder / path.name)
            print(f'What an earlier run left in {output_folder} is now in {folder}')
        try:
            lines = csv.DictReader(self.log.read_text().splitlines(), restval='') if self.log.exists() else ()
            self.lines = [line for line in lines if int(line['epoch']) <= first_epoch]  # later ones are done again
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"log '{self.log}' can't be read ({error}): repair it or move it away") from None
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(Path(output_folder, 'runs'))
        except ImportError:
            self.board = None

    def show(self, values, step):
        """Sends values to TensorBoard. Steps count from 1 over the whole training."""
        self.step = step
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def save_epoch(self, line, state):
        """Adds a line to the log, and saves the last checkpoint; `state` is what save_checkpoint() takes."""
        self.lines.append({**line, 'mAP': ''})  # it isn't known yet, and often never
        self.write_log()
        save_checkpoint(self.checkpoint, *state)

    def save_mAP(self, mAP, state):
        """Adds the epoch's mAP to the log, and saves the best checkpoint if this is it."""
        print(f'mAP after epoch {state[0]}: {mAP:.4f}')
        best = max((float(line['mAP']) for line in self.lines if line.get('mAP', '') != ''), default=-1)
        self.lines[-1]['mAP'] = mAP
        self.write_log()
        self.show({'mAP': mAP}, self.step)
        if mAP > best:  # never if it is nan
            save_checkpoint(self.best, *state)

    def write_log(self):
        text = io.StringIO()
        # The newest line has all columns. One of an older version may lack some, or have others.
        writer = csv.DictWriter(text, self.lines[-1], restval='', extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(self.lines)
        with replaced_file(self.log) as file:
            file.write(text.getvalue().encode())
        with replaced_file(self.picture) as file:
            draw_log(self.lines).save(file, 'PNG')


def take_over_settings(resumed, given):
    """Makes the settings of the learning those of a checkpoint, but for those that the command line has."""
    require({'optimizer', 'settings'} <= resumed.keys(),
            f"checkpoint '{checkpoint}' holds weights but no training to go on with: start from it by --finetune")
    today = current_settings(sys.modules[__name__])
    before = {**today, **resumed['settings']}  # an older checkpoint lacks the newest settings
    if any(part > 1 for part in before['decay_lr_at']):  # or counts epochs
        before['decay_lr_at'] = [epoch / before['epochs'] for epoch in before['decay_lr_at']]
    for name in sorted(today.keys() - PLACE_SETTINGS):
        if name not in given:
            setattr(sys.modules[__name__], name, before[name])
        elif before[name] != today[name]:
            print(f'{name} is {today[name]} from now on; the checkpoint had {before[name]}')
    require(resumed['epoch'] < epochs, f"checkpoint '{checkpoint}' has {resumed['epoch']} epochs behind it already: "
                                       'set epochs to more than that')


def check_settings():
    require(not (checkpoint and finetune), 'set checkpoint to go on with a run, or finetune for a new one, not both')
    require(not freeze or pretrained or finetune or checkpoint,
            'freeze would keep random weights as they are: set pretrained, finetune or checkpoint')
    for name, value, right, range_text in (
            ('batch_size', batch_size, batch_size >= 1, 'at least 1'),
            ('epochs', epochs, epochs >= 1, 'at least 1'),
            ('workers', workers, workers >= 0, '0 or more'),
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
    check_precision(precision)


if __name__ == '__main__':
    run_script(sys.modules[__name__], pass_given=True)
