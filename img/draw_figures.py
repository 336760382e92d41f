"""Draws all figures of the README again.

    python img/draw_figures.py                                            # all of them, into img/
    python img/draw_figures.py --only nms_1_candidates.svg ssd300.svg     # two of them
    python img/draw_figures.py --record checkpoint_ssd300.pth             # first asks a trained network anew

They come from the project's own functions: what a figure says of priors, overlaps, matches or crops is what the
code computes. They come out the same on any computer, but for pixels of the augmentation, which Pillow may round
differently in other versions. What trained networks gave out was recorded, see img/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project's own modules lie

import augmentation
import charts
import diagrams
import recorded
import scenes
from utils import make_folder, require, run_script

output_folder: str = str(scenes.HERE)  # where the figures go
only: list[str] | None = None  # file names of the figures to draw; None: all
record: str | None = None  # checkpoint of a trained network: what it finds in the photographs
candidates_in: str = 'boats.jpg'  # the photograph in which record also writes down candidates and scores
record_hard_negatives: str | None = None  # checkpoint of a half-trained network; 'untrained': a network of seed 0
record_quick_start: list[str] | None = None  # checkpoints of the quick start after some of its epochs
picture: str = 'emoji_voc/VOC2007/JPEGImages/000006.jpg'  # the training picture in which those look

# Each draws the figure of its own name.
FIGURES = {f'{function.__name__}.svg': function for function in (
    recorded.detections, recorded.failures, recorded.quick_start_training, recorded.score_maps,
    recorded.hard_negatives, recorded.nms_1_candidates, recorded.nms_2_sorted, recorded.nms_3_overlaps,
    recorded.nms_4_result,
    scenes.coordinates_pixels, scenes.coordinates_fractional, scenes.coordinates_center_size,
    scenes.jaccard_index, scenes.jaccard_values, scenes.feature_maps, scenes.priors_center, scenes.priors_neighbors,
    scenes.offsets_from_prior, scenes.receptive_field, scenes.matching_scene, scenes.matching_result,
    diagrams.ssd300, diagrams.vgg16, diagrams.modified_vgg16, diagrams.auxiliary_convolutions,
    diagrams.fc_as_conv, diagrams.decimation, diagrams.prediction_convolutions,
    diagrams.prediction_channels, diagrams.reshaping, diagrams.stacking,
    augmentation.augmentation, augmentation.augmented_samples, charts.learning_rate, charts.eleven_points,
    charts.results_bccd, charts.results_voc,
)}


def main():
    names = list(FIGURES) if only is None else only
    for name in names:
        require(name in FIGURES, f"only names '{name}', but the figures are {', '.join(FIGURES)}")
    if record:
        recorded.record_photos(record, candidates_in)
    if record_hard_negatives:
        recorded.record_hard_negatives(None if record_hard_negatives == 'untrained' else record_hard_negatives)
    for checkpoint in record_quick_start or ():
        recorded.record_quick_start(checkpoint, picture)
    make_folder(output_folder)
    for name in names:
        FIGURES[name]().save(Path(output_folder, name))
        print(name)


if __name__ == '__main__':
    run_script(sys.modules[__name__])
