"""Images as a file whose size is the bound: bits back with ANS, derived in docs/compression.md.

    python docs/compress.py write RUN_FOLDER FILE [COUNT]    the first COUNT test images (all)
    python docs/compress.py read RUN_FOLDER FILE             back, to FILE.npy, bit for bit
    python docs/compress.py sizes RUN_FOLDER [COUNT]         what they would cost, part by part,
                                                             beside the bound, PNG and WebP

RUN_FOLDER is the folder of a run of vae.py or selfvae.py; a relative data_dir of that run is one of
the current folder. Sender and receiver must compute equal numbers: the same weights, torch, numpy,
kind of CPU. So one image at a time, in fp32, on one thread. The exit code is 2 where the receiver's
numbers differ or FILE is broken; nothing is written then, and nothing is ever overwritten.
"""

import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch.nn.utils.parametrize import cached

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (  # noqa: E402 (needs the path)
    Batches, Dmol, UserError, bits_per_dim, from_uint8, importance_weighted, load_images,
    mean_terms, to_uint8)
from vae import LATENT, VAE, MoGPrior, gaussian  # noqa: E402

BITS = 20  # of an integer probability: 2^20 slots
BINS = 10  # a latent has 2^10 bins, 1/64 of the prior's sd wide
LANES = 64  # coders side by side
LEVELS = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)  # the values of a pixel


# ---- ANS -----------------------------------------------------------------------------------------

class Stack:
    """LANES coders of asymmetric numeral systems (Duda 2009) over one stack of 32-bit words.

    A coder is an integer, its head. Pushing a symbol that has `count` of 2^BITS slots, from `first`
    on, makes it 2^BITS/count times as large: it gains -log2 p bits. Popping undoes a push exactly.
    Invariant: 2^32 ≤ head < 2^64. Where a push would pass the upper end, the head's lower half goes
    to the words first; where a pop has passed the lower end, it comes back.
    """

    def __init__(self, heads, words):
        self.heads = heads  # uint64 (LANES,)
        self.words = words  # a list, the last one on top

    def push(self, first, count):
        """One symbol to each of the first n coders: slots, uint64 (n,), n ≤ LANES, count ≥ 1."""
        if not count.all():  # an intact stack holds no symbol without a slot
            raise UserError("the file is damaged")
        head = self.heads[:len(first)]
        full = head >> np.uint64(64 - BITS) >= count
        self.words.extend((head[full] & np.uint64(2**32 - 1)).tolist())
        head = np.where(full, head >> np.uint64(32), head)
        self.heads[:len(first)] = (head // count << np.uint64(BITS)) + first + head % count

    def pop(self, table):
        """One symbol from each of the first coders: `table` (n, symbols + 1) of slots -> (n,)."""
        head = self.heads[:len(table)]
        slot = head & np.uint64(2**BITS - 1)
        symbol = (table[:, 1:] <= slot[:, None]).sum(1)
        first, count = interval(table, symbol)
        head = count * (head >> np.uint64(BITS)) + slot - first
        empty = head < np.uint64(2**32)
        few = int(empty.sum())
        if few > len(self.words):
            raise UserError("the file is cut short, or damaged")
        if few:
            back = np.array(self.words[-few:], np.uint64)
            del self.words[-few:]
            head[empty] = (head[empty] << np.uint64(32)) | back
        self.heads[:len(table)] = head
        return symbol

    def bits(self):
        """How much is on the stack, with the fractions of a bit that heads hold."""
        return 32 * len(self.words) + np.log2(self.heads.astype(np.float64)).sum()


def interval(table, symbol):
    """Slots of the symbols (n,) in a table (n, symbols + 1) -> first and count, uint64 (n,)."""
    row = np.arange(len(symbol))
    first = table[row, symbol]
    return first, table[row, symbol + 1] - first


def slots(probabilities):
    """Probabilities (n, symbols) -> where each symbol's slots begin, uint64 (n, symbols + 1).

    Every symbol keeps one slot, however improbable; the others are shared out.
    """
    symbols = probabilities.shape[1]
    cumulated = np.zeros((len(probabilities), symbols + 1))
    np.cumsum(probabilities, 1, out=cumulated[:, 1:])
    share = cumulated / cumulated[:, -1:] * (2**BITS - symbols)
    return share.astype(np.uint64) + np.arange(symbols + 1, dtype=np.uint64)


def push_all(stack, table, symbol):
    """Push n symbols, LANES at a time."""
    first, count = interval(table, symbol)
    for i in range(0, len(symbol), LANES):
        stack.push(first[i:i + LANES], count[i:i + LANES])


def pop_all(stack, table):
    """Pop what `push_all` pushed -> symbols (n,)."""
    parts = []
    for i in reversed(range(0, len(table), LANES)):
        parts.append(stack.pop(table[i:i + LANES]))
    return np.concatenate(parts[::-1])


# ---- An image given its mixture, a latent given its Gaussian -------------------------------------

def pixel_tables(p_x, level_of):
    """Walk through the n values of all blocks, whose levels `level_of(table)` says, (h·w,).

    A table of slots (h·w, 257) is of p(x_c) given the values before, the bound's own numbers:
    component m weighs π_m times its probabilities of these values, by Bayes' rule. The sender knows
    the levels, the receiver pops them. Memory: some ten times 256·M·h·w floats.
    """
    log_w = p_x.logits.log_softmax(1)  # (1, M, h, w)
    h, w = log_w.shape[2:]
    rest = []
    for c in range(p_x.n):
        log_bins = p_x.log_bin(c, LEVELS, rest)  # (256, M, h, w)
        probabilities = torch.logsumexp(log_w + log_bins, 1).double().softmax(0)
        level = level_of(slots(probabilities.flatten(1).T.numpy()))
        level = torch.from_numpy(level).view(1, 1, h, w)
        rest.append(level / 127.5 - 1 - p_x.shift[:, c:c + 1])
        log_w = log_w + log_bins.gather(0, level.expand(1, *log_bins.shape[1:]))


def push_image(stack, p_x, x):
    """Push an image (1, C, H, W), its last value first, as a receiver pops its first one first."""
    levels = F.pixel_unshuffle(to_uint8(x), p_x.block).flatten(2)[0].long().numpy()  # (n, h·w)
    tables = []

    def level_of(table):
        tables.append(table)
        return levels[len(tables) - 1]

    pixel_tables(p_x, level_of)
    for table, level in zip(reversed(tables), reversed(levels)):
        push_all(stack, table, level)


def pop_image(stack, p_x):
    """Pop an image -> (1, C, H, W)."""
    levels = []

    def level_of(table):
        levels.append(pop_all(stack, table))
        return levels[-1]

    pixel_tables(p_x, level_of)
    h, w = p_x.logits.shape[2:]
    pixels = torch.from_numpy(np.stack(levels)).view(1, p_x.n, h, w).to(torch.uint8)
    return from_uint8(F.pixel_shuffle(pixels, p_x.block))


EDGES = torch.linspace(-8, 8, 2**BINS + 1, dtype=torch.float64)  # in the prior's sd
MIDDLES = (EDGES[:-1] + EDGES[1:]) / 2
EDGES[[0, -1]] = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
PRIOR = slots(torch.special.ndtr(EDGES).diff().numpy()[None])
# Where a latent's number i is pushed by its prior: what is popped next is drawn by these bits.
ORDER = np.random.default_rng(0).permutation(math.prod(LATENT))


def latent_table(q, p):
    """Slots of a latent's bins under q, (1,024, 2^BINS + 1): probabilities of intervals.

    q and p are pairs of mean and sd, each (1, 16, 8, 8); bins are those of p. Bins may have no
    slot: only what was popped by this table is pushed by it.
    """
    mean = ((q[0] - p[0]) / p[1]).double().reshape(-1, 1)
    sd = (q[1] / p[1]).double().reshape(-1, 1)
    below = torch.special.ndtr((EDGES - mean) / sd)
    return (below * 2**BITS).round().numpy().astype(np.uint64)


def latent_value(bins, p):
    """Bins (1,024,) -> their middles, (1, 16, 8, 8)."""
    return p[0] + p[1] * MIDDLES[torch.from_numpy(bins)].float().view_as(p[0])


def push_prior(stack, bins):
    """Push bins (1,024,) by their probabilities under p, the same for every number."""
    push_all(stack, np.broadcast_to(PRIOR, (len(bins), 2**BINS + 1)), bins[ORDER])


def pop_prior(stack):
    """Pop them -> (1,024,)."""
    bins = np.empty(len(ORDER), np.int64)
    bins[ORDER] = pop_all(stack, np.broadcast_to(PRIOR, (len(bins), 2**BINS + 1)))
    return bins


# ---- A model as a code: the order of pushes and pops ---------------------------------------------

class Codec:
    """Pushes images by a model, and pops them: x = y_{K+1}, z_0 = u, y_k = d(y_{k+1}).

        push    pop u ~ q(u|y_1), z_1 ~ q(z_1|y_2), …, z_K ~ q(z_K|x): the bits back
                push x by p(x|y_K, z_K), z_K by its prior, …, y_1 by p(y_1|u), u by its prior
        pop     all of it backwards: u, y_1, z_1, y_2, …, x; then z_K, …, u go back by q

    y is computed, not drawn: it takes no bits back. A small image is popped before larger ones.
    """

    def __init__(self, model):
        self.model = model
        self.is_vae = isinstance(model, VAE)
        self.K = 0 if self.is_vae else model.K
        self.q_u = model.q_z if self.is_vae else model.q_u
        self.prior = model.p_z if self.is_vae else model.p_u
        if isinstance(self.prior, MoGPrior):
            raise UserError("a mixture prior cannot be coded number by number: take another run")

    def q(self, k, y_next):
        """Mean and sd of q(z_k|y_{k+1}); for k = 0 under a flow those of v, which is coded then.

        Any q gives a bound. v given y_1 is no Gaussian of independent numbers; the one that costs
        least has their sd given all others, from the diagonal of the precision of v:
        1/sd_i² = Σ_j (∂u_j/∂v_i)² / sd_j², estimated by 64 random signs r_j, as the mean square of
        Σ_j r_j (∂u_j/∂v_i) / sd_j.
        """
        if k:
            return moments(gaussian(self.model.q_z[k - 1](y_next)))
        mean, sd = moments(gaussian(self.q_u(y_next)))
        if not hasattr(self.prior, "flow"):
            return mean, sd
        v, _ = self.prior.flow(mean)
        with torch.enable_grad():
            copies = v.expand(64, -1, -1, -1).clone().requires_grad_()
            signs = torch.randint(2, copies.shape, generator=torch.Generator().manual_seed(0))
            u = self.prior.from_noise(copies)
            slope, = torch.autograd.grad(((2 * signs - 1) * u / sd).sum(), copies)
        return v, slope.square().mean(0, keepdim=True).rsqrt()

    def p(self, k, y_k, z_below):
        """Mean and sd of p(z_k|y_k, z_{k-1}); N(0, 1) for u, or the flow's v."""
        if k:
            return moments(self.model.p_z[k - 1](y_k, z_below))
        return torch.zeros(1, *LATENT), torch.ones(1, *LATENT)

    def z(self, k, bins, p):
        """z_k from its bins; u through the flow."""
        value = latent_value(bins, p)
        return self.prior.from_noise(value) if k == 0 else value

    def p_image(self, k, y_k, z):
        """p(y_{k+1}|y_k, z_k), for k = 0 p(y_1|u)."""
        if k:
            return self.model.p_x[k - 1](y_k, z)
        if self.is_vae:
            return Dmol(self.model.p_x(z), block=self.model.block)
        return Dmol(self.model.p_y(z), block=self.model.block_1)

    def push(self, stack, x):
        """Push an image (1, C, H, W)."""
        y = {1: x} if self.is_vae else self.model.representations(x)
        # Laid out as what a receiver pops: strides decide how a convolution rounds. (A grey image
        # would be its own .contiguous(), in any layout.)
        plain = torch.contiguous_format
        y = {0: None, **{k: image.clone(memory_format=plain) for k, image in y.items()}}
        bins = []
        images = []
        z = None
        for k in range(self.K + 1):
            p = self.p(k, y[k], z)
            bins.append(pop_all(stack, latent_table(self.q(k, y[k + 1]), p)))
            z = self.z(k, bins[k], p)
            images.append(self.p_image(k, y[k], z))
        for k in reversed(range(self.K + 1)):
            push_image(stack, images[k], y[k + 1])
            push_prior(stack, bins[k])

    def pop(self, stack, last=None):
        """Pop an image -> (1, C, H, W); with `last` only as far as y_last, and no bits go back."""
        y = None
        z = None
        drawn = []  # bins, and the table by which they go back
        for k in range(self.K + 1):
            bins = pop_prior(stack)
            p = self.p(k, y, z)
            z = self.z(k, bins, p)
            y = pop_image(stack, self.p_image(k, y, z))
            if k + 1 == last:
                return y
            drawn.append((latent_table(self.q(k, y), p), bins))
        for table, bins in reversed(drawn):
            push_all(stack, table, bins)
        return y


def moments(distribution):
    """Mean and sd."""
    return distribution.mean, distribution.stddev


# ---- Files ---------------------------------------------------------------------------------------

def random_stack(K):
    """The stack that a sender begins with: random bits, for the first image's latents.

    A latent's 1,024 numbers take 10 bits at most on average, 320 words, if q knows nothing.
    """
    rng = np.random.default_rng(0)
    heads = rng.integers(2**32, 2**33, LANES, dtype=np.uint64)
    words = rng.integers(0, 2**32, 340 * (K + 1), dtype=np.uint64)
    return Stack(heads, words.tolist())


def load_codec(folder, shape=None):
    """A run's folder -> its Codec, for images of `shape` or of its dataset; and its Config."""
    path = Path(folder, "best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
        if script not in ("vae", "selfvae"):
            raise UserError(f"{path} is of {script}.py: take one of vae.py or selfvae.py")
        module = importlib.import_module(script)
        cfg = module.Config(**checkpoint["config"])
        if shape is None:
            shape = load_images(cfg.dataset, cfg.data_dir, cfg.size).shape
        Model = module.VAE if script == "vae" else module.SelfVAE
        model = Model(cfg, tuple(shape)).eval()
        model.load_state_dict(checkpoint["model"])
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            pickle.UnpicklingError):
        raise UserError(f"{path} is missing, damaged, or of another model than these images "
                        "need") from None
    return Codec(model), cfg


def fingerprint(codec, shape):
    """A hash of what a certain image makes of the stack: of all networks, as they compute here."""
    levels = torch.arange(math.prod(shape)).view(1, *shape) % 256
    stack = random_stack(codec.K)
    codec.push(stack, from_uint8(levels.to(torch.uint8)))
    words = np.array(stack.words, "<u4")
    return hashlib.sha256(stack.heads.astype("<u8").tobytes() + words.tobytes()).hexdigest()[:16]


def refuse_to_overwrite(path):
    """UserError if `path` exists, or the folder in which it is to be does not."""
    if path.exists() or not path.parent.is_dir():
        raise UserError(f"{path} exists, or {path.parent} is no folder: nothing is overwritten")


class Progress:
    """Images a second, and every half minute a line of how many are done."""

    def __init__(self, count):
        self.count = count
        self.done = 0
        self.began = self.told = time.perf_counter()

    def step(self):
        """One more is done."""
        self.done += 1
        now = time.perf_counter()
        if now > self.told + 30:
            self.told = now
            print(f"{self.done} of {self.count} images", flush=True)

    def rate(self):
        """Images a second, so far."""
        return self.done / (time.perf_counter() - self.began)


def first_test_images(cfg, count=None):
    """A run's dataset, and its first `count` test images (all), batches of one."""
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise UserError(f"COUNT must be a whole number from 1 on, not {count}")
    images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
    return images, Batches(images.test, 1, "cpu", count=int(count) if count else None)


def write(folder, path, count=None):
    """The first `count` test images of the run's dataset -> FILE, and what it costs."""
    path = Path(path)
    refuse_to_overwrite(path)
    codec, cfg = load_codec(folder)
    images, test = first_test_images(cfg, count)
    stack = random_stack(codec.K)
    at_first = stack.bits()
    progress = Progress(test.count)
    for x in test:
        codec.push(stack, x)
        progress.step()
    rate = progress.rate()
    header = {"shape": images.shape, "count": test.count,
              "fingerprint": fingerprint(codec, images.shape)}
    words = np.array(stack.words, "<u4").tobytes()
    content = json.dumps(header).encode() + b"\n" + stack.heads.astype("<u8").tobytes() + words
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    os.replace(aside, path)
    dims = test.count * math.prod(images.shape)
    net = (stack.bits() - at_first) / dims
    print(f"{test.count} images, {len(content):,} bytes: {net:.4f} bits per dimension net, "
          f"{8 * len(content) / dims:.4f} with header, heads and the random bits for the first "
          f"latents; {rate:.2f} images/s")


def read(folder, path):
    """FILE -> FILE.npy, uint8 (count, H, W, C)."""
    target = Path(f"{path}.npy")
    refuse_to_overwrite(target)
    try:
        header, body = Path(path).read_bytes().split(b"\n", 1)
        header = json.loads(header)
        shape, count, sent = header["shape"], header["count"], header["fingerprint"]
        if type(count) is not int or count < 1 or [type(side) for side in shape] != [int] * 3:
            raise ValueError("its header is broken")
        heads = np.frombuffer(body, "<u8", LANES).astype(np.uint64)
        words = np.frombuffer(body, "<u4", offset=8 * LANES).astype(np.uint64).tolist()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read, or is no file of compress.py: {error}") from None
    codec, _ = load_codec(folder, shape)
    if sent != fingerprint(codec, shape):
        raise UserError(f"{path} was written with other weights, or by a machine, a torch or a "
                        "numpy that computes other numbers: its images cannot be had here")
    stack = Stack(heads, words)
    images = []
    progress = Progress(count)
    for _ in range(count):
        x = codec.pop(stack)
        images.append(to_uint8(x)[0].permute(1, 2, 0).numpy())
        progress.step()
    first = random_stack(codec.K)
    if not np.array_equal(stack.heads, first.heads) or stack.words != first.words:
        raise UserError(f"{path} is damaged, or was written where other numbers are computed")
    aside = Path(f"{path}.tmp.npy")
    np.save(aside, np.stack(images[::-1]))  # the last one was on top
    os.replace(aside, target)
    print(f"{count} images in {target}; {progress.rate():.2f} images/s")


# ---- Sizes ---------------------------------------------------------------------------------------

def sizes(folder, count=None):
    """What the first `count` test images cost, in bits per dimension of x, as a Markdown table.

    A row for y_1, y_2, …, x: the bound on log p of it, one draw of z an image; what it adds to a
    stack without the larger images; and what must be popped of one image to see it (the mean over
    the first ten), with all latents' bits in full, as none has come back yet.
    """
    codec, cfg = load_codec(folder)
    images, test = first_test_images(cfg, count)
    torch.manual_seed(0)
    dims = math.prod(images.shape)
    costs = list(mean_terms(codec.model, test).values())  # of u and y_1, z_1 and y_2, …
    prefixes = prefix_bits(codec, test)
    print(f"| {test.count} images of {cfg.dataset} | bound | file, net | prefix of one image |")
    print("|---|---|---|---|")
    K = codec.K
    for k in range(K + 1):
        codec.K = k  # nothing is coded that is larger than y_{k+1}
        stack = random_stack(k)
        at_first = stack.bits()
        for x in test:
            codec.push(stack, x)
        bits = (stack.bits() - at_first) / test.count
        bound = bits_per_dim(sum(costs[:2 * k + 2]), dims)
        name = "x" if k == K else f"y_{k + 1}"
        print(f"| {name} | {bound:.4f} | {bits / dims:.4f} | {prefixes[k] / dims:.4f} |")
    print(f"\nRandom bits of the beginning: {at_first:,.0f}, {at_first / bits:.2f} images; of "
          f"{math.ceil(100 * at_first / bits)} images they are 1 %.")
    weighted = importance_weighted(codec.model, test, 16, dims)
    print(f"log p(x) by 16 importance samples: {weighted['iw_bpd']:.4f}")
    for name, options in (("PNG", {"optimize": True}), ("WebP", {"lossless": True, "quality": 100,
                                                                 "method": 6})):
        total = 0
        for image in images.test[:test.count]:
            file = io.BytesIO()
            TF.to_pil_image(image).save(file, name, **options)
            total += 8 * len(file.getvalue())
        print(f"{name}, a file each: {total / test.count / dims:.4f}")


def prefix_bits(codec, test):
    """Mean bits that are popped of an image until y_1 is seen, y_2, …, x, over the first ten."""
    popped = np.zeros(codec.K + 1)
    n = 0
    for x in itertools.islice(test, 10):
        stack = random_stack(codec.K)
        codec.push(stack, x)
        for k in range(codec.K + 1):
            copy = Stack(stack.heads.copy(), list(stack.words))
            codec.pop(copy, last=k + 1)
            popped[k] += stack.bits() - copy.bits()
        n += 1
    return popped / n


def main(words):
    """Do what the command line says -> the exit code."""
    if words in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    torch.set_num_threads(1)
    try:
        if words[:1] == ["write"] and len(words) in (3, 4):
            command = write
        elif words[:1] == ["read"] and len(words) == 3:
            command = read
        elif words[:1] == ["sizes"] and len(words) in (2, 3):
            command = sizes
        else:
            raise UserError("write RUN_FOLDER FILE [COUNT], read RUN_FOLDER FILE, or sizes "
                            "RUN_FOLDER [COUNT]; see --help")
        with torch.no_grad(), cached():
            command(*words[1:])
    except (UserError, OSError) as error:
        print(f"compress.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
