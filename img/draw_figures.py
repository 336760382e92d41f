"""Draws all figures of the README again.

    python img/draw_figures.py                                            # all of them, into img/
    python img/draw_figures.py --only nms_1_candidates.svg ssd300.svg     # two of them
    python img/draw_figures.py --record epoch_2.pth epoch_6.pth epoch_12.pth

They come from the project's own functions: what a figure says of priors, overlaps, matches or crops is what the
code computes. The same settings give the same files: SVG on any computer, JPEG with the same version of Pillow.

The figure of the quick start's training needs detections of a real training run. Those are in
quick_start_detections.json, beside this script. To make them anew, keep copies of checkpoint_ssd300.pth after some
of the run's epochs and name them as --record: `record_detections` writes what each of them finds.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project's own modules lie

import augmentation
import charts
import detect
import diagrams
import scenes
from utils import load_checkpoint, make_folder, read_image, replaced_file, require, run_script

output_folder: str = str(scenes.HERE)  # where the figures go
only: list[str] | None = None  # file names of the figures to draw; None: all
record: list[str] | None = None  # checkpoints of one training run, whose detections to write down first
picture: str = 'emoji_voc/VOC2007/JPEGImages/000006.jpg'  # for --record: a training picture, its path inside img/

# In the order of the README
FIGURES = {
    'coordinates_pixels.svg': scenes.coordinates_pixels,
    'coordinates_fractional.svg': scenes.coordinates_fractional,
    'coordinates_center_size.svg': scenes.coordinates_center_size,
    'jaccard_index.svg': scenes.jaccard_index,
    'jaccard_values.svg': scenes.jaccard_values,
    'ssd300.svg': diagrams.ssd300,
    'vgg16.svg': diagrams.vgg16,
    'fc_as_conv_1.svg': diagrams.fc_as_conv_1,
    'fc_as_conv_2.svg': diagrams.fc_as_conv_2,
    'fc_as_conv_3.svg': diagrams.fc_as_conv_3,
    'fc_as_conv_4.svg': diagrams.fc_as_conv_4,
    'decimation.svg': diagrams.decimation,
    'modified_vgg16.svg': diagrams.modified_vgg16,
    'auxiliary_convolutions.svg': diagrams.auxiliary_convolutions,
    'feature_maps.svg': scenes.feature_maps,
    'priors_center.svg': scenes.priors_center,
    'priors_neighbors.svg': scenes.priors_neighbors,
    'offsets_from_prior.svg': scenes.offsets_from_prior,
    'prediction_convolutions_1.svg': diagrams.prediction_convolutions_1,
    'prediction_convolutions_2.svg': diagrams.prediction_convolutions_2,
    'prediction_convolutions_3.svg': diagrams.prediction_convolutions_3,
    'prediction_convolutions_4.svg': diagrams.prediction_convolutions_4,
    'reshaping.svg': diagrams.reshaping,
    'stacking.svg': diagrams.stacking,
    'matching_scene.svg': scenes.matching_scene,
    'matching_result.svg': scenes.matching_result,
    'hard_negatives.svg': charts.hard_negatives,
    'nms_1_candidates.svg': scenes.nms_1_candidates,
    'nms_2_sorted.svg': scenes.nms_2_sorted,
    'nms_3_overlaps.svg': scenes.nms_3_overlaps,
    'nms_4_result.svg': scenes.nms_4_result,
    'augmentation.jpg': augmentation.augmentation,
    'augmented_samples.jpg': augmentation.augmented_samples,
    'learning_rate.svg': charts.learning_rate,
    'eleven_points.svg': charts.eleven_points,
    'receptive_field.svg': scenes.receptive_field,
    'quick_start_training.svg': scenes.quick_start_training,
}


def main():
    names = list(FIGURES) if only is None else only
    for name in names:
        require(name in FIGURES, f"only names '{name}', but the figures are {', '.join(FIGURES)}")
    if record is not None:
        for checkpoint in record:
            record_detections(checkpoint, picture)
    make_folder(output_folder)
    for name in names:
        figure = FIGURES[name]()
        if figure is None:
            print(f'{name}: not drawn, since there is no {scenes.QUICK_START.name}; --record makes it')
        else:
            figure.save(Path(output_folder, name))
            print(name)


def record_detections(checkpoint, picture):
    """Writes what a checkpoint's network finds in a picture to quick_start_detections.json.

    The file holds {'picture': path inside img/, 'epochs': {epoch: [{'label', 'score', 'box' in pixels}, …]}}. Epochs
    of the same picture that are in it stay, those of another picture don't.
    """
    recorded = {'picture': picture, 'epochs': {}}
    if scenes.QUICK_START.exists():
        old = json.loads(scenes.QUICK_START.read_text(encoding='utf-8'))
        recorded = old if old['picture'] == picture else recorded
    detect.checkpoint = checkpoint
    found = detect.find_objects(read_image(scenes.HERE / picture), min_score=0.2, max_overlap=0.2, top_k=4)
    epoch = load_checkpoint(checkpoint)['epoch']
    recorded['epochs'][str(epoch)] = [
        {'label': label, 'score': round(score, 3), 'box': [round(value, 1) for value in box]}
        for label, score, box in found]
    with replaced_file(scenes.QUICK_START) as file:
        file.write((json.dumps(recorded, indent=1) + '\n').encode())
    print(f'epoch {epoch}: {len(found)} objects')


if __name__ == '__main__':
    run_script(sys.modules[__name__])
