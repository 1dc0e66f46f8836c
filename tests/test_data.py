"""Datasets on disk as they really are: several runs at once, full disks, odd pictures and folders.

What preparing a dataset is by worked examples stands in test_common.py.
"""

import errno
import os
import shutil
import struct
import threading

import numpy as np
import pytest
import torchvision
from PIL import Image, features

import common
from common import UserError, load_images

# ---- What the tests are made of ------------------------------------------------------------------

def write(path, image, **options):
    """A PIL image -> a file of the kind that the name says, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def fill(folder, levels, name="{}.png"):
    """One grey picture for each level, which is its name."""
    for level in levels:
        write(folder / name.format(level), Image.new("RGB", (12, 10), (level, level, level)))


def levels_of(images):
    """The levels of all images of a dataset, in order."""
    levels = []
    for split in (images.train, images.valid, images.test):
        levels += split[:][:, 0, 0, 0].tolist()
    return sorted(levels)


def numbered(count, fail=None):
    """`count` images of 16 x 16; number i has the value i + 1. `fail`(i) may raise."""
    def image(i):
        if fail:
            fail(i)
        return np.full((16, 16, 3), i + 1, np.uint8)

    return common.Made(image, (count, 16, 16, 3))


def use(monkeypatch, train, test=None, name="shapes"):
    """`name` is made of these images."""
    def splits(data_dir, size):
        return {"train": (train, None), "test": (test or numbered(4), None)}

    monkeypatch.setitem(common.DATASETS, name, (16, splits))


def stop_at(number):
    """-> a function that raises KeyboardInterrupt for one number."""
    def fail(i):
        if i == number:
            raise KeyboardInterrupt

    return fail


def interrupt(monkeypatch, data_dir, number, count=20):
    """Prepare `shapes` of `count` training images up to image `number`, where Ctrl-C comes."""
    use(monkeypatch, numbered(count, stop_at(number)))
    with pytest.raises(KeyboardInterrupt):
        load_images("shapes", data_dir, 16)
    assert [path.name for path in data_dir.iterdir()] == ["shapes-16.partial"]


def stored_levels(data_dir):
    """The value of each training image that is stored of `shapes`."""
    return np.load(data_dir / "shapes-16" / "train.npy")[:, 5, 5, 1].tolist()


# ---- Several runs at once ------------------------------------------------------------------------

@pytest.mark.skipif(common.fcntl is None, reason="nobody waits on this system")
@pytest.mark.parametrize("size", [16, 24])
def test_of_two_runs_one_prepares_and_the_other_waits(size, monkeypatch, tmp_path, capsys):
    """At once they would write into one file. Of another size they would share the downloads."""
    inside = []
    entered = threading.Event()
    leave = threading.Event()
    done = []

    def splits(data_dir, size):
        inside.append(size)
        entered.set()
        leave.wait(10)
        inside.remove(size)
        assert inside == []
        pixels = np.full((10, size, size, 3), 7 + len(done), np.uint8)
        return {"train": (pixels, None), "test": (pixels, None)}

    def second():
        done.append(load_images("shapes", tmp_path, size))

    monkeypatch.setitem(common.DATASETS, "shapes", (16, splits))
    first = threading.Thread(target=load_images, args=("shapes", tmp_path, 16))
    other = threading.Thread(target=second)
    first.start()
    assert entered.wait(10)
    other.start()
    other.join(0.3)
    assert inside == [16] and other.is_alive()
    leave.set()
    first.join(10)
    other.join(10)
    assert (done[0].train[:] == 7).all() and done[0].size == size
    out = capsys.readouterr().out
    assert "waiting for another process" in out
    assert out.count("(once)") == (1 if size == 16 else 2)


@pytest.mark.skipif(common.fcntl is None, reason="nobody waits on this system")
def test_after_a_failure_still_one_at_a_time(monkeypatch, tmp_path):
    """The first of three removes the file that it has locked, and that the second waits for."""
    entered = [threading.Event() for _ in range(3)]
    leave = [threading.Event() for _ in range(3)]
    calls = []
    told = []

    def splits(data_dir, size):
        number = len(calls)
        calls.append(number)
        entered[number].set()
        leave[number].wait(10)
        if number == 0:
            raise UserError("no network")
        return {"train": (numbered(20), None), "test": (numbered(4), None)}

    def load():
        try:
            load_images("shapes", tmp_path, 16)
        except UserError as error:
            told.append(str(error))

    monkeypatch.setitem(common.DATASETS, "shapes", (16, splits))
    runs = [threading.Thread(target=load) for _ in range(3)]
    runs[0].start()
    assert entered[0].wait(10)
    runs[1].start()
    runs[1].join(0.2)
    leave[0].set()
    assert entered[1].wait(10)
    runs[2].start()
    runs[2].join(0.2)
    assert calls == [0, 1] and runs[2].is_alive()
    leave[1].set()
    for run in runs:
        run.join(10)
    assert calls == [0, 1] and told == ["no network"]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes-16"]


def test_a_lock_that_nobody_holds_is_no_hindrance(monkeypatch, tmp_path):
    """A run that was killed leaves its file; nor need there be locks at all."""
    (tmp_path / "shapes.lock").write_text("", encoding="utf-8")
    use(monkeypatch, numbered(20))
    assert len(load_images("shapes", tmp_path, 16).train) == 17
    if common.fcntl:
        def flock(file, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(common.fcntl, "flock", flock)
        assert len(load_images("shapes", tmp_path / "nfs", 16).train) == 17
    monkeypatch.setattr(common, "fcntl", None)
    assert len(load_images("shapes", tmp_path / "windows", 16).train) == 17


# ---- Full disks and damaged files ----------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be taken beforehand")
def test_space_is_taken_before_images_are_written(monkeypatch, tmp_path):
    """Writing into the hole of a mapped file ends in a bus error when the disk is full."""
    interrupt(monkeypatch, tmp_path, 1, count=200)
    facts = os.stat(tmp_path / "shapes-16.partial" / "train.npy")
    assert facts.st_size > 200 * 16 * 16 * 3 and facts.st_blocks * 512 >= facts.st_size


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be taken beforehand")
def test_a_full_disk_is_an_error_and_leaves_nothing_that_counts(monkeypatch, tmp_path):
    """A note of an older file beside the new, empty one would make its first images black."""
    def full(file, start, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    interrupt(monkeypatch, tmp_path, 15, count=20)
    use(monkeypatch, numbered(18))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device"):
            load_images("shapes", tmp_path, 16)
    assert not (tmp_path / "shapes-16").exists()
    load_images("shapes", tmp_path, 16)
    assert stored_levels(tmp_path) == list(range(1, 19))


@pytest.mark.parametrize("note", [b"", b"1x", b"-3", b"21", b"\xff\xfe", b"1.5"])
def test_a_damaged_note_begins_anew(note, monkeypatch, tmp_path):
    """After a crash it may be empty; a number beyond the images would leave black ones."""
    interrupt(monkeypatch, tmp_path, 5)
    (tmp_path / "shapes-16.partial" / "train.done").write_bytes(note)
    use(monkeypatch, numbered(20))
    load_images("shapes", tmp_path, 16)
    assert stored_levels(tmp_path) == list(range(1, 21))


GARBLED = b"\x93NUMPY\x01\x00\x10\x00{'descr': ('''u1"  # a header that Python cannot split


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", GARBLED, None])
def test_a_damaged_array_begins_anew(content, monkeypatch, tmp_path):
    """numpy would fill up one that is cut off with zeros: black images."""
    interrupt(monkeypatch, tmp_path, 15)
    path = tmp_path / "shapes-16.partial" / "train.npy"
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    use(monkeypatch, numbered(20))
    load_images("shapes", tmp_path, 16)
    assert stored_levels(tmp_path) == list(range(1, 21))


def test_a_garbled_header_of_a_stored_file_is_one_line(monkeypatch, tmp_path):
    """numpy's own errors are of many kinds."""
    use(monkeypatch, numbered(20))
    load_images("shapes", tmp_path, 16)
    (tmp_path / "shapes-16" / "test.npy").write_bytes(GARBLED)
    with pytest.raises(UserError, match="cannot read .*test.npy"):
        load_images("shapes", tmp_path, 16)


# ---- Downloads that are not whole ----------------------------------------------------------------

@pytest.mark.parametrize("name", common.COUNTS)
def test_a_set_that_is_not_whole_is_not_stored(name, monkeypatch, tmp_path):
    """One line says how many there are, how many there should be, and what to delete."""
    use(monkeypatch, numbered(20), name=name)
    with pytest.raises(UserError, match="has 20 training and 4 test images") as error:
        load_images(name, tmp_path, 16)
    n_train, n_test, source = common.COUNTS[name]
    assert f"{n_train:,} and {n_test:,} are expected" in str(error.value)
    assert str(tmp_path / source) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_part_that_was_stored_by_hand_is_taken(tmp_path):
    """Only what is prepared is counted."""
    (tmp_path / "cifar10-16").mkdir()
    for split in ("train", "test"):
        np.save(tmp_path / "cifar10-16" / f"{split}.npy", np.zeros((5, 16, 16, 3), np.uint8))
    assert len(load_images("cifar10", tmp_path, 16).train) == 4


def test_imagenette_of_three_classes(tmp_path):
    """What torchvision finds where unpacking was interrupted."""
    folder = tmp_path / "downloads" / "imagenette2-160"
    for part in ("train", "val"):
        for wnid in ("n01440764", "n02102040", "n02979186"):
            fill(folder / part / wnid, (1, 2), "{}.JPEG")
    with pytest.raises(UserError, match=f"6 training and 6 test .* Delete {folder}"):
        load_images("imagenette", tmp_path)
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match="Imagenette .* or reading it there, failed"):
        load_images("imagenette", tmp_path)


def test_celeba_without_some_of_its_pictures(monkeypatch, tmp_path):
    """Its lists are whole before its archive is unpacked."""
    class CelebA:
        def __init__(self, root, split, download):
            self.filename = [f"{i}.jpg" for i in range(20)]
            self.attr = np.zeros((20, 40))

    monkeypatch.setattr(torchvision.datasets, "CelebA", CelebA)
    fill(tmp_path / "celeba" / "img_align_celeba", range(15), "{}.jpg")
    with pytest.raises(UserError, match="has 15 training and 15 test images"):
        load_images("celeba", tmp_path)


def test_the_reason_of_a_failed_download_is_whole(monkeypatch, tmp_path):
    """torchvision's has several lines, of which the last says why; a very long one is cut."""
    def fails(text):
        def MNIST(**arguments):
            raise RuntimeError(text)

        monkeypatch.setattr(torchvision.datasets, "MNIST", MNIST)
        with pytest.raises(UserError) as error:
            load_images("mnist", tmp_path)
        return str(error.value)

    told = fails("Error downloading a.gz:\nTried https://a.org/, got:\n<urlopen error no route>\n")
    assert told.endswith("Error downloading a.gz: Tried https://a.org/, got: "
                         "<urlopen error no route>")
    assert len(fails(1000 * "word ")) < 450 + len(str(tmp_path))


# ---- Pictures ------------------------------------------------------------------------------------

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
    elif name == "big-endian.tif":
        write(path, Image.fromarray(wide.astype(">u2")))
        assert Image.open(path).mode == "I;16B"
    else:
        write(path, Image.fromarray(wide))
    assert (read(path) == RAMP[:, :, None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bits_are_refused(dtype, tmp_path):
    """Whether 1 or 255 or something else is white, the file does not say."""
    write(tmp_path / "wide.tif", Image.fromarray(RAMP.astype(dtype)))
    with pytest.raises(UserError, match="wide.tif .*white level"):
        read(tmp_path / "wide.tif")


def drawing():
    """A black stroke on transparent black, with an edge that is half transparent: RGBA, 16 x 16."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[4, :, 3] = 255
    pixels[5, :, 3] = 128
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_white(mode, tmp_path):
    """The colours below it are hidden, and mostly black."""
    path = tmp_path / "drawing.png"
    expected = np.full((16, 16, 3), 255)
    expected[4] = 0
    if mode in ("RGBA", "LA"):
        write(path, drawing().convert(mode))
        expected[5] = 127
    else:  # level or entry 1 is transparent, entry 0 and all the others are not
        levels = np.ones((16, 16), np.uint8)
        levels[4] = 0
        image = Image.fromarray(levels)
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0])
        write(path, image, transparency=1)
    assert (read(path) == expected).all()


@pytest.mark.parametrize("orientation, turned", [
    (1, RAMP), (2, RAMP[:, ::-1]), (3, np.rot90(RAMP, 2)), (6, np.rot90(RAMP, -1)),
    (8, np.rot90(RAMP))])
def test_photographs_stand_upright(orientation, turned, tmp_path):
    """Cameras store which side is up, in EXIF's tag 0x0112."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "photo.png", Image.fromarray(RAMP), exif=exif)
    assert (read(tmp_path / "photo.png") == turned[:, :, None]).all()


def test_a_picture_too_large_is_named(tmp_path):
    """190 megapixels are an attack, for PIL."""
    (tmp_path / "huge.pgm").write_bytes(b"P5 19000 10000 255\n")
    with pytest.raises(UserError, match="huge.pgm .*exceeds limit"):
        read(tmp_path / "huge.pgm")


@pytest.mark.skipif(not features.check("avif"), reason="this PIL reads no AVIF")
def test_a_truncated_avif_is_named(tmp_path):
    """Web pages call them .jpg; their decoder raises RuntimeError."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write(tmp_path / "whole.avif", Image.fromarray(noise))
    content = (tmp_path / "whole.avif").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:len(content) // 2])
    with pytest.raises(UserError, match="cut.jpg"):
        read(tmp_path / "cut.jpg")


@pytest.mark.parametrize("error", [
    struct.error("unpack requires 4 bytes"), SyntaxError("broken PNG"), RuntimeError("a\nb"),
    KeyError(7), IndexError("out of range"), MemoryError(), ZeroDivisionError("scale"),
    AttributeError("read"), OverflowError("too large"), EOFError()])
def test_whatever_a_decoder_raises_is_one_line(error, monkeypatch, tmp_path):
    """It names the file, and says what there is to say."""
    def decode(path):
        raise error

    monkeypatch.setattr(Image, "open", decode)
    with pytest.raises(UserError, match="photo.jpg") as told:
        read(tmp_path / "photo.jpg")
    assert "\n" not in str(told.value) and "()" not in str(told.value)


def test_all_broken_files_are_named_at_once(tmp_path, monkeypatch):
    """The first ten, and how many there are; each file is decoded once, and nothing is stored."""
    fill(tmp_path / "own", range(18))
    for i in range(12):
        (tmp_path / "own" / f"broken{i}.png").write_bytes(b"no picture")
    opened = []

    def count(path):
        opened.append(path)
        return decode(path)

    decode = Image.open
    monkeypatch.setattr(Image, "open", count)
    with pytest.raises(UserError, match="cannot read 12 of the images") as error:
        load_images(str(tmp_path / "own"), tmp_path / "data", 8)
    *told, end = str(error.value).split("; ")
    assert len(told) == 10 and end == "…" and told[1:] == sorted(told[1:])
    assert told[9].endswith("broken7.png (no image of a known kind)")
    assert len(opened) == len(set(opened)) == 30
    assert not list((tmp_path / "data").iterdir())


def test_a_broken_image_before_an_interruption_is_not_forgotten(monkeypatch, tmp_path):
    """Going on behind it would store it black."""
    def fail(i):
        if i == 3:
            raise UserError("number three")
        if i == 10 and not again:
            raise KeyboardInterrupt

    again = []
    use(monkeypatch, numbered(20, fail))
    with pytest.raises(KeyboardInterrupt):
        load_images("shapes", tmp_path, 16)
    again.append(True)
    with pytest.raises(UserError, match="cannot read 1 of the images: number three$"):
        load_images("shapes", tmp_path, 16)
    use(monkeypatch, numbered(20))
    load_images("shapes", tmp_path, 16)
    assert stored_levels(tmp_path) == list(range(1, 21))


def test_names_that_are_no_utf8(tmp_path, capsys):
    """Old archives have them in Latin-1. They can be read, named and printed."""
    own = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        fill(own, range(12), os.fsdecode(b"\xe9t\xe9") + "{}.png")
    except OSError:
        pytest.skip("this file system has none")
    images = load_images(str(own), tmp_path / "data", 8)
    assert levels_of(images) == list(range(12)) and images.name.encode() == b"caf\\udce9"
    (own / os.fsdecode(b"\xe9.png")).write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        load_images(str(own), tmp_path / "data", 8)
    assert b"\\udce9.png" in str(error.value).encode()
    shutil.rmtree(own)
    own.mkdir()
    with pytest.raises(UserError) as error:
        load_images(str(own), tmp_path / "data", 8)
    assert b"caf\\udce9 holds 0 images" in str(error.value).encode()
    assert b"caf\\udce9" in capsys.readouterr().out.encode()


# ---- Folders -------------------------------------------------------------------------------------

def test_links_are_followed_once(tmp_path):
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
    assert levels_of(load_images(str(own), tmp_path / "data", 8)) == list(range(24))


def test_what_other_programs_leave_in_folders_is_left_out(tmp_path):
    """Hidden names, a Synology's thumbnails, a Mac's archives; a hidden folder may be the one."""
    own = tmp_path / ".cache" / "own"
    fill(own, range(20))
    fill(own, [200], "._{}.png")
    for name in (".thumbnails", "@eaDir", "__MACOSX", ".ipynb_checkpoints"):
        fill(own / "part" / name / "deep", [201])
    assert levels_of(load_images(str(own), tmp_path / "data", 8)) == list(range(20))


@pytest.mark.parametrize("part", ["val", "valid", "validation"])
def test_validation_images_are_the_test_set_where_there_is_no_other(part, tmp_path, capsys):
    """Else they would be mixed into training, silently. A test/ goes before them."""
    fill(tmp_path / "own" / "train", range(20))
    fill(tmp_path / "own" / part, range(100, 104))
    images = load_images(str(tmp_path / "own"), tmp_path / "data", 8)
    assert images.test[:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    assert levels_of(images) == [*range(20), *range(100, 104)]
    assert f"has no test/: its {part}/ is the test set" in capsys.readouterr().out
    fill(tmp_path / "own" / "test", [50, 51])
    images = load_images(str(tmp_path / "own"), tmp_path / "data", 8)
    assert images.test[:, 0, 0, 0].tolist() == [50, 51] and len(images.train) == 17
    assert "test set" not in capsys.readouterr().out


def test_the_working_directory_without_its_runs_and_data(tmp_path, monkeypatch):
    """The pictures of runs, which are new after each, and downloads are no training images."""
    fill(tmp_path / "photos", range(20))
    run = tmp_path / "runs" / "vae-photos-s0"
    fill(tmp_path / "data" / "downloads" / "imagenette", [202])
    fill(tmp_path / "data", [203])
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        fill(run / "samples", [100 + number])
        for name in ("config.json", "log.jsonl"):
            (run / name).write_text("{}", encoding="utf-8")
        images = load_images(".", "data", 8)
        assert levels_of(images) == list(range(20)) and images.name == tmp_path.name
        assert len(list((tmp_path / "data").glob("*-8*"))) == 1


def test_data_dir_as_the_folder_without_its_downloads(tmp_path):
    """Photographs may have been put there."""
    fill(tmp_path / "data" / "downloads" / "imagenette", [202])
    fill(tmp_path / "data" / "photos", range(20))
    images = load_images(str(tmp_path / "data"), tmp_path / "data", 8)
    assert levels_of(images) == list(range(20))


@pytest.mark.parametrize("name", ["", " ", "~nosuchuser/p", "a\0b"])
def test_names_of_no_folder_are_refused(name, tmp_path, monkeypatch):
    """The empty one is the working directory, for Path."""
    fill(tmp_path, range(20))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither one of shapes"):
        load_images(name, tmp_path / "data", 8)
    assert not (tmp_path / "data").exists()


def test_a_tilde_is_home(tmp_path, monkeypatch):
    """As in a shell, where the name is quoted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    fill(tmp_path / "own", range(20))
    assert load_images("~/own", tmp_path / "data", 8).name == "own"


# ---- Files put there by hand ---------------------------------------------------------------------

def put(folder, **arrays):
    """Store arrays as {folder}/{name}.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


GOOD = np.zeros((10, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("array", [
    np.zeros((10, 32, 32, 3), np.uint8), np.zeros((10, 16, 24, 3), np.uint8), GOOD[:0],
    np.zeros((10, 16, 16, 4), np.uint8), GOOD[..., 0], GOOD[0, 0, 0, 0], GOOD.astype(np.int64)],
    ids=lambda array: f"{array.dtype}{array.shape}")
def test_images_of_another_shape_are_refused(array, split, tmp_path):
    """Later on they would be errors of torch. The line says what is there and what should be."""
    put(tmp_path / "shapes-16", **{"train": GOOD, "test": GOOD, split: array})
    with pytest.raises(UserError, match=rf"{split}.npy .*\(N, 16, 16, 1 or 3\)") as error:
        load_images("shapes", tmp_path, 16)
    assert f"{array.dtype} {array.shape}" in str(error.value) or array.size == 0


def test_one_image_and_mixed_channels_are_refused(tmp_path):
    """Of two training images one becomes validation; grey and RGB are two datasets."""
    put(tmp_path / "shapes-16", train=GOOD[:1], test=GOOD)
    with pytest.raises(UserError, match="train.npy .* N >= 2"):
        load_images("shapes", tmp_path, 16)
    put(tmp_path / "shapes-16", train=GOOD[:2], test=GOOD[:1])
    images = load_images("shapes", tmp_path, 16)
    assert (len(images.train), len(images.valid), len(images.test)) == (1, 1, 1)
    put(tmp_path / "shapes-16", test=GOOD[..., :1])
    with pytest.raises(UserError, match="3 channels in train.npy, 1 in test.npy"):
        load_images("shapes", tmp_path, 16)


# ---- The key of a dataset ------------------------------------------------------------------------

def test_a_folder_that_was_moved_is_the_same_data(tmp_path, capsys):
    """Its key is that of its names and sizes, at any size of the images; it is prepared once."""
    own = tmp_path / "own"
    fill(own / "part", range(20))
    key = load_images(str(own), tmp_path / "data", 8).key
    assert load_images(str(own), tmp_path / "data", 16).key == key
    capsys.readouterr()
    (tmp_path / "disk").mkdir()
    moved = shutil.move(own, tmp_path / "disk" / "own")
    os.utime(moved / "part" / "3.png", (0, 0))
    assert load_images(str(moved), tmp_path / "data", 8).key == key
    assert capsys.readouterr().out == ""
    os.rename(moved, tmp_path / "renamed")
    assert load_images(str(tmp_path / "renamed"), tmp_path / "data", 8).key == key


def test_a_folder_that_was_changed_is_other_data(tmp_path):
    """One image more, one less, one renamed, one of another size in bytes, one in a subfolder."""
    own = tmp_path / "own"
    fill(own, range(20))

    def key():
        return load_images(str(own), tmp_path / "data", 8).key

    keys = [key()]
    fill(own, [30])
    keys.append(key())
    (own / "0.png").unlink()
    keys.append(key())
    (own / "1.png").rename(own / "1b.png")
    keys.append(key())
    write(own / "2.png", Image.new("RGB", (99, 70)))
    keys.append(key())
    (own / "deep").mkdir()
    (own / "9.png").rename(own / "deep" / "9.png")  # it stays the last
    keys.append(key())
    assert len(set(keys)) == 6


@pytest.mark.parametrize("name", ["shapes", "moons"])
def test_the_key_of_a_named_set_is_its_name(name, tmp_path):
    put(tmp_path / "shapes-16", train=np.zeros((10, 16, 16, 3), np.uint8),
        test=np.zeros((5, 16, 16, 3), np.uint8))
    assert load_images(name, tmp_path, 16).key == name
