"""What every script shares: image datasets · the discretized mixture of logistics · metrics, over all processes. Nothing else.

Images on disk are uint8 (N, H, W, C), memory-mapped. Images in a model are float (B, C, H, W) in [-1, 1]: the 256 levels
0 … 255 sit at level / 127.5 - 1, a grid of spacing 2/255. Only `from_uint8` and `to_uint8` convert; the
mixture below and the points know the spacing too. Equations are numbered as in docs/equations.md.

    B batch · C channels · H, W height and width · M mixture components · N images · S importance samples
"""

import atexit
import contextlib
import json
import math
import os
import pickle
import shlex
import shutil
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

class UserError(Exception):
    """A request that cannot be met. `main` prints it as one line and exits with code 2."""

# ---- Processes: under torchrun there are several, each with its share of every batch ------------------------------------

def join_processes(device):
    """Under torchrun, meet the other processes: NCCL between GPUs, one for each process, gloo between CPUs. All but the first fall silent."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group(timeout=timedelta(days=1))  # the first may have a dataset to prepare
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")

def processes():
    """-> the rank of this process, how many there are: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def barrier():
    """Wait until every process has come here."""
    if processes()[1] > 1:
        dist.barrier()

def summed(values):
    """Tensor -> its sum over all processes, in float64 on the CPU, the same bits in each of them."""
    values = values.detach().cpu().double().clone()  # in this order: mps has no double
    if processes()[1] > 1:
        dist.all_reduce(values)
    return values

def gathered(values):
    """(B, …) of each process -> (processes·B, …), in the order of the whole batch, which `Batches.batch` dealt out by turns."""
    if processes()[1] == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(processes()[1])]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)

def merged(results):
    """{number: result} of each process -> those of all, ordered by number."""
    parts = [results]
    if processes()[1] > 1:
        dist.all_gather_object(parts := [None] * processes()[1], results)
    return dict(sorted(item for part in parts for item in part.items()))

def seed_noise(*numbers):
    """From here on random numbers follow from `numbers` alone (in training: seed, step, process), so a resumed run of as many processes
    draws what an unbroken one would have."""
    torch.manual_seed(zlib.crc32(repr(numbers).encode()))

def shared(batches):
    """This process's share of an evaluation: batches rank, rank + world, …, each with its number. What is drawn for a batch follows from
    that number and the seed last set, so results do not depend on which process draws it, or on what was evaluated before it."""
    seed, (rank, world) = torch.initial_seed(), processes()
    for i, batch in enumerate(batches):
        if i % world == rank:
            seed_noise(seed, i)
            yield i, batch
    torch.manual_seed(seed)

def command_line():
    """What was typed to start this process, or all of them."""
    world = processes()[1]
    return shlex.join([*(["torchrun", f"--nproc_per_node={world}"] if world > 1 else ["python"]), *sys.argv])

def explain(script, error):
    """One line about what ended the run -> the exit code. A RuntimeError is no user's mistake, and is raised again."""
    if isinstance(error, RuntimeError):
        if processes()[1] > 1:
            print("this process failed, or lost another; checkpoints are kept, and --resume goes on", file=sys.stderr)
        raise error
    print(f"{script}.py: error: {error}" if str(error) else "stopped; checkpoints are kept", file=sys.stderr)
    return {FloatingPointError: 1, KeyboardInterrupt: 130}.get(type(error), 2)

# ---- Pixels: 256 levels in [-1, 1] ------------------------------------------------------------------------------------

def from_uint8(levels):
    """Levels 0 … 255 of any dtype -> float in [-1, 1], same shape."""
    return levels.float() / 127.5 - 1

def to_uint8(x):
    """Float of any range -> the nearest of the 256 levels, uint8, same shape. Inverse of `from_uint8`."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

def quantize(x):
    """Float -> the nearest of the 256 grid values in [-1, 1], same shape."""
    return from_uint8(to_uint8(x))

# ---- Datasets ---------------------------------------------------------------------------------------------------------

SIZES = {"shapes": 32, "mnist": 32, "cifar10": 32, "stl10": 32, "imagenette": 64, "celeba": 64}  # name: side in pixels
VALID_SHARE = 0.15  # of the training images (selfVAE paper, A.5: "15 % randomly selected")
RESIDENT_BYTES = 4 * 2**30  # a split up to this size lives on the device; a larger one stays memory-mapped

@dataclass
class Subset:
    """The images of `array`, (N, H, W, C) uint8, at the positions `index`: a view that reads only what is asked for."""

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
    """One dataset. The three splits are uint8 (N, H, W, C); `labels` maps a split's name to uint8 (N,) or (N, factors)."""

    name: str
    size: int
    train: Subset
    valid: Subset
    test: np.ndarray
    labels: dict | None
    augment: bool  # whether training flips and shifts: not on CelebA (A.5), and a flipped digit is no digit

    @property
    def shape(self):
        """(C, H, W), as the models take it."""
        height, width, channels = self.test.shape[1:]
        return (channels, height, width)

def load_images(name, data_dir, size=None):
    """The dataset `name`, one of SIZES or the path of a folder of images, at `size` pixels a side -> Images.

    Reads `{data_dir}/{name}-{size}/{train,test}.npy`; where that is missing, makes it once (built in, downloaded through
    torchvision, or read from the folder). Validation is 15 % of train by a permutation that never changes.
    Raises UserError for an unknown name, a missing, empty or broken folder, or a failed download.
    """
    source = None
    if name not in SIZES:
        source = Path(name).expanduser()
        if not source.is_dir():
            raise UserError(f"dataset {name!r} is neither one of {', '.join(SIZES)}, nor, for realnvp.py, {', '.join(POINTS)}, nor a folder of images")
    size = SIZES.get(name, 64) if size is None else size
    if size < 8:
        raise UserError(f"--size {size} is too small: images need at least 8 pixels a side")
    key = name if source is None else _folder_key(source)
    folder = Path(data_dir) / f"{key}-{size}"
    if processes()[0] == 0 and not folder.is_dir():
        print(f"preparing {folder} (once)", flush=True)
        splits = _folder_splits(source, size) if source else globals()[f"_{name}_splits"](Path(data_dir), size)
        _store(folder, splits)
    barrier()
    train, test = (_open(folder / f"{split}.npy", 4) for split in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(train))
    n_valid = max(1, round(VALID_SHARE * len(train)))
    index = {"valid": np.sort(order[:n_valid]), "train": np.sort(order[n_valid:])}
    labels = None
    if (folder / "train-labels.npy").exists():
        train_labels = _open(folder / "train-labels.npy", (1, 2), len(train))
        labels = {split: train_labels[i] for split, i in index.items()}
        labels["test"] = _open(folder / "test-labels.npy", (1, 2), len(test))
    return Images(source.resolve().name if source else name, size, Subset(train, index["train"]),
                  Subset(train, index["valid"]), test, labels, source is not None or name not in ("mnist", "celeba"))

def _open(path, dims, count=None):
    """Memory-map one file of the on-disk format: uint8, `dims` (4: images; 1 or 2: labels) dimensions, `count` rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path} ({error}); delete its folder to have it made again") from None
    if array.dtype != np.uint8 or array.ndim not in np.atleast_1d(dims) or len(array) < 1 or len(array) != (count or len(array)):
        raise UserError(f"{path} holds {array.dtype} {array.shape}; it should be uint8 (N, H, W, C), or labels, a row an image")
    return array

def _store(folder, splits):
    """Write {split: (count, images, labels or None)} as .npy files: aside, then renamed, so that `folder` is whole or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for split, (count, images, labels) in splits.items():
            array = None
            for i, image in enumerate(images):
                if array is None:
                    array = np.lib.format.open_memmap(partial / f"{split}.npy", "w+", np.uint8, (count, *image.shape))
                array[i] = image
            array.flush()
            if labels is not None:
                np.save(partial / f"{split}-labels.npy", np.asarray(labels, np.uint8))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

def _square(image, size):
    """PIL image -> (size, size, C) uint8: centre crop to a square, Lanczos."""
    image = TF.center_crop(image, min(image.size))
    return np.asarray(TF.resize(image, [size, size], InterpolationMode.LANCZOS)).reshape(size, size, -1)

def _resized(array, size):
    """(N, H, W) or (N, H, W, C) uint8 -> iterator of (size, size, C); untouched where it has that size."""
    for image in array:
        yield image.reshape(size, size, -1) if image.shape[0] == size else _square(TF.to_pil_image(image), size)

def _download(dataset, **arguments):
    """A torchvision dataset, downloaded where it is missing. Any failure of the network or the archive is a UserError."""
    name = dataset.__name__
    try:
        return dataset(download=True, **arguments)
    except Exception as error:  # the network, archives and the download helpers each raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"downloading {name} to {arguments['root']} failed: {reason}") from None

def _mnist_splits(data_dir, size):
    splits = {}
    for split in ("train", "test"):
        data = _download(torchvision.datasets.MNIST, root=data_dir / "downloads", train=split == "train")
        images = data.data.numpy()
        if size == 32:
            images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
        splits[split] = len(images), _resized(images, size), data.targets
    return splits

def _cifar10_splits(data_dir, size):
    splits = {}
    for split in ("train", "test"):
        data = _download(torchvision.datasets.CIFAR10, root=data_dir / "downloads", train=split == "train")
        splits[split] = len(data.data), _resized(data.data, size), data.targets
    return splits

def _stl10_splits(data_dir, size):
    """Train is the 5,000 labelled and the 100,000 unlabelled images; no labels are kept."""
    splits = {}
    for split, parts in (("train", "train+unlabeled"), ("test", "test")):
        data = _download(torchvision.datasets.STL10, root=data_dir / "downloads", split=parts)
        splits[split] = len(data.data), _resized(data.data.transpose(0, 2, 3, 1), size), None
    return splits

def _imagenette_splits(data_dir, size):
    splits = {}
    for split, part in (("train", "train"), ("test", "val")):
        root, arguments = data_dir / "downloads", dict(split=part, size="160px")
        if (root / "imagenette2-160").is_dir():  # torchvision < 0.20 refuses to download over it
            data = torchvision.datasets.Imagenette(root, **arguments)
        else:
            data = _download(torchvision.datasets.Imagenette, root=root, **arguments)
        images = (_square(image, size) for image, _ in data)
        splits[split] = len(data), images, [label for _, label in data._samples]
    return splits

def _celeba_splits(data_dir, size):
    """Official train and test splits; crop top 40, left 15, side 148 (selfVAE paper, A.5). Labels: the 40 attributes."""
    root = data_dir / "celeba"
    partition, attributes, jpegs = root / "list_eval_partition.txt", root / "list_attr_celeba.txt", root / "img_align_celeba"
    if not (partition.exists() and jpegs.is_dir()):
        try:
            _download(torchvision.datasets.CelebA, root=data_dir)
        except UserError as error:
            raise UserError(f"{error}. By hand: unzip img_align_celeba.zip so that {jpegs}/000001.jpg exists, put "
                            f"list_eval_partition.txt at {partition} and (optional, labels) list_attr_celeba.txt beside "
                            "it; all three are on the CelebA project page") from None
    labels = {}
    try:
        part = dict(line.split() for line in partition.read_text().splitlines() if line.strip())
        if attributes.exists():  # two header lines, then: file name, 40 times 1 or -1
            rows = [line.split() for line in attributes.read_text().splitlines()[2:] if line.strip()]
            labels = {name: [int(value) > 0 for value in values] for name, *values in rows}
    except ValueError:
        raise UserError(f"{partition} needs lines 'NAME 0|1|2', {attributes} 'NAME ±1 … ±1' below two header lines") from None
    splits = {}
    for split, code in (("train", "0"), ("test", "2")):
        names = [name for name, value in part.items() if value == code]
        images = (_square(TF.crop(_read(jpegs / name), 40, 15, 148, 148), size) for name in names)
        if not names:
            raise UserError(f"{partition} lists no {split} images (lines 'NAME {code}')")
        splits[split] = len(names), images, [labels[name] for name in names] if labels.keys() >= set(names) else None
    return splits

def _read(path):
    """One image file -> RGB PIL image."""
    try:
        return default_loader(str(path))
    except (OSError, SyntaxError, ValueError) as error:  # what the decoders raise on broken files
        raise UserError(f"cannot read the image {path}: {error}") from None

def _image_files(folder):
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())

def _folder_key(folder):
    """A name for the cache of `folder` that changes when one of its files does."""
    files = _image_files(folder)
    if len(files) < 10:
        raise UserError(f"the folder {folder} holds {len(files)} images ({', '.join(IMG_EXTENSIONS)}); at least 10 are needed")
    listing = "".join(f"{p.resolve()}{p.stat().st_size}{p.stat().st_mtime_ns}" for p in files)
    return f"{folder.resolve().name}-{zlib.crc32(listing.encode()):08x}"

def _folder_splits(folder, size):
    """The subfolders train/ and test/ where both exist; else every tenth image, in a fixed random order, is a test image."""
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        files = {split: _image_files(folder / split) for split in ("train", "test")}
        for split in files:
            if len(files[split]) < 2:
                raise UserError(f"the folder {folder / split} holds {len(files[split])} images; at least 2 are needed")
    else:
        everything = _image_files(folder)
        order = [everything[i] for i in np.random.default_rng(0).permutation(len(everything))]
        n_test = len(order) // 10
        files = {"train": order[n_test:], "test": order[:n_test]}
    return {split: (len(paths), (_square(_read(path), size) for path in paths), None) for split, paths in files.items()}

COLOURS = np.array([[230, 60, 60], [240, 150, 40], [235, 220, 70], [80, 200, 90], [70, 205, 215], [70, 110, 235],
                    [165, 80, 220], [235, 235, 235]], np.float32)

def _shapes_splits(data_dir, size):
    return {"train": (20_000, *draw_shapes(20_000, size, seed=0)), "test": (2_000, *draw_shapes(2_000, size, seed=1))}

def draw_shapes(count, size, seed):
    """`shapes`: one anti-aliased figure over a colour gradient, with sensor noise -> uint8 (count, size, size, 3), labels.

    Labels, uint8 (count, 5): kind 0-3 (disc, square, triangle, ring), colour 0-7, size 0-3, column 0-3, row 0-3. The noise
    (sd 2 levels) keeps a likelihood from running off to infinity on flat areas; its entropy is 3.05 bits per dimension.
    """
    rng = np.random.default_rng([seed, size])
    kind, colour = rng.integers(0, 4, count), rng.integers(0, 8, count)
    radius = rng.uniform(0.12, 0.32, count).astype(np.float32)  # in units of the image's side
    centre = rng.uniform(0.25, 0.75, (2, count)).astype(np.float32)
    labels = np.stack([kind, colour, (radius - 0.12) / 0.05, (centre[0] - 0.25) * 8, (centre[1] - 0.25) * 8], 1)
    corners = rng.uniform(10, 120, (count, 3, 3)).astype(np.float32)  # the gradient: colour = a + b·column + c·row
    images = np.empty((count, size, size, 3), np.uint8)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    for start in range(0, count, 500):
        part = slice(start, start + 500)
        x, y = axis[None, None, :] - centre[0, part, None, None], axis[None, :, None] - centre[1, part, None, None]
        r = radius[part, None, None]
        disc = np.sqrt(x**2 + y**2) - r  # signed distances to the outline, negative inside, (500, size, size)
        square = np.maximum(abs(x), abs(y)) - 0.85 * r
        triangle = np.maximum(y - 0.6 * r, 0.866 * abs(x) - 0.5 * y - 0.6 * r)
        ring = abs(disc + 0.2 * r) - 0.2 * r
        distance = np.choose(kind[part, None, None], [disc, square, triangle, ring])
        cover = np.clip(0.5 - distance * size, 0, 1)[..., None]  # the share of the pixel inside the outline
        a, b, c = (corners[part, i, None, None, :] for i in range(3))
        backdrop = a + (b - a) * axis[None, None, :, None] / 2 + (c - a) * axis[None, :, None, None] / 2
        clean = backdrop + cover * (COLOURS[colour[part], None, None] - backdrop)
        noisy = clean + 2 * rng.standard_normal(clean.shape, np.float32)
        images[part] = np.clip(np.rint(noisy), 0, 255)
    return images, np.minimum(labels, [3, 7, 3, 3, 3]).astype(np.uint8)

POINTS = ("moons", "rings", "spirals", "checkerboard")  # of the plane, for realnvp.py

def draw_points(name, count, seed):
    """`count` points of one of POINTS, most of them in [-1, 1]² -> float (count, 2). `checkerboard` has entropy log 2 nats."""
    rng = np.random.default_rng(seed)
    share, arm, noise = rng.random(count), rng.choice([-1, 1], count), rng.standard_normal((2, count))
    angle = np.pi * share
    if name == "moons":  # two half circles, each with its end inside the other
        points = 0.6 * arm * [np.cos(angle) - 0.5, np.sin(angle) - 0.25] + 0.05 * noise
    elif name == "rings":  # two, of equal shares
        points = rng.choice([0.35, 0.85], count) * [np.cos(2 * angle), np.sin(2 * angle)] + 0.05 * noise
    elif name == "spirals":  # two arms of one turn, evenly filled
        angle = 2 * np.pi * np.sqrt(share)
        points = 0.9 * arm * np.sqrt(share) * [np.cos(angle), np.sin(angle)] + 0.04 * noise
    else:  # 8 of 16 squares
        row, column = rng.integers(0, 4, count), rng.integers(0, 2, count)
        points = np.stack([2 * column + row % 2 + share, row + rng.random(count)]) / 2 - 1
    return points.T

def load_points(name):
    """One of POINTS as Images of one pixel with two channels: float (N, 1, 1, 2), in the units of levels that Batches maps back."""
    train, valid, test = (np.float32(127.5 * (draw_points(name, count, seed) + 1)).reshape(-1, 1, 1, 2)
                          for seed, count in enumerate((102_400, 10_000, 10_000)))
    return Images(name, 1, train, valid, test, labels=None, augment=False)

class Batches:
    """Batches of one split as float (B, C, H, W) in [-1, 1] on `device`, in channels-last memory.

    The split is kept on the device as it is stored, uint8 (points: float32), up to RESIDENT_BYTES. A larger one stays memory-mapped,
    and a thread reads the next batch while this one is in use. Flips and shifts are tensor operations on the device, so there are no
    worker processes.
    `batch(step)` is training: which images it holds follows from (seed, step) alone, so that a resumed run sees what the unbroken
    one would have seen; it must split into `parts` equal parts, else UserError. A small split is one batch, less what does not split.
    Iterating is evaluation: the whole split once, in order, the last batch smaller if need be.
    """

    def __init__(self, images, batch_size, device, seed=0, augment=False, parts=1):
        self.images, self.device, self.seed, self.augment = images, torch.device(device), seed, augment
        self.count = len(images)
        self.batch_size = batch_size if batch_size <= self.count else self.count // parts * parts or self.count
        if self.batch_size % parts:
            raise UserError(f"a step's {self.batch_size} images do not split into {parts} equal parts: processes times --accumulate, "
                            "in dcvae.py times --d_steps")
        self.per_epoch = self.count // self.batch_size
        self.resident = None
        if math.prod(images.shape) <= RESIDENT_BYTES:
            self.resident = torch.from_numpy(np.require(images[:], requirements="W")).to(self.device)
        self.reader, self.ahead = ThreadPoolExecutor(1), {}  # {positions: what the thread reads}
        self.epoch, self.order = None, None

    def _beside_images(self, index):
        """`index`, on the device if the images are there: once an epoch, so that no step waits for the copy."""
        return index if self.resident is None else index.to(self.device)

    def _read(self, index):
        """Positions (B,) -> uint8 (B, H, W, C) in memory from which a GPU can copy by itself ("pinned")."""
        levels = torch.from_numpy(np.array(self.images[index.numpy()]))
        return levels.pin_memory() if self.device.type == "cuda" else levels

    def _levels(self, index, following):
        """Positions (B,) -> uint8 (B, H, W, C) on the device; where they are streamed, starts reading `following`."""
        if self.resident is not None:
            return self.resident[index]
        reading = self.ahead.get(tuple(index.tolist())) or self.reader.submit(self._read, index)
        self.ahead = {tuple(following.tolist()): self.reader.submit(self._read, following)} if len(following) else {}
        return reading.result().to(self.device, non_blocking=True)

    def _order(self, epoch):
        """The positions of an epoch's images, in a permutation of its own."""
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(self.count, generator=generator)[:self.per_epoch * self.batch_size]  # whole batches
            self.epoch, self.order = epoch, self._beside_images(order)
        return self.order

    def batch(self, step, rank=0, world=1):
        """The training batch of step 0, 1, 2, …, or the share that process `rank` of `world` has of it; every epoch is a new permutation."""
        epoch, i = divmod(step, self.per_epoch)
        index = self._order(epoch)[i * self.batch_size:(i + 2) * self.batch_size]  # and the next, unless a new epoch begins
        this, following = index[:self.batch_size][rank::world], index[self.batch_size:][rank::world]
        levels = self._levels(this, following)
        return from_uint8((augment(levels) if self.augment else levels).permute(0, 3, 1, 2))

    def __iter__(self):
        parts = self._beside_images(torch.arange(self.count)).split(self.batch_size)
        for index, following in zip(parts, (*parts[1:], parts[0][:0])):
            yield from_uint8(self._levels(index, following).permute(0, 3, 1, 2))

def augment(levels, share=0.05):
    """Random flips and shifts by up to ceil(5 %) of the side, each image its own: uint8 (B, H, W, C) -> same shape.

    Shifted-in pixels repeat the edge: the clamp on the row and column numbers does it.
    """
    B, H, W, _ = levels.shape
    draw = lambda low, high: torch.randint(low, high + 1, (B, 1), device=levels.device)
    reach_y, reach_x = math.ceil(share * H), math.ceil(share * W)
    rows = (torch.arange(H, device=levels.device) + draw(-reach_y, reach_y)).clamp(0, H - 1)  # (B, H)
    columns = (torch.arange(W, device=levels.device) + draw(-reach_x, reach_x)).clamp(0, W - 1)  # (B, W)
    columns = torch.where(draw(0, 1) == 1, W - 1 - columns, columns)
    image = torch.arange(B, device=levels.device)
    return levels[image[:, None, None], rows[:, :, None], columns[:, None, :]]

# ----------------------------------------------------------------------------------------------------------------------
# Discretized mixture of logistics (Salimans et al. 2017, PixelCNN++, section 2.1 and 2.2)
#
# A pixel of C channels is drawn from one of M components; given the component, channel c is logistic around a mean that
# depends linearly on the channels before it, rounded to the 256-level grid:
#
#     p(x) = Σ_m π_m Π_c [σ((x_c + δ - μ_mc) / s_mc) - σ((x_c - δ - μ_mc) / s_mc)],     δ = 1/255, half a grid step
#     μ_mc = mean_mc + Σ_{j<c} tanh(coefficient_mcj) x_j
#
# The lowest level owns everything below it (the first σ alone), the highest everything above it (1 - the second σ): the
# 256 probabilities telescope to exactly one.
# ----------------------------------------------------------------------------------------------------------------------

MIXTURES = 10  # components; the paper leaves the number out, its predecessor's code has 10

def dmol_channels(channels, mixtures=MIXTURES):
    """Parameters per pixel: for each component 1 weight, C means, C log-scales and C(C-1)/2 coupling coefficients."""
    return mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)

def _dmol_split(params, channels):
    """(B, P, H, W) -> logits (B, M, H, W); means, log-scales (B, C, M, H, W); coefficients (B, C(C-1)/2, M, H, W). fp32.

    As they are used: log-scales counted from -2 and clamped, coefficients through tanh, in the order (2,1), (3,1), (3,2) of (c, j).
    """
    params = params.to(torch.promote_types(params.dtype, torch.float32))  # likelihoods are never computed in bf16
    params = params.unflatten(1, (dmol_channels(channels, 1), -1))
    weight, means, log_scales, coefficients = params.split([1, channels, channels, channels * (channels - 1) // 2], 1)
    # At -7 a component puts 97.3 % on one level (PixelCNN++'s clamp: at most 0.03 nats a value are lost); above 7 it is flat.
    # A network starts near 0, which is made a scale of e⁻² = 17 levels: from half the range, 1, training would take long to come down.
    return weight[:, 0], means, (log_scales - 2).clamp(-7, 7), coefficients.tanh()

def dmol_shift(params, shift):
    """The parameters of x + shift where x has `params`: (B, P, H, W), shift (B, C, H, W) -> (B, P, H, W). Only the means change.

    They move by the shift, less what the coupling would add for the shift of the channels before: μ_c is linear in x_j - shift_j.
    """
    channels = shift.shape[1]
    params = params.to(torch.promote_types(params.dtype, torch.float32))  # as where they are used
    rows = params.unflatten(1, (dmol_channels(channels, 1), -1))  # (B, rows, M, H, W)
    weight, means, log_scales, coefficients = rows.split([1, channels, channels, channels * (channels - 1) // 2], 1)
    moved, pair = [], 0
    for c in range(channels):
        mean = means[:, c] + shift[:, c:c + 1]
        for j in range(c):
            mean = mean - coefficients[:, pair].tanh() * shift[:, j:j + 1]
            pair += 1
        moved.append(mean)
    return torch.cat([weight, torch.stack(moved, 1), log_scales, coefficients], 1).flatten(1, 2)

def dmol_log_prob(x, params):
    """log p(x), in nats, summed over C, H, W: x (B, C, H, W) on the 256-level grid, params (B, P, H, W) -> (B,).

    The mixture of Dlogistic in the selfVAE paper, Eqs. (3.2c), (3.2e), with PixelCNN++'s coupling of the channels.
    With a = (x + δ - μ)/s and b = (x - δ - μ)/s, the bin's mass is σ(a) - σ(b) = σ(a) σ(-b) (1 - e^(b-a)). Its log is a sum
    of three terms that neither cancel nor underflow, however improbable the pixel, so no approximate low-probability branch
    is needed (PixelCNN++ has one); an edge bin just leaves out the terms of the edge that it does not have.
    """
    channels = x.shape[1]
    logits, means, log_scales, coefficients = _dmol_split(params, channels)
    x = x.to(means.dtype).unsqueeze(2)  # (B, C, 1, H, W), against M components
    lowest, highest = x < -1 + 1 / 255, x > 1 - 1 / 255
    log_p = logits.log_softmax(1)  # (B, M, H, W)
    pair = 0
    for c in range(channels):
        mean = means[:, c]
        for j in range(c):  # channel coupling: R, then G given R, then B given R and G
            mean = mean + coefficients[:, pair] * x[:, j]
            pair += 1
        inverse_scale = torch.exp(-log_scales[:, c])
        centred = x[:, c] - mean
        log_above = -F.softplus((centred - 1 / 255) * inverse_scale)  # log σ(-b): not below the bin
        log_below = -F.softplus(-(centred + 1 / 255) * inverse_scale)  # log σ(a): not above the bin
        log_width = torch.log(-torch.expm1(-2 / 255 * inverse_scale))  # log(1 - e^(b-a))
        log_bin = log_above + log_below + log_width
        log_p = log_p + torch.where(lowest[:, c], log_below, torch.where(highest[:, c], log_above, log_bin))
    return torch.logsumexp(log_p, 1).sum((1, 2))

def dmol_sample(params, mean=False, mixtures=MIXTURES):
    """Draw x ~ p(x), or with `mean` its expected value: params (B, P, H, W) -> (B, C, H, W) on the 256-level grid.

    The expected value ignores the rounding and clips every component's mean to [-1, 1].
    """
    per_component = params.shape[1] // mixtures  # = (C + 1)(C + 2)/2, solved for C
    channels = (math.isqrt(8 * per_component + 1) - 3) // 2
    logits, means, log_scales, coefficients = _dmol_split(params, channels)
    if not mean:
        chosen = torch.distributions.Categorical(logits=logits.movedim(1, -1), validate_args=False).sample()  # (B, H, W)
        pick = lambda values: values.gather(2, chosen[:, None, None].expand(-1, values.shape[1], -1, -1, -1))
        means, log_scales, coefficients = pick(means), pick(log_scales), pick(coefficients)  # M = 1 from here on
    x, pair = [], 0
    for c in range(channels):
        value = means[:, c]
        for j in range(c):
            value = value + coefficients[:, pair] * x[j]
            pair += 1
        if not mean:  # inverse CDF of the logistic; rounding here conditions the next channel on what the pixel will be
            value = quantize(value + log_scales[:, c].exp() * torch.logit(torch.rand_like(value), eps=2**-25))  # rand can be 0
        x.append(value.clamp(-1, 1))
    x = torch.stack(x, 1)  # (B, C, M or 1, H, W)
    weights = logits.softmax(1).unsqueeze(1) if mean else 1
    return quantize((weights * x).sum(2))

# ---- Metrics ----------------------------------------------------------------------------------------------------------

def bits_per_dim(nats, dims):
    """Nats per image -> bits per dimension, nats / (D ln 2). `dims` is always the D = C·H·W of x, whatever was coded."""
    return nats / (dims * math.log(2))

def log_mean_exp(log_w, dim=0):
    """log 1/S Σ_s exp(log_w_s) over `dim`, the importance-weighted bound from log-weights in nats (Burda et al. 2015, Eq. (8))."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])

def psnr(x, y):
    """Peak signal-to-noise ratio in decibels, per image: two (B, C, H, W) in [-1, 1] -> (B,); infinite where they are equal."""
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))

# The next three take any model with `terms(x)`, `log_weights(x, samples)` and `sample(n)`; precision and seed are the caller's.
# Under torchrun every process must call the first two, and those of features below: each does its share.

def mean_terms(model, batches):
    """Every term of the bound, {name: nats per image}, averaged over all images of a split."""
    sums = merged({i: {name: values.cpu().double().sum().item() for name, values in model.terms(x).items()} for i, x in shared(batches)})
    return {name: sum(row[name] for row in sums.values()) / batches.count for name in sums[0]}

def importance_weighted(model, batches, samples, dims, kept=os.devnull):
    """log p(x) ≥ E[log 1/S Σ_s w_s] for each image (Burda et al. 2015, Eq. (8)), averaged over a split, in bits per dimension.

    iw_bpd_se is the standard error of that average over images; iw_elbo_bpd is E[log w], the plain bound, from the same weights of
    the same images: what iw_bpd is to be held against. Sums over samples and images are float64. What is done is appended to the
    file `kept`, from which a stopped call goes on; it is deleted at the end. (The null device, the default, keeps nothing.)
    """
    done, start, shown = {}, time.perf_counter(), 0  # done: {number of the batch: bounds, plain bounds of its images}
    for line in Path(kept).read_text().splitlines() if os.path.exists(kept) else ():
        with contextlib.suppress(ValueError):  # a line cut short, as the process was killed
            i, row = json.loads(line)
            done[i] = row
    total = math.ceil(batches.count / batches.batch_size)
    before = finished = len(done)  # batches, of all processes
    for i, x in shared(batches):
        if i in done:
            continue
        log_w = model.log_weights(x, samples).cpu().double()  # (S, B); in this order: mps has no double
        done[i] = [log_mean_exp(log_w).tolist(), log_w.mean(0).tolist()]
        with open(kept, "a") as file:
            file.write("\n" + json.dumps([i, done[i]]))  # in this order, so that one cut short has a line of its own
        seconds, finished = time.perf_counter() - start, min(finished + processes()[1], total)
        if seconds > shown + 30:
            shown, left = seconds, seconds * (total - finished) / (finished - before)
            print(f"importance weighting: {min(finished * batches.batch_size, batches.count)} of {batches.count} images  "
                  f"{timedelta(seconds=int(seconds))} < {timedelta(seconds=int(left))}", flush=True)
    bounds = [torch.tensor(sum(rows, []), dtype=torch.float64) for rows in zip(*merged(done).values())]
    if kept != os.devnull and processes()[0] == 0:
        Path(kept).unlink(missing_ok=True)
    bpd, elbo_bpd = (bits_per_dim(-nats, dims) for nats in bounds)
    return {"iw_bpd": bpd.mean().item(), "iw_bpd_se": bpd.std(correction=min(1, len(bpd) - 1)).item() / len(bpd)**0.5, "iw_samples": samples,
            "iw_images": len(bpd), "iw_elbo_bpd": elbo_bpd.mean().item()}

def seconds_to_sample(model, n, runs=10):
    """Seconds to draw n images: the mean of `runs`, after one to warm up (Table 2's last column, there of 100)."""
    model.sample(n).cpu()
    start = time.perf_counter()
    for _ in range(runs):
        model.sample(n).cpu()  # waits for the device
    return (time.perf_counter() - start) / runs

# ---- Metrics of pictures: FID, Inception Score, distances of reconstructions --------------------------------------------

def pixel_distance(x, y):
    """‖x - y‖² with pixels in [0, 1], summed over the image: two (B, C, H, W) in [-1, 1] -> (B,)."""
    return (x - y).float().square().sum((1, 2, 3)) / 4

INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
VGG_URL = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url

def weights_file(url, path, data_dir):
    """`path` or, without one, data_dir/downloads/NAME, downloaded from `url` if missing and checked against the hash in its name."""
    file = Path(path or Path(data_dir, "downloads", url.split("/")[-1]))
    try:
        if not (path or file.exists()):
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, file, file.stem.split("-")[-1], progress=False)
    except (OSError, RuntimeError, HTTPException) as error:  # RuntimeError: another hash
        raise UserError(f"{file} is missing ({error}): download {url} and put it there") from None
    return file

def _load(net, path):
    """A network on the meta device, without weights, -> the same with those of a state dict's file, for inference. UserError if they do not fit."""
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError):
        raise UserError(f"{path} is missing, damaged or holds no weights of {type(net).__name__}") from None
    return net.eval().requires_grad_(False)

def _pooled_by(pool):
    """Forward hook for a block of Inception: its last branch, and last channels, behind `pool` instead of torchvision's mean."""
    def replace(block, inputs, output):
        branch = block.branch_pool(pool(inputs[0]))
        return torch.cat([output[:, :-branch.shape[1]], branch], 1)
    return replace

class InceptionFeatures(nn.Module):
    """The Inception network of FID and Inception Score, TensorFlow's of 2015-12-05, from a state dict in pytorch-fid's format.

    uint8 images (B, 1 or 3, H, W) -> features (B, 2048), logits (B, 1008), fp32; what a row is depends on its own image only.
    It is torchvision's Inception v3 but for four things of the original: how images are resized; means over 3x3 that leave out
    what lies beyond the border; in the last block the largest instead of the mean; no biases in the logits (Salimans et al. 2016).
    """

    def __init__(self, weights_path):
        super().__init__()
        with torch.device("meta"):  # no initial weights: they would take time, and the random numbers of others
            net = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        self.net = _load(net, weights_path)
        self.logit_weights = self.net.fc.weight  # (1008, 2048)
        self.net.fc = nn.Identity()
        for name, block in self.net.named_children():
            if name == "Mixed_7c":
                block.register_forward_hook(_pooled_by(lambda h: F.max_pool2d(h, 3, 1, 1)))
            elif hasattr(block, "branch_pool"):
                block.register_forward_hook(_pooled_by(lambda h: F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)))
        self.eval()

    def forward(self, images):
        x = (images.float() - 128) / 128  # as in 2015, and not quite from_uint8
        for dim in (2, 3):  # TensorFlow 1's bilinear resize: row i of 299 lies at row i·H/299, with no shift of half a pixel
            length = x.shape[dim]
            at = torch.arange(299, device=x.device) * length / 299
            low, share = at.long(), (at - at.floor()).view((299, 1) if dim == 2 else (299,))
            x = x.index_select(dim, low).lerp(x.index_select(dim, (low + 1).clamp(max=length - 1)), share)
        with torch.autocast(x.device.type, enabled=False):
            features = self.net(x.expand(-1, 3, -1, -1))
            return features, features @ self.logit_weights.T

class VGGFeatures(nn.Module):
    """ReLU 4_3 of VGG-16 (Johnson et al. 2016), from torchvision's state dict: (B, 1 or 3, H, W) in [-1, 1] -> (B, 512, H/8, W/8)."""

    def __init__(self, weights_path):
        super().__init__()
        with torch.device("meta"):
            net = torchvision.models.vgg16()
        self.net = _load(net, weights_path).features[:23]

    def forward(self, x):
        x = TF.normalize((x.float().expand(-1, 3, -1, -1) + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.autocast(x.device.type, enabled=False):
            return self.net(x)

def perceptual_distance(vgg, x, y):
    """Mean squared difference of VGGFeatures (DC-VAE paper, A.7): two (B, C, H, W) in [-1, 1] -> (B,)."""
    return (vgg(x) - vgg(y)).square().mean((1, 2, 3))

def feature_statistics(inception, batches):
    """Pairs as from `shared`, a number and uint8 images (B, C, H, W), read one by one -> mean (2048,) and covariance of the features
    of all processes, float64; class probabilities (N, 1008)."""
    total, products, probabilities = 0, 0, {}  # Σ f, Σ f fᵀ
    for i, images in batches:
        features, logits = inception(images)
        features = features.cpu().double()  # in this order: mps has no double
        total, products = total + features.sum(0), products + features.T @ features
        probabilities[i] = logits.softmax(1).cpu()
    probabilities = torch.cat(list(merged(probabilities).values()))
    n = len(probabilities)
    totals, all_products = zip(*merged({processes()[0]: (total, products)}).values())  # one of each process
    mean = sum(totals) / n
    return mean, (sum(all_products) - n * torch.outer(mean, mean)) / max(1, n - 1), probabilities

def frechet_distance(mean1, cov1, mean2, cov2):
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2(Σ₁Σ₂)^½), the squared W₂ distance of two Gaussians (Heusel et al. 2017, Eq. (6)), >= 0.

    With Σ₁ = A Aᵀ, Σ₁Σ₂ has the eigenvalues λ of AᵀΣ₂A, so tr (Σ₁Σ₂)^½ = Σ √λ. That matrix is symmetric, so they are real, and those
    below 0 are rounding, also where a covariance is singular, as it is with fewer images than features.
    """
    values, vectors = torch.linalg.eigh(cov1.double())
    A = vectors * values.clamp(min=0).sqrt()
    root_trace = torch.linalg.eigvalsh(A.T @ cov2.double() @ A).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).double().square().sum() + cov1.double().trace() + cov2.double().trace() - 2 * root_trace
    return max(distance.item(), 0.0)  # in this order NaN stays NaN

def inception_score(probabilities, splits=10):
    """exp E[KL(p(y|x) ‖ p(y))] (Salimans et al. 2016) from (N, classes) -> mean and sd over `splits` parts, each with its own p(y)."""
    parts = probabilities.double().tensor_split(min(splits, len(probabilities)))
    scores = [(torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp() for p in parts]
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()

def load_inception(path, data_dir, device):
    """InceptionFeatures from `path` or, without one, downloaded. None, and a line that says why, where that fails: FID is an extra."""
    return _load_network(InceptionFeatures, INCEPTION_URL, path, data_dir, device, "FID", "--inception_weights")

def load_vgg(path, data_dir, device):
    """The same for VGGFeatures."""
    return _load_network(VGGFeatures, VGG_URL, path, data_dir, device, "perceptual distance", "--vgg_weights")

def _load_network(Network, url, path, data_dir, device, metric, flag):
    first, network = processes()[0] == 0, None
    if not first:
        barrier()  # the first downloads
    try:
        network = Network(weights_file(url, path, data_dir)).to(device)
    except UserError as error:
        if path:
            raise
        print(f"no {metric}: {error}, or name its place with {flag}", flush=True)
    if first:
        barrier()
    return None if summed(torch.tensor(network is None)).item() else network  # all or none

def draws(model, count, batch_size=100):
    """This process's share of `count` samples: uint8 batches, drawn when they are asked for, numbered as by `shared`."""
    for i, start in shared(range(0, count, batch_size)):
        yield i, to_uint8(model.sample(min(batch_size, count - start)))

def levels(batches):
    """The images of `batches` as `feature_statistics` takes them."""
    return ((i, to_uint8(x)) for i, x in shared(batches))

def reference_statistics(inception, images, device):
    """{split: feature_statistics} of the training images, those for validation included, and of the test images."""
    return {split: feature_statistics(inception, levels(Batches(array, 100, device)))
            for split, array in (("train", images.train.array), ("test", images.test))}

def inception_metrics(inception, batches, references):
    """FID of numbered uint8 batches against each of {split: feature_statistics}, their Inception Score, and how many images each stands on."""
    mean, cov, probabilities = feature_statistics(inception, batches)
    score, sd = inception_score(probabilities)
    results = {"inception_score": score, "inception_score_sd": sd, "fid_images": len(probabilities)}
    for split, (mean_ref, cov_ref, p_ref) in references.items():
        results |= {f"fid_{split}": frechet_distance(mean, cov, mean_ref, cov_ref), f"fid_{split}_images": len(p_ref)}
    if min(value for name, value in results.items() if name.endswith("images")) < 10_000:
        warnings.warn("FID from fewer than 10,000 images is biased upwards: compare it only with FID from as many")
    return results
