"""The DC-VAE paper's Figure 3 from finished runs of dcvae.py.

    python docs/lab/four_losses.py OUT.png RUN_FOLDER …

The figure has eight test images, and then for each run their reconstructions, with the pixel
distance of results.json, and eight samples.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common import DATASETS, save_sheet  # noqa: E402 (needs the path above)
from figures import row_of_sheet  # noqa: E402


def main(out, *folders):
    """Draw the first rows of x, x̂ and samples of every run, one run below the other."""
    rows = {}
    for folder in map(Path, folders):
        cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        side = cfg["size"] or DATASETS.get(cfg["dataset"], (64,))[0]
        reconstructions = folder / "reconstructions" / "test.png"
        rows["test images"] = row_of_sheet(reconstructions, side, 0)
        distance = f"{results['pixel_distance']:.0f}"
        name = f"{folder.name}: x̂, distance {distance}"
        rows[name] = row_of_sheet(reconstructions, side, 1)
        rows[f"{folder.name}: samples"] = row_of_sheet(folder / "samples" / "test.png", side)
    save_sheet(Path(out), f"dcvae.py, {cfg['dataset']} {side}x{side}\n"
               "reconstructions x̂ (lower pixel distance is nearer) and samples", rows,
               keep_columns=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
