"""The paper's Figure 3 from finished runs of dcvae.py: python tests/compare.py OUT.png RUN_FOLDER …

Columns are eight test images' reconstructions and eight samples. The first row is the images
themselves; then a row for each run, named by --loss, with the pixel distance of results.json. Not
collected by pytest.
"""

import json
import sys
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure


def row_of(picture, i):
    """Row i of a sheet of eight pictures a row, with the 2 pixels of white around it."""
    side = (picture.shape[1] - 2) // 8  # of a picture and the line beside it
    return picture[i * side:(i + 1) * side + 2]


def show(axes, picture, title=None):
    """One row of pictures, with its name on the left."""
    axes.imshow(picture, interpolation="nearest")
    if title is not None:
        axes.set_ylabel(title, rotation=0, ha="right", va="center")


def main(out, *folders):
    """Draw the first row of x, of x̂ and of samples of every run, one run above the other."""
    figure = Figure(figsize=(10, 0.7 * (len(folders) + 1.2)), layout="constrained")
    panels = figure.subplots(len(folders) + 1, 2, squeeze=False)
    for i, folder in enumerate(map(Path, folders), 1):
        cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        reconstructions = matplotlib.image.imread(folder / "reconstructions" / "test.png")
        samples = matplotlib.image.imread(folder / "samples" / "test.png")
        if i == 1:
            show(panels[0, 0], row_of(reconstructions, 0), "x")
        title = f"{cfg['loss']} {results['pixel_distance']:.1f}"
        show(panels[i, 0], row_of(reconstructions, 1), title)
        show(panels[i, 1], row_of(samples, 0))
    panels[0, 0].set_title("reconstructions (beside the name: pixel distance)", fontsize=9)
    panels[1, 1].set_title("samples", fontsize=9)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
