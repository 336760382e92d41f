"""Draws all figures of the README again.

    python img/draw_figures.py                                            # all of them, into img/
    python img/draw_figures.py --only nms_candidates.svg ssd300.svg       # two of them
    python img/draw_figures.py --record_teach                             # first memorizes the photograph anew
    python img/draw_figures.py --record checkpoint_ssd300.pth             # first asks a trained network anew

They come from the project's own functions: what a figure says of priors, overlaps, matches or crops is what the
code computes. They come out the same on any computer, but for pixels of embedded photographs, which Pillow may round
differently in other versions. What networks gave out was recorded, see img/README.md.
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
record_teach: bool = False  # train a network on the one photograph, some minutes: what it says along the way
record_quick_start: list[str] | None = None  # checkpoints of the quick start after some of its epochs

# Each draws the figure of its own name. In the order of the README.
FIGURES = {f'{function.__name__}.svg': function for function in (
    recorded.hero, recorded.quick_start_training,
    scenes.coordinates, scenes.jaccard_index, scenes.jaccard_values,
    diagrams.ssd300, diagrams.vgg16, diagrams.fc_as_conv, diagrams.decimation, diagrams.modified_vgg16,
    diagrams.auxiliary_convolutions,
    scenes.feature_maps, scenes.priors_center, scenes.priors_neighbors, scenes.objects_on_maps,
    scenes.offsets_from_prior,
    diagrams.prediction_convolutions, diagrams.prediction_channels, diagrams.reshaping,
    scenes.matching_scene, scenes.matching_result, recorded.hard_negatives, recorded.teach, recorded.score_maps,
    recorded.nms_candidates, recorded.nms_overlaps, recorded.nms_result, charts.eleven_points, diagrams.data_flow,
    augmentation.augmentation, augmentation.augmented_samples, charts.learning_rate,
    charts.results_bccd, charts.results_voc, recorded.gallery, recorded.failures,
)}


def main():
    names = list(FIGURES) if only is None else only
    for name in names:
        require(name in FIGURES, f"only names '{name}', but the figures are {', '.join(FIGURES)}")
    if record:
        recorded.record_photos(record)
    if record_teach:
        recorded.record_teach()
    if record_quick_start:
        recorded.record_quick_start(record_quick_start)
    make_folder(output_folder)
    for name in names:
        FIGURES[name]().save(Path(output_folder, name))
        print(name)


if __name__ == '__main__':
    run_script(sys.modules[__name__])
