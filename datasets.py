"""VOC as a PyTorch Dataset, read from the data lists that create_data_lists.py wrote."""

import json
import random
from pathlib import Path

import torch
from torch.utils.data import Dataset, default_collate

from utils import IMAGENET_MEAN, IMAGENET_STD, InputError, read_image, require, transform


class PascalVOCDataset(Dataset):
    """The pictures of one split with their objects.

    An item is (image, boxes, labels, difficulties): a normalized image (3, 300, 300), boxes in fractional boundary
    coordinates (n, 4), labels long (n), difficulties bool (n). A picture without objects has n = 0. Raises InputError
    if the data lists are missing or don't belong together, or if a picture can't be read or can't contain its objects.
    """

    def __init__(self, data_folder, split, keep_difficult=False, augment=None, seed=None):
        """
        :param data_folder: folder with the data lists
        :param split: 'TRAIN' or 'TEST'
        :param keep_difficult: whether to keep objects marked as difficult
        :param augment: whether to change pictures at random; None: only those of the training split
        :param seed: makes the changes repeatable: they depend only on the seed, the epoch (see `set_epoch`) and the
            picture's number; None: they differ each time
        """
        self.split = split.upper()
        require(self.split in ('TRAIN', 'TEST'), f"split must be 'train' or 'test', not '{split}'")
        self.keep_difficult, self.seed = keep_difficult, seed
        self.augment = self.split == 'TRAIN' if augment is None else augment
        self.image_mean, self.image_std = IMAGENET_MEAN, IMAGENET_STD
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # so running workers see the number change

        self.paths = read_list(data_folder, f'{self.split}_images.json', list)
        self.objects = read_list(data_folder, f'{self.split}_objects.json', list)
        self.label_map = read_list(data_folder, 'label_map.json', dict)
        require(len(self.paths) == len(self.objects),
                f"'{data_folder}' lists {len(self.paths)} pictures but the objects of {len(self.objects)}: "
                'make the lists again with create_data_lists.py')

    def normalize_for(self, model):
        """Normalize images as a network expects them. Call it before a DataLoader starts its workers."""
        self.image_mean, self.image_std = model.image_mean, model.image_std

    def set_epoch(self, epoch):
        """Set the epoch that seeds the random changes, in running workers as well."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if self.augment and self.seed is not None:
            # The changes must not depend on which worker reads the picture, nor on what it read before. The seed is a
            # text, not a sum: with 0 + 1 = 1 + 0, seed 0 would repeat in its second epoch the first of seed 1.
            random.seed(f'{self.seed} {self.epoch.item()} {i}')
            torch.default_generator.manual_seed(random.getrandbits(63))
        image = read_image(self.paths[i])
        objects = self.objects[i]
        boxes = torch.tensor(objects['boxes'], dtype=torch.float).view(-1, 4)  # (n, 4), also for n = 0
        labels = torch.tensor(objects['labels'], dtype=torch.long)  # (n)
        difficulties = torch.tensor(objects['difficulties'], dtype=torch.bool)  # (n)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # (n, 2), in pixels
        require((centers < torch.tensor(image.size)).all(),
                f"picture '{self.paths[i]}' has {image.width}×{image.height} pixels, but an object outside of them: it "
                'has changed since the data lists were made; make them again with create_data_lists.py')
        if not self.keep_difficult:
            boxes, labels, difficulties = boxes[~difficulties], labels[~difficulties], difficulties[~difficulties]
        split = 'TRAIN' if self.augment else 'TEST'
        return transform(image, boxes, labels, difficulties, split, self.image_mean, self.image_std)

    @staticmethod
    def collate_fn(batch):
        """Make a batch of N items.

        :return: images (N, 3, 300, 300); boxes (all, 4), labels (all) and difficulties (all) of the objects of all
            images, one image after the other; n_objects, a list with the number of objects in each image

        Images differ in their number of objects, so boxes can't be stacked; `boxes.split(n_objects)` is the list of
        each image's boxes. A loader could pass such lists, but each tensor from a worker costs an open file: four are
        cheap, 3 · N + 1 exceed a shell's limit.
        """
        images, boxes, labels, difficulties = zip(*batch)
        n_objects = [len(image_labels) for image_labels in labels]
        # default_collate stacks right in a worker's shared memory; torch.stack would need another copy.
        return default_collate(images), torch.cat(boxes), torch.cat(labels), torch.cat(difficulties), n_objects


def read_list(data_folder, name, kind):
    """Return the content of a JSON file, a list or a dict. Raises InputError if it is missing or damaged."""
    path = Path(data_folder) / name
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, kind) or not content:
            raise ValueError(f"it must hold a {kind.__name__} that isn't empty")
        return content
    except FileNotFoundError:
        raise InputError(f"data list '{path}' isn't there: run create_data_lists.py first, or set data_folder to its "
                         'output_folder') from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"data list '{path}' can't be read ({error}): make it again with create_data_lists.py") from None
