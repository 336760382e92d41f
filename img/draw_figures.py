"""Draws all figures of the README again.

    python img/draw_figures.py                                            # all of them, into img/
    python img/draw_figures.py --only nms_candidates.svg ssd300.svg       # two of them
    python img/draw_figures.py --record_teach                             # first memorizes the photograph anew
    python img/draw_figures.py --record checkpoint_ssd300.pth             # first asks a trained network anew

They come from the project's own functions, and come out the same on any computer, but for pixels of photographs, which
Pillow may round differently in other versions. What networks gave out was recorded, see img/README.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the project's own modules lie

import augmentation  # noqa: F401, it makes figures
import charts  # noqa: F401
import diagrams  # noqa: F401
import recorded
from scenes import HERE
from svg import FIGURES
from utils import make_folder, require, run_script

output_folder: str = str(HERE)  # where the figures go
only: list[str] | None = None  # file names of the figures to draw; None: all
record: str | None = None  # checkpoint of a trained network: what it finds in the photographs
record_teach: bool = False  # train a network on the one photograph, some minutes: what it says along the way
record_quick_start: list[str] | None = None  # checkpoints of the quick start after some of its epochs


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
        FIGURES[name](output_folder)
        print(name)


if __name__ == '__main__':
    run_script(sys.modules[__name__])
