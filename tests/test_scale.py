"""Several processes, lower precision, compiled losses: all give what one plain process gives."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import common
import numpy as np
import pytest
import selfvae
import torch
import vae
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for, narrow_networks, seeded
from two_processes import nothing, plain, short
from torch.utils._python_dispatch import TorchDispatchMode

CHEAP = {"vae": dict(prior="normal"), "selfvae": dict(prior="normal"), "realnvp": {},
         "dcvae": dict(d_steps=2, negatives=20)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
            "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def records(folder):
    """The lines of log.jsonl."""
    return common.read_log(folder / "log.jsonl")


def gradients(folder, rank=0):
    """What the optimizer was given at each update: [[tensor or None for each parameter]]."""
    count = len(list(folder.glob(f"{rank}-*")))
    return [load(folder / f"{rank}-{i}.pt") for i in range(count)]


def assert_same(ours, theirs, rel):
    """Two flat records: the same keys, text and counts, and numbers up to `rel`; but for times."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if "seconds" in name:
            continue
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=rel, abs=1e-6), name
        else:
            assert ours[name] == value, name


def assert_same_gradients(ours, theirs):
    """To the rounding of fp32 sums in another order. What has no gradient may have one of 0."""
    assert len(ours) == len(theirs) > 0
    for update, reference in zip(ours, theirs):
        given = [g for g in reference if g is not None]
        largest = max(g.abs().max().item() for g in given)
        assert len(update) == len(reference) and largest > 0
        for a, b in zip(update, reference):
            if b is None:
                assert a is None or not a.any()
            else:
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * largest)


# ---- Two processes -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tiny_data, tmp_path_factory):
    """A folder with, for each script, these runs:

    "one" and "two", trained for two steps under `plain` by one process and by two, with their
    gradients; "noisy", trained as usual; "eval", the same evaluated by two; "resumed", the same
    gone on with by two for two steps more.
    """
    folder = tmp_path_factory.mktemp("two")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        for script in SCRIPTS:
            runs = folder / script
            cheap = CHEAP[script]
            with plain(runs / "one-gradients"):
                assert call(script, flags_for(script, tiny_data, runs, name="one", **cheap)) == 0
            assert call(script, flags_for(script, tiny_data, runs, name="noisy", **cheap)) == 0
            for name in ("eval", "resumed"):
                shutil.copytree(runs / "noisy", runs / name)
            line = flags_for(script, tiny_data, runs, name="two", **cheap)
            lines.append((script, line, str(runs / "two-gradients")))
            line = flags_for(script, tiny_data, runs, name="eval", eval=True, **cheap)
            lines.append((script, line, None))
            if script in ("vae", "dcvae"):  # the others are resumed by the same lines
                line = flags_for(script, tiny_data, runs, name="resumed", resume=True, **cheap)
                lines.append((script, [*line, "--steps", "4"], None))
    (folder / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    command = [*TORCHRUN, str(ROOT / "tests" / "two_processes.py"), str(folder / "lines.json")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=ONE_THREAD,
                          timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n[0, 0") == 1  # one process speaks
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_of_two_processes_are_those_of_the_joint_batch(two, script):
    """In both of them, at every update.

    So are what data-dependent initialisation made of the weights, and the queue of keys.
    """
    for rank in (0, 1):
        assert_same_gradients(gradients(two / script / "two-gradients", rank),
                              gradients(two / script / "one-gradients"))
    ours = load(two / script / "two" / "last.pt")["model"]
    theirs = load(two / script / "one" / "last.pt")["model"]
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_writes(two, script):
    """Every line of the log once, with the mean over both; the same files."""
    ours = records(two / script / "two")
    theirs = records(two / script / "one")
    assert len(ours) == len(theirs) > 2
    for row, reference in zip(ours, theirs):
        assert_same(row, reference, rel=1e-4)
    files = {}
    for name in ("two", "one"):
        folder = two / script / name
        files[name] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert files["two"] == files["one"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_evaluate_as_one(two, script):
    """The first of them does, and the other waits."""
    ours = json.loads((two / script / "eval" / "results.json").read_text(encoding="utf-8"))
    theirs = json.loads((two / script / "noisy" / "results.json").read_text(encoding="utf-8"))
    assert_same(ours, theirs, rel=1e-6)


@pytest.mark.parametrize("script", ["vae", "dcvae"])
def test_another_number_of_processes_resumes(two, tiny_data, script, monkeypatch):
    """One process, then two, then one again: the same images, other noise."""
    short(monkeypatch)
    folder = two / script / "resumed"
    line = flags_for(script, tiny_data, two / script, name="resumed", resume=True, steps=5,
                     **CHEAP[script])
    assert [row["step"] for row in records(folder) if row["split"] == "train"] == [1, 2, 3, 4]
    assert call(script, line) == 0
    assert [row["step"] for row in records(folder) if row["split"] == "train"] == [1, 2, 3, 4, 5]


def noise_of(*numbers):
    """Three random numbers that follow from these."""
    common.seed_noise(*numbers)
    return tuple(torch.rand(3).tolist())


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_process_has_its_own_noise(two, script):
    """In training; what follows from other numbers is other noise."""
    for rank in (0, 1):
        path = two / script / "two-gradients" / f"seeds-{rank}"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [[0, 1, rank], [0, 2, rank]]
    different = {noise_of(0, 1, 0), noise_of(0, 1, 1), noise_of(0, 2, 0), noise_of(1, 1, 0)}
    assert len(different) == 4 and noise_of(0, 1, 0) == noise_of(0, 1, 0)


# ---- What the machine decides --------------------------------------------------------------------

@pytest.mark.parametrize("has, asked, taken, warned", [
    (True, "auto", "bf16", False), (False, "auto", "fp32", False), (True, "fp32", "fp32", False),
    (True, "bf16", "bf16", False), (False, "bf16", "bf16", True)])
def test_a_cpu_takes_bf16_where_it_computes_in_it(has, asked, taken, warned, monkeypatch, capsys):
    """Who asks for it elsewhere gets it, slowly, and one line that says so."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    cfg = vae.Config(device="cpu", dtype=asked)
    common.choose_device(cfg)
    assert cfg.dtype == taken and cfg.compile is False
    assert capsys.readouterr().out.count("--dtype fp32 is faster here\n") == warned
    points = vae.Config(device="cpu", dataset="moons")
    common.choose_device(points)
    assert points.dtype == "fp32"


def test_a_run_keeps_its_precision(monkeypatch, tiny_data, tmp_path, capsys):
    """Resumed on another CPU it goes on in the precision that it was started in."""
    narrow_networks(monkeypatch)
    line = flags_for("vae", tiny_data, tmp_path, name="a", prior="normal", dtype="auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert call("vae", line) == 0
    assert "1 x cpu, threads: 1, bf16" in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    line = ["--out_dir", str(tmp_path), "--name", "a", "--resume", "--steps", "3"]
    assert call("vae", line) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "bf16 is emulated on this device: --dtype fp32 is faster here"
    assert load(tmp_path / "a" / "last.pt")["config"]["dtype"] == "bf16"


def test_small_networks_take_one_thread(monkeypatch):
    """Unless the environment says how many; networks of the paper's size take what PyTorch does."""
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    common.choose_device(vae.Config(device="cpu"))
    assert taken == []
    common.choose_device(vae.Config(device="cpu", small=True))
    common.choose_device(vae.Config(device="cpu", dataset="moons"))
    assert taken == [1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    common.choose_device(vae.Config(device="cpu", small=True))
    assert taken == [1, 1]


def test_the_papers_size_on_a_cpu_is_said_in_days(capsys):
    """Of a whole run, not of a few steps, and not with --small. (The line is the same everywhere.)
    """
    pixels = np.zeros((50_000, 1, 1, 3), np.uint8)
    images = common.Images("many", 32, pixels, pixels, pixels, None, False)
    for flags, said in (({"epochs": 864}, "about 50.0 days, if it trains 10 images/s"),
                        ({"steps": 10}, ""), ({"epochs": 864, "small": True}, "")):
        cfg = vae.Config(device="cpu", dtype="fp32", **flags)
        vae.print_header(cfg, "folder", torch.nn.Linear(1, 1), images)
        out = capsys.readouterr().out
        assert out.count("\n") == 1 + bool(said)
        assert said in out and ("--small is for CPUs" in out) == bool(said)


class Count(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches below autograd."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags, most", [
    (dict(size=16), 4300), (dict(size=64, levels=2, exact=True), 9_800)])
def test_a_small_step_is_light(flags, most):
    """Forward, backward and the first update of --small: on a CPU each operation costs time."""
    cfg = selfvae.Config(small=True, **flags)
    model = selfvae.SelfVAE(cfg, (3, cfg.size, cfg.size)).to(memory_format=torch.channels_last)
    x = torch.randint(0, 256, (2, 3, cfg.size, cfg.size)).float() / 127.5 - 1
    model.initialize(x)
    optimizer = torch.optim.Adamax(model.parameters(), foreach=True)
    with Count() as count:
        sum(model.terms(x).values()).mean().backward()
        optimizer.step()
    assert count.operations <= most


def test_evaluation_has_batches_of_its_own():
    """As many pixels as fit into any memory, at most 128 images, at least one."""
    for side, size in ((16, 128), (32, 128), (64, 32), (256, 2), (512, 1)):
        images = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (300, side, side, 3))
        assert common.evaluation_batches(images, "cpu", 200).batch_size == size


# ---- Precision and compilation -------------------------------------------------------------------

def passes(script, **flags):
    """A small model with all its parts -> it, and [(arguments, options)] of its forward passes."""
    module = importlib.import_module(script)
    if script == "dcvae":
        flags |= {"negatives": 20, "patch_after": 0}
    torch.manual_seed(0)
    model = getattr(module, MODELS[script])(module.Config(small=True, **flags), (3, 16, 16))
    model.to(memory_format=torch.channels_last)
    x = common.from_uint8(torch.randint(256, (4, 3, 16, 16)))
    if script in ("vae", "selfvae"):
        model.initialize(x)
    if script == "realnvp":
        with torch.no_grad():  # away from the identity
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
    if script != "dcvae":
        return model, [((x,), {})]
    where = torch.rand(4, 2)
    keys = model.encode_keys(x, where)
    model.eval()  # else each pass would move spectral norm's vectors
    return model, [((x, where, keys), {}), ((x, where, keys), {"player": "discriminator"})]


def outputs(function, arguments, options):
    """What a forward pass gives, from the same noise each time -> {name: tensor}."""
    result = seeded(function, *arguments, **options)
    return result if isinstance(result, dict) else dict(enumerate(result))


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16(script):
    """One pass of the same weights in two precisions: losses are fp32 and near, so is the slope.

    Games are compared nowhere: two steps of two players in two precisions are two games.
    """
    model, ((arguments, options), *_) = passes(script)
    slopes = {}
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = outputs(model, arguments, options)
        assert all(values.dtype == torch.float32 for values in terms.values())
        if script == "realnvp":
            terms = model.costs(*terms.values())
        loss = sum(values.mean() for values in terms.values())
        given = [p for p in model.parameters() if p.requires_grad]
        slope = torch.autograd.grad(loss, given, allow_unused=True)
        slopes[dtype] = torch.cat([g.flatten() for g in slope if g is not None])
        losses[dtype] = loss.item()
    assert not torch.equal(*slopes.values())  # losses can agree in every digit by chance
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)
    cosine = torch.cosine_similarity(*slopes.values(), dim=0)
    assert cosine > 0.8


UNBROKEN = {"selfvae": dict(prior="normal", exact=True)}


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "vae"])
def test_no_graph_breaks(script, monkeypatch):
    """One graph, in bf16 (`fullgraph` raises at a break), that gives what it gives uncompiled.

    vae.py is in the next test; realnvp.py has the flow.
    """
    narrow_networks(monkeypatch)  # tracing takes as long as there are layers
    model, calls = passes(script, **UNBROKEN.get(script, {}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for arguments, options in calls:
        with torch.autocast("cpu", torch.bfloat16):
            ours = outputs(compiled, arguments, options)
            theirs = outputs(model, arguments, options)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4), name
    torch.compiler.reset()


def test_compiled_gradients(monkeypatch):
    """Forward and backward pass traced, in fp32: the gradients of the eager ones."""
    narrow_networks(monkeypatch)
    model, ((arguments, options),) = passes("vae", prior="mog")
    slopes = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = sum(outputs(function, arguments, options).values()).mean()
        slopes.append(torch.autograd.grad(loss, list(model.parameters())))
    for ours, theirs in zip(*slopes):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    torch.compiler.reset()


READING = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
           "nonzero")


def spied(original, script, reads):
    """A method of tensors that notes which function of ours called it."""
    def method(self, *arguments, **options):
        frame = sys._getframe(1)
        name = frame.f_globals.get("__name__", "")
        # The nearest of ours, unless the optimizer asks, whose counters lie on the host.
        while name.startswith("torch.") and not name.startswith("torch.optim"):
            frame = frame.f_back
            name = frame.f_globals.get("__name__", "")
        if name in (script, "common"):
            reads.append(f"{frame.f_code.co_name}, line {frame.f_lineno}")
        return original(self, *arguments, **options)
    return method


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_waits_for_nothing(script, tiny_data, tmp_path, monkeypatch):
    """Between two progress lines no line of ours reads a number from a tensor.

    On a GPU each would wait for all work in flight.
    """
    short(monkeypatch)
    monkeypatch.setattr(f"{script}.evaluate", nothing)
    monkeypatch.setattr(f"{script}.validate", nothing)
    reads = []
    for name in READING:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, spied(original, script, reads))
    line = flags_for(script, tiny_data, tmp_path, name="run", **CHEAP[script])
    assert call(script, [*line, "--steps", "6", "--log_every", "100"]) == 0
    in_the_log = ("sum_over_processes", "mean_over_steps", "require_finite", "<")
    assert any(read.startswith("sum_over_processes") for read in reads)  # the spy sees
    assert [read for read in reads if not read.startswith(in_the_log)] == []


# ---- Batches of several processes ----------------------------------------------------------------

def batch_size_of(batch_size, parts, count=35):
    """The images of a step, of a set of `count`."""
    images = np.zeros((count, 1, 1, 1), np.uint8)
    return common.Batches(images, batch_size, "cpu", parts=parts).batch_size


def test_a_small_set_is_one_batch_that_splits():
    """35 images in two parts are 34; 33 that were asked for are an error."""
    assert batch_size_of(64, 1) == 35 and batch_size_of(64, 2) == 34
    assert batch_size_of(32, 2) == 32 and batch_size_of(64, 4) == 32
    with pytest.raises(common.UserError, match="33 images do not split into 2"):
        batch_size_of(33, 2)


def test_processes_share_a_batch():
    """Put together as `gather_batch` does, the shares are the whole batch in its order."""
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    batches = common.Batches(images, 6, "cpu")
    parts = [batches.batch(1, rank, 3) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batches.batch(1))
