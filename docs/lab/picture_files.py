"""Bits per dimension of test images as lossless WebP and PNG, a file each, headers included.

    python docs/lab/picture_files.py data/cifar10-32
"""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"WEBP": {"lossless": True, "quality": 100, "method": 6}, "PNG": {"optimize": True}}


def main(folder):
    """Print a line for each format: the mean over the test.npy of a folder in data/."""
    images = np.load(Path(folder, "test.npy"), allow_pickle=False)
    for name, options in FORMATS.items():
        size = 0
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, name, **options)
            size += len(file.getvalue())
        print(f"{folder}: {len(images)} images, {name} {options}: {8 * size / images.size:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
