"""Train SSD300.

    python train.py                                               # the settings below, on the device at hand
    python train.py --checkpoint checkpoint_ssd300.pth            # resume that run after its last whole epoch
    python train.py --no-pretrained --no-augment --grad_clip 10   # every setting is a flag
    torchrun --nproc_per_node=4 train.py                          # four GPUs, batch_size pictures each

Reads the data lists of create_data_lists.py. After each epoch it saves checkpoint_ssd300.pth and adds a line to
training_log.csv. Every eval_every epochs it measures the mAP and keeps the best network as best_checkpoint_ssd300.pth.
All files go to output_folder, also training_log.png if matplotlib is installed and runs/ if TensorBoard is.
If a run ends early, the last line that it prints is the command that resumes it.
"""

import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from datasets import PascalVOCDataset
from eval import draw_plots, evaluate, make_test_loader
from model import SSD300, MultiBoxLoss, load_weights, start_from_checkpoint
from utils import (CtrlC, InputError, as_flags, autocast, check_label_map, check_ranges, choose_dtype,
                   current_settings, ignore_ctrl_c, join_processes, load_checkpoint, make_folder, only_warn,
                   place_network, replaced_file, require, run_script, save_checkpoint, until_ctrl_c, way_back)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

# Data, machine and results
data_folder: str = 'data'  # folder with the data lists of create_data_lists.py
output_folder: str = '.'  # folder for checkpoints and logs
overwrite: bool = False  # let a new run replace the run that output_folder holds
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main process reads them itself
device: str = 'auto'  # 'auto': CUDA if there is a GPU, else the CPU; or any PyTorch device, like 'cuda:1'
eval_every: int | None = 10  # epochs between measurements of the mAP on the test pictures; None: never

# Start
pretrained: bool = True  # start from VGG-16 trained on ImageNet; False: from random weights
finetune: str | None = None  # checkpoint whose weights a new run starts from; its class heads where the labels match
checkpoint: str | None = None  # checkpoint of a run to resume; None: a new run

# Learning: sections 3 and 3.6 of the paper; its iterations of 32 pictures are epochs here
keep_difficult: bool = True  # also train on objects marked as difficult; without them it is faster, but a bit worse
augment: bool = True  # zoom, crop, mirror and distort colors at random (paper, sections 2.2 and 3.6)
batch_size: int = 8  # pictures per step and process; the paper uses 32, the published 77.2 mAP came from 8
epochs: int = 232  # passes through the training data; the paper's 120,000 iterations
lr: float = 1e-3  # learning rate of weights; biases learn at twice this rate, as in the authors' Caffe code
warmup: int = 500  # steps over which the rate rises to lr, one epoch at most; 0: none, as in the paper
decay_lr_at: list[float] = [2 / 3, 5 / 6]  # fractions of the training after which the rate drops: 80k, 100k steps
decay_lr_to: float = 0.1  # factor applied to the rate each time
momentum: float = 0.9  # of SGD
weight_decay: float = 5e-4  # of SGD, on weights and biases
grad_clip: float | None = None  # largest norm of the gradient; None: no limit; 10 helps if training diverges
localization: str = 'smooth_l1'  # loss of the boxes, as in the paper; the published 77.2 mAP came from 'l1'
min_negatives: int = 0  # fewest hard negatives per picture; 3 or 10 let empty pictures teach (not in the paper)
freeze: int = 0  # VGG blocks whose weights stay fixed, 0 to 5; 2 or 3 suit small data sets and small machines
precision: str = 'float32'  # TF32 on GPUs since Ampere; 'bfloat16', 'float16'; 'auto': the best the device supports
seed: int = 0  # random seed; on one CPU, the same seed gives the same weights

LEARNING = list(__annotations__)[list(__annotations__).index('keep_difficult'):]
CHECKPOINT_NAME, BEST_NAME = 'checkpoint_ssd300.pth', 'best_checkpoint_ssd300.pth'


def main():
    check_settings()
    rank, n_processes, main_device = join_processes(device)
    dtype = choose_dtype(main_device, precision)
    mixed_precision = autocast(main_device, dtype)
    torch.backends.cudnn.benchmark = True  # all inputs have one size: cuDNN may try what is fastest
    check_output_folder()
    resumed = load_resumed() if checkpoint else None

    dataset = PascalVOCDataset(data_folder, 'TRAIN', keep_difficult, augment, seed)
    require(any(objects['labels'] for objects in dataset.objects),
            f"no training picture in '{data_folder}' has an object: make the lists again with the right --labels")
    # One loader for all epochs: where processes can't fork, its workers take up to a minute to start.
    loader = DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset, n_processes, rank, seed=seed),
                        num_workers=workers, persistent_workers=workers > 0, collate_fn=dataset.collate_fn,
                        worker_init_fn=ignore_ctrl_c, pin_memory=torch.cuda.is_available())

    model = make_model(dataset.label_map, resumed, is_main=rank == 0)
    place_network(model, main_device, dtype, training=True)
    dataset.normalize_for(model)
    network = DistributedDataParallel(model) if n_processes > 1 else model

    criterion = MultiBoxLoss(model.priors_cxcy, localization=localization, min_negatives=min_negatives)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler(main_device.type, enabled=dtype == torch.float16)  # off, it does nothing
    run = Run(model, optimizer, scaler, dataset.label_map, resumed, is_main=rank == 0)
    resumed = None  # frees 200 MB
    test_loader = None
    if eval_every:  # with difficult objects: finding one must not count as an error
        test_dataset = PascalVOCDataset(data_folder, 'TEST', keep_difficult=True)
        test_dataset.normalize_for(model)
        test_loader = make_test_loader(test_dataset, batch_size, workers, rank, n_processes)
    rest = f'epochs {run.epoch + 1} to {epochs}' if run.epoch < epochs else 'only the mAP is missing'
    print(f'{len(dataset):,} pictures, {rest}, on {n_processes} × {main_device.type}')

    with way_back(run):
        run.measure_mAP(test_loader, mixed_precision)  # if a resumed run ended before it did
        for epoch in range(run.epoch, epochs):
            loader.sampler.set_epoch(epoch)
            dataset.set_epoch(epoch)
            progress = Progress(loader, epoch, n_processes, run.is_main)
            train_epoch(network, criterion, optimizer, scaler, mixed_precision, progress)
            run.save_epoch(progress.summary())
            if progress.stopped and run.epoch < epochs:
                raise KeyboardInterrupt
            run.measure_mAP(test_loader, mixed_precision)
    if n_processes > 1:
        distributed.destroy_process_group()
    print(f'Saved {Path(output_folder, CHECKPOINT_NAME)}')


def train_epoch(network, criterion, optimizer, scaler, mixed_precision, progress):
    """Train on all pictures once."""
    network.train()
    device = criterion.priors_cxcy.device
    for step, (images, boxes, labels, _, n_objects) in enumerate(progress.batches(), progress.first_step):
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        boxes = boxes.to(device, non_blocking=True).split(n_objects)  # N × (n_objects, 4)
        labels = labels.to(device, non_blocking=True).split(n_objects)  # N × (n_objects)

        # Forward
        with mixed_precision:
            predicted_locs, predicted_scores = network(images)  # (N, 8732, 4), (N, 8732, n_classes)
        confidence_loss, localization_loss = criterion.parts(predicted_locs, predicted_scores, boxes, labels)
        loss = confidence_loss + criterion.alpha * localization_loss  # scalar

        # Backward
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if grad_clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)

        # Update, at this step's learning rate: twice as high for biases as for weights
        rate = learning_rate(step, progress.n_steps)
        biases, weights = optimizer.param_groups  # the order in which make_optimizer() groups them
        biases['lr'] = 2 * rate
        weights['lr'] = rate
        scaler.step(optimizer)
        scaler.update()
        progress.update(torch.stack((confidence_loss, localization_loss)).detach(), rate)


def learning_rate(step, steps_per_epoch) -> float:
    """Return the learning rate of a step, counted from 0 over all epochs. So a resume has no rate to restore."""
    warmup_steps = min(warmup, steps_per_epoch)
    rate = lr * min(1, (step + 1) / warmup_steps) if warmup_steps else lr
    for fraction in decay_lr_at:
        # It drops only between epochs (of 232, after 154 and 193), and not before the first. 1e-9 offsets rounding.
        if step // steps_per_epoch >= max(1, int(fraction * epochs + 1e-9)):
            rate *= decay_lr_to
    return rate


def make_model(label_map, resumed, is_main):
    """Return the network with the weights from which training starts or resumes."""
    torch.manual_seed(seed)
    model = SSD300(n_classes=len(label_map))
    if resumed:
        check_label_map(resumed['label_map'], label_map)
        load_weights(model, resumed, checkpoint)
    elif finetune:
        start_from_checkpoint(model, finetune, label_map)
    elif pretrained and is_main:  # DistributedDataParallel copies its weights to the other processes
        model.base.load_pretrained_layers()
    elif freeze and not pretrained:
        print('Frozen blocks keep random weights: enough to memorize a few pictures, not to learn from many')
    if freeze:
        model.base.freeze_blocks(freeze)
    return model


def make_optimizer(model):
    """Return SGD with two groups of parameters, biases and weights: each group has its own learning rate."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith('.bias')]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith('.bias')]
    return torch.optim.SGD([{'params': biases}, {'params': weights}], lr, momentum, weight_decay=weight_decay)


class Progress:
    """One epoch's steps: shows them in a bar, checks their losses, and averages these over the processes."""

    def __init__(self, loader, epoch, n_processes, is_main):
        self.loader, self.epoch, self.n_processes, self.is_main = loader, epoch, n_processes, is_main
        self.n_steps, self.first_step = len(loader), epoch * len(loader)
        self.unread, self.losses = [], []
        self.start = time.monotonic()

    def batches(self):
        # Several processes must stop at the same step, or one would wait for another forever: see update().
        batches = until_ctrl_c(self.loader) if self.n_processes == 1 else self.loader
        with tqdm(batches, f'Epoch {self.epoch + 1}/{epochs}', self.n_steps, unit='step',
                  disable=not self.is_main) as self.bar:
            yield from self.bar

    def update(self, parts, rate):
        """Record a step: both parts of its loss (2) and its learning rate. Raises InputError if the loss isn't finite:
        from then on, the weights aren't either."""
        self.rate = rate
        self.unread.append(parts)
        # Reading a loss makes the CPU wait for the GPU. So twenty of a GPU's losses are read at once.
        read_every = 1 if parts.device.type == 'cpu' else 20
        if len(self.unread) < read_every and len(self.losses) + len(self.unread) < self.n_steps:
            return
        own = torch.stack(self.unread)  # (n_unread, 2): the losses of this process
        self.unread = []
        means = torch.cat((own, torch.full_like(own[:, :1], CtrlC.pressed)), dim=1) / self.n_processes  # (n_unread, 3)
        if self.n_processes > 1:
            distributed.all_reduce(means)  # adds up those of all processes
        for own_loss, mean in zip(own.tolist(), means.tolist()):
            *loss, pressed = mean
            self.losses.append(loss)
            if not math.isfinite(sum(loss)):
                raise InputError(self.complaint(*own_loss), **gentler_settings())
        n_pictures = min(len(self.losses) * batch_size * self.n_processes, len(self.loader.dataset))
        self.speed = n_pictures / (time.monotonic() - self.start)
        self.bar.set_postfix({'loss': sum(loss), 'lr': rate, 'pictures/s': self.speed}, refresh=False)
        self.stopped = self.n_processes > 1 and pressed > 0  # the same in all of them
        if self.stopped and len(self.losses) < self.n_steps:  # a whole epoch is worth saving
            raise KeyboardInterrupt

    def complaint(self, confidence, localization) -> str:
        """Return the message about the last loss, which isn't finite, in this process or in another one."""
        where = f'no longer finite in epoch {self.epoch + 1}, step {len(self.losses)}'
        if math.isfinite(confidence + localization):
            return f'the loss of another process is {where}'
        batch = list(self.loader.batch_sampler)[len(self.losses) - 1]
        paths = ', '.join(self.loader.dataset.paths[i] for i in batch)
        return (f'the loss is {where} (confidence {confidence:g}, localization {localization:g}; pictures: {paths}): '
                'check the boxes of these pictures, or resume with gentler settings')

    def summary(self) -> dict:
        """Return the epoch's line of the log, with the mean of its losses."""
        confidence, localization = torch.tensor(self.losses).mean(dim=0).tolist()
        return {'epoch': self.epoch + 1, 'loss': confidence + localization, 'confidence_loss': confidence,
                'localization_loss': localization, 'lr': self.rate, 'images_per_second': self.speed, 'mAP': None}


class Run:
    """A training run: what its checkpoints hold, and the files that it writes to output_folder."""

    def __init__(self, model, optimizer, scaler, label_map, resumed, is_main):
        self.model, self.optimizer, self.scaler, self.label_map = model, optimizer, scaler, label_map
        self.is_main = is_main  # the first of several processes: only it writes
        self.epoch, self.log = 0, []  # the number of finished epochs, and the log's line for each
        self.last_saved, self.n_saved = None, 0  # this run's last checkpoint, and the epochs that are saved somewhere
        if resumed:
            try:
                optimizer.load_state_dict({**optimizer.state_dict(), 'state': resumed['optimizer']['state']})
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise InputError(f"checkpoint '{checkpoint}' holds another optimizer than train.py's ({error}): choose "
                                 'one that train.py wrote') from None
            if resumed['scaler'] and scaler.is_enabled():
                scaler.load_state_dict(resumed['scaler'])
            self.epoch, self.log, self.settings = resumed['epoch'], resumed['log'], resumed['settings']
            self.n_saved = self.epoch
            require(self.epoch < epochs or self.lacks_mAP(), f"checkpoint '{checkpoint}' was already trained for "
                    f'{self.epoch} epochs: set epochs to more than that')
        self.board, self.first_epoch = None, self.epoch + 1

    def save_epoch(self, line):
        """Add an epoch's line to the log and save a checkpoint. Raises InputError if the last step ruined the weights:
        a loss shows only how the weights were before its step."""
        require(all(parameter.isfinite().all() for parameter in self.model.parameters()),
                f'the weights are no longer finite after epoch {line["epoch"]}', **gentler_settings())
        self.epoch = line['epoch']
        self.settings = current_settings(sys.modules[__name__])  # measuring the mAP alone keeps those of the training
        self.log.append(line)
        if self.is_main:
            self.save(CHECKPOINT_NAME)
            self.write_log(line)

    def lacks_mAP(self) -> bool:
        """Return whether the mAP after the last epoch is due but not yet known."""
        due = eval_every and (self.epoch % eval_every == 0 or self.epoch == epochs)
        return bool(due and self.log and self.log[-1]['mAP'] is None)

    def measure_mAP(self, test_loader, mixed_precision):
        """If the mAP on the test pictures is due, measure it. Save the network if it is the best so far."""
        if not self.lacks_mAP():
            return
        with mixed_precision:
            measured = evaluate(test_loader, self.model, self.label_map)
        if self.is_main:
            mAP = measured[1]
            beaten = any(line['mAP'] is not None and line['mAP'] >= mAP for line in self.log)
            self.log[-1]['mAP'] = mAP
            if not beaten and not math.isnan(mAP):  # nan: there was nothing to find
                self.save(BEST_NAME)
            self.save(CHECKPOINT_NAME)
            self.write_log({'mAP': mAP})
            print(f'mAP after epoch {self.epoch}: {mAP:.1%}')

    def save(self, name):
        path = Path(output_folder, name)
        save_checkpoint(path, self.epoch, self.model, self.optimizer, self.label_map, self.settings, self.scaler,
                        self.log)
        if not self.last_saved and not (checkpoint and Path(checkpoint).resolve().parent == path.resolve().parent):
            for old in {BEST_NAME, CHECKPOINT_NAME} - {name}:  # left by the run that this one overwrites
                Path(output_folder, old).unlink(missing_ok=True)
        self.last_saved, self.n_saved = path, self.epoch

    def write_log(self, news):
        """Write the log to training_log.csv, draw it, and send the news to TensorBoard. The checkpoint holds the log,
        too: failing to write it here is no reason to stop."""
        columns = {name: [line.get(name) for line in self.log] for name in self.log[-1]}
        rows = [columns, *zip(*columns.values())]
        lines = [','.join('' if value is None else str(value) for value in row) + '\n' for row in rows]
        with only_warn(), replaced_file(Path(output_folder, 'training_log.csv')) as file:
            file.write(''.join(lines).encode())
        with only_warn(), suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            if not self.board:  # hides the later epochs of an earlier run in the same folder
                self.board = SummaryWriter(Path(output_folder, 'runs'), purge_step=self.first_epoch)
            for name, value in news.items():
                if value is not None:
                    self.board.add_scalar(name, value, self.epoch)
        curves = {name: (columns['epoch'], columns[name]) for name in columns}
        losses = {name: curves[name] for name in ('loss', 'confidence_loss', 'localization_loss') if name in curves}
        with only_warn():
            draw_plots(Path(output_folder, 'training_log.png'),
                       {'loss': losses, 'learning rate': {'': curves['lr']}, 'mAP': {'': curves['mAP']}})


def gentler_settings() -> dict:
    """Return a setting that may keep a training from diverging again."""
    return {'grad_clip': 10} if grad_clip is None or grad_clip > 10 else {'lr': lr / 2}


def check_output_folder():
    """Raise InputError if output_folder can't be written to or holds a run that this one would overwrite."""
    make_folder(output_folder)
    held = [path for path in (Path(output_folder, CHECKPOINT_NAME), Path(output_folder, BEST_NAME)) if path.exists()]
    if held and not overwrite and not (checkpoint and Path(checkpoint).resolve() == held[0].resolve()):
        raise InputError(f"'{held[0]}' holds a run of {load_checkpoint(held[0])['epoch']} epochs: continue it with "
                         f'--checkpoint {held[0]}, choose another output_folder, or replace it with --overwrite')


def load_resumed() -> dict:
    """Return the checkpoint to resume. Print which settings of the learning differ from those that it had."""
    resumed = load_checkpoint(checkpoint)
    require({'optimizer', 'settings'} <= resumed.keys(),
            f"checkpoint '{checkpoint}' has weights but no training state to resume: use --finetune")
    before, today = resumed['settings'], current_settings(sys.modules[__name__])
    changed = {name: before[name] for name in LEARNING if name in before and before[name] != today[name]}
    if changed:
        print(f'Settings that differ from those of {checkpoint}:')
        for name, value in changed.items():
            print(f'    {name}: {today[name]} from now on, {value} before')
        print(f'To keep those of the checkpoint: {as_flags(changed)}')
    return resumed


def check_settings():
    check_ranges(sys.modules[__name__], workers=(0, math.inf), eval_every=(1, math.inf), batch_size=(1, math.inf),
                 epochs=(1, math.inf), lr=(1e-9, 100), warmup=(0, math.inf), decay_lr_to=(1e-9, 1),
                 momentum=(0, 0.9999), weight_decay=(0, 1), grad_clip=(1e-9, math.inf), min_negatives=(0, 8732),
                 freeze=(0, 5), seed=(0, 2 ** 32 - 1))
    require(decay_lr_at == sorted(decay_lr_at) and all(0 < fraction <= 1 for fraction in decay_lr_at), 'decay_lr_at '
            f'must be fractions of the training in rising order, like 0.667 for two thirds, not {decay_lr_at}')
    require(localization in ('smooth_l1', 'l1'), f"localization must be 'smooth_l1' or 'l1', not '{localization}'")


if __name__ == '__main__':
    run_script(sys.modules[__name__])
