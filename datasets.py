"""VOC as a PyTorch Dataset, read from the data lists that create_data_lists.py wrote."""

import json
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset, default_collate

from utils import IMAGENET_MEAN, IMAGENET_STD, InputError, read_image, require, transform


class PascalVOCDataset(Dataset):
    """The pictures of one split with their objects.

    An item is (image, boxes, labels, difficulties): a normalized image (3, 300, 300), boxes in fractional
    boundary coordinates (n, 4), labels long (n), difficulties bool (n). A picture without objects has n = 0.
    One that can't be read, or to which the objects can't belong, raises InputError.
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=None, seed=None):
        """
        :param data_folder: where the data lists are
        :param split: 'TRAIN' or 'TEST'
        :param keep_difficult: whether objects marked as difficult are kept
        :param augment: whether pictures are changed at random; None: for the training split only
        :param seed: makes the changes repeatable: they follow from the seed, the epoch (see `set_epoch`) and the
            picture's number alone; None: they differ each time

        Raises InputError if there are no data lists, or if they don't belong together.
        """
        self.split = split.upper()
        require(self.split in ('TRAIN', 'TEST'), f"split must be 'train' or 'test', not '{split}'")
        self.keep_difficult, self.seed, self.epoch = keep_difficult, seed, 0
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self.augment = self.split == 'TRAIN' if augment is None else augment

        self.images = read_list(data_folder, f'{self.split}_images.json', list)
        self.objects = read_list(data_folder, f'{self.split}_objects.json', list)
        self.label_map = read_list(data_folder, 'label_map.json', dict)
        require(len(self.images) == len(self.objects),
                f"'{data_folder}' has lists of {len(self.images)} images but of {len(self.objects)} images' objects: "
                'make them again with create_data_lists.py')

    def normalize_for(self, model):
        """Normalizes images as a network wants them: one from elsewhere has a mean and deviation of its own."""
        self.image_mean, self.image_std = model.image_mean, model.image_std

    def set_epoch(self, epoch):
        """Makes the random changes those of an epoch. Counts from the next DataLoader on, since workers have copies."""
        self.epoch = epoch

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if self.augment and self.seed is not None:
            # So the changes don't depend on which worker reads the picture, nor on what it read before. A text
            # keeps the three numbers apart, where their sum could be that of another seed, epoch or picture.
            random.seed(f'{self.seed} {self.epoch} {i}')
            torch.manual_seed(random.getrandbits(63))
        image = read_image(self.images[i])
        boxes, labels, difficulties = make_tensors(**self.objects[i])  # (n, 4), (n), (n)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n, 2), in pixels
        require((centers < torch.tensor(image.size)).all(),
                f"picture '{self.images[i]}' has {image.width}×{image.height} pixels, but an object outside of them: "
                "the data lists were made of another one; make them again with create_data_lists.py")
        if not self.keep_difficult:
            boxes, labels, difficulties = boxes[~difficulties], labels[~difficulties], difficulties[~difficulties]
        return transform(image, boxes, labels, difficulties, 'TRAIN' if self.augment else 'TEST', self.image_mean,
                         self.image_std)

    def collate_fn(self, batch):
        """Makes a batch of items: images stacked to (N, 3, 300, 300), all else as lists of N tensors, since
        images differ in how many objects they have."""
        images, boxes, labels, difficulties = zip(*batch)
        return Batch((default_collate(images), list(boxes), list(labels), list(difficulties)))


class Batch(tuple):
    """(images, boxes, labels, difficulties), made to travel from a worker process with only one tensor, the images.

    PyTorch sends each tensor as a piece of shared memory with an open file. Three small ones per picture would take
    longer than all the images; and since eval.py keeps them, it would run out of files after a few hundred pictures.
    So they travel as plain lists: `__reduce__` tells pickle how to take a batch apart and who puts it together.
    """

    def __reduce__(self):
        images, *others = self
        return unpack_batch, (images, *([tensor.tolist() for tensor in tensors] for tensors in others))


def unpack_batch(images, *others):
    """Puts a Batch together again, in the main process."""
    boxes, labels, difficulties = zip(*map(make_tensors, *others))
    return images, list(boxes), list(labels), list(difficulties)


def make_tensors(boxes, labels, difficulties):
    """The objects of a picture, given as three lists: boxes (n, 4), labels (n), difficulties (n)."""
    return (torch.tensor(boxes, dtype=torch.float).view(-1, 4),  # also for n = 0
            torch.tensor(labels, dtype=torch.long), torch.tensor(difficulties, dtype=torch.bool))


def read_list(data_folder, name, kind):
    """The content of one of the JSON files, a list or a dict. Raises InputError if it is missing or damaged."""
    path = Path(data_folder) / name
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, kind) or not content:
            raise ValueError(f'it must hold a {kind.__name__} that isn\'t empty')
        return content
    except FileNotFoundError:
        raise InputError(f"data list '{path}' isn't there: run create_data_lists.py first, or set data_folder to the "
                         'folder that it wrote') from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"data list '{path}' can't be read ({error}): make it again with create_data_lists.py") from None
