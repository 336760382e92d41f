"""Measures the mean average precision (mAP) of a trained SSD300, by the rules of PASCAL VOC 2007.

    python eval.py                                         # checkpoint_ssd300.pth on the test split
    python eval.py --split train                           # on what it was trained with: has it learned at all?

Needs the data lists of create_data_lists.py. Prints a table with the average precision of each class.
"""

import os
import sys

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import load_model
from utils import calculate_mAP, check_label_map, label_map, require, run_script

data_folder: str = 'data'  # where create_data_lists.py put the data lists
checkpoint: str = 'checkpoint_ssd300.pth'  # the trained network, a file that train.py wrote
split: str = 'test'  # 'test' or 'train'
batch_size: int = 16  # images per forward pass; changes the speed and the memory needed, not the result
workers: int = min(4, os.cpu_count() or 1)  # processes that read pictures; 0: the main one reads them itself

# With these, results compare with the paper's and others'. They aren't settings.
MIN_SCORE = 0.01  # so low that the precision–recall curve gets its long tail
MAX_OVERLAP = 0.45  # of two boxes of a class
TOP_K = 200  # objects per image


def main():
    check_settings()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    # Difficult objects have to be known, so that finding one isn't counted as an error.
    dataset = PascalVOCDataset(data_folder, split, keep_difficult=True, augment=False)
    model, model_label_map = load_model(checkpoint)
    check_label_map(model_label_map, dataset.label_map)
    model.to(device, memory_format=torch.channels_last)
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=dataset.collate_fn,
                        pin_memory=device.type == 'cuda')

    average_precisions, mean = evaluate(loader, model, dataset.label_map)
    n_objects = count_objects(dataset)
    print(f'{"class":<20}{"objects":>10}{"AP":>10}')
    for label, value in average_precisions.items():
        print(f'{label:<20}{n_objects[label]:>10,}{value:>10.4f}')
    print(f'mAP of {len(dataset):,} images: {mean:.4f}')


@torch.no_grad()
def evaluate(test_loader, model, label_map=label_map):
    """Detects the objects in all pictures of a loader and compares them with the true ones.

    :param test_loader: gives batches of PascalVOCDataset, difficult objects included
    :param model: SSD300
    :return: {label: average precision}, mAP; see `calculate_mAP`
    """
    model.eval()
    device = model.priors_cxcy.device
    detections, truths = [], []
    for images, *truth in tqdm(test_loader, desc='Evaluating', unit='batch'):
        images = images.to(device, non_blocking=True)  # (N, 3, 300, 300)
        predicted_locs, predicted_scores = model(images)  # (N, 8732, 4), (N, 8732, n_classes)
        found = model.detect_objects(predicted_locs, predicted_scores, MIN_SCORE, MAX_OVERLAP, TOP_K)
        detections.append([[tensor.cpu() for tensor in tensors] for tensors in found])
        truths.append(truth)
    # From batches of (boxes, labels, scores) to one list of boxes, one of labels, …, with a tensor per picture.
    det_boxes, det_labels, det_scores = ([t for batch in column for t in batch] for column in zip(*detections))
    boxes, labels, difficulties = ([t for batch in column for t in batch] for column in zip(*truths))
    return calculate_mAP(det_boxes, det_labels, det_scores, boxes, labels, difficulties, label_map)


def count_objects(dataset):
    """{label: number of objects that aren't difficult}"""
    counts = dict.fromkeys(dataset.label_map, 0)
    names = {index: label for label, index in dataset.label_map.items()}
    for objects in dataset.objects:
        for label, difficult in zip(objects['labels'], objects['difficulties']):
            counts[names[label]] += not difficult
    return counts


def check_settings():
    require(batch_size >= 1, f'batch_size must be at least 1, not {batch_size}')
    require(workers >= 0, f'workers must be 0 or more, not {workers}')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
