"""The paper's Figure 3 from finished runs of dcvae.py. Not collected by pytest.

    python tests/compare.py OUT.png RUN_FOLDER …

Columns are runs, named by --loss, with the pixel distance of results.json: eight test images, their
reconstructions, eight samples.
"""

import json
import sys
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure


def main(out, *folders):
    """Draw the first row of x, of x̂ and of samples of every run, one run above the other."""
    figure = Figure(figsize=(10, 0.7 * (len(folders) + 1.2)), layout="constrained")
    axes = figure.subplots(len(folders) + 1, 2, squeeze=False)
    for row, folder in enumerate(map(Path, folders), 1):
        cfg, results = (
            json.loads((folder / name).read_text()) for name in ("config.json", "results.json")
        )
        pictures = [
            matplotlib.image.imread(folder / name / "test.png")
            for name in ("reconstructions", "samples")
        ]
        side = (pictures[0].shape[1] - 2) // 8

        def line(picture, i):
            return picture[i * side : (i + 1) * side + 2]

        axes[0, 0].imshow(line(pictures[0], 0), interpolation="nearest")
        axes[row, 0].imshow(line(pictures[0], 1), interpolation="nearest")
        axes[row, 1].imshow(line(pictures[1], 0), interpolation="nearest")
        axes[row, 0].set_ylabel(
            f"{cfg['loss']} {results['pixel_distance']:.1f}", rotation=0, ha="right", va="center"
        )
    axes[0, 0].set_ylabel("x", rotation=0, ha="right", va="center")
    axes[0, 0].set_title("reconstructions (beside the name: pixel distance)", fontsize=9)
    axes[1, 1].set_title("samples", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
