"""Data sets: what is stored of each and what is refused; how batches are made of them."""

import errno
import math
import os
import shutil
import struct
import threading
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
import torchvision
from common import Batches, UserError, load_images, make_shapes, to_uint8
from PIL import Image

# ---- What the tests are made of ------------------------------------------------------------------

def write(path, pixels, **options):
    """An array -> a file of the kind that the name says, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def fill(folder, levels, name="{}.png"):
    """One grey picture for each level, which is its name; it is not square."""
    for level in levels:
        write(folder / name.format(level), np.full((10, 12, 3), level, np.uint8))


def put(folder, **arrays):
    """Store arrays as {folder}/{name}.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def levels_of(images):
    """The levels of all images of a dataset, in order."""
    levels = []
    for split in (images.train, images.valid, images.test):
        levels += split[:][:, 0, 0, 0].tolist()
    return sorted(levels)


def numbered(count, channels=3):
    """Image i of 16 x 16 is constant: i in channel 0, i + 50 in channel 1, i + 100 in channel 2."""
    levels = np.arange(count)[:, None, None, None] + 50 * np.arange(channels)
    return np.tile(levels, (1, 16, 16, 1)).astype(np.uint8)


NOISE = np.random.default_rng(0).integers(0, 256, (25, 32, 32, 3), np.uint8)
LABELS = np.arange(25, dtype=np.uint8) % 10


def assert_holds(images, pixels, labels=None):
    """Train and validation are the first 20 of these 25, the test is the rest; all have labels."""
    for split, numbers in (("train", images.train.index), ("valid", images.valid.index),
                           ("test", range(20, 25))):
        assert np.array_equal(getattr(images, split)[:], pixels[numbers])
        if labels is not None:
            assert np.array_equal(images.labels[split], labels[numbers])
            assert images.labels[split].dtype == np.uint8
    assert len(images.train) == 17 and len(images.valid) == 3
    assert labels is not None or images.labels is None


@pytest.fixture
def data(tmp_path):
    """The data_dir of these tests, which does not exist yet."""
    return tmp_path / "data"


@pytest.fixture
def load(data):
    """load(name, size=8) -> Images."""
    def load(name, size=8):
        return load_images(str(name), data, size)

    return load


@pytest.fixture
def refused(load, data):
    """refused(name, *words, size=8) -> a UserError's line, which has the words; data_dir stays."""
    def refused(name, *words, size=8):
        before = sorted(data.rglob("*"))
        with pytest.raises(UserError) as error:
            load(name, size)
        told = str(error.value)
        for word in words:
            assert word in told
        assert "\n" not in told and sorted(data.rglob("*")) == before
        return told

    return refused


@pytest.fixture
def small_shapes(monkeypatch):
    """`shapes` of the 20 + 5 images of NOISE, with labels, at any size."""
    def pictures_of(data_dir, size, split):
        part = slice(0, 20) if split == "train" else slice(20, 25)
        return NOISE[part], LABELS[part]

    monkeypatch.setitem(common.DATASETS, "shapes", (32, pictures_of))


# ---- From pictures to files ----------------------------------------------------------------------

def test_a_dataset_on_disk(small_shapes, load, data, capsys, monkeypatch):
    """Four files hold what was prepared, once: the second call reads them and says nothing."""
    images = load("shapes", None)
    assert [path.name for path in data.iterdir()] == ["shapes-32"]
    names = sorted(path.name for path in (data / "shapes-32").iterdir())
    assert names == ["test-labels.npy", "test.npy", "train-labels.npy", "train.npy"]
    assert "preparing" in capsys.readouterr().out
    monkeypatch.setitem(common.DATASETS, "shapes", (32, None))
    for images in (images, load("shapes", 32)):
        assert_holds(images, NOISE, LABELS)
        assert isinstance(images.test, np.memmap)
        assert (images.name, images.size, images.shape) == ("shapes", 32, (3, 32, 32))
        assert images.identity == "20 for training, 5 for the test (shapes)"
    assert capsys.readouterr().out == ""


def test_validation_is_15_percent_and_never_changes(load, data):
    """30 of 200 images, scattered, none of which is trained on; always the same ones."""
    put(data / "shapes-16", train=numbered(200), test=numbered(1))
    images = load("shapes", 16)
    assert len(images.valid) == 30 and images.valid.index[:6].tolist() == [0, 6, 39, 54, 65, 71]
    assert sorted([*images.valid.index, *images.train.index]) == list(range(200))


def test_digits_and_celeba_are_not_augmented(load, data, tmp_path):
    """A flipped digit is no digit; the paper leaves CelebA alone. A folder "mnist" is augmented.

    What lies there is not counted: only what is prepared must be whole.
    """
    for name in common.DATASETS:
        put(data / f"{name}-16", train=numbered(10), test=numbered(10))
        images = load(name, 16)
        assert images.augment == (name not in ("mnist", "celeba")) and images.key == name
    fill(tmp_path / "mnist", range(10))
    assert load(tmp_path / "mnist").augment


def test_a_long_preparation_says_how_long_it_takes(small_shapes, load, monkeypatch, capsys):
    """Half a minute for each of 20 images: after the first 19 times as long is left."""
    clock = iter(range(0, 10**6, 31))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    load("shapes")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1 of 20 train images, 0:09:49 left"
    assert lines[2].startswith("2 of 20 train images") and len(lines) == 26


@pytest.mark.parametrize("number", [5, 22])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_was_interrupted_is_begun_anew(error, number, small_shapes, load, data, monkeypatch):
    """Ctrl-C or a full disk, at a train or a test image, leave nothing. A killed process may."""
    def fails(*arguments):
        done.append(1)
        if len(done) > number:
            raise error
        return square(*arguments)

    done = []
    square = common._square
    with monkeypatch.context() as patch:
        patch.setattr(common, "_square", fails)
        with pytest.raises(type(error)):
            load("shapes", 32)
    assert list(data.iterdir()) == []
    put(data / "shapes-32.partial", train=NOISE[:3], other=NOISE)
    assert_holds(load("shapes", 32), NOISE, LABELS)
    assert [path.name for path in data.iterdir()] == ["shapes-32"]
    assert len(list((data / "shapes-32").iterdir())) == 4


def test_a_disk_that_is_too_full_says_so_at_once(small_shapes, refused, data, monkeypatch):
    """20 images of 32 x 32 x 3 bytes are 61,440."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=61_439))
    data.mkdir()
    refused("shapes", "disk", str(data / "shapes-32.partial"), size=32)


# ---- Several runs at once ------------------------------------------------------------------------

@pytest.mark.skipif(common.fcntl is None, reason="nobody waits on this system")
@pytest.mark.parametrize("size", [16, 24])
def test_one_process_prepares_and_the_others_wait(size, load, monkeypatch):
    """At once they would write into one file. Of another size they would share the downloads."""
    def pictures_of(data_dir, size, split):
        calls.append((size, split))
        if len(calls) == 1:
            entered.set()
            assert leave.wait(10)
        return numbered(20), None

    calls = []
    sizes = []
    entered = threading.Event()
    leave = threading.Event()
    monkeypatch.setitem(common.DATASETS, "shapes", (16, pictures_of))
    first = threading.Thread(target=lambda: sizes.append(load("shapes", 16).size))
    second = threading.Thread(target=lambda: sizes.append(load("shapes", size).size))
    first.start()
    assert entered.wait(10)
    second.start()
    second.join(0.2)
    assert calls == [(16, "train")] and second.is_alive()
    leave.set()
    first.join(10)
    second.join(10)
    assert len(calls) == (2 if size == 16 else 4)  # the second one finds what it needs
    assert sorted(sizes) == [16, size]


def test_there_need_not_be_locks(small_shapes, tmp_path, monkeypatch):
    """Some file systems have none, nor has Windows."""
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    if common.fcntl:
        monkeypatch.setattr(common.fcntl, "flock", flock)
        assert_holds(load_images("shapes", tmp_path / "nfs"), NOISE, LABELS)
    monkeypatch.setattr(common, "fcntl", None)
    assert_holds(load_images("shapes", tmp_path / "windows"), NOISE, LABELS)


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["imagenet", "no/where", "", " ", "~nosuchuser/p", "a\0b"])
def test_an_unknown_name_is_refused(name, refused, data, tmp_path, monkeypatch):
    """The line repeats it and has those that exist. The empty one is no working directory."""
    fill(tmp_path, range(20))
    monkeypatch.chdir(tmp_path)
    refused(name, repr(name), "shapes, mnist, cifar10", "moons", "nor a folder")
    assert not data.exists()


HEADER = b"\x93NUMPY\x01\x00\x10\x00{'descr': ('''u1"  # that Python cannot split


@pytest.mark.parametrize("content", [None, b"", HEADER[:6], HEADER, "half"])
@pytest.mark.parametrize("name", ["train.npy", "test-labels.npy"])
def test_a_damaged_file_is_named(name, content, small_shapes, load, refused, data):
    """It is missing, empty or cut, as after a crash, or garbled; numpy raises many kinds."""
    load("shapes")
    path = data / "shapes-8" / name
    if content == "half":
        content = path.read_bytes()[:-1]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused("shapes", str(path), "delete its folder")


GOOD = numbered(10)
ROWS = np.zeros(10, np.uint8)
WRONG = [np.zeros((10, 16, 24, 3), np.uint8), np.zeros((10, 16, 16, 4), np.uint8), GOOD[:0],
         GOOD[:, :8, :8], GOOD[..., 0], GOOD[0, 0, 0, 0], GOOD.astype(np.int64)]


@pytest.mark.parametrize("name, array", [
    *[("train", array) for array in WRONG], *[("test", array) for array in WRONG],
    ("train", GOOD[:1]), ("test", GOOD[..., :1]), ("train-labels", ROWS[:7]),
    ("test-labels", np.zeros(11, np.uint8)), ("train-labels", ROWS.astype(np.int64))])
def test_arrays_that_do_not_fit_are_refused(name, array, refused, data):
    """Later on they would be errors of torch, or other labels. The line says what is there.

    Of two training images one becomes validation; grey and RGB are two datasets.
    """
    arrays = {"train": GOOD, "test": GOOD, "train-labels": ROWS, "test-labels": ROWS}
    put(data / "shapes-16", **arrays | {name: array})
    refused("shapes", f"{name}.npy", str(array.shape) if array.size else "", size=16)


def test_three_images_are_enough(load, data):
    """One to train, one to validate, one to test."""
    put(data / "shapes-16", train=GOOD[:2], test=GOOD[:1])
    images = load("shapes", 16)
    assert (len(images.train), len(images.valid), len(images.test)) == (1, 1, 1)


def test_all_broken_pictures_are_named_at_once(refused, data, tmp_path, monkeypatch):
    """Ten by name, and how many there are; each is decoded once. A cut one is broken, too."""
    def count(path):
        opened.append(path)
        return decode(path)

    own = tmp_path / "own"
    fill(own, range(19))
    write(own / "broken.png", NOISE[0])
    (own / "broken.png").write_bytes((own / "broken.png").read_bytes()[:2000])
    for i in range(11):
        (own / f"broken{i}.png").write_bytes(b"no picture")
    data.mkdir()
    opened = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", count)
    first, *told = refused(own, "cannot read 12 of the images: ").split("; ")
    assert "broken.png (image file is truncated" in first
    assert len(told) == 9 and told == sorted(told) and "broken7.png (" in told[8]
    assert len(opened) == len(set(opened)) == 31


@pytest.mark.parametrize("error, says", [
    (OSError("no route to host"), "no route to host"), (OSError(), "OSError"),
    (RuntimeError("Tried\nhttps://a.org/, got:\n<urlopen error>\n"),
     "Tried https://a.org/, got: <urlopen error>"), (EOFError(1000 * "word "), "word word")])
@pytest.mark.parametrize("name", ["MNIST", "CelebA"])
def test_a_failed_download_is_one_line(name, error, says, refused, data, monkeypatch):
    """The helpers that torchvision calls raise errors of many kinds, without or with long texts.

    CelebA's host is often used up for the day: the files may be put there by hand.
    """
    def dataset(**arguments):
        raise error

    dataset.__name__ = name
    monkeypatch.setattr(torchvision.datasets, name, dataset)
    data.mkdir()
    told = refused(name.lower(), f"downloading {name} to {data}", f"failed: {says}")
    assert len(told) < 700 + 2 * len(str(data))
    assert (f"img_align_celeba.zip, unpacked, into {data / 'celeba'}" in told) == (name == "CelebA")


@pytest.mark.parametrize("name", common.COUNTS)
def test_a_set_that_is_not_whole_is_not_stored(name, refused, data, monkeypatch):
    """One line says how many there are, how many there should be, and what to delete."""
    monkeypatch.setitem(common.DATASETS, name, (16, lambda *arguments: (numbered(20), None)))
    n_train, n_test, source = common.COUNTS[name]
    data.mkdir()
    refused(name, "has 20 training and 20 test images", f"{n_train:,} and {n_test:,} are expected",
            str(data / source))


# ---- The sets that have a name -------------------------------------------------------------------

def replace(monkeypatch, name, place, train, test):
    """In place of a dataset of torchvision, whose parts are these (arguments, attributes)."""
    def dataset(root, download, **arguments):
        assert root == place and download
        for expected, attributes in (train, test):
            if arguments == expected:
                return SimpleNamespace(**attributes)

    monkeypatch.setattr(torchvision.datasets, name, dataset)
    monkeypatch.setitem(common.COUNTS, name.lower(), (20, 5, ""))


def test_mnist(load, data, monkeypatch):
    """28 x 28 digits get a frame of two black pixels; at 28 they are left alone."""
    digits = torch.from_numpy(NOISE[:, :28, :28, 0])
    targets = torch.from_numpy(LABELS).long()
    replace(monkeypatch, "MNIST", data / "downloads",
            ({"train": True}, dict(data=digits[:20], targets=targets[:20])),
            ({"train": False}, dict(data=digits[20:], targets=targets[20:])))
    framed = torch.zeros(25, 32, 32, 1)
    framed[:, 2:30, 2:30, 0] = digits
    assert_holds(load("mnist", None), framed.numpy(), LABELS)
    assert_holds(load("mnist", 28), digits.numpy()[..., None], LABELS)


def test_cifar10(load, data, monkeypatch):
    """Images are as torchvision holds them, with labels."""
    labels = LABELS.tolist()
    replace(monkeypatch, "CIFAR10", data / "downloads",
            ({"train": True}, dict(data=NOISE[:20], targets=labels[:20])),
            ({"train": False}, dict(data=NOISE[20:], targets=labels[20:])))
    assert_holds(load("cifar10", None), NOISE, LABELS)


def test_stl10(load, data, monkeypatch):
    """Channels-first 96 x 96 becomes channels-last 32 x 32; train is train+unlabeled; no labels."""
    large = numbered(25).repeat(6, 1).repeat(6, 2).transpose(0, 3, 1, 2)
    replace(monkeypatch, "STL10", data / "downloads",
            ({"split": "train+unlabeled"}, dict(data=large[:20])),
            ({"split": "test"}, dict(data=large[20:])))
    assert_holds(load("stl10", None), numbered(25).repeat(2, 1).repeat(2, 2))


def test_imagenette(load, refused, data, monkeypatch):
    """Of three classes, as torchvision finds it where unpacking was interrupted; then whole.

    Its validation part is the test split.
    """
    folder = data / "downloads" / "imagenette2-160"
    for part, levels in (("train", (1, 2)), ("val", (3,))):
        for i, wnid in enumerate(("n01440764", "n02102040", "n02979186")):
            fill(folder / part / wnid, [100 * i + level for level in levels], "{}.JPEG")
    refused("imagenette", "6 training and 3 test", f"Delete {folder}")
    monkeypatch.setitem(common.COUNTS, "imagenette", (6, 3, ""))
    images = load("imagenette", None)
    assert images.shape == (3, 64, 64) and images.test[:, 0, 0, 0].tolist() == [3, 103, 203]
    assert images.labels["test"].tolist() == [0, 1, 2]
    assert (images.train[:][:, 5, 5, 1] // 100 == images.labels["train"]).all()


def test_celeba(load, refused, data, monkeypatch):
    """178 x 218 pixels without the upper 40, the left 15 and more than 148: 40 attributes each."""
    pictures = np.random.default_rng(0).integers(0, 256, (25, 218, 178, 3), np.uint8)
    attributes = torch.arange(25)[:, None] % torch.arange(2, 42) // 2
    names = [f"{i:06}.jpg" for i in range(25)]
    replace(monkeypatch, "CelebA", data,
            ({"split": "train"}, dict(filename=names[:20], attr=attributes[:20])),
            ({"split": "test"}, dict(filename=names[20:], attr=attributes[20:])))
    for name, picture in zip(names, pictures):
        write(data / "celeba" / "img_align_celeba" / name, picture, format="PNG")
    assert_holds(load("celeba", 148), pictures[:, 40:188, 15:163], attributes.numpy())
    assert load("celeba", None).shape == (3, 64, 64)
    (data / "celeba" / "img_align_celeba" / names[0]).unlink()
    refused("celeba", "has 19 training")  # its lists are whole before its archive


@pytest.mark.parametrize("name", ["celebahq", "lsun"])
def test_folders_that_nobody_may_pass_on(name, load, refused, data):
    """Without images the line has their place; of faces the last by name are test, 1 in 30."""
    data.mkdir()
    refused(name, f"{data / name} holds 0 images")
    fill(data / name, range(40, 100))
    images = load(name)
    assert levels_of(images) == list(range(40, 100))
    test = images.test[:, 0, 0, 0].tolist()
    assert test == [98, 99] if name == "celebahq" else len(test) == 6


# ---- Folders -------------------------------------------------------------------------------------

def test_a_folder_of_images(load, tmp_path, monkeypatch):
    """With all below it, made square; every tenth is test, 15 % of the rest validation, once each.

    The split never changes. A tilde is home, as in a shell, where the name is quoted.
    """
    own = tmp_path / "own"
    for i in range(40):
        fill(own / f"part{i % 3}" / "deep", [i])
    images = load(own, None)
    assert images.name == "own" and images.shape == (3, 64, 64) and images.labels is None
    assert (len(images.train), len(images.valid), len(images.test)) == (31, 5, 4)
    assert levels_of(images) == list(range(40))
    assert images.test[:, 0, 0, 0].tolist() == [39, 11, 21, 37]
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert load("~/own", None).key == images.key


def test_pictures_are_cropped_in_the_centre_and_become_rgb(load, tmp_path):
    """Of 48 x 16 pixels, dark, middle and bright, the middle third remains, both ways round."""
    stripes = np.array([10, 120, 230], np.uint8).repeat(16)
    (tmp_path / "own").mkdir()
    for i in range(12):
        picture = np.tile(stripes, (16, 1))
        image = Image.fromarray(picture.T if i % 2 else picture)
        ending = ".png" if i % 4 else ".TIFF"
        image.convert(("L", "RGB", "RGBA")[i % 3]).save(tmp_path / "own" / f"{i}{ending}")
    images = load(tmp_path / "own", 16)
    assert images.shape == (3, 16, 16)
    assert (images.train[:] == 120).all() and (images.test == 120).all()


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_images_that_were_held_out_stay_so(part, load, tmp_path):
    """20 images below train/ are the training images; a loose one is left out.

    Those of a val/ are the test images where there is no test/, which goes before it.
    """
    own = tmp_path / "own"
    fill(own / "train", range(20))
    fill(own / part / "nested", range(100, 104))
    fill(own, [255])
    for test in ([100, 101, 102, 103], [50, 51]):
        fill(own / "test", test if test[0] == 50 else [])
        images = load(own)
        assert images.test[:, 0, 0, 0].tolist() == test
        assert levels_of(images) == sorted([*range(20), *test]) and len(images.valid) == 3


def test_folders_of_too_few_images_are_refused(refused, data, tmp_path):
    """The line says which, how many it holds and how many are needed."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.txt").write_text("no image", encoding="utf-8")
    refused(own, f"{own} holds 0 images", ".png", "at least 10")
    fill(own / "train", range(9))
    refused(own, f"{own} holds 9 images")
    fill(own / "val", [1])
    data.mkdir()
    refused(own, f"{own / 'val'} holds 1 images", "at least 2")


def test_links_are_followed_once(load, tmp_path):
    """To a folder elsewhere, to that folder again, and in circles."""
    fill(tmp_path / "elsewhere", range(20))
    own = tmp_path / "own"
    fill(own / "here", range(20, 24))
    try:
        (own / "link").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no links here")
    (own / "again").symlink_to(tmp_path / "elsewhere")
    (own / "here" / "circle").symlink_to(own)
    (own / "dead.png").symlink_to(tmp_path / "nothing.png")
    assert levels_of(load(own)) == list(range(24))


def test_what_other_programs_leave_in_folders_is_left_out(load, tmp_path):
    """Hidden names, a Synology's thumbnails, a Mac's archives; a hidden folder may be the one."""
    own = tmp_path / ".cache" / "own"
    fill(own, range(20))
    fill(own, [200], "._{}.png")
    for name in (".thumbnails", "@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        fill(own / "part" / name / "deep", [201])
    assert levels_of(load(own)) == list(range(20))


def test_the_working_directory_without_its_runs_and_data(load, data, tmp_path, monkeypatch):
    """The pictures of runs, which are new after each, and downloads are no training images.

    If data_dir itself is the folder, photographs may have been put there.
    """
    run = tmp_path / "runs" / "vae-photos-s0"
    fill(data / "downloads" / "imagenette", [202])
    fill(data / "photos", range(100, 120))
    assert levels_of(load(data)) == list(range(100, 120))
    fill(tmp_path / "photos", range(20))
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        fill(run / "samples", [100 + number])
        for name in ("config.json", "log.jsonl"):
            (run / name).write_text("{}", encoding="utf-8")
        images = load(".")
        assert levels_of(images) == list(range(20)) and images.name == tmp_path.name
        assert len(list(data.glob(f"{tmp_path.name}-*"))) == 1


def test_names_that_are_no_utf8(load, tmp_path, capsys):
    """Old archives have them in Latin-1. They can be read and named; what is printed is UTF-8."""
    own = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        fill(own, range(12), os.fsdecode(b"\xe9t\xe9") + "{}.png")
    except OSError:
        pytest.skip("this file system has none")
    images = load(own)
    assert levels_of(images) == list(range(12)) and images.name.encode() == b"caf\\udce9"
    assert b"caf\\udce9" in capsys.readouterr().out.encode()


# ---- The key of a folder -------------------------------------------------------------------------

def test_a_folder_that_was_moved_is_the_same_data(load, data, tmp_path, capsys):
    """Its key is that of its names and sizes, at any size of the images; it is prepared once."""
    own = tmp_path / "own"
    fill(own / "part", range(20))
    key = load(own).key
    assert load(own, 16).key == key
    capsys.readouterr()
    (tmp_path / "disk").mkdir()
    moved = shutil.move(own, tmp_path / "disk" / "own")
    os.utime(moved / "part" / "3.png", (0, 0))
    assert load(moved).key == key and capsys.readouterr().out == ""
    os.rename(moved, tmp_path / "renamed")
    assert load(tmp_path / "renamed").key == key


def test_a_folder_that_was_changed_is_other_data(tmp_path):
    """A key is of names, sizes and 256 bytes in the middle, and it never changes.

    Here one image is more, one less, one renamed, one of another size, one of other content, one
    in a subfolder.
    """
    for i in range(10):
        content = bytes(range(256)) * 2
        (tmp_path / f"{i}.png").write_bytes(content[:i * 40] + b"!" + content)
    keys = []

    def note():
        keys.append(common._folder_key(tmp_path, tmp_path))

    note()
    (tmp_path / "10.png").write_bytes(b"ten")
    note()
    (tmp_path / "10.png").rename(tmp_path / "11.png")
    note()
    (tmp_path / "11.png").write_bytes(b"eleven")
    note()
    (tmp_path / "11.png").write_bytes(b"ELEVEN")
    note()
    (tmp_path / "deep").mkdir()
    (tmp_path / "9.png").rename(tmp_path / "deep" / "9.png")  # it stays the last
    note()
    (tmp_path / "0.png").unlink()
    note()
    assert keys[0] == "08f66b02" and len(set(keys)) == 7


# ---- One picture ---------------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # each level once


def read(path):
    """The picture as the datasets have it, (H, W, 3)."""
    picture = common._read(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.pgm"])
def test_16_bits_become_8(name, tmp_path):
    """65,535 is white, 0 black, and a level times 257 that level."""
    wide = RAMP.astype(np.uint16) * 257
    path = tmp_path / name
    if name == "a.pgm":
        path.write_bytes(b"P5 16 16 65535\n" + wide.astype(">u2").tobytes())
    else:
        write(path, wide.astype(">u2") if name == "big-endian.tif" else wide)
    assert (read(path) == RAMP[:, :, None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_refused(dtype, tmp_path):
    """Whether 1 or 255 or something else is white, the file does not say."""
    write(tmp_path / "wide.tif", RAMP.astype(dtype))
    with pytest.raises(UserError, match="wide.tif .*white level"):
        read(tmp_path / "wide.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_white(mode, tmp_path):
    """A black stroke on transparent black, with an edge that is half transparent in two modes."""
    path = tmp_path / "drawing.png"
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4] = 255
    if mode in ("RGBA", "LA"):
        alpha[5] = 128
        Image.fromarray(np.stack([0 * alpha] * 3 + [alpha], 2)).convert(mode).save(path)
    else:  # entry 255 is opaque, 0 is not
        image = Image.fromarray(alpha)
        if mode == "P":
            image.putpalette([200, 0, 0] + 255 * [0, 0, 0])
        image.save(path, transparency=0)
    expected = np.full_like(alpha, 255) if mode == "L" else 255 - alpha
    assert (read(path) == expected[:, :, None]).all()


@pytest.mark.parametrize("orientation, turned", [
    (1, RAMP), (2, RAMP[:, ::-1]), (6, np.rot90(RAMP, -1))])
def test_photographs_stand_upright(orientation, turned, tmp_path):
    """Cameras store which side is up, in EXIF's tag 0x0112."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "photo.png", RAMP, exif=exif)
    assert (read(tmp_path / "photo.png") == turned[:, :, None]).all()


@pytest.mark.parametrize("error", [
    struct.error("unpack requires 4 bytes"), SyntaxError("broken PNG"), RuntimeError("a\nb"),
    MemoryError()])
def test_whatever_a_decoder_raises_is_one_line(error, monkeypatch, tmp_path):
    """It names the file, and says what there is to say."""
    def decode(path):
        raise error

    monkeypatch.setattr(Image, "open", decode)
    with pytest.raises(UserError, match="photo.jpg") as told:
        read(tmp_path / "photo.jpg")
    assert "\n" not in str(told.value) and "()" not in str(told.value)


# ---- shapes --------------------------------------------------------------------------------------

def test_shapes_are_deterministic(monkeypatch):
    """The same (count, size, seed) has the same images and labels, another seed others.

    The dataset is of 20,000 and 2,000, from different seeds.
    """
    first, again, other = [make_shapes(40, 16, seed) for seed in (0, 0, 1)]
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not (first[0] == other[0]).all((1, 2, 3)).any()
    monkeypatch.setattr(common, "make_shapes", lambda count, size, seed: (count, size, seed))
    assert common._shapes(None, 32, "train") == (20_000, 32, 0)
    assert common._shapes(None, 32, "test") == (2_000, 32, 1)


def test_shapes_are_what_their_labels_say():
    """Kind, colour, size, column, row take 4, 8, 4, 4, 4 values.

    Around (column, row) discs, squares and triangles show the colour; rings (kind 3) are hollow.
    Second differences cancel the gradient and leave noise of sd 2 √(1 + 4 + 1) = 4.9, whose median
    size is 0.67 · 4.9 = 3.3.
    """
    images, labels = make_shapes(300, 32, seed=0)
    assert images.shape == (300, 32, 32, 3) and images.dtype == labels.dtype == np.uint8
    for column, count in zip(labels.T.tolist(), (4, 8, 4, 4, 4), strict=True):
        assert set(column) == set(range(count))
    middles = (((labels[:, 3:] + 0.5) / 8 + 0.25) * 32).astype(int)  # of the labelled cells
    patches = []
    for image, (x, y) in zip(images, middles):
        patches.append(image[y - 1:y + 1, x - 1:x + 1].mean((0, 1)))
    distances = np.linalg.norm(np.array(patches)[:, None] - common.COLOURS, axis=-1)
    found = distances.argmin(1) == labels[:, 1]
    by_kind = [found[labels[:, 0] == kind].mean() for kind in range(4)]
    assert min(by_kind[:3]) > 0.9 and by_kind[3] < 0.5, by_kind
    differences = np.diff(images.astype(float), n=2, axis=2)
    assert 2.8 < np.median(abs(differences)) < 4.2


# ---- Batches -------------------------------------------------------------------------------------

def which(x):
    """The numbers of the images in a batch of `numbered` images."""
    return to_uint8(x)[:, 0, 0, 0].tolist()


def test_batches_are_channels_first_floats():
    """They are (B, C, H, W), float32 in [-1, 1], in channels-last memory."""
    for x in (Batches(NOISE[:, :16], 25, "cpu").batch(0), *Batches(NOISE[:, :16], 25, "cpu")):
        assert x.shape == (25, 3, 16, 32) and x.dtype == torch.float32
        assert (x.min(), x.max()) == (-1, 1) and x.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_follows_from_seed_and_step_alone():
    """A new object, asked for a late step alone, gives what one that went through all gives."""
    old = Batches(numbered(40), 8, "cpu", seed=3)
    history = [which(old.batch(step)) for step in range(23)]
    assert which(Batches(numbered(40), 8, "cpu", seed=3).batch(22)) == history[22]
    assert which(old.batch(4)) == history[4]  # and back again
    assert which(Batches(numbered(40), 8, "cpu", seed=4).batch(22)) != history[22]


@pytest.mark.parametrize("count, batch_size, per_epoch", [(40, 8, 5), (11, 4, 2), (5, 100, 1)])
def test_no_image_comes_twice_an_epoch(count, batch_size, per_epoch):
    """Every epoch has another order. What is left over is left out; a small split is one batch."""
    batches = Batches(numbered(count), batch_size, "cpu")
    epochs = []
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        epochs.append([number for step in steps for number in which(batches.batch(step))])
        assert len(set(epochs[epoch])) == len(epochs[epoch]) == per_epoch * min(count, batch_size)
    assert batches.per_epoch == per_epoch and epochs[0] != epochs[1]


def test_iterating_is_the_whole_split_in_order():
    """In batches of 4, the second time again, and never augmented; of a count only the first."""
    batches = Batches(NOISE[:11], 4, "cpu", augment=True)
    for _ in range(2):
        parts = list(batches)
        assert [len(x) for x in parts] == [4, 4, 3]
        assert np.array_equal(to_uint8(torch.cat(parts)).permute(0, 2, 3, 1), NOISE[:11])
    parts = list(Batches(NOISE[:11], 4, "cpu", count=6))
    assert np.array_equal(to_uint8(torch.cat(parts)).permute(0, 2, 3, 1), NOISE[:6])


def test_memory_mapped_batches_equal_resident_ones(monkeypatch, tmp_path):
    """A split over the limit is read from disk for each batch, in training and in evaluation."""
    put(tmp_path, a=NOISE)
    array = np.load(tmp_path / "a.npy", mmap_mode="r")
    index = np.array([4, 1, 7, 12, 20, 3, 9])
    for images, pixels in ((array, NOISE), (common.Subset(array, index), NOISE[index])):
        resident = Batches(images, 3, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(common, "RESIDENT_BYTES", images[:].nbytes - 1)
            mapped = Batches(images, 3, "cpu")
        assert images.shape == pixels.shape and np.array_equal(images[:], pixels)
        assert resident.resident and not mapped.resident
        assert all(torch.equal(resident.batch(step), mapped.batch(step)) for step in range(8))
        assert all(torch.equal(a, b) for a, b in zip(resident, mapped, strict=True))


def test_augment_flips_half_and_shifts_by_at_most_5_percent():
    """30 rows move by up to 2, 20 columns by up to 1, and what is beyond the edge is mirrored.

    Each pixel holds its own (row, column), so that the move can be read off. All 5 · 3 · 2 moves
    occur, and nothing else; of 1,000 images 500 are mirrored, ± 5 standard deviations of √250.
    """
    torch.manual_seed(0)
    place = np.stack(np.mgrid[:30, :20], 2).astype(np.uint8)
    result = common.augment(torch.from_numpy(place).expand(1000, -1, -1, -1)).numpy()
    flips = {}
    for dy in range(-2, 3):
        for dx in range(-1, 2):
            rows = np.pad(np.arange(30), 2, mode="reflect")[2 + dy:][:30]
            columns = np.pad(np.arange(20), 1, mode="reflect")[1 + dx:][:20]
            moved = place[rows][:, columns]
            flips[moved.tobytes()] = 0
            flips[moved[:, ::-1].tobytes()] = 1
    seen = [image.tobytes() for image in result]
    assert result.shape == (1000, 30, 20, 2) and len(flips) == 5 * 3 * 2
    assert set(seen) == set(flips)  # each is missed by all 1,000 with a chance below 1e-14
    assert abs(sum(flips[image] for image in seen) - 500) < 5 * math.sqrt(250)


def test_batches_augment_only_when_told():
    """A step has the same images in the same order with and without, moved or not."""
    for images, alike in ((NOISE, False), (numbered(25), True)):  # one colour cannot move
        plain = Batches(images, 25, "cpu").batch(0)
        moved = Batches(images, 25, "cpu", augment=True).batch(0)
        assert torch.equal(plain, moved) == alike
        assert torch.equal(plain, Batches(images, 25, "cpu", augment=False).batch(0))
