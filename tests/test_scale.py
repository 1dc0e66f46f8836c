"""Many processes, parts of a batch, compiled losses, images that do not fit: all of them give what one plain process gives."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import common
import numpy as np
import pytest
import torch
from conftest import MODELS, ROOT, SCRIPTS, call, flags_for, seeded
from pair import plain

CHEAP = {"vae": dict(prior="normal"), "selfvae": dict(prior="normal"), "realnvp": {}, "dcvae": dict(d_steps=2, negatives=20)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def gradients(folder, rank=0):
    """What the optimizer was given at each update, in order: [[tensor or None for each parameter]]."""
    return [load(folder / f"{rank}-{i}.pt") for i in range(len(list(folder.glob(f"{rank}-*"))))]


def assert_same(ours, theirs, rel):
    """Two flat records: the same keys, text and counts, and numbers up to `rel`; but for times."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        if "seconds" not in name:
            assert ours[name] == (pytest.approx(theirs[name], rel=rel, abs=1e-6) if isinstance(theirs[name], float) else theirs[name]), name


def assert_same_gradients(ours, theirs):
    """To the rounding of fp32 sums in another order."""
    assert len(ours) == len(theirs) > 0
    for update, reference in zip(ours, theirs):
        assert len(update) == len(reference) and any(g is not None and g.any() for g in reference)
        largest = max(g.abs().max() for g in reference if g is not None)
        for a, b in zip(update, reference):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(largest))


# ---- Two processes -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two(tiny_data, tmp_path_factory):
    """A folder with, for each script: "one" and "two", trained for two steps under `plain` by one process and by two, with their
    gradients; "noisy", trained as usual; "eval", the same evaluated by two; "resumed", the same gone on with by two for two steps more."""
    folder = tmp_path_factory.mktemp("two")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.seconds_to_sample, "__defaults__", (1,))
        for script in SCRIPTS:
            patch.setattr(f"{script}.draw", lambda *arguments: None)
            flags = lambda name, **more: flags_for(script, tiny_data, folder / script, name=name, **CHEAP[script], **more)
            with plain(folder / script / "one-gradients"):
                assert call(script, flags("one")) == 0
            assert call(script, flags("noisy")) == 0
            for name in ("eval", "resumed"):
                shutil.copytree(folder / script / "noisy", folder / script / name)
            lines += [(script, flags("two"), str(folder / script / "two-gradients")), (script, flags("eval", eval=True), None)]
            if script in ("vae", "dcvae"):  # the others are checkpointed and resumed by the same lines
                lines.append((script, [*flags("resumed", resume=True), "--steps", "4"], None))
    (folder / "lines.json").write_text(json.dumps(lines))
    done = subprocess.run([*TORCHRUN, str(ROOT / "tests" / "pair.py"), str(folder / "lines.json")], capture_output=True, text=True,
                          env=ONE_THREAD, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n[0, 0") == 1  # one process speaks
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_of_two_processes_are_those_of_the_joint_batch(two, script):
    """In both of them, at every update; so are what data-dependent initialisation made of the weights, and the queue of keys."""
    for rank in (0, 1):
        assert_same_gradients(gradients(two / script / "two-gradients", rank), gradients(two / script / "one-gradients"))
    ours, theirs = (load(two / script / name / "last.pt")["model"] for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_process_writes(two, script):
    """Every line of the log once, with the mean over both; the same files."""
    ours, theirs = ([json.loads(line) for line in (two / script / name / "log.jsonl").read_text().splitlines()] for name in ("two", "one"))
    assert len(ours) == len(theirs) > 2
    for row, reference in zip(ours, theirs):
        assert_same(row, reference, rel=1e-4)
    files = [sorted(str(path.relative_to(two / script / name)) for path in (two / script / name).rglob("*")) for name in ("two", "one")]
    assert files[0] == files[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_evaluate_as_one(two, script):
    ours, theirs = (json.loads((two / script / name / "results.json").read_text()) for name in ("eval", "noisy"))
    assert_same(ours, theirs, rel=1e-6)
    assert not list((two / script / "eval").glob("importance-*"))


@pytest.mark.parametrize("script", ["vae", "dcvae"])
def test_another_number_of_processes_resumes(two, tiny_data, script):
    """One process, then two, then one again: the same images, other noise."""
    steps = lambda: [row["step"] for row in map(json.loads, (two / script / "resumed" / "log.jsonl").read_text().splitlines()) if row["split"] == "train"]
    assert steps() == [1, 2, 3, 4]
    line = flags_for(script, tiny_data, two / script, name="resumed", resume=True, steps=5, **CHEAP[script])
    assert call(script, line) == 0 and steps() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_process_has_its_own_noise(two, script):
    """In training; what follows from other numbers is other noise."""
    for rank in (0, 1):
        seeds = [json.loads(line) for line in (two / script / "two-gradients" / f"seeds-{rank}").read_text().splitlines()]
        assert [numbers for numbers in seeds if len(numbers) == 3] == [[0, 1, rank], [0, 2, rank]]
    draw = lambda *numbers: common.seed_noise(*numbers) or tuple(torch.rand(3).tolist())
    assert len({draw(0, 1, 0), draw(0, 1, 1), draw(0, 2, 0), draw(1, 1, 0)}) == 4 and draw(0, 1, 0) == draw(0, 1, 0)


@pytest.fixture
def endless(tiny_data, tmp_path):
    """start(**flags) -> torchrun with two processes of vae.py, in training, and their process numbers."""
    started = []

    def start(**flags):
        line = flags_for("vae", tiny_data, tmp_path, name="run", **CHEAP["vae"], **flags) + ["--steps", "1000000"]
        process = subprocess.Popen([*TORCHRUN, str(ROOT / "vae.py"), *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        started.append(process)
        log, waited = tmp_path / "run" / "log.jsonl", time.monotonic()
        while not (log.exists() and log.read_text().count("\n") > 2) and process.poll() is None and time.monotonic() - waited < 60:
            time.sleep(0.1)
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
        children = [int(child) for child, parent in zip(table[::2], table[1::2]) if int(parent) == process.pid]
        assert len(children) == 2
        return process, children
    yield start
    for process in started:
        process.kill()


def test_one_stops_all_stop(endless, tmp_path):
    """A signal that reaches one process: all finish the same step."""
    process, children = endless(save_every=1_000_000)
    os.kill(children[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped and saved" in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert load(tmp_path / "run" / "last.pt")["state"]["step"] == steps[-1] == len(steps)


def test_a_lost_process_ends_the_run(endless, tmp_path):
    """Killed as the system kills it when memory runs out: the other says so, and what was saved is whole."""
    process, children = endless(save_every=1)
    os.kill(children[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume goes on" in err
    assert load(tmp_path / "run" / "last.pt")["state"]["step"] >= 1


def test_batch_that_does_not_split(tiny_data, tmp_path, capsys):
    for script in SCRIPTS:
        line = flags_for(script, tiny_data, tmp_path, accumulate=3)  # 4 images a batch
        assert call(script, line) == 2 and "do not split into" in capsys.readouterr().err


# ---- A batch in parts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulated_gradients(script, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{script}.evaluate", lambda *arguments: None)
    for parts in (1, 4):
        line = flags_for(script, tiny_data, tmp_path, name=str(parts), accumulate=parts, **CHEAP[script])
        with plain(tmp_path / f"gradients-{parts}"):
            assert call(script, line) == 0
    rows = [[json.loads(line) for line in (tmp_path / str(parts) / "log.jsonl").read_text().splitlines()] for parts in (1, 4)]
    assert_same_gradients(gradients(tmp_path / "gradients-4"), gradients(tmp_path / "gradients-1"))
    for row, reference in zip(*rows):
        assert_same(row, reference, rel=1e-4)


def test_accumulated_penalty(tiny_data, tmp_path, monkeypatch):
    """realnvp's l2 counts once, whatever the number of parts: alone, its gradients are 1e-4 times weight norm's g and tanh's factor."""
    import realnvp
    monkeypatch.setattr(realnvp, "evaluate", lambda *arguments: None)

    class Flat(realnvp.RealNVP):
        """A likelihood without slope."""
        def terms(self, x):
            return {name: 0 * values for name, values in super().terms(x).items()}

    with plain(tmp_path / "gradients"):
        assert call("realnvp", flags_for("realnvp", tiny_data, tmp_path, name="flat", accumulate=2), Flat) == 0
    weights = load(tmp_path / "flat" / "last.pt")["model"]
    for name, gradient in zip(weights, gradients(tmp_path / "gradients")[0]):
        expected = 1e-4 * weights[name] * name.endswith(("original0", "scale"))
        assert gradient is None and not expected.any() or torch.allclose(gradient, expected)


# ---- Compiled ----------------------------------------------------------------------------------------------------------

def losses(script, **flags):
    """-> a small model with all its parts, and [(function, arguments)] of what training compiles of it."""
    module = importlib.import_module(script)
    cfg = module.Config(small=True, **flags, **({"negatives": 20, "patch_after": 0} if script == "dcvae" else {}))
    torch.manual_seed(0)
    model = getattr(module, MODELS[script])(cfg, (3, 16, 16)).to(memory_format=torch.channels_last)
    x = common.from_uint8(torch.randint(256, (4, 3, 16, 16)))
    if script != "dcvae":
        if script != "realnvp":
            model.initialize(x)
        return model, [(model.terms, (x,))]
    keys = model.encode_keys(x, patches=True)
    return model, [(model.terms, (x, *keys)), (model.discriminator_terms, (x, *keys))]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "vae"])
def test_no_graph_breaks(script):
    """One graph, in bf16 (`fullgraph` raises at a break), whose terms are those without compilation. vae.py is in the next test."""
    model, functions = losses(script, **({"prior": "normal"} if script == "selfvae" else {}))  # realnvp.py has the flow
    if script == "dcvae":
        model.eval()  # else each pass would move spectral norm's vectors
    for function, arguments in functions:
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        with torch.autocast("cpu", torch.bfloat16):
            terms = seeded(compiled, *arguments)
            expected = seeded(function, *arguments)
        assert terms.keys() == expected.keys()
        for name in expected:
            assert torch.allclose(terms[name], expected[name], rtol=1e-4), name
    torch.compiler.reset()


def test_compiled_gradients():
    """Forward and backward pass traced, in fp32: terms and gradients of the eager ones."""
    model, ((function, arguments),) = losses("vae", prior="mog")
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        terms = seeded(f, *arguments)
        sum(values.mean() for values in terms.values()).backward()
        results.append([*terms.values(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()) for a, b in zip(*results))
    torch.compiler.reset()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_waits_for_nothing(script, tiny_data, tmp_path, monkeypatch):
    """Between two reports no line of ours reads a number from a tensor: on a GPU each would wait for all work in flight. `asked` may:
    what it reads never was on a device."""
    monkeypatch.setattr(f"{script}.evaluate", lambda *arguments: None)
    monkeypatch.setattr(f"{script}.draw", lambda *arguments: None)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        def spy(self, *arguments, original=getattr(torch.Tensor, name), **options):
            frame = sys._getframe(1)  # the nearest of ours, if it is not the optimizer that asks, whose counters lie on the host
            while frame.f_globals.get("__name__", "").startswith("torch.") and not frame.f_globals["__name__"].startswith("torch.optim"):
                frame = frame.f_back
            if frame.f_globals["__name__"] in (script, "common"):
                reads.append(f"{frame.f_code.co_name}, line {frame.f_lineno}")
            return original(self, *arguments, **options)
        monkeypatch.setattr(torch.Tensor, name, spy)
    line = flags_for(script, tiny_data, tmp_path, name="run", **CHEAP[script])
    assert call(script, line + ["--steps", "6", "--log_every", "100", "--eval_every", "100", "--save_every", "100"]) == 0
    reporting = ("asked", "report", "summed", "mean_terms", "distances", "draw", "shared", "dmol_sample", "interpolate", "<")
    assert any(read.startswith("summed") for read in reads)  # the spy sees
    assert [read for read in reads if not read.startswith(reporting)] == []


# ---- Importance weighting ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["vae", "selfvae"])
def test_any_chunk_same_bound(script):
    """Samples decoded 1, 3 or 100 at a time: the same log-weights; encoded once."""
    module = importlib.import_module(script)
    torch.manual_seed(0)
    model = getattr(module, MODELS[script])(module.Config(small=True), (3, 16, 16))
    x = common.from_uint8(torch.randint(256, (3, 3, 16, 16)))
    model.initialize(x)
    passes = []
    encoder = model.q_z if script == "vae" else model.q_u
    encoder.register_forward_hook(lambda *arguments: passes.append(1))
    whole = seeded(model.log_weights, x, 10, chunk=100)
    for chunk in (1, 7, 9):
        assert torch.allclose(seeded(model.log_weights, x, 10, chunk=chunk), whole, rtol=1e-5)
    assert len(passes) == 4 and whole.std(0).min() > 0


class Slow:
    """A model whose log-weights are noise. It is stopped before batch number `stop`."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def log_weights(self, x, samples):
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return 100 * torch.randn(samples, len(x))


def test_stopped_importance_weighting_goes_on(tmp_path):
    batches, kept = common.Batches(np.zeros((11, 2, 2, 1), np.uint8), 2, "cpu"), tmp_path / "kept.jsonl"
    torch.manual_seed(5)
    whole = common.importance_weighted(Slow(), batches, 4, 12)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        common.importance_weighted(Slow(stop=3), batches, 4, 12, kept)
    assert len(kept.read_text().split()) > 3
    kept.write_text(kept.read_text()[:-9])  # killed while it wrote the third
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        common.importance_weighted(Slow(stop=1), batches, 4, 12, kept)  # the third again, and stopped
    torch.manual_seed(5)
    assert common.importance_weighted(rest := Slow(), batches, 4, 12, kept) == whole
    assert rest.calls == 3 and not kept.exists()


def test_a_new_run_takes_nothing_from_an_old_one(tiny_data, tmp_path):
    """A folder whose checkpoints were deleted: what an evaluation left there was of another model."""
    line = flags_for("vae", tiny_data, tmp_path, name="run", **CHEAP["vae"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "importance-2-2-4-fp32.jsonl").write_text(json.dumps([0, [[-1.0] * 4, [-1.0] * 4]]) + "\n")
    assert call("vae", line) == 0 and json.loads((tmp_path / "run" / "results.json").read_text())["iw_bpd"] > 1


def test_progress_is_told(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    common.importance_weighted(Slow(), common.Batches(np.zeros((11, 2, 2, 1), np.uint8), 2, "cpu"), 4, 12)
    assert capsys.readouterr().out.splitlines()[0] == "importance weighting: 4 of 11 images  0:00:40 < 0:01:20"


# ---- Images that do not fit --------------------------------------------------------------------------------------------

def test_streamed_batches_are_read_ahead(monkeypatch):
    """Each batch is read once, and the next is already on its way; the same images as from memory, in parts too."""
    levels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    resident = common.Batches(levels, 6, "cpu", seed=1)
    monkeypatch.setattr(common, "RESIDENT_BYTES", 100)
    streamed, read = common.Batches(levels, 6, "cpu", seed=1), []
    monkeypatch.setattr(streamed, "_read", lambda index, original=streamed._read: read.append(index) or original(index))
    assert streamed.resident is None
    for step, reads in enumerate((2, 3, 3, 5, 6, 6)):  # two epochs of three batches; ahead within an epoch
        assert torch.equal(streamed.batch(step, 1, 2), resident.batch(step, 1, 2))
        streamed.reader.submit(int).result()  # the thread is done with all it was given
        assert len(read) == reads
    assert torch.equal(torch.cat(list(streamed)), torch.cat(list(resident)))


def test_a_small_set_is_one_batch_that_splits():
    batches = lambda size, parts: common.Batches(np.zeros((35, 1, 1, 1), np.uint8), size, "cpu", parts=parts).batch_size
    assert [batches(64, 1), batches(64, 2), batches(32, 2), batches(64, 4)] == [35, 34, 32, 32]
    with pytest.raises(common.UserError, match="33 images do not split into 2"):
        batches(33, 2)


def test_processes_share_a_batch():
    batches = common.Batches(np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1), 6, "cpu")
    parts = [batches.batch(1, rank, 3) for rank in range(3)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), batches.batch(1))  # in the order in which `gathered` puts them
