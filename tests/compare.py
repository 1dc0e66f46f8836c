"""The paper's Figure 3 from finished runs of dcvae.py: python tests/compare.py OUT.png RUN_FOLDER …

Eight test images; then, for each run, their reconstructions, with the pixel distance of
results.json, and eight samples. Not collected by pytest.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import DATASETS, from_uint8, save_sheet  # noqa: E402 (needs the path above)
from conftest import pictures_on  # noqa: E402


def row(path, side, i):
    """Row i of a sheet of 8 columns -> (8, 3, side, side) in [-1, 1]."""
    return from_uint8(torch.tensor(pictures_on(path, side)[i]).movedim(3, 1))


def main(out, *folders):
    """Draw the first rows of x, x̂ and samples of every run, one run below the other."""
    rows = {}
    for folder in map(Path, folders):
        cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        side = cfg["size"] or DATASETS.get(cfg["dataset"], (64,))[0]
        reconstructions = folder / "reconstructions" / "test.png"
        rows["x"] = row(reconstructions, side, 0)
        distance = f"{results['pixel_distance']:.1f}"
        rows[f"{folder.name}: x̂, {distance}"] = row(reconstructions, side, 1)
        rows[f"{folder.name}: x̃"] = row(folder / "samples" / "test.png", side, 0)
    save_sheet(Path(out), f"dcvae.py, {cfg['dataset']} {side}x{side}, test\n"
               "reconstructions, with their pixel distance, and samples", rows, keep_columns=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
