"""Make the data lists that train.py and eval.py read.

    python create_data_lists.py                  # the embedded sample: sixteen pictures of emoji
    python create_data_lists.py --download       # downloads PASCAL VOC 2007 and 2012 (2.9 GB) and uses them
    python create_data_lists.py --voc07_path /data/VOCdevkit/VOC2007 --voc12_path /data/VOCdevkit/VOC2012
    python create_data_lists.py --voc07_path /data/fruit --labels apple pear plum

Writes TRAIN_images.json, TRAIN_objects.json, TEST_images.json, TEST_objects.json and label_map.json to output_folder.
With VOC, the training data are trainval of 2007 and 2012, the test data are test of 2007; both archives of 2007 must be
extracted to the same place. With your own data in VOC's format, the same lists decide; without lists, the folders train
and test (or val); without these, every fifth picture is for testing.

Decodes each picture once, to find broken ones. Finally reports which training objects SSD300's priors can find.
"""

import math
import sys
from pathlib import Path

import torch
from torchvision.datasets import VOCDetection

from model import SSD300
from utils import (InputError, create_data_lists, cxcy_to_xy, find_jaccard_overlap, make_folder, run_script,
                   voc_labels)

# Settings: each annotated constant is also a command-line flag of its name, which changes it for one run.

voc07_path: str = 'img/emoji_voc/VOC2007'  # folder with Annotations, ImageSets and JPEGImages: training and test
voc12_path: list[str] | None = ['img/emoji_voc/VOC2012']  # more such folders, for training only; None: no more
labels: list[str] = list(voc_labels)  # names of the classes, as in the annotations; by default, VOC's twenty
skip_empty: bool = False  # leave out training pictures that have no object of these labels
keep_unannotated: bool = False  # take pictures without an annotation file as pictures without objects
output_folder: str = 'data'  # folder for the lists
download: bool = False  # download VOC and use it instead of the paths
download_folder: str = 'voc'  # folder for the download: 2.9 GB of archives, and as much again when extracted


def download_voc(folder) -> tuple[Path, Path]:
    """Download and extract 2007 trainval, 2007 test and 2012 trainval; archives that are already there are only
    checked. Return the folders VOC2007 and VOC2012."""
    make_folder(folder)
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        print(f'VOC {year} {image_set}')
        try:
            VOCDetection(folder, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(f"VOC {year} {image_set} can't be downloaded to '{folder}' ({error}): try again, or "
                             'extract the archives from http://host.robots.ox.ac.uk/pascal/VOC yourself and set '
                             'voc07_path and voc12_path') from None
    return Path(folder, 'VOCdevkit', 'VOC2007'), Path(folder, 'VOCdevkit', 'VOC2012')


def coverage(boxes, box_labels, label_names, priors_cxcy) -> dict[str, tuple]:
    """Return which objects the priors can find. An object that no prior overlaps by 0.5 is learned only from the one
    prior that it claims.

    :param boxes: objects in fractional boundary coordinates (n, 4)
    :param box_labels: their classes (n), from 1 on
    :return: {label: (number of objects, share whose best prior overlaps by 0.5 or more, median of the best overlaps,
        share of those that are smaller than the smallest prior)}, and the same of "all"; shares of no objects are nan
    """
    best = best_prior_overlaps(boxes, priors_cxcy)  # (n)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)  # (n)
    smaller = areas < priors_cxcy[:, 2:].prod(dim=1).min() - 1e-6  # (n)
    of_class = {label: box_labels == i for i, label in enumerate(label_names, start=1)}  # (n) each
    rows = {}
    for label, mask in {**of_class, 'all': torch.ones_like(smaller)}.items():
        n_objects = int(mask.sum())
        rows[label] = (n_objects, (best[mask] >= 0.5).float().mean().item(),
                       best[mask].quantile(0.5).item() if n_objects else math.nan,
                       smaller[mask].float().mean().item())
    return rows


def best_prior_overlaps(boxes, priors_cxcy):
    """Return each object's largest Jaccard overlap with any prior (n).

    :param boxes: objects in fractional boundary coordinates (n, 4): as the network sees them, in a square image
    :param priors_cxcy: priors in center-size coordinates (8732, 4)
    """
    priors_xy = cxcy_to_xy(priors_cxcy)  # (8732, 4)
    # A hundred at a time: the overlaps of all of VOC's 47,223 objects would take 1.6 GB.
    return torch.cat([find_jaccard_overlap(chunk, priors_xy).amax(dim=1) for chunk in boxes.split(100)])


def print_coverage(rows):
    """Print the table that `coverage` returns, and advice on classes that the priors hardly find."""
    width = max(20, *(len(label) + 2 for label in rows))
    print(f'\n{"training objects":<{width}}{"number":>8}{"prior ≥ 0.5":>13}{"median best":>13}{"too small":>11}')
    for label, (number, found, median, smaller) in rows.items():
        shares = f'{found:>13.1%}{median:>13.2f}{smaller:>11.1%}' if number else '  no object: is it misspelled?'
        print(f'{label:<{width}}{number:>8,}{shares}')
    print('prior ≥ 0.5: share of objects that some prior overlaps by at least 0.5; median best: median of the largest\n'
          'overlaps; too small: share of objects with less area than the smallest prior.\n'
          "The priors are those of model.py, as in training from ImageNet's weights; a checkpoint has its own")
    poor = [label for label, (_, found, _, _) in rows.items() if found < 0.8 and label != 'all']
    if poor:
        print(f'Fewer than 80% find a prior: {", ".join(poor)}. If they are small, cut the pictures into parts or\n'
              'give FEATURE_MAPS in model.py smaller scales; if they are long and thin, give it other ratios')


def main():
    paths = voc07_path, voc12_path
    if download:
        paths = download_voc(download_folder)
    elif Path(voc07_path) != Path('img/emoji_voc/VOC2007') and voc12_path == ['img/emoji_voc/VOC2012']:
        paths = voc07_path, None  # the sample's emoji are for the sample alone
    objects = create_data_lists(*paths, output_folder, labels, skip_empty, keep_unannotated)
    print_coverage(coverage(*objects, labels, SSD300.create_prior_boxes()))


if __name__ == '__main__':
    run_script(sys.modules[__name__])
