"""Makes the data lists that train.py and eval.py read.

    python create_data_lists.py                  # the embedded sample: sixteen pictures of emoji
    python create_data_lists.py --download       # fetches PASCAL VOC 2007 and 2012 (2.8 GB) and uses that
    python create_data_lists.py --voc07_path /data/VOCdevkit/VOC2007 --voc12_path /data/VOCdevkit/VOC2012
    python create_data_lists.py --voc07_path /data/fruit --voc12_path None --labels apple pear plum

Writes TRAIN_images.json, TRAIN_objects.json, TEST_images.json, TEST_objects.json and label_map.json to output_folder.
Training data are trainval of 2007 and 2012, test data are test of 2007. Both archives of 2007 must be extracted to the
same place.
"""

import sys
from pathlib import Path

from torchvision.datasets import VOCDetection

from utils import InputError, create_data_lists, make_folder, run_script, voc_labels

voc07_path: str = 'img/emoji_voc/VOC2007'  # folder with Annotations, ImageSets and JPEGImages: training and test
voc12_path: list[str] | None = ['img/emoji_voc/VOC2012']  # more such folders, for training only; None: no more
labels: list[str] = list(voc_labels)  # names of the classes, as the annotations have them; VOC's twenty
output_folder: str = 'data'  # where the lists go
download: bool = False  # fetch VOC from its makers instead, and use it in place of the paths
download_folder: str = 'voc'  # where a download goes: 2.8 GB of archives, and as much again when extracted


def download_voc(folder) -> tuple[Path, Path]:
    """Fetches 2007 trainval, 2007 test and 2012 trainval and extracts them; archives that are there already are only
    checked. Returns the folders VOC2007 and VOC2012."""
    make_folder(folder)
    for year, image_set in (('2007', 'trainval'), ('2007', 'test'), ('2012', 'trainval')):
        print(f'VOC {year} {image_set}')
        try:
            VOCDetection(folder, year=year, image_set=image_set, download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(f"VOC {year} {image_set} can't be fetched into '{folder}' ({error}): try again, or "
                             'extract the archives from http://host.robots.ox.ac.uk/pascal/VOC yourself and set '
                             'voc07_path and voc12_path') from None
    return Path(folder, 'VOCdevkit', 'VOC2007'), Path(folder, 'VOCdevkit', 'VOC2012')


def main():
    paths = download_voc(download_folder) if download else (voc07_path, voc12_path)
    create_data_lists(*paths, output_folder, labels)


if __name__ == '__main__':
    run_script(sys.modules[__name__])
