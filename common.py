"""What every script shares: image datasets, the discretized mixture of logistics, metrics.

Images on disk are uint8 (N, H, W, C). Images in a model are float32 (B, C, H, W) in [-1, 1]: the
256 pixel values 0 … 255 lie at value / 127.5 - 1, a grid of spacing 2/255. Only `from_uint8` and
`to_uint8` convert between the two. Equations are numbered as in docs/equations.md.

    B batch · C channels · H, W height and width · M mixture components · N images
    P = dmol_channels(C) mixture parameters per pixel · S importance samples
"""

import atexit
import contextlib
import functools
import json
import math
import os
import pickle
import shutil
import sys
import time
import warnings
import zlib
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch.distributions import Categorical, Distribution
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

try:
    import fcntl
except ImportError:  # Windows does not have it
    fcntl = None

Distribution.set_default_validate_args(False)  # its checks would wait for the device


class UserError(Exception):
    """A request that cannot be met. `main` prints it as one line and exits with code 2."""


# ---- Pixels: 256 values in [-1, 1] ---------------------------------------------------------------

def from_uint8(pixels):
    """Pixel values 0 … 255 of any dtype -> float32 in [-1, 1], same shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """Float of any range -> the nearest pixel value, uint8, same shape. Inverse of `from_uint8`."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def quantize(x):
    """Float -> the nearest of the 256 grid values in [-1, 1], same shape."""
    return from_uint8(to_uint8(x))


# ---- Datasets ------------------------------------------------------------------------------------

VALID_SHARE = 0.15  # of the training images (selfVAE paper, A.5: "15 % randomly selected")
RESIDENT_BYTES = 4 * 2**30  # a split up to this size lives on the device


@dataclass
class Subset:
    """The images of `array`, uint8 (N, H, W, C), at the positions `index`, read when needed."""

    array: np.ndarray
    index: np.ndarray

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.array[self.index[i]]

    @property
    def shape(self):
        return (len(self.index), *self.array.shape[1:])


@dataclass
class Images:
    """One dataset, in three splits of uint8 (N, H, W, C)."""

    name: str
    size: int
    train: Subset
    valid: Subset
    test: np.ndarray
    labels: dict | None  # {split: uint8 (N,) or (N, columns)}
    augment: bool  # whether training flips and shifts the images
    key: str = ""  # the dataset's name, or a folder's checksum, the same wherever the folder lies

    @property
    def shape(self):
        """(C, H, W), as the models take it."""
        height, width, channels = self.test.shape[1:]
        return (channels, height, width)

    @property
    def identity(self):
        """A string by which a run recognises its images, wherever they are kept."""
        n_train = len(self.train) + len(self.valid)
        return f"{n_train} for training, {len(self.test)} for the test ({self.key})"


def load_images(name, data_dir, size=None):
    """Load a dataset -> Images. `name` is one of DATASETS, one of POINTS, or a folder's path.

    It reads {data_dir}/{name}-{size}/train.npy and test.npy. If these are missing, it makes them
    once: it draws the images, downloads them by torchvision, or reads them from the folder. `size`
    is the side in pixels. Validation images are 15 % of the training images, chosen by a
    permutation that never changes. UserError for an unknown name, an empty or broken folder, a
    failed or incomplete download, and files that do not fit `size`.
    """
    if name in POINTS:
        return load_points(name)
    data_dir = Path(data_dir)
    if name in DATASETS:
        side, pictures_of = DATASETS[name]
        title = name
        key = name
        place = name
    else:
        folder = Path(os.path.expanduser(name))
        if not name or not folder.is_dir():
            known = ", ".join([*DATASETS, *POINTS])
            raise UserError(f"dataset {name!r} is neither one of {known}, nor a folder of images")
        side = 64
        pictures_of = functools.partial(_folder, folder)
        title = folder.resolve().name
        key = _folder_key(folder, data_dir)
        place = f"{title}-{key}"
    size = size or side
    if size < 8:
        raise UserError(f"--size {size} is too small: images need at least 8 pixels a side")
    stored = data_dir / f"{place}-{size}"
    if processes()[0] == 0 and not stored.is_dir():
        print(f"preparing {_printable(stored)} (once, by one process at a time)", flush=True)
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir):
            if not stored.is_dir():  # another process may have made it in the meantime
                splits = {}
                for split in ("train", "test"):
                    splits[split] = pictures_of(data_dir, size, split)
                _require_whole(name, splits, data_dir)
                _store(stored, splits, size, BOXES.get(name))
    barrier()

    train, test = _open_images(stored, size)
    order = np.random.default_rng(0).permutation(len(train))
    n_valid = max(1, round(VALID_SHARE * len(train)))
    valid_index = np.sort(order[:n_valid])
    train_index = np.sort(order[n_valid:])
    labels = None
    if (stored / "train-labels.npy").exists():
        of_train = _open(stored / "train-labels.npy", len(train))
        of_test = _open(stored / "test-labels.npy", len(test))
        labels = {"train": of_train[train_index], "valid": of_train[valid_index], "test": of_test}
    # A mirrored digit is not a digit, and the selfVAE paper does not augment CelebA (A.5).
    augment = name not in ("mnist", "celeba")
    return Images(_printable(title), size, Subset(train, train_index), Subset(train, valid_index),
                  test, labels, augment, key)


def _printable(name):
    """A file's name as text that can be encoded; bytes that are not UTF-8 are escaped."""
    return str(name).encode(errors="backslashreplace").decode()


def _reason(error):
    """An error's message, one line of at most 300 characters, or its type if it has no message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _open(path, rows=None):
    """Memory-map a uint8 .npy file, which must have `rows` rows if given. UserError otherwise."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises many kinds for a damaged file
        raise UserError(f"cannot read {path} ({_reason(error)}); "
                        "delete its folder to remake it") from None
    if array.dtype != np.uint8 or rows not in (None, *array.shape[:1]):
        raise UserError(f"{path} holds {array.dtype} {array.shape}; it should be uint8, with a row "
                        "for each image")
    return array


def _open_images(folder, size):
    """Memory-map train.npy and test.npy. UserError if they are not images of this size."""
    train = _open(folder / "train.npy")
    test = _open(folder / "test.npy")
    fits = train.shape[1:] in ((size, size, 1), (size, size, 3)) and len(train) > 1
    if not fits or test.shape[1:] != train.shape[1:] or len(test) == 0:
        raise UserError(f"{folder} holds {train.shape} in train.npy, {test.shape} in test.npy; "
                        f"both should be (N, {size}, {size}, 1) or (N, {size}, {size}, 3), "
                        "with two images or more in train.npy")
    return train, test


# ---- Datasets: preparing one, once ---------------------------------------------------------------

@contextlib.contextmanager
def _locked(folder):
    """One process at a time holds the folder; the others wait. A lock ends with its process.

    On systems without such locks, like Windows, no process waits.
    """
    if not fcntl:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # raised by a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _require_whole(name, splits, data_dir):
    """UserError if a dataset does not have its COUNTS, for example after interrupted unpacking."""
    if name in COUNTS:
        *expected, source = COUNTS[name]
        found = [len(pictures) for pictures, _ in splits.values()]
        if found != expected:
            raise UserError(f"{name} has {found[0]:,} training and {found[1]:,} test images here; "
                            f"{expected[0]:,} and {expected[1]:,} are expected. Delete "
                            f"{data_dir / source} and start again")


def _store(folder, splits, size, box):
    """Write {split: (pictures, labels or None)} as .npy files, all or none.

    They go to a temporary folder, which is renamed at the end. If pictures are broken, UserError
    names up to ten of them.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    broken = []
    try:
        for split, (pictures, labels) in splits.items():
            broken += _write(partial / f"{split}.npy", pictures, size, box)
            if labels is not None:
                np.save(partial / f"{split}-labels.npy", np.asarray(labels, np.uint8))
        if broken:
            named = "; ".join(sorted(broken)[:10])
            raise UserError(f"cannot read {len(broken):,} of the images: {named}")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # still there after an error or Ctrl-C


def _write(path, pictures, size, box):
    """Write pictures as images to a .npy file -> the errors of broken pictures, a list of str.

    Every half minute a line says how much time is left.
    """
    count = len(pictures)
    grey = isinstance(pictures, np.ndarray) and pictures.ndim == 3
    shape = (count, size, size, 1 if grey else 3)
    if math.prod(shape) > shutil.disk_usage(path.parent).free:
        raise UserError(f"the disk does not have {math.prod(shape) / 1e9:.1f} GB left for {path}")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    broken = []
    began = time.perf_counter()
    told = began
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for i in range(count):
            try:
                file.write(_square(pictures[i], size, box).tobytes())
            except UserError as error:
                broken.append(str(error))
            now = time.perf_counter()
            if now > told + 30:
                told = now
                left = (now - began) / (i + 1) * (count - i - 1)
                print(f"{i + 1:,} of {count:,} {path.stem} images, {clock(left)} left", flush=True)
    return broken


def _square(picture, size, box=None):
    """A picture -> uint8 (size, size, C): its central square, resized by Lanczos.

    The picture is a file, or an array, uint8 (H, W) or (H, W, 3). If a `box` (top, left, height,
    width) is given, it is cut out first.
    """
    if isinstance(picture, np.ndarray):
        image = TF.to_pil_image(picture)
    else:
        image = _read(picture)
    if box:
        image = TF.crop(image, *box)
    image = TF.center_crop(image, min(image.size))
    image = TF.resize(image, [size, size], InterpolationMode.LANCZOS)
    return np.asarray(image).reshape(size, size, -1)


def _read(path):
    """One image file -> RGB PIL image, turned upright by its EXIF; 16 bits become 8.

    Transparent areas become white. UserError names the file if it is damaged or has 32 bits per
    channel.
    """
    try:
        with Image.open(path) as image:
            with contextlib.suppress(Exception):  # the EXIF may be damaged, and the picture whole
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
                raise ValueError("its white level is unknown: save it with 8 or 16 bits")
            if image.mode.startswith("I"):
                grey = np.rint(np.asarray(image) / 257)  # 65,535 becomes 255
                image = Image.fromarray(grey.astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # each decoder raises its own kinds
        raise UserError(f"{path} ({_reason(error)})") from None


# ---- Datasets: folders of images -----------------------------------------------------------------

def _image_files(folder, data_dir, least):
    """All image files below the folder, in alphabetical order; links are followed.

    Hidden names and the folders @eaDir and __MACOSX of other systems are left out. So are runs of
    these scripts, data_dir and its downloads, if they lie below the folder. UserError if there are
    fewer than `least` images.
    """
    files = []
    seen = {data_dir.resolve(), (data_dir / "downloads").resolve()} - {folder.resolve()}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen or {"config.json", "log.jsonl"} <= set(names):
            folders.clear()  # so that os.walk goes neither deeper nor in circles
            continue
        seen.add(real)
        # Sorted, so that of two links to the same folder always the same one is followed.
        folders[:] = [name for name in sorted(folders) if not _hidden(name)]
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in IMG_EXTENSIONS and not _hidden(name) and path.is_file():
                files.append(path)
    if len(files) < least:
        raise UserError(f"the folder {folder} holds {len(files)} images "
                        f"({', '.join(IMG_EXTENSIONS)}); at least {least} are needed")
    return sorted(files)


def _hidden(name):
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def _folder_key(folder, data_dir):
    """A checksum of the images' paths below `folder`, their sizes, and 256 bytes of each."""
    checksum = 0
    for path in _image_files(folder, data_dir, least=10):
        size = path.stat().st_size
        facts = f"{path.relative_to(folder).as_posix()}\n{size}\n"
        checksum = zlib.crc32(_printable(facts).encode(), checksum)
        with open(path, "rb") as file:
            file.seek(size // 2)
            checksum = zlib.crc32(file.read(256), checksum)
    return f"{checksum:08x}"


def _folder(folder, data_dir, size, split):
    """A split of a folder: its subfolder train/ or test/, or else a share of all its images.

    If test/ is missing, val/, valid/ or validation/ takes its place. Without these subfolders the
    test set is a tenth of the images, drawn at random but always the same.
    """
    parts = ("test", "val", "valid", "validation")
    held_out = [part for part in parts if (folder / part).is_dir()]
    if (folder / "train").is_dir() and held_out:
        part = held_out[0] if split == "test" else "train"
        paths = _image_files(folder / part, data_dir, least=2)
    else:
        files = _image_files(folder, data_dir, least=10)
        order = np.random.default_rng(0).permutation(len(files))
        n_test = len(files) // 10
        order = order[:n_test] if split == "test" else order[n_test:]
        paths = [files[i] for i in order]
    return paths, None


# ---- Datasets: those that have a name ------------------------------------------------------------
# Each has a function (data_dir, size, split) -> pictures, and labels or None. The split is "train"
# or "test". Pictures are a list of files, or an array of uint8, (N, H, W) or (N, H, W, 3).

def _download(dataset, root, by_hand="", **arguments):
    """A torchvision dataset, downloaded if it is missing. UserError if that fails."""
    try:
        return dataset(root=root, download=True, **arguments)
    except Exception as error:  # the network, archives and helpers each raise their own kinds
        raise UserError(f"downloading {dataset.__name__} to {root}, or reading it there, failed: "
                        f"{_reason(error)}{by_hand}") from None


def _mnist(data_dir, size, split):
    """Digits are zero-padded to size 32, and resized to any other size."""
    data = _download(torchvision.datasets.MNIST, data_dir / "downloads", train=split == "train")
    digits = data.data.numpy()
    if size == 32:
        digits = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
    return digits, data.targets


def _cifar10(data_dir, size, split):
    data = _download(torchvision.datasets.CIFAR10, data_dir / "downloads", train=split == "train")
    return data.data, data.targets


def _stl10(data_dir, size, split):
    """Training images are the 5,000 labelled and 100,000 unlabelled ones; labels are not kept."""
    part = "train+unlabeled" if split == "train" else "test"
    data = _download(torchvision.datasets.STL10, data_dir / "downloads", split=part)
    return data.data.transpose(0, 2, 3, 1), None


def _imagenette(data_dir, size, split):
    """Imagenette's validation split is our test set."""
    part = "train" if split == "train" else "val"
    data = _download(torchvision.datasets.Imagenette, data_dir / "downloads", split=part,
                     size="160px")
    paths = [path for path, _ in data._samples]
    labels = [label for _, label in data._samples]
    return paths, labels


def _celeba(data_dir, size, split):
    """Official train and test splits, labelled by the 40 attributes."""
    by_hand = (". By hand: put the five files list_*.txt and identity_CelebA.txt from its page, "
               f"and img_align_celeba.zip, unpacked, into {data_dir / 'celeba'}")
    data = _download(torchvision.datasets.CelebA, data_dir, by_hand, split=split)
    paths = [data_dir / "celeba" / "img_align_celeba" / file for file in data.filename]
    paths = [path for path in paths if path.is_file()]  # if any is missing, the count is wrong
    return paths, data.attr


def _celebahq(data_dir, size, split):
    """The test set is the last 1,000 by name of the 30,000 images in {data_dir}/celebahq.

    The DC-VAE paper (Table 8) does not say which 1,000 it takes. If the folder does not hold
    30,000 images, the test set is one in 30.
    """
    paths = _image_files(data_dir / "celebahq", data_dir, least=10)
    n_test = max(1, len(paths) // 30)
    paths = paths[-n_test:] if split == "test" else paths[:-n_test]
    return paths, None


def _lsun(data_dir, size, split):
    """Bedrooms in {data_dir}/lsun, JPEG files exported from LSUN's lmdb, split like any folder."""
    return _folder(data_dir / "lsun", data_dir, size, split)


COLOURS = np.array([[230, 60, 60], [240, 150, 40], [235, 220, 70], [80, 200, 90],
                    [70, 205, 215], [70, 110, 235], [165, 80, 220], [235, 235, 235]], np.float32)


def _shapes(data_dir, size, split):
    if split == "train":
        return make_shapes(20_000, size, seed=0)
    return make_shapes(2_000, size, seed=1)


def make_shapes(count, size, seed):
    """`shapes`: one figure on a colour gradient -> uint8 (count, size, size, 3), and labels.

    Labels, uint8 (count, 5): kind 0-3 (disc, square, triangle, ring), colour 0-7, size 0-3,
    column 0-3, row 0-3. Sensor noise (sd 2 pixel values) keeps the likelihood of flat areas from
    growing without limit. Its entropy is 3.05 bits per dimension.
    """
    rng = np.random.default_rng([seed, size])
    kind = rng.integers(0, 4, count)
    colour = rng.integers(0, 8, count)
    radius = rng.uniform(0.12, 0.32, count).astype(np.float32)  # in units of the image's side
    column, row = rng.uniform(0.25, 0.75, (2, count)).astype(np.float32)
    corners = rng.uniform(10, 120, (count, 3, 3)).astype(np.float32)  # gradient: a, b, c below
    labels = np.stack([kind, colour, (radius - 0.12) / 0.05,
                       (column - 0.25) * 8, (row - 0.25) * 8], 1)
    images = np.empty((count, size, size, 3), np.uint8)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    right = axis[None, :, None] / 2
    down = axis[:, None, None] / 2
    for i in range(count):
        x = axis[None, :] - column[i]
        y = axis[:, None] - row[i]
        r = radius[i:i + 1]
        # Signed distances to the outline, negative inside, (size, size).
        disc = np.sqrt(x**2 + y**2) - r
        square = np.maximum(abs(x), abs(y)) - 0.85 * r
        triangle = np.maximum(y - 0.6 * r, 0.866 * abs(x) - 0.5 * y - 0.6 * r)
        ring = abs(disc + 0.2 * r) - 0.2 * r
        distance = [disc, square, triangle, ring][kind[i]]
        inside = np.clip(0.5 - distance * size, 0, 1)[..., None]  # share of the pixel
        a, b, c = corners[i]
        backdrop = a + (b - a) * right + (c - a) * down
        clean = backdrop + inside * (COLOURS[colour[i]] - backdrop)
        noisy = clean + 2 * rng.standard_normal(clean.shape, np.float32)
        images[i] = np.clip(np.rint(noisy), 0, 255)
    return images, np.minimum(labels, [3, 7, 3, 3, 3]).astype(np.uint8)


DATASETS = {  # name: side in pixels, function
    "shapes": (32, _shapes),
    "mnist": (32, _mnist),
    "cifar10": (32, _cifar10),
    "stl10": (32, _stl10),
    "imagenette": (64, _imagenette),
    "celeba": (64, _celeba),
    "celebahq": (256, _celebahq),
    "lsun": (128, _lsun),
}

COUNTS = {  # name: training images, test images, and the folder in data_dir that they come from
    "mnist": (60_000, 10_000, "downloads/MNIST"),
    "cifar10": (50_000, 10_000, "downloads/cifar-10-batches-py"),
    "stl10": (105_000, 8_000, "downloads/stl10_binary"),
    "imagenette": (9_469, 3_925, "downloads/imagenette2-160"),
    "celeba": (162_770, 19_962, "celeba/img_align_celeba"),
}

BOXES = {"celeba": (40, 15, 148, 148)}  # top, left, height, width (selfVAE paper, A.5)

POINTS = ("moons", "rings", "spirals", "checkerboard")  # sets of points in the plane


def make_points(name, count, seed):
    """`count` points of one of POINTS, most of them in [-1, 1]² -> float (count, 2)."""
    rng = np.random.default_rng(seed)
    share = rng.random(count)
    arm = rng.choice([-1, 1], count)
    noise = rng.standard_normal((2, count))
    angle = np.pi * share
    if name == "moons":  # two half circles, each with its end inside the other
        points = 0.6 * arm * [np.cos(angle) - 0.5, np.sin(angle) - 0.25] + 0.05 * noise
    elif name == "rings":  # two, each with half of the points
        radius = rng.choice([0.35, 0.85], count)
        points = radius * [np.cos(2 * angle), np.sin(2 * angle)] + 0.05 * noise
    elif name == "spirals":  # two arms of one turn, evenly filled
        angle = 2 * np.pi * np.sqrt(share)
        points = 0.9 * arm * np.sqrt(share) * [np.cos(angle), np.sin(angle)] + 0.04 * noise
    else:  # 8 of 16 squares, each of side ½: the entropy is log 2 nats
        row = rng.integers(0, 4, count)
        column = 2 * rng.integers(0, 2, count) + row % 2
        points = np.stack([column + share, row + rng.random(count)]) / 2 - 1
    return points.T


def load_points(name):
    """One of POINTS as Images of one pixel with two channels, float (N, 1, 1, 2).

    Coordinates are stored in units of pixel values; `Batches` maps them back.
    """
    splits = []
    for seed, count in enumerate((102_400, 10_000, 10_000)):
        points = 127.5 * (make_points(name, count, seed) + 1)
        splits.append(points.astype(np.float32).reshape(-1, 1, 1, 2))
    return Images(name, 1, *splits, labels=None, augment=False, key=name)


class Batches:
    """Batches of one split as float32 (B, C, H, W) in [-1, 1] on `device`, channels-last.

    A split of up to RESIDENT_BYTES is kept on the device as uint8. A larger one stays a
    memory-mapped file. Flips and shifts are tensor operations on the device and need no worker
    processes. Training calls `batch(step)`. Evaluation iterates over the split once, in order.
    """

    def __init__(self, images, batch_size, device, seed=0, augment=False, parts=1, count=None):
        """UserError unless a step's batch splits into `parts` equal parts.

        With `count`, only the first `count` images of the split are used.
        """
        self.images = images
        self.count = min(len(images), count or len(images))
        self.device = torch.device(device)
        self.seed = seed
        self.augment = augment
        self.parts = parts
        self.set_batch_size(batch_size)
        self.resident = self.count * math.prod(images.shape[1:]) <= RESIDENT_BYTES
        self.place = self.device if self.resident else "cpu"  # where the images are
        if self.resident:
            writable = np.require(images[:self.count], requirements="W")
            self.images = torch.from_numpy(writable).to(self.device)
        self.epoch = None
        self.order = None

    def set_batch_size(self, batch_size):
        """Set the number of images per step. A split smaller than that is one batch."""
        self.batch_size = batch_size
        if batch_size > self.count:  # one batch, rounded down to a multiple of `parts`
            self.batch_size = self.count // self.parts * self.parts or self.count
        if self.batch_size % self.parts:
            raise UserError(f"a step's {self.batch_size} images do not split into {self.parts} "
                            "equal parts: one for each process, in dcvae.py times --d_steps")
        self.per_epoch = self.count // self.batch_size

    def batch(self, step, rank=0, world=1):
        """The batch of step 0, 1, 2, …, or the share of it for process `rank` of `world`.

        Its images depend on (seed, step) alone, so a resumed run sees the same images as an
        uninterrupted one. Every epoch has a new permutation.
        """
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            self.epoch = epoch
            # Copied once per epoch, so that no step waits for it.
            self.order = torch.randperm(self.count, generator=generator).to(self.place)
        index = self.order[i * self.batch_size:(i + 1) * self.batch_size]
        pixels = self._read(index[rank::world])
        if self.augment:
            pixels = augment(pixels)
        return from_uint8(pixels.permute(0, 3, 1, 2))

    def __iter__(self):
        for index in torch.arange(self.count, device=self.place).split(self.batch_size):
            yield from_uint8(self._read(index).permute(0, 3, 1, 2))

    def _read(self, index):
        """Positions (B,) -> uint8 (B, H, W, C) on the device."""
        if self.resident:
            return self.images[index]
        return torch.from_numpy(np.array(self.images[index.numpy()])).to(self.device)


def evaluation_batches(images, device, count=None):
    """`Batches` for evaluation. Their size depends on the images only, not on --batch_size.

    A batch has 2¹⁷ pixels, but at least one image and at most 128. That is enough to keep a GPU
    busy and fits into a laptop's memory.
    """
    pixels = math.prod(images.shape[1:3])
    return Batches(images, max(1, min(128, 2**17 // pixels)), device, count=count)


def augment(pixels):
    """Random flips, and shifts by up to 5 % of the side: uint8 (B, H, W, C) -> same.

    Each image has its own flip and shift.
    """
    B, H, W, _ = pixels.shape
    rows = _shifted(B, H, pixels.device)
    columns = _shifted(B, W, pixels.device)
    flip = torch.randint(0, 2, (B, 1), device=pixels.device)
    columns = torch.where(flip == 1, W - 1 - columns, columns)
    image = torch.arange(B, device=pixels.device)
    return pixels[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def _shifted(B, side, device):
    """Positions 0 … side - 1, shifted by up to 5 % of the side, for each image -> (B, side).

    Beyond an edge the image is mirrored. The edge pixel is not repeated, because a repeated pixel
    is too easy to predict. The side is at least 2.
    """
    reach = math.ceil(0.05 * side)
    shift = torch.randint(-reach, reach + 1, (B, 1), device=device)
    position = (torch.arange(side, device=device) + shift).abs()  # -1 becomes 1
    last = side - 1
    return last - (last - position).abs()  # last + 1 becomes last - 1


# ---- The discretized mixture of logistics --------------------------------------------------------
# (Salimans et al. 2017, PixelCNN++, sections 2.1 and 2.2)
#
# A pixel of C channels is drawn from one of M components. Given the component, channel c is
# logistic around a mean that depends linearly on the channels before it, rounded to the grid:
#
#     p(x) = Σ_m π_m Π_c [σ((x_c + δ - μ_mc) / s_mc) - σ((x_c - δ - μ_mc) / s_mc)],     δ = 1/255
#     μ_mc = mean_mc + Σ_{j<c} tanh(coefficient_mcj) x_j
#
# δ is half a grid step. The lowest pixel value has all the mass below it (the first σ alone), and
# the highest has all the mass above it (1 - the second σ). So the 256 probabilities telescope to
# exactly one.
#
# If only the values from low_c to high_c are possible, each factor is divided by its sum over them,
# σ((high_c + δ - μ_mc) / s_mc) - σ((low_c - δ - μ_mc) / s_mc).
# --------------------------------------------------------------------------------------------------

MIXTURES = 10  # components; the paper does not give the number, its predecessor's code has 10


def dmol_channels(channels, mixtures=MIXTURES):
    """Parameters per pixel: 100 for RGB, 30 for grey.

    A component has 1 weight, C means, C log-scales and C(C-1)/2 couplings of the channels.
    """
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


class Dmol:
    """The mixture of discretized logistics of an image, in the style of torch.distributions.

    It is Dlogistic in the selfVAE paper, Eqs. (3.2c), (3.2e), with PixelCNN++'s coupling of the
    channels. `params` (B, P, H, W) is a network's output for images of `channels` channels. With
    `shift` (B, C or 1, H, W) the mixture models x - shift, called `rest` below. With `interval` the
    values of x are restricted: `interval` is a function of int pixel values (B, C, H, W) and
    returns the lowest and the highest possible value of each channel. The limits of channel c
    depend on the channels before c alone. Everything is computed in fp32 or float64. M is the
    number of components.
    """

    def __init__(self, params, channels, shift=None, interval=None):
        params = params.to(torch.promote_types(params.dtype, torch.float32))  # never in bf16
        mixtures = params.shape[1] // dmol_channels(channels, 1)
        pairs = channels * (channels - 1) // 2
        logits, means, log_scales, couplings = params.unflatten(1, (-1, mixtures)).split(
            [1, channels, channels, pairs], 1)
        self.logits = logits.squeeze(1)  # (B, M, H, W)
        self.means = means.unbind(1)  # C tensors (B, M, H, W)
        # At -7 a component puts 97.3 % on one pixel value. This is PixelCNN++'s clamp, and it costs
        # at most 0.03 nats per value. Above 7 a component is flat. A network's output starts near
        # 0, so subtracting 2 starts scales at e⁻², 17 pixel values. From 1, half of the range,
        # training would need long to bring them down.
        self.log_scales = (log_scales - 2).clamp(-7, 7)  # (B, C, M, H, W)
        # C(C-1)/2 tensors (B, M, H, W): green on red, blue on red, blue on green.
        self.couplings = couplings.tanh().unbind(1)
        if shift is None:
            shift = params.new_zeros(1, 1, 1, 1)
        self.shift = shift.expand(-1, channels, -1, -1)
        self.channels = channels
        self.interval = interval

    def log_prob(self, x):
        """log p(x) in nats, summed over C, H, W: x (B, C, H, W) on the grid -> (B,).

        It is -inf if a value lies outside its interval.
        """
        log_p = self.logits.log_softmax(1) + self.log_values(x).sum(1)  # (B, M, H, W)
        return torch.logsumexp(log_p, 1).sum((1, 2))

    def log_values(self, x, first=0):
        """log p(x_c | the channels before c) under each component, from channel `first` on.

        x (B, C, H, W) -> (B, C - first, M, H, W). x may lack channels at the end.
        """
        x = x.to(self.logits.dtype)
        last = x.shape[1]
        shift = self.shift[:, :last]
        rest = (x - shift).unsqueeze(2).unbind(1)  # C tensors (B, 1, H, W), 1 stands for M
        means = []
        for c in range(first, last):
            means.append(coupled_mean(c, rest, self.means, self.couplings))
        mean = torch.stack(means, 1) + shift[:, first:].unsqueeze(2)
        inverse_scale = torch.exp(-self.log_scales[:, first:last])
        value = x[:, first:].unsqueeze(2)
        bin_of_x = bin_edges(value, value)
        if self.interval is None:
            return log_mass(bin_of_x, mean, inverse_scale)
        low, high = self.limits(x)
        low = low[:, first:last].unsqueeze(2)
        high = high[:, first:last].unsqueeze(2)
        possible = bin_edges(low, high)
        mean = near(possible, mean, inverse_scale)
        log_all = log_mass(possible, mean, inverse_scale)
        log_p = log_mass(bin_of_x, mean, inverse_scale) - log_all
        # The edges are half a grid step from any value, so rounding does not matter.
        outside = (value < possible[0]) | (value > possible[1])
        return log_p.masked_fill(outside, -math.inf)

    def limits(self, x):
        """The lowest and highest possible values, on the grid: two tensors that broadcast to x.

        Those of channel c depend on the channels before c. The other channels may hold anything.
        """
        if self.interval is None:
            return -torch.ones_like(x), torch.ones_like(x)
        low, high = self.interval(to_uint8(x).int())
        return from_uint8(low).to(x.dtype), from_uint8(high).to(x.dtype)

    def sample(self):
        """x ~ p(x) -> (B, C, H, W), on the grid."""
        chosen = Categorical(logits=self.logits.movedim(1, -1)).sample().unsqueeze(1)
        means = [mean.take_along_dim(chosen, 1) for mean in self.means]  # C tensors (B, 1, H, W)
        couplings = [coupling.take_along_dim(chosen, 1) for coupling in self.couplings]
        log_scales = self.log_scales.take_along_dim(chosen.unsqueeze(1), 2).squeeze(2)
        x = torch.zeros_like(log_scales)  # (B, C, H, W)
        rest = []
        for c in range(self.channels):
            this = slice(c, c + 1)
            shift = self.shift[:, this]
            low, high = self.limits(x)
            low = low[:, this]
            high = high[:, this]
            mean = coupled_mean(c, rest, means, couplings) + shift
            inverse_scale = torch.exp(-log_scales[:, this])
            drawn = draw_logistic(bin_edges(low, high), mean, inverse_scale)
            # Rounded here, because the next channel is conditioned on the rounded value.
            x[:, this] = quantize(drawn).clamp(low, high)
            rest.append(x[:, this] - shift)
        return x

    @property
    def mean(self):
        """Approximately the expected value of x -> (B, C, H, W), on the grid.

        It ignores the rounding, and clips every component's mean to the possible values.
        """
        weights = self.logits.softmax(1)
        x = torch.zeros_like(self.log_scales[:, :, 0])
        rest = []
        for c in range(self.channels):
            this = slice(c, c + 1)
            shift = self.shift[:, this]
            low, high = self.limits(x)
            mean = coupled_mean(c, rest, self.means, self.couplings) + shift
            mean = mean.clamp(low[:, this], high[:, this])  # (B, M, H, W)
            x[:, this] = quantize((weights * mean).sum(1, keepdim=True))
            rest.append(mean - shift)
        return x


def coupled_mean(c, rest, means, couplings):
    """The components' means of channel c, minus its shift, given the channels before it.

    means: C tensors (B, M, H, W); couplings: C(C-1)/2 such tensors; rest: x_j - shift_j for j < c.
    """
    mean = means[c]
    for j in range(c):
        mean = mean + couplings[c * (c - 1) // 2 + j] * rest[j]
    return mean


FAR = 1e9  # for σ the same as infinity, but gradients are 0 there and not 0 · ∞


def bin_edges(low, high):
    """Grid values `low` to `high` -> the lower edge of the first bin, the upper edge of the last.

    The lowest pixel value's bin starts at -FAR, and the highest pixel value's bin ends at FAR.
    """
    lower = (low - 1 / 255).masked_fill(low < -1 + 1 / 255, -FAR)
    upper = (high + 1 / 255).masked_fill(high > 1 - 1 / 255, FAR)
    return lower, upper


def log_mass(edges, mean, inverse_scale):
    """The log of a logistic variable's probability between two edges, lower and upper.

    It is exact however improbable the values are. (PixelCNN++ needs an approximation there.)
    """
    # With a = (upper - μ)/s and b = (lower - μ)/s, σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b-a)). The log
    # of the right side is a sum of three terms that neither cancel nor underflow.
    lower, upper = edges
    log_above = F.logsigmoid((mean - lower) * inverse_scale)  # log σ(-b)
    log_below = F.logsigmoid((upper - mean) * inverse_scale)  # log σ(a)
    log_width = torch.log(-torch.expm1((lower - upper) * inverse_scale))  # log(1 - e^(b-a))
    return log_above + log_below + log_width


def near(edges, mean, inverse_scale):
    """The mean, moved to within 20 scales of the values between two edges.

    Further out the restricted logistic is an exponential that does not depend on the mean, so
    moving the mean changes log p and its gradients by at most e⁻²⁰. At a larger distance digits
    would be lost. The reach is detached, because no gradient should come from the moved mean.
    """
    lower, upper = edges
    reach = 20 / inverse_scale.detach()
    return mean.clamp(lower - reach, upper + reach)


def draw_logistic(edges, mean, inverse_scale):
    """A draw of a logistic variable between two edges, by inverting σ."""
    lower, upper = edges
    mean = near(edges, mean, inverse_scale)
    # Mirrored if most of the interval lies above the mean: σ is precise near 0, but not near 1.
    sign = torch.where(lower + upper > 2 * mean, -1.0, 1.0)
    from_p = torch.sigmoid(sign * (lower - mean) * inverse_scale)
    to_p = torch.sigmoid(sign * (upper - mean) * inverse_scale)
    p = torch.lerp(from_p, to_p, torch.rand_like(mean).clamp(min=2**-24))  # never 0 or 1
    return mean + sign * torch.logit(p) / inverse_scale


# ---- Metrics of likelihoods ----------------------------------------------------------------------

def bits_per_dim(nats, dims):
    """Nats per image -> bits per dimension, nats / (D ln 2). `dims` is always D = C·H·W of x."""
    return nats / (dims * math.log(2))


def log_mean_exp(log_w, dim=0):
    """log 1/S Σ_s exp(log_w_s) over `dim`, log_w in nats (Burda et al. 2015, Eq. (8))."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, per image: two (B, C, H, W) in [-1, 1] -> (B,).

    Capped at 100, the value of equal images, so that averages stay finite.
    """
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))


def progress(what, batches, count):
    """Yield the batches of `count` images, and print the progress: time spent < time left.

    The first line comes with the first batch that ends after two seconds. Later lines are at least
    ten seconds apart.
    """
    done = 0
    start = time.perf_counter()
    next_line = start + 2
    for x in batches:
        yield x
        done += len(x)
        now = time.perf_counter()
        if now > next_line and done < count:
            next_line = now + 10
            left = (now - start) * (count - done) / done
            print(f"{what}: {done:,} of {count:,} images  "
                  f"{clock(now - start)} < {clock(left)}", flush=True)


def mean_terms(model, batches):
    """Every term of the bound, {name: nats per image}, averaged over all images of a split."""
    sums = {}
    for x in progress("likelihood", batches, batches.count):
        for name, values in model.terms(x).items():
            # To the CPU first, because mps does not have float64.
            sums[name] = sums.get(name, 0.0) + values.cpu().double().sum().item()
    means = {name: total / batches.count for name, total in sums.items()}
    if not math.isfinite(sum(means.values())):
        raise FloatingPointError(f"the bound is not finite, {means}; "
                                 "the last checkpoint, if any, is kept")
    return means


def importance_weighted(model, batches, samples, dims):
    """log p(x) ≥ E[log 1/S Σ_s w_s] for each image (Burda et al. 2015, Eq. (8)), over a split.

    iw_bpd is the average over images in bits per dimension, and iw_bpd_se is its standard error.
    iw_elbo_bpd is E[log w], the plain bound, from the same weights of the same images, to compare
    iw_bpd with. Sums over samples and images are float64.
    """
    bounds = []
    plain_bounds = []
    what = f"importance-weighted bound, {samples} samples"
    for x in progress(what, batches, batches.count):
        log_w = model.log_weights(x, samples).cpu().double()  # (S, B)
        bounds.append(log_mean_exp(log_w))
        plain_bounds.append(log_w.mean(0))
    bpd = bits_per_dim(-torch.cat(bounds), dims)
    elbo_bpd = bits_per_dim(-torch.cat(plain_bounds), dims)
    sd = bpd.std(correction=min(1, len(bpd) - 1)).item()
    return {"iw_bpd": bpd.mean().item(), "iw_bpd_se": sd / len(bpd)**0.5, "iw_samples": samples,
            "iw_images": len(bpd), "iw_elbo_bpd": elbo_bpd.mean().item()}


def seconds_to_sample(model, n, runs=10, limit=1):
    """Seconds to sample n images, after one warm-up (Table 2: n = 100).

    It is the mean of `runs` runs, or of those that begin within `limit` seconds.
    """
    print(f"timing the sampling of {n} at a time", flush=True)
    model.sample(n).cpu()
    start = time.perf_counter()
    for done in range(1, runs + 1):
        model.sample(n).cpu()  # waits for the device
        if time.perf_counter() > start + limit:
            break
    return (time.perf_counter() - start) / done


def cost_of(cfg, model, state):
    """Parameters, seconds to sample and to train, device: the last lines of results.json."""
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds_1": seconds_to_sample(model, 1),
        "seconds_100": seconds_to_sample(model, 100),
        "step": state["step"],
        "train_seconds": state["seconds"],
        "device": cfg.device,
        "dtype": cfg.dtype,
    }


def linear_probe(train, train_labels, test, test_labels, epochs=20):
    """Test errors in percent of a linear classifier of features (N, d), with labels int64 (N,).

    -> their mean over five seeds, and half the width of its 95 % interval (DC-VAE paper, Table 6,
    where the 5 trials may be of the whole model). The classifier is softmax regression on
    standardised features, trained by Adam with a rate that falls from 0.01 to 0.
    """
    mean = train.mean(0)
    sd = train.std(0).clamp(min=0.01)  # no division by 0 where a feature is constant
    train = (train - mean) / sd
    test = (test - mean) / sd
    classes = int(train_labels.max()) + 1
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        linear = nn.Linear(train.shape[1], classes).to(train.device)
        optimizer = torch.optim.Adam(linear.parameters())
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - epoch / epochs)
            for index in torch.randperm(len(train), device=train.device).split(500):
                loss = F.cross_entropy(linear(train[index]), train_labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        wrong = linear(test).argmax(1) != test_labels
        errors.append(100 * wrong.double().mean())
    errors = torch.stack(errors)
    return errors.mean().item(), 2.776 * errors.std().item() / 5**0.5  # Student's t, five seeds


# ---- Metrics of pictures: distances, FID, Inception Score ----------------------------------------

def pixel_distance(x, y):
    """‖x - y‖² with pixels in [0, 1], summed over the image: (B, C, H, W) in [-1, 1] -> (B,)."""
    return (x - y).float().square().sum((1, 2, 3)) / 4


INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
VGG_URL = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url


def weights_file(url):
    """The file of `url` in torch.hub's cache. If missing, it is downloaded and its hash checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.split("/")[-1])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, path.stem.split("-")[-1], progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: wrong hash
        raise UserError(f"{path} is missing ({error}): download {url} and put it there") from None
    return path


def _load(net, path):
    """A network on the meta device -> the same network with a file's weights, for inference."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(weights, assign=True)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError,
            pickle.UnpicklingError):
        name = type(net).__name__
        raise UserError(f"{path} is missing, damaged or holds no weights of {name}") from None
    return net.eval().requires_grad_(False)


class InceptionFeatures(nn.Module):
    """The network of FID and Inception Score: TensorFlow's Inception of 2015-12-05.

    uint8 images (B, 1 or 3, H, W) -> features (B, 2048), logits (B, 1008), fp32. A row depends on
    its own image only. Weights are a state dict in pytorch-fid's format. The network is
    torchvision's Inception v3 with four changes back to the original: how images are resized; 3x3
    means leave out what lies beyond the border; the last block takes the maximum instead of the
    mean; logits have no biases (Salimans et al. 2016).
    """

    def __init__(self, weights_path):
        super().__init__()
        with torch.device("meta"):  # no initial weights: they would use up random numbers
            net = torchvision.models.Inception3(1008, aux_logits=False, init_weights=False)
        self.net = _load(net, weights_path)
        self.logit_weights = self.net.fc.weight  # (1008, 2048)
        self.net.fc = nn.Identity()
        for name, block in self.net.named_children():
            if name == "Mixed_7c":
                block.register_forward_hook(_pool_by_largest)
            elif hasattr(block, "branch_pool"):
                block.register_forward_hook(_pool_by_mean_inside)
        self.eval()

    def forward(self, images):
        x = (images.float() - 128) / 128  # as in 2015; slightly different from from_uint8
        x = _resize_rows(x, 299)
        x = _resize_rows(x.transpose(2, 3), 299).transpose(2, 3)
        with torch.autocast(x.device.type, enabled=False):
            features = self.net(x.expand(-1, 3, -1, -1))
            return features, features @ self.logit_weights.T


def _resize_rows(x, count):
    """TensorFlow 1's bilinear resize of (B, C, H, W) to `count` rows.

    Row i of the result lies at row i·H/count of x, without a shift of half a pixel.
    """
    H = x.shape[2]
    at = torch.arange(count, device=x.device) * H / count
    low = at.long()
    high = (low + 1).clamp(max=H - 1)
    share = (at - low).view(count, 1)
    return x.index_select(2, low).lerp(x.index_select(2, high), share)


def _pool_by_largest(block, inputs, output):
    """Forward hook of an Inception block: its last branch computed after a 3x3 maximum."""
    branch = block.branch_pool(F.max_pool2d(inputs[0], 3, 1, 1))
    return torch.cat([output[:, :-branch.shape[1]], branch], 1)


def _pool_by_mean_inside(block, inputs, output):
    """Forward hook of an Inception block: its last branch after 3x3 means inside the border."""
    branch = block.branch_pool(F.avg_pool2d(inputs[0], 3, 1, 1, count_include_pad=False))
    return torch.cat([output[:, :-branch.shape[1]], branch], 1)


class VGGFeatures(nn.Module):
    """Features of VGG-16, from torchvision's state dict; by default ReLU 4_3 (Johnson et al. 2016).

    (B, 1 or 3, H, W) in [-1, 1] -> (B, 512, H/8, W/8). `index` selects another layer.
    """

    def __init__(self, weights_path, index=22):
        super().__init__()
        with torch.device("meta"):
            net = torchvision.models.vgg16()
        self.net = _load(net, weights_path).features[:index + 1]

    def forward(self, x):
        return self.at(x, [len(self.net) - 1])[0]

    def at(self, x, indices):
        """The outputs of the layers with these indices, a list."""
        x = (x.float().expand(-1, 3, -1, -1) + 1) / 2
        h = TF.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        outputs = []
        with torch.autocast(x.device.type, enabled=False):
            for i, layer in enumerate(self.net):
                h = layer(h)
                if i in indices:
                    outputs.append(h)
        return outputs


class LPIPS(nn.Module):
    """The distance of Zhang et al. 2018 on VGG-16: two (B, C, H, W) in [-1, 1] -> (B,).

    Features at ReLUs 1_2, 2_2, 3_3, 4_3 and 5_3 are scaled to length 1. Their squared differences
    are weighted by channel, averaged over pixels, and added up. `lpips_path` is vgg.pth of the
    package lpips, which has the channels' weights. UserError if it has others.
    """

    CHANNELS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # {index of a ReLU: its channels}

    def __init__(self, weights_path, lpips_path):
        super().__init__()
        self.vgg = VGGFeatures(weights_path, max(self.CHANNELS))
        self.lin = nn.ModuleList()
        try:
            state = torch.load(lpips_path, map_location="cpu", weights_only=True)
            for i, channels in enumerate(self.CHANNELS.values()):
                self.lin.append(nn.Conv2d(channels, 1, 1, bias=False))
                self.lin[i].load_state_dict({"weight": state[f"lin{i}.model.1.weight"]})
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError,
                pickle.UnpicklingError):
            raise UserError(f"{lpips_path} holds no weights of LPIPS on VGG-16") from None
        self.requires_grad_(False)

    def forward(self, x, y):
        distance = 0
        for weigh, of_x, of_y in zip(self.lin, self.vgg.at(x, self.CHANNELS),
                                     self.vgg.at(y, self.CHANNELS)):
            difference = F.normalize(of_x, dim=1) - F.normalize(of_y, dim=1)
            distance = distance + weigh(difference.square()).mean((1, 2, 3))
        return distance


def load_network(Network, url, metric, device):
    """InceptionFeatures or VGGFeatures with the weights of `url`.

    If they cannot be had, a line says why, and the result is None: the metric is optional.
    """
    try:
        return Network(weights_file(url)).to(device)
    except UserError as error:
        print(f"no {metric}: {error}", flush=True)
        return None


def perceptual_distance(vgg, x, y):
    """Mean squared difference of VGGFeatures (DC-VAE paper, A.7): two (B, C, H, W) -> (B,)."""
    return (vgg(x) - vgg(y)).square().mean((1, 2, 3))


def slerp(z1, z2, t):
    """Points at t (N, 1) on the arcs from z1 to z2, both (N, L) -> (N, L).

    In many dimensions such a point is as long as the ends. A straight line between two draws of
    N(0, 1) comes nearer to 0 than draws do.
    """
    cosine = F.cosine_similarity(z1, z2, dim=1).clamp(-1, 1).unsqueeze(1)
    angle = cosine.acos()
    return (torch.sin((1 - t) * angle) * z1 + torch.sin(t * angle) * z2) / torch.sin(angle)


@torch.no_grad()
def path_length(decode, distance, latent, pairs, device, between=slerp, epsilon=1e-4):
    """Perceptual path length (Karras et al. 2019), a number: how fast images change as codes move.

    It is the mean of distance(G(z_t), G(z_{t+ε})) / ε², where z_t lies at a random share t of the
    path `between` two draws of N(0, 1). Its unit is that of `distance`. The lowest and the highest
    1 % of all `pairs` are left out. Images of more than 256 pixels a side are averaged down.
    Everything is fp32, because differences of 10⁻⁴ vanish in bf16 and in a GPU's TF32.
    """
    lengths = []
    for start in range(0, pairs, 50):
        count = min(50, pairs - start)
        z1 = torch.randn(count, latent, device=device)
        z2 = torch.randn(count, latent, device=device)
        t = torch.rand(count, 1, device=device)
        with (torch.autocast(z1.device.type, enabled=False),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            x = decode(between(z1, z2, t))
            y = decode(between(z1, z2, t + epsilon))
            if x.shape[-1] > 256:
                x = F.avg_pool2d(x, x.shape[-1] // 256)
                y = F.avg_pool2d(y, y.shape[-1] // 256)
            lengths.append(distance(x, y) / epsilon**2)
    lengths = torch.cat(lengths)
    lowest = lengths.quantile(0.01, interpolation="lower")
    highest = lengths.quantile(0.99, interpolation="higher")
    return lengths[(lengths >= lowest) & (lengths <= highest)].mean().item()


def path_length_metrics(decode, latent, pairs, device, lpips_path=None):
    """A decoder's path length, and the distance that measures it: a dict, empty without networks.

    The distance is LPIPS if `lpips_path` has its weights, else `perceptual_distance`. The two have
    different units.
    """
    Network = VGGFeatures
    unit = "VGG ReLU 4_3"
    if lpips_path:
        Network = functools.partial(LPIPS, lpips_path=lpips_path)
        unit = "LPIPS"
    network = load_network(Network, VGG_URL, "path length", device)
    if network is None:
        return {}
    distance = network if lpips_path else functools.partial(perceptual_distance, network)
    return {"path_length": path_length(decode, distance, latent, pairs, device),
            "path_length_pairs": pairs, "path_length_in": unit}


def feature_statistics(inception, batches):
    """uint8 batches (B, C, H, W) -> mean (2048,), covariance of features; probabilities (N, 1008).

    Mean and covariance are float64. Batches are read one by one, and of features only sums are
    kept.
    """
    total = 0
    products = 0
    probabilities = []
    for images in batches:
        features, logits = inception(images)
        features = features.cpu().double()  # in this order: mps does not have float64
        total = total + features.sum(0)
        products = products + features.T @ features
        probabilities.append(logits.softmax(1).cpu())
    probabilities = torch.cat(probabilities)
    n = len(probabilities)
    mean = total / n
    covariance = (products - n * torch.outer(mean, mean)) / max(1, n - 1)
    return mean, covariance, probabilities


def frechet_distance(mean1, cov1, mean2, cov2):
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½) ≥ 0 of two Gaussians (Heusel et al. 2017, Eq. (6)).

    A covariance may be singular, as with fewer images than features.
    """
    # With Σ₁ = A Aᵀ, Σ₁Σ₂ has the eigenvalues λ of AᵀΣ₂A, so tr (Σ₁Σ₂)^½ = Σ √λ. As AᵀΣ₂A is
    # symmetric, its eigenvalues are real, and those below 0 are rounding errors.
    cov1 = cov1.double()
    cov2 = cov2.double()
    values, vectors = torch.linalg.eigh(cov1)
    A = vectors * values.clamp(min=0).sqrt()
    root_trace = torch.linalg.eigvalsh(A.T @ cov2 @ A).clamp(min=0).sqrt().sum()
    means = (mean1 - mean2).double().square().sum()
    distance = means + cov1.trace() + cov2.trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # in this order NaN stays NaN


def inception_score(probabilities, splits=10):
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al. 2016) from (N, classes) -> mean and sd.

    Mean and sd are over `splits` parts, each with its own p(y).
    """
    scores = []
    for p in probabilities.double().tensor_split(min(splits, len(probabilities))):
        kl = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def sample_batches(model, count, batch_size=100):
    """`count` samples of the model as uint8 batches, each drawn when it is needed."""
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    samples = (to_uint8(model.sample(size)) for size in sizes)
    return progress("sampling", samples, count)


def reference_statistics(inception, images, device):
    """{split: feature_statistics} of all training images, validation included, and of test."""
    references = {}
    for split, array in (("train", images.train.array), ("test", images.test)):
        batches = progress(f"features, {split}", Batches(array, 100, device), len(array))
        references[split] = feature_statistics(inception, (to_uint8(x) for x in batches))
    return references


def inception_metrics(inception, batches, references):
    """FID of uint8 batches against each of {split: feature_statistics}, and Inception Score.

    The result also has the number of images behind each of these.
    """
    mean, cov, probabilities = feature_statistics(inception, batches)
    score, sd = inception_score(probabilities)
    n = len(probabilities)
    results = {"inception_score": score, "inception_score_sd": sd, "fid_images": n}
    for split, (mean_ref, cov_ref, probabilities_ref) in references.items():
        results[f"fid_{split}"] = frechet_distance(mean, cov, mean_ref, cov_ref)
        results[f"fid_{split}_images"] = len(probabilities_ref)
        n = min(n, len(probabilities_ref))
    if n < 10_000:
        warnings.warn("FID from fewer than 10,000 images is biased upwards: "
                      "compare it only with FID from as many")
    return results


def fid_of_samples(cfg, model, images):
    """FID of --fid samples against train and test, and Inception Score.

    The result is {} if Inception's weights cannot be had.
    """
    inception = load_network(InceptionFeatures, INCEPTION_URL, "FID", cfg.device)
    if inception is None:
        return {}
    references = reference_statistics(inception, images, cfg.device)
    return inception_metrics(inception, sample_batches(model, cfg.fid), references)


# ---- Sheets: pictures that say what they are -----------------------------------------------------

PICTURE_SIDE = 64  # pixels; smaller pictures are enlarged
SHEET_BYTES = 300_000
SHEET_TOP = 38  # pixels for the title, two lines
GAP = 2  # pixels between pictures


def save_sheet(path, title, rows, columns=8, keep_columns=False):
    """Save sets of pictures as one PNG below a title, with each row's name at its left.

    `rows` is {name: images (N, C, H, W) in [-1, 1]}, with the same N for all. The first `columns`
    images of each set make a row, then the next `columns` images of each set, and so on. An
    incomplete row is left out. Pixel values are not changed, but pictures of fewer than 64 pixels a
    side are enlarged by a whole factor. To keep the file near SHEET_BYTES, rows at the end are left
    out, and then columns, down to four. With `keep_columns` all columns are kept. A single row of
    large pictures may exceed SHEET_BYTES.
    """
    names = list(rows)
    pictures = pictures_that_fit(list(rows.values()), columns, keep_columns)
    side = pictures.shape[2]
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)
    step = side + GAP
    height = SHEET_TOP + len(pictures) * step
    width = 10 + math.ceil(max(font.getlength(name) for name in names)) + len(pictures[0]) * step
    for line in title.split("\n"):
        width = max(width, 10 + math.ceil(font.getlength(line)))
    left = width - len(pictures[0]) * step
    sheet = Image.new("L" if pictures.ndim == 4 else "RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((5, 4), title, "black", font)
    for i, row in enumerate(pictures):
        top = SHEET_TOP + i * step
        if len(names) > 1 or i == 0:  # a single name holds for all rows and is written once
            draw.text((left - 5, top + step / 2), names[i % len(names)], "black", font, "rm")
        for j, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (left + j * step, top))
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


def pictures_that_fit(sets, columns, keep_columns):
    """The pictures of a sheet: [(N, C, H, W)] -> uint8 (rows, columns, side, side, 3), enlarged.

    Grey ones are (rows, columns, side, side).
    """
    count, channels, side, _ = sets[0].shape
    factor = math.ceil(PICTURE_SIDE / side)
    columns = min(columns, count)
    whole = count // columns * columns
    sets = [images[:whole].unflatten(0, (-1, columns)) for images in sets]
    pictures = to_uint8(torch.stack(sets, 1))  # (repeats, sets, columns, C, H, W)
    # Fitted to files: PNG cannot compress noise, and a repeated pixel costs a little, too.
    picture_bytes = channels * side**2 * (4 + factor) / 5
    fitting = int(SHEET_BYTES / picture_bytes / len(sets))  # pictures of each set
    pictures = pictures[:max(1, fitting // columns)]
    if not keep_columns:
        pictures = pictures[:, :, :max(4, fitting)]
    pictures = pictures.flatten(0, 1).repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    pictures = pictures.permute(0, 1, 3, 4, 2).cpu().numpy()
    return pictures[..., 0] if channels == 1 else pictures


# ---- The log: log.jsonl, the console, results.json, curves.png -----------------------------------

def mean_over_steps(rows, step):
    """[{name: scalar tensor}] of the steps up to `step` -> {name: mean over steps and processes}.

    If a value is not finite, FloatingPointError names its step and the values of that step.
    """
    columns = []
    for name in rows[0]:
        columns.append(torch.stack([row[name] for row in rows]))
    table = sum_over_processes(torch.stack(columns)) / processes()[1]  # (names, steps)
    for i, values in enumerate(table.T):
        if not values.isfinite().all():
            named = dict(zip(rows[0], values.tolist()))
            raise FloatingPointError(f"step {step - len(rows) + 1 + i} is not finite, {named}; "
                                     "the last checkpoint, if any, is kept")
    return dict(zip(rows[0], table.mean(1).tolist()))


def require_finite(model, step):
    """FloatingPointError if a parameter is inf or nan: a finite loss may have such a gradient."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(f"{name} is not finite after step {step}; "
                                     "the last checkpoint, if any, is kept")


def to_json(values, indent=None):
    """{name: value} as JSON, which has no infinity and no NaN: such a number becomes null."""
    stored = {}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        stored[name] = value
    return json.dumps(stored, indent=indent, allow_nan=False)


def read_log(path):
    """log.jsonl -> its rows, dicts; a line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def log_row(folder, state, split, values, dims=None, ending=""):
    """Append {"step", "split", **values, "seconds"} to log.jsonl, and print it as one line.

    With `dims` the values are the terms of a bound, in nats per image: their sum is logged as
    "bpd", and the line shows bits per dimension.
    """
    if dims is None:
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
    else:
        bpd = bits_per_dim(sum(values.values()), dims)
        parts = [f"{name} {bits_per_dim(nats, dims):.3f}" for name, nats in values.items()]
        text = f"bpd {bpd:.4f} = {' + '.join(parts)}"
        values = {"bpd": bpd, **values}
    row = {"step": state["step"], "split": split, **values, "seconds": state["seconds"]}
    if processes()[0] == 0:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")
        print(f"step {state['step']}  {split}  {text}{ending}", flush=True)


def log_training(folder, state, total, rows, batch_size, dims=None):
    """`log_row` of the means of the last steps' `rows`, with images/s, time spent < time left.

    It waits for the device. The time since state["clock"] is added to state["seconds"], the time
    spent in training without evaluation.
    """
    values = mean_over_steps(rows, state["step"])
    now = time.perf_counter()
    spent = now - state["clock"]
    state["clock"] = now
    state["seconds"] += spent
    left = state["seconds"] * (total - state["step"]) / state["step"]
    ending = (f"  {len(rows) * batch_size / spent:.0f} img/s  "
              f"{clock(state['seconds'])} < {clock(left)}")
    log_row(folder, state, "train", values, dims, ending)


def clock(seconds):
    """Seconds -> "h:mm:ss"."""
    return str(timedelta(seconds=int(seconds)))


def write_results(folder, results, table=None):
    """Write results.json, and print a line for each number.

    `table` {row: {column: number}} is printed as a table, and stored as {row_column: number}.
    """
    stored = dict(results)
    for row, numbers in (table or {}).items():
        for column, number in numbers.items():
            stored[f"{row}_{column}"] = number
    (folder / "results.json").write_text(to_json(stored, indent=1), encoding="utf-8")
    for name, value in results.items():
        print(f"{name:24} {value:,.4f}" if isinstance(value, float) else f"{name:24} {value}")
    if table:
        columns = next(iter(table.values()))
        print(f"{'':24}", *(f"{column:>10}" for column in columns))
        for row, numbers in table.items():
            print(f"{row:24}", *(f"{number:10.3f}" for number in numbers.values()))


def draw_curves(folder, names=None):
    """Draw curves.png from log.jsonl, a panel for each of `names`: train blue, validation orange.

    By default there is a panel for all that is logged except counts of images. If a step is logged
    twice, because the run was resumed from before it, the later line is drawn.
    """
    records = read_log(folder / "log.jsonl")
    if names is None:
        names = []
        for name in dict.fromkeys(name for record in records for name in record):
            if not name.endswith(("step", "split", "seconds", "images")):
                names.append(name)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(6, 3 * columns), max(4, 2.5 * rows)), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for name, axes in zip(names, panels):
        for split, colour in (("train", "C0"), ("valid", "C1")):
            steps, values = curve_of(records, name, split)
            if steps:
                axes.plot(steps, values, ".-", color=colour)
        axes.set(title=name, xlabel="step")
    for axes in panels[len(names):]:
        axes.axis("off")
    panels[0].legend(handles=[Line2D([], [], color="C0", marker=".", label="train"),
                              Line2D([], [], color="C1", marker=".", label="valid")])
    figure.savefig(folder / "curves.png")


def curve_of(records, name, split):
    """-> steps and values of one key of log.jsonl.

    Of more than 50 the first 2 % are left out, because they would flatten the rest.
    """
    curve = {r["step"]: r[name] for r in records if r["split"] == split and name in r}
    first = max(curve) / 50 if len(curve) > 50 else 0
    steps = [step for step in sorted(curve) if step > first]
    return steps, [curve[step] for step in steps]


# ---- Devices and processes: under torchrun there are several, each with its share of a batch -----

def choose_device(cfg):
    """Choose --device, --dtype, --compile and threads if not given; join the other processes."""
    if cfg.device == "auto":
        cfg.device = "cpu"
        if torch.cuda.is_available():
            cfg.device = "cuda"
        elif torch.backends.mps.is_available():
            cfg.device = "mps"
    if cfg.device == "cuda" and by_torchrun():
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one GPU per process
    try:
        torch.empty(0, device=cfg.device)
    except (RuntimeError, AssertionError):  # AssertionError: torch was built without it
        raise UserError(f"there is no --device {cfg.device} here; take auto or cpu, "
                        "and no more processes than GPUs") from None
    on_gpu = cfg.device.startswith("cuda")
    if on_gpu:
        has_bf16 = torch.cuda.get_device_capability(cfg.device) >= (8, 0)  # from Ampere on
    else:
        has_bf16 = cfg.device == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    emulated = cfg.dtype == "bf16" and not has_bf16 and cfg.device != "mps"
    if cfg.dtype == "auto":  # a point is two numbers, for which bf16 gains nothing
        cfg.dtype = "bf16" if has_bf16 and cfg.dataset not in POINTS else "fp32"
    if cfg.compile is None:
        cfg.compile = on_gpu and has_bf16 and sys.platform == "linux"
    # A step of a small network is thousands of small operations. Threads that share an operation
    # mostly wait for each other, and for any other program that occupies a core:
    # docs/performance.md.
    small = cfg.small or cfg.dataset in POINTS
    if cfg.device == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    # oneDNN computes convolutions on a CPU and caches 1,024 compiled operations. A layer needs
    # three, so a model of more than 340 convolutions would compile all of them again in every step.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    join_processes(cfg.device)
    if emulated:
        print("bf16 is emulated on this device: --dtype fp32 is faster here", flush=True)


def by_torchrun():
    """Whether torchrun started this process. A LOCAL_RANK alone may be left over in the shell."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join_processes(device):
    """Under torchrun, meet the other processes: NCCL between GPUs, gloo between CPUs.

    All but the first print nothing.
    """
    if by_torchrun() and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group(timeout=timedelta(days=1))  # others wait while the first evaluates
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")


def processes():
    """-> this process's rank, the number of processes: (0, 1) unless started by torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier():
    """Wait until every process has arrived here."""
    if processes()[1] > 1:
        dist.barrier()


def sum_over_processes(values):
    """Tensor -> its sum over all processes, float64 on the CPU, the same bits in each of them."""
    values = values.detach().cpu().double().clone()
    if processes()[1] > 1:
        dist.all_reduce(values)
    return values


def gather_batch(values):
    """(B, …) of each process -> (processes·B, …), in the order in which `Batches` dealt them."""
    world = processes()[1]
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def seed_noise(*numbers):
    """Seed all random numbers from `numbers` alone: in training (seed, step, rank).

    So a resumed run with as many processes has the same noise as an uninterrupted one.
    """
    torch.manual_seed(zlib.crc32(repr(numbers).encode()))
