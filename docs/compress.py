"""Images as a file of the bound's size: bits back with ANS, derived in docs/compression.md.

    python docs/compress.py write RUN_FOLDER FILE [COUNT]    code the first COUNT test images (all)
    python docs/compress.py read RUN_FOLDER FILE             decode to FILE.npy, bit for bit
    python docs/compress.py sizes RUN_FOLDER [COUNT]         what they cost up to y_1, y_2, …, x,
                                                             beside the bound, PNG and WebP
    python docs/compress.py photo RUN_FOLDER PICTURE [SIDE]  code and decode your photograph, cut
                                                             into tiles of the model's SIDE (64)

RUN_FOLDER is the folder of a run of vae.py or selfvae.py. If the run's data_dir is relative, start
this where the run was started. With a normal prior the size is that of the bound. With a flow it is
larger. Sender and receiver must compute equal numbers, so they need the same weights, torch, numpy
and kind of CPU. Images are coded one at a time, in fp32, on one thread. The exit code is 2 if the
receiver's numbers differ or FILE is broken. Nothing is ever overwritten.
"""

import hashlib
import importlib
import io
import itertools
import json
import math
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch.nn.utils.parametrize import cached

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (  # noqa: E402 (needs the path)
    Batches, Dmol, UserError, bits_per_dim, from_uint8, importance_weighted, load_images,
    mean_terms, to_uint8)
from selfvae import image_of_pixels, pixels_of_blocks  # noqa: E402
from vae import LATENT, VAE, MoGPrior  # noqa: E402

FORMATS = {"PNG": {"optimize": True}, "WebP": {"lossless": True, "quality": 100, "method": 6}}
SLOT_BITS = 20  # the symbols share 2^20 slots
LANES = 64  # coders side by side
VALUES = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)  # all values of a pixel
BIN_BITS = 10  # a latent's value has 2^10 bins, 1/64 of its prior's sd wide, from -8 to 8 sd
MIDDLES = (torch.arange(2**BIN_BITS, dtype=torch.float64) + 0.5) / 64 - 8
EDGES = torch.cat([torch.tensor([-torch.inf]), MIDDLES[1:] - 1 / 128, torch.tensor([torch.inf])])
# A push by the prior puts the latent's value ORDER[j] in place j. The bits in place j draw value j
# of the next image's latent, and these bits should not come from value j of this image's latent.
ORDER = np.random.default_rng(0).permutation(math.prod(LATENT))


# ---- ANS -----------------------------------------------------------------------------------------

class Stack:
    """LANES coders of asymmetric numeral systems (Duda 2009) over one stack of 32-bit words.

    A coder is an integer, its head. Pushing a symbol that has `count` of 2^SLOT_BITS slots, from
    `first` on, makes the head 2^SLOT_BITS/count times as large, a gain of -log2 p bits. Popping
    undoes a push exactly. Invariant: 2^32 ≤ head < 2^64. If a push would exceed the upper end, the
    head's lower half first goes to the words. If a pop falls below the lower end, it comes back.
    """

    def __init__(self, heads, words):
        self.heads = heads  # uint64 (LANES,)
        self.words = words  # a list; the last word is the top of the stack

    def push(self, first, count):
        """Push a symbol to each of the first n ≤ LANES coders: slots, uint64 (n,), count ≥ 1.

        UserError if a count is 0, because a symbol without a slot cannot have been popped.
        """
        if not count.all():
            raise UserError("a symbol without a slot")
        head = self.heads[:len(first)]
        full = head >> np.uint64(64 - SLOT_BITS) >= count
        self.words.extend((head[full] & np.uint64(2**32 - 1)).tolist())
        head = np.where(full, head >> np.uint64(32), head)
        self.heads[:len(first)] = (head // count << np.uint64(SLOT_BITS)) + first + head % count

    def pop(self, table):
        """Pop a symbol from each of the first n coders: `table` (n, symbols + 1) of slots -> (n,).

        UserError if the words run out.
        """
        head = self.heads[:len(table)]
        slot = head & np.uint64(2**SLOT_BITS - 1)
        symbol = (table[:, 1:] <= slot[:, None]).sum(1)
        first, count = interval(table, symbol)
        head = count * (head >> np.uint64(SLOT_BITS)) + slot - first
        empty = head < np.uint64(2**32)
        few = int(empty.sum())
        if few > len(self.words):
            raise UserError("the stack has run empty")
        if few:
            back = np.array(self.words[-few:], np.uint64)
            del self.words[-few:]
            head[empty] = (head[empty] << np.uint64(32)) | back
        self.heads[:len(table)] = head
        return symbol

    def bits(self):
        """The bits on the stack, including the fractions of a bit that heads hold."""
        return 32 * len(self.words) + np.log2(self.heads.astype(np.float64)).sum()


def interval(table, symbol):
    """Slots of the symbols (n,) in a table (n, symbols + 1) -> first and count, uint64 (n,)."""
    row = np.arange(len(symbol))
    first = table[row, symbol]
    return first, table[row, symbol + 1] - first


def slots(probabilities, possible):
    """Probabilities (n, symbols) -> where each symbol's slots begin, uint64 (n, symbols + 1).

    Every `possible` symbol, bool (n, symbols), gets one slot, however improbable it is. The other
    slots are shared by probability.
    """
    cumulated = np.zeros((len(probabilities), probabilities.shape[1] + 1))
    np.cumsum(probabilities, 1, out=cumulated[:, 1:])
    kept = np.zeros(cumulated.shape, np.uint64)
    np.cumsum(possible, 1, out=kept[:, 1:])
    share = cumulated / cumulated[:, -1:] * (2**SLOT_BITS - kept[:, -1:].astype(float))
    return share.astype(np.uint64) + kept


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


# ---- An image given its distribution, a latent given its Gaussian --------------------------------

def walk_image(p_x, value_of):
    """Walk through an image (1, C, H, W), for an InTurn pixel by pixel -> the image.

    `value_of(table)` returns the next values, (h·w,). `table` (h·w, 257) has their slots given all
    values before. The sender knows the values; the receiver pops them.
    """
    if isinstance(p_x, Dmol):
        return walk_channels(p_x, value_of)
    pixels = []
    for _ in range(4):
        factor = p_x.given(pixels)
        if isinstance(factor, Dmol):
            pixels.append(walk_channels(factor, value_of))
        else:
            pixels.append(walk_uniform(factor, value_of))
    return image_of_pixels(pixels)


def walk_channels(p_x, value_of):
    """`walk_image` for a Dmol: one channel after the other, with the bound's own numbers.

    By Bayes' rule the weight of component m is π_m times its probabilities of the channels before.
    Memory: about ten times 256·M·h·w floats.
    """
    log_w = p_x.logits.log_softmax(1)  # (1, M, h, w)
    h, w = log_w.shape[2:]
    x = torch.zeros(1, 0, h, w)
    for c in range(p_x.channels):
        before = x.expand(256, -1, -1, -1)
        candidates = torch.cat([before, VALUES.expand(-1, -1, h, w)], 1)
        log_p = p_x.log_values(candidates, first=c)[:, 0]  # (256, M, h, w)
        log_mixture = torch.logsumexp(log_w + log_p, 1)
        value = value_of(table_of(log_mixture.double().softmax(0), log_mixture > -math.inf))
        value = torch.from_numpy(value).view(1, 1, h, w)
        x = torch.cat([x, from_uint8(value)], 1)
        log_w = log_w + log_p.gather(0, value.expand(1, *log_p.shape[1:]))
    return x


def walk_uniform(p_x, value_of):
    """`walk_image` for a Uniform."""
    values = torch.arange(256).view(256, 1, 1)
    x = []
    for low, high in zip(p_x.low.unbind(1), p_x.high.unbind(1)):  # (1, h, w) each
        possible = (low <= values) & (values <= high)  # (256, h, w)
        value = value_of(table_of(possible.double(), possible))
        x.append(from_uint8(torch.from_numpy(value).view_as(low)))
    return torch.stack(x, 1)


def table_of(probabilities, possible):
    """`slots` of 256 values: (256, h, w) each -> (h·w, 257)."""
    return slots(probabilities.flatten(1).T.numpy(), possible.flatten(1).T.numpy())


def push_image(stack, p_x, x):
    """Push an image (1, C, H, W), the last value first, because a receiver pops the first first."""
    images = [x] if isinstance(p_x, Dmol) else pixels_of_blocks(x)
    values = to_uint8(torch.cat(list(images), 1)).long().flatten(2)[0].numpy()
    tables = []

    def value_of(table):
        tables.append(table)
        return values[len(tables) - 1]

    walk_image(p_x, value_of)
    for table, value in zip(reversed(tables), reversed(values)):
        push_all(stack, table, value)


def pop_image(stack, p_x):
    """Pop an image -> (1, C, H, W)."""
    def value_of(table):
        return pop_all(stack, table)

    return walk_image(p_x, value_of)


PRIOR = torch.special.ndtr(EDGES).diff().numpy()[None]
PRIOR_TABLE = slots(PRIOR, np.ones(PRIOR.shape, bool))


def latent_table(q, p):
    """Slots of a latent's bins under q, (1,024, 2^BIN_BITS + 1): probabilities of intervals.

    q and p are pairs of mean and sd, each (1, 16, 8, 8); bins are those of p. A bin may have no
    slot, because only bins that were popped by this table are pushed by it.
    """
    mean = ((q[0] - p[0]) / p[1]).double().reshape(-1, 1)
    sd = (q[1] / p[1]).double().reshape(-1, 1)
    below = torch.special.ndtr((EDGES - mean) / sd)
    return (below * 2**SLOT_BITS).round().numpy().astype(np.uint64)


def latent_value(bins, p):
    """Bins (1,024,) -> their middles, (1, 16, 8, 8)."""
    return p[0] + p[1] * MIDDLES[torch.from_numpy(bins)].float().view_as(p[0])


def push_prior(stack, bins):
    """Push bins (1,024,) by their probabilities under p, which are the same for every value."""
    push_all(stack, np.broadcast_to(PRIOR_TABLE, (len(bins), 2**BIN_BITS + 1)), bins[ORDER])


def pop_prior(stack):
    """Pop what `push_prior` pushed -> bins (1,024,)."""
    bins = np.empty(len(ORDER), np.int64)
    bins[ORDER] = pop_all(stack, np.broadcast_to(PRIOR_TABLE, (len(bins), 2**BIN_BITS + 1)))
    return bins


# ---- A model as a code: the order of pushes and pops ---------------------------------------------

class Codec:
    """Pushes images by a model, and pops them: x = y_{K+1}, z_0 = u, y_k = d(y_{k+1}).

        push    pop u ~ q(u|y_1), z_1 ~ q(z_1|y_2), …, z_K ~ q(z_K|x): the bits back
                push x by p(x|y_K, z_K), z_K by its prior, …, y_1 by p(y_1|u), u by its prior
        pop     all of it backwards: u, y_1, z_1, y_2, …, x; then z_K, …, u go back by q

    y is computed and not drawn, so it gets no bits back. y_1 is popped before y_2, …, x. For a
    vae.py, u is its z and y_1 is x. With a K smaller than the model's, only y_{K+1} of the pushed
    images is coded.
    """

    def __init__(self, model, K=None):
        self.model = model
        self.is_vae = isinstance(model, VAE)
        self.K = K
        if K is None:
            self.K = 0 if self.is_vae else model.K
        self.q_u = model.q_z if self.is_vae else model.q_u
        self.prior = model.p_z if self.is_vae else model.p_u
        if isinstance(self.prior, MoGPrior):
            raise UserError("a mixture prior cannot be coded number by number: take another run")

    def q(self, k, y_next):
        """Mean and sd of q(z_k|y_{k+1}). With a flow, v is coded in place of u, and q is that of v.

        Any q gives a bound. v given y_1 is not a Gaussian with independent values. The cheapest
        Gaussian that is one has, for each value, the sd given all other values, from the diagonal
        of the precision of v: 1/τ_i² = Σ_j (∂u_j/∂v_i)² / σ_j², where σ_j is that of u. With 64
        draws of random signs r_j it is estimated as the mean square of Σ_j r_j (∂u_j/∂v_i) / σ_j.
        The estimate scatters by 15 %.
        """
        if k:
            return moments(self.model.q_z[k - 1](y_next))
        mean, sd = moments(self.q_u(y_next))
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
            return self.model.p_x(z)
        return self.model.p_y(z)

    def push(self, stack, x):
        """Push an image (1, C, H, W)."""
        y = {1: x} if self.is_vae else self.model.representations(x)
        # In the layout that a receiver pops, because strides decide how a convolution rounds. (For
        # a grey image .contiguous() returns the image itself, in any layout.)
        plain = torch.contiguous_format
        y = {0: None, **{k: image.clone(memory_format=plain) for k, image in y.items()}}
        bins = []
        mixtures = []
        z = None
        for k in range(self.K + 1):
            p = self.p(k, y[k], z)
            bins.append(pop_all(stack, latent_table(self.q(k, y[k + 1]), p)))
            z = self.z(k, bins[k], p)
            mixtures.append(self.p_image(k, y[k], z))
        for k in reversed(range(self.K + 1)):
            push_image(stack, mixtures[k], y[k + 1])
            push_prior(stack, bins[k])

    def pop(self, stack, last=None):
        """Pop an image -> (1, C, H, W). With `last`, pop only up to y_last; no bits go back."""
        y = None
        z = None
        drawn = []  # for each latent the table by which its bins go back, and the bins
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

    A latent takes 258 words if q is the prior, and at most 310, if q is four times as wide. It
    takes some more, because each coder takes whole words.
    """
    rng = np.random.default_rng(0)
    heads = rng.integers(2**32, 2**33, LANES, dtype=np.uint64)
    words = rng.integers(0, 2**32, 340 * (K + 1), dtype=np.uint64)
    return Stack(heads, words.tolist())


def load_codec(folder, shape=None):
    """A run's folder -> its Codec, and its dataset, which is None if a `shape` is given.

    The Codec is for images of `shape`, or else of the dataset. UserError if best.pt is not that of
    a vae.py or selfvae.py for such images.
    """
    path = Path(folder, "best.pt")
    images = None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        script = checkpoint["script"]
        if script not in ("vae", "selfvae"):
            raise UserError(f"{path} is of {script}.py: take one of vae.py or selfvae.py")
        module = importlib.import_module(script)
        cfg = module.Config(**checkpoint["config"])
        if shape is None:
            images = load_images(cfg.dataset, cfg.data_dir, cfg.size)
            shape = images.shape
        Model = module.VAE if script == "vae" else module.SelfVAE
        model = Model(cfg, tuple(shape)).eval()
        model.load_state_dict(checkpoint["model"])
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError,
            pickle.UnpicklingError):
        raise UserError(f"{path} is missing, damaged, or of another model than these images "
                        "need") from None
    return Codec(model), images


def fingerprint(codec, shape):
    """A hash of the stack after a fixed image, so of all networks as they compute here."""
    values = torch.arange(math.prod(shape)).view(1, *shape) % 256
    stack = random_stack(codec.K)
    codec.push(stack, from_uint8(values.to(torch.uint8)))
    words = np.array(stack.words, "<u4")
    return hashlib.sha256(stack.heads.astype("<u8").tobytes() + words.tobytes()).hexdigest()[:16]


def refuse_to_overwrite(path):
    """UserError if `path` exists, or if its folder does not."""
    if path.exists():
        raise UserError(f"{path} exists: nothing is overwritten")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder")


class Progress:
    """Counts images, gives their rate, and prints a line every half minute."""

    def __init__(self, count):
        self.count = count
        self.done = 0
        self.began = self.told = time.perf_counter()

    def step(self):
        """Count one more image."""
        self.done += 1
        now = time.perf_counter()
        if now > self.told + 30:
            self.told = now
            print(f"{self.done} of {self.count} images", file=sys.stderr, flush=True)

    def rate(self):
        """Images per second so far."""
        return self.done / (time.perf_counter() - self.began)


def first_images(images, count=None):
    """The first `count` images of the test split (all), in batches of one."""
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise UserError(f"COUNT must be a whole number from 1 on, not {count}")
    return Batches(images.test, 1, "cpu", count=int(count) if count else None)


def push_images(codec, test):
    """Push all images onto a new stack -> the stack, the bits it began with, images per second."""
    stack = random_stack(codec.K)
    at_first = stack.bits()
    progress = Progress(test.count)
    for x in test:
        codec.push(stack, x)
        progress.step()
    return stack, at_first, progress.rate()


def write(folder, path, count=None):
    """Write the first `count` test images of the run's dataset to FILE, and print what it costs.

    FILE has a line of JSON, the heads, and then the words from the top of the stack down.
    """
    path = Path(path)
    refuse_to_overwrite(path)
    codec, images = load_codec(folder)
    test = first_images(images, count)
    stack, at_first, rate = push_images(codec, test)
    header = {"shape": images.shape, "count": test.count,
              "fingerprint": fingerprint(codec, images.shape)}
    words = np.array(stack.words[::-1], "<u4").tobytes()
    content = json.dumps(header).encode() + b"\n" + stack.heads.astype("<u8").tobytes() + words
    with open(path, "xb") as file:  # x: fails if it exists
        file.write(content)
    dims = test.count * math.prod(images.shape)
    net = (stack.bits() - at_first) / dims
    print(f"images: {test.count}, bytes: {len(content):,}; {net:.4f} bits per dimension net, "
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
        if [type(number) for number in [count, *shape]] != [int] * 4:
            raise ValueError("its header is broken")
        if min(count, *shape) < 1 or shape[1] != shape[2]:
            raise ValueError("its header is broken")
        heads = np.frombuffer(body, "<u8", LANES).astype(np.uint64)
        words = np.frombuffer(body, "<u4", offset=8 * LANES).astype(np.uint64).tolist()[::-1]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be read, or is no file of compress.py: {error}") from None
    codec, _ = load_codec(folder, shape)
    if sent != fingerprint(codec, shape):
        raise UserError(f"{path} was written with other weights, or by a machine, a torch or a "
                        "numpy that computes other numbers: its images cannot be had here")
    stack = Stack(heads, words)
    images = []
    progress = Progress(count)
    damaged = f"{path} is cut short or damaged, or was written where other numbers are computed"
    try:
        for _ in range(count):
            x = codec.pop(stack)
            images.append(to_uint8(x)[0].permute(1, 2, 0).numpy())
            progress.step()
    except UserError as error:
        raise UserError(f"{damaged}: {error}") from None
    first = random_stack(codec.K)
    if not np.array_equal(stack.heads, first.heads) or stack.words != first.words:
        raise UserError(f"{damaged}: the stack does not end as it began")
    with open(target, "xb") as file:
        np.save(file, np.stack(images[::-1]))  # the last image was on top
    print(f"{count} images in {target}; {progress.rate():.2f} images/s")


# ---- Sizes ---------------------------------------------------------------------------------------

def sizes(folder, count=None):
    """Print what the first `count` test images cost in bits per dimension of x: a Markdown table.

    y_1, y_2, …, x have a row each. Its columns are minus the bound on log p, with one draw of z per
    image; what a stack gains if only this y or x is coded; and what is popped of an image until it
    is seen, as a mean over the first ten. The last one has the latents in full, because their bits
    have not come back yet. More rows have minus the importance-weighted bound, and files of PNG and
    WebP. A line below says how many bits a stack begins with.
    """
    codec, images = load_codec(folder)
    test = first_images(images, count)
    dims = math.prod(images.shape)
    torch.manual_seed(0)
    weighted = importance_weighted(codec.model, test, 16, dims)
    costs = list(mean_terms(codec.model, test).values())  # of u and y_1, z_1 and y_2, …
    popped = popped_until_seen(codec, test)
    print("| bits per dimension of x | -bound | stack, net | popped until it is seen |")
    print("|---|---|---|---|")
    for k in range(codec.K + 1):
        stack, at_first, _ = push_images(Codec(codec.model, k), test)
        bits = (stack.bits() - at_first) / test.count
        bound = bits_per_dim(sum(costs[:2 * k + 2]), dims)
        name = "x" if k == codec.K else f"y_{k + 1}"
        print(f"| {name} | {bound:.4f} | {bits / dims:.4f} | {popped[k] / dims:.4f} |")
    print(f"| x, -bound by 16 importance samples | {weighted['iw_bpd']:.4f} | | |")
    for name in FORMATS:
        total = 0
        for image in images.test[:test.count]:
            total += picture_bits(image, name)
        print(f"| x as {name}, a file each | | {total / test.count / dims:.4f} | |")
    print(f"\nImages: {test.count}, of {images.name}. The stack began with {at_first:,.0f} bits, "
          f"as many as {at_first / bits:.2f} images cost: 1 % of "
          f"{math.ceil(100 * at_first / bits)}.")


def picture_bits(image, name):
    """Bits of an image as a file in one of FORMATS, headers included. image is uint8 (H, W, C)."""
    file = io.BytesIO()
    TF.to_pil_image(image).save(file, name, **FORMATS[name])
    return 8 * len(file.getvalue())


def photo(folder, path, side="64"):
    """Push a photograph's tiles of `side` pixels a side, pop them again, and print what they cost.

    Pixels left over at the right and at the bottom are cut off. PNG and WebP have the same pixels
    in one file, so they can learn from one tile for the next, which the model cannot.
    """
    if not side.isdecimal() or int(side) < 8:
        raise UserError(f"SIDE must be a whole number of at least 8, not {side}")
    side = int(side)
    codec, _ = load_codec(folder, (3, side, side))
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))  # (H, W, 3)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {error}") from None
    rows = pixels.shape[0] // side
    columns = pixels.shape[1] // side
    if rows * columns == 0:
        raise UserError(f"{path} is smaller than one tile of {side}x{side}")
    pixels = pixels[:rows * side, :columns * side]
    tiles = pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    stack, at_first, rate = push_images(codec, Batches(tiles, 1, "cpu"))
    written = stack.bits()
    progress = Progress(len(tiles))
    for tile in tiles[::-1]:
        x = to_uint8(codec.pop(stack))[0].permute(1, 2, 0).numpy()
        if not np.array_equal(x, tile):
            raise UserError("a tile did not come back: sender and receiver computed other numbers")
        progress.step()
    dims = pixels.size
    print(f"{columns * side}x{rows * side} pixels, {len(tiles)} tiles, back bit for bit; "
          f"{rate:.2f} tiles/s there, {progress.rate():.2f} back")
    print(f"{'bits per dimension, net':34}{(written - at_first) / dims:.3f}")
    print(f"{'with the bits of the beginning':34}{written / dims:.3f}")
    for name in FORMATS:
        print(f"{name:34}{picture_bits(pixels, name) / dims:.3f}")


def popped_until_seen(codec, test):
    """Bits popped of an image until y_1, y_2, …, x is seen, each a mean over the first ten."""
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


def main(argv):
    """Do what the command line says -> the exit code."""
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    torch.set_num_threads(1)
    try:
        if argv[:1] == ["write"] and len(argv) in (3, 4):
            command = write
        elif argv[:1] == ["read"] and len(argv) == 3:
            command = read
        elif argv[:1] == ["sizes"] and len(argv) in (2, 3):
            command = sizes
        elif argv[:1] == ["photo"] and len(argv) in (3, 4):
            command = photo
        else:
            raise UserError("write RUN_FOLDER FILE [COUNT], read RUN_FOLDER FILE, sizes RUN_FOLDER "
                            "[COUNT], or photo RUN_FOLDER PICTURE [SIDE]; see --help")
        with torch.no_grad(), cached():
            command(*argv[1:])
    except (UserError, OSError, FloatingPointError) as error:
        print(f"compress.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
