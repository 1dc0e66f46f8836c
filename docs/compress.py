"""Images as a file whose size is the bound: bits back with ANS, derived in docs/compression.md.

    python docs/compress.py write RUN_FOLDER FILE [COUNT]    the first COUNT test images (all)
    python docs/compress.py read RUN_FOLDER FILE             back, to FILE.npy, bit for bit

RUN_FOLDER is of a trained vae.py or selfvae.py. Sender and receiver must compute equal numbers:
the same weights, torch, kind of CPU. One image at a time, in fp32, on one thread. The exit code is
2 where the receiver's numbers differ or FILE is broken; nothing is written then.
"""

import hashlib
import importlib
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
from torch.nn.utils.parametrize import cached

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Dmol, UserError, from_uint8, load_images, to_uint8  # noqa: E402 (needs the path)
from vae import LATENT  # noqa: E402

BITS = 20  # of an integer probability: 2^20 slots
BINS = 10  # bits of a latent: 2^10 bins of equal prior probability
LANES = 64  # coders side by side
LEVELS = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)  # the values of a pixel


# ---- ANS -----------------------------------------------------------------------------------------

class Stack:
    """LANES coders of asymmetric numeral systems (Duda 2009) over one stack of 32-bit words.

    A coder is an integer, its head. Pushing a symbol that has `count` of 2^BITS slots, from `start`
    on, makes it 2^BITS/count times as large: it gains -log2 p bits. Popping undoes a push exactly.
    Invariant: 2^32 ≤ head < 2^64. Where a push would pass the upper end, the head's lower half goes
    to the words first; where a pop has passed the lower end, it comes back.
    """

    def __init__(self, heads, words):
        self.heads = heads  # uint64 (LANES,)
        self.words = words  # a list, the last one on top

    def push(self, start, count):
        """One symbol to each of the first coders: uint64 arrays of at most LANES slots."""
        head = self.heads[:len(start)]
        full = head >= count << np.uint64(64 - BITS)
        self.words.extend((head[full] & np.uint64(2**32 - 1)).tolist())
        head = np.where(full, head >> np.uint64(32), head)
        self.heads[:len(start)] = (head // count << np.uint64(BITS)) + start + head % count

    def pop(self, table):
        """One symbol from each of the first coders: `table` (n, symbols + 1) of slots -> (n,)."""
        head = self.heads[:len(table)]
        slot = head & np.uint64(2**BITS - 1)
        symbol = (table[:, 1:] <= slot[:, None]).sum(1)
        start, count = interval(table, symbol)
        head = count * (head >> np.uint64(BITS)) + slot - start
        empty = head < np.uint64(2**32)
        few = int(empty.sum())
        if few > len(self.words):
            raise UserError("the file ends before its images do")
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
    """Slots of the symbols (n,) in a table (n, symbols + 1) -> start and count, uint64 (n,)."""
    row = np.arange(len(symbol))
    start = table[row, symbol]
    return start, table[row, symbol + 1] - start


def slots(probabilities):
    """Probabilities (n, symbols) -> where each symbol's slots begin, uint64 (n, symbols + 1).

    Every symbol keeps one slot, however improbable; the others are shared out.
    """
    symbols = probabilities.shape[1]
    cumulated = np.zeros((len(probabilities), symbols + 1))
    np.cumsum(probabilities, 1, out=cumulated[:, 1:])
    share = np.minimum(cumulated / cumulated[:, -1:], 1) * (2**BITS - symbols)
    return share.astype(np.uint64) + np.arange(symbols + 1, dtype=np.uint64)


def push_all(stack, table, symbol):
    """Push n symbols, LANES at a time."""
    start, count = interval(table, symbol)
    for first in range(0, len(symbol), LANES):
        stack.push(start[first:first + LANES], count[first:first + LANES])


def pop_all(stack, table):
    """Pop what `push_all` pushed -> symbols (n,)."""
    parts = []
    for first in reversed(range(0, len(table), LANES)):
        parts.append(stack.pop(table[first:first + LANES]))
    return np.concatenate(parts[::-1])


# ---- An image given its mixture, a latent given its Gaussian -------------------------------------

def pixel_tables(p_x, value):
    """Walk through the values of all blocks: table of slots (h·w, 256) by table, in coding order.

    `value(c, table)` says which of 256 levels value c of each block has, (h·w,): the sender knows,
    the receiver pops. The probabilities are those of the bound, p(x_c) given the values before:
    components by Bayes' rule, weighed with what they gave to those.
    """
    log_w = p_x.logits.log_softmax(1)  # (1, M, h, w)
    h, w = log_w.shape[2:]
    rest = []
    for c in range(p_x.n):
        log_bins = p_x.log_bin(c, LEVELS, rest)  # (256, M, h, w)
        probabilities = torch.logsumexp(log_w + log_bins, 1).double().softmax(0)
        level = value(c, slots(probabilities.flatten(1).T.numpy()))
        level = torch.from_numpy(level).view(1, 1, h, w)
        rest.append(level / 127.5 - 1 - p_x.shift[:, c:c + 1])
        log_w = log_w + log_bins.gather(0, level.expand(1, *log_bins.shape[1:]))


def push_image(stack, p_x, x):
    """Push an image (1, C, H, W), its last value first, as a receiver pops its first one first."""
    levels = F.pixel_unshuffle(to_uint8(x), p_x.block).flatten(2)[0].long().numpy()  # (n, h·w)
    tables = []

    def value(c, table):
        tables.append(table)
        return levels[c]

    pixel_tables(p_x, value)
    for c in reversed(range(p_x.n)):
        push_all(stack, tables[c], levels[c])


def pop_image(stack, p_x):
    """Pop an image -> (1, C, H, W)."""
    levels = []

    def value(c, table):
        levels.append(pop_all(stack, table))
        return levels[c]

    pixel_tables(p_x, value)
    h, w = p_x.logits.shape[2:]
    pixels = torch.from_numpy(np.stack(levels)).view(1, p_x.n, h, w).to(torch.uint8)
    return from_uint8(F.pixel_shuffle(pixels, p_x.block))


NORMAL_EDGES = torch.special.ndtri(torch.arange(2**BINS + 1, dtype=torch.float64) / 2**BINS)
NORMAL_MIDDLES = torch.special.ndtri((torch.arange(2**BINS, dtype=torch.float64) + 0.5) / 2**BINS)
UNIFORM = np.arange(2**BINS + 1, dtype=np.uint64)[None] << np.uint64(BITS - BINS)


def latent_table(q, p):
    """Slots of a latent's bins under q, (1,024, 2^BINS + 1), for bins equally probable under p.

    q and p are pairs of mean and sd, each (1, 16, 8, 8). So p costs BINS bits a number, exactly,
    and q's probability of a bin is that of an interval.
    """
    mean = ((q[0] - p[0]) / p[1]).double().view(-1, 1)
    sd = (q[1] / p[1]).double().view(-1, 1)
    below = torch.special.ndtr((NORMAL_EDGES - mean) / sd)
    return slots(below.diff(dim=1).numpy())


def latent_value(bins, p):
    """Bins (1,024,) -> their middles under p, (1, 16, 8, 8)."""
    return p[0] + p[1] * NORMAL_MIDDLES[torch.from_numpy(bins)].float().view_as(p[0])


def push_prior(stack, bins):
    """Push bins (1,024,) that are all equally probable."""
    push_all(stack, np.broadcast_to(UNIFORM, (len(bins), 2**BINS + 1)), bins)


def pop_prior(stack, count):
    """Pop `count` of them."""
    return pop_all(stack, np.broadcast_to(UNIFORM, (count, 2**BINS + 1)))


# ---- A model as a code: the order of pushes and pops ---------------------------------------------

class Codec:
    """Pushes images by a model, and pops them: x = y_{K+1}, z_0 = u, y_k = d(y_{k+1}).

        push    pop u ~ q(u|y_1), z_1 ~ q(z_1|y_2), …, z_K ~ q(z_K|x): the bits back
                push x by p(x|y_K, z_K), z_K by its prior, …, y_1 by p(y_1|u), u by its prior
        pop     all of it backwards: u, y_1, z_1, y_2, …, x; then z_K, …, u go back by q

    y is computed, not drawn: it takes no bits back. A small image is popped before larger ones.
    """

    def __init__(self, script, model):
        self.model = model
        self.gaussian = importlib.import_module(script).gaussian
        self.is_vae = script == "vae"
        self.K = 0 if self.is_vae else model.K
        self.q_u = model.q_z if self.is_vae else model.q_u
        self.prior = model.p_z if self.is_vae else model.p_u
        self.flow = getattr(self.prior, "flow", None)
        if type(self.prior).__name__ == "MoGPrior":
            raise UserError("a mixture prior has no bins of equal probability: take another run")

    def q(self, k, y_next):
        """Mean and sd of q(z_k|y_{k+1}), for u under a flow of v = flow(u), which is what is coded.

        v given y_1 is no Gaussian of independent numbers. Mean and sd of 64 draws make one of it:
        every q gives a bound, and this one's is what the file costs.
        """
        if k:
            return moments(self.gaussian(self.model.q_z[k - 1](y_next)))
        mean, sd = moments(self.gaussian(self.q_u(y_next)))
        if self.flow is None:
            return mean, sd
        noise = torch.randn(64, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
        v, _ = self.flow(mean + sd * noise)
        return v.mean(0, keepdim=True), v.std(0, keepdim=True)

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
        y = {0: None, 1: x} if self.is_vae else {0: None, **self.model.representations(x)}
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
            bins = pop_prior(stack, math.prod(LATENT))
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

def start(K):
    """The stack that a sender begins with: random bits, for the first image's latents."""
    rng = np.random.default_rng(0)
    heads = rng.integers(2**32, 2**33, LANES, dtype=np.uint64)
    words = rng.integers(0, 2**32, 400 * (K + 1), dtype=np.uint64)
    return Stack(heads, words.tolist())


def load_codec(folder, shape=None):
    """A run's folder -> its Codec for images of `shape`; without one, for its dataset, and that."""
    path = Path(folder, "best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{path} is missing, or no checkpoint of these scripts") from None
    if script not in ("vae", "selfvae"):
        raise UserError(f"{path} is of {script}.py: take one of vae.py or selfvae.py")
    module = importlib.import_module(script)
    cfg = module.Config(**checkpoint["config"])
    images = None
    if shape is None:
        images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
        shape = images.shape
    Model = module.VAE if script == "vae" else module.SelfVAE
    model = Model(cfg, tuple(shape)).eval()
    model.load_state_dict(checkpoint["model"])
    return Codec(script, model), images


def fingerprint(codec):
    """A hash of the slots of p(y_1|u) at v = 0: of weights, torch and machine, as far as they count.

    Where it differs, the receiver's probabilities are not the sender's.
    """
    u = codec.z(0, np.full(math.prod(LATENT), 2**BINS // 2), codec.p(0, None, None))
    digest = hashlib.sha256()

    def value(c, table):
        digest.update(table.tobytes())
        return np.full(len(table), 128)

    pixel_tables(codec.p_image(0, None, u), value)
    return digest.hexdigest()[:16]


def write(folder, path, count=None):
    """The first `count` test images of the run's dataset -> FILE, and what it costs."""
    codec, images = load_codec(folder)
    count = min(int(count or len(images.test)), len(images.test))
    stack = start(codec.K)
    at_first = stack.bits()
    sizes = []
    began = time.perf_counter()
    for pixels in images.test[:count]:
        codec.push(stack, from_uint8(torch.from_numpy(pixels.copy()).movedim(2, 0)[None]))
        sizes.append(stack.bits() - at_first)
    seconds = time.perf_counter() - began
    header = {"shape": images.shape, "count": count, "fingerprint": fingerprint(codec)}
    aside = Path(f"{path}.tmp")
    with open(aside, "wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(stack.heads.astype("<u8").tobytes())
        file.write(np.array(stack.words, "<u4").tobytes())
    os.replace(aside, path)
    dims = count * math.prod(images.shape)
    print(f"{count} images, {Path(path).stat().st_size:,} bytes: {sizes[-1] / dims:.4f} bits per "
          f"dimension net, {8 * Path(path).stat().st_size / dims:.4f} with what the first image's "
          f"latents were drawn from; {count / seconds:.2f} images/s")


def read(folder, path):
    """FILE -> FILE.npy, uint8 (count, H, W, C)."""
    try:
        header, body = Path(path).read_bytes().split(b"\n", 1)
        header = json.loads(header)
        heads = np.frombuffer(body, "<u8", LANES).astype(np.uint64)
        words = np.frombuffer(body, "<u4", offset=8 * LANES).astype(np.uint64).tolist()
        shape = header["shape"]
        count = header["count"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of compress.py: {error}") from None
    codec, _ = load_codec(folder, shape)
    if header["fingerprint"] != fingerprint(codec):
        raise UserError(f"{path} was written with other weights, or by a machine or a torch that "
                        "computes other numbers: its images cannot be had here")
    stack = Stack(heads, words)
    images = []
    began = time.perf_counter()
    for _ in range(count):
        x = codec.pop(stack)
        images.append(to_uint8(x)[0].permute(1, 2, 0).numpy())
    seconds = time.perf_counter() - began
    first = start(codec.K)
    if not np.array_equal(stack.heads, first.heads) or stack.words != first.words:
        raise UserError(f"{path} is damaged: its images are not what was written")
    np.save(f"{path}.npy", np.stack(images[::-1]))  # the last one is on top
    print(f"{count} images in {path}.npy; {count / seconds:.2f} images/s")


def main(words):
    """Do what the command line says -> the exit code."""
    commands = {"write": (write, (2, 3)), "read": (read, (2,))}
    name, *arguments = words or [""]
    if name not in commands or len(arguments) not in commands[name][1]:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), cached():
            commands[name][0](*arguments)
    except (UserError, OSError) as error:
        print(f"compress.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
