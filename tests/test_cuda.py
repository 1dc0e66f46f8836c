"""A GPU that is not there: all models on fake CUDA tensors, which have shapes and devices only.

An operation raises where a tensor was left on the CPU, or where the host would read a value and so
wait for the device. Forward passes only: autograd does not work on fake CUDA.
"""

import importlib
import warnings

import common
import pytest
import selfvae
import torch
from conftest import MODELS, narrow_networks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """--small, narrower still."""
    narrow_networks(monkeypatch)


@pytest.fixture(autouse=True)
def fake_gpu():
    """Inside every test new tensors are fake; networks run under autocast, where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without CUDA this autocast switches itself off
        autocast = torch.autocast("cuda", torch.bfloat16)
    with FakeTensorMode() as mode, torch.no_grad(), autocast:
        yield mode


def moved(mode, tensor):
    """A real tensor -> a fake one on the GPU."""
    with unset_fake_temporarily():
        tensor = tensor.detach()
    return mode.from_tensor(tensor).to("cuda")


@pytest.fixture
def on_gpu(fake_gpu):
    """on_gpu(script, image_shape, **flags) -> a model, made and moved as `main` does; images."""
    def make(script, image_shape=(3, 16, 16), **flags):
        with unset_fake_temporarily():
            module = importlib.import_module(script)
            model = getattr(module, MODELS[script])(module.Config(small=True, **flags), image_shape)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(moved(fake_gpu, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = moved(fake_gpu, buffer)
        return model, torch.zeros(4, *image_shape, device="cuda")
    return make


def assert_on_gpu(*tensors):
    """On the GPU, and not by way of a number."""
    for tensor in tensors:
        assert isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"


@pytest.mark.parametrize("prior", ["normal", "mog", "realnvp"])
def test_vae(on_gpu, prior):
    """Bound, weights, samples, reconstructions, interpolations, with every prior."""
    model, x = on_gpu("vae", prior=prior)
    assert_on_gpu(*model.terms(x).values(), model.log_weights(x, 2))
    assert_on_gpu(model.sample(2, 0.5, mean=True), model.reconstruct(x))
    assert_on_gpu(model.interpolate(x, x, 3))


@pytest.mark.parametrize("levels, transform, prior, exact", [
    (0, "downscale", "normal", False), (1, "downscale", "realnvp", False),
    (2, "downscale", "normal", True), (1, "sketch", "normal", False),
    (1, "grayscale", "normal", True), (1, "edges", "normal", False),
    (1, "posterize", "normal", True)])
def test_selfvae(on_gpu, levels, transform, prior, exact):
    """Bound and one of the operations, with every transformation; all else with downscaling."""
    model, x = on_gpu("selfvae", (3, 32, 32), levels=levels, transform=transform, prior=prior,
                      exact=exact)
    rate = selfvae.rate(model, x, model.operations["conditional_reconstruct"], 3072)
    assert_on_gpu(*model.terms(x).values(), *rate.values())
    if transform == "downscale":
        assert_on_gpu(model.log_weights(x, 2), model.sample(2), model.vary(x, ["u"], 2))
        assert_on_gpu(model.interpolate(x, x, 3, base=prior == "realnvp"))


@pytest.mark.parametrize("image_shape", [(3, 16, 16), (2, 1, 1)], ids=["images", "points"])
def test_realnvp(on_gpu, image_shape):
    """Flow and inverse, with dequantization and without."""
    model, x = on_gpu("realnvp", image_shape)
    assert_on_gpu(*model.terms(x).values(), model.log_weights(x, 2), model.sample(2, 0.5))
    assert_on_gpu(model.interpolate(x, x, 3), model.inverse_error(x))


@pytest.mark.parametrize("loss", ["vae", "vaegan", "contrastive", "dcvae"])
def test_dcvae(on_gpu, loss):
    """The losses of both players, keys and queue, and what figures are drawn with."""
    model, x = on_gpu("dcvae", loss=loss, negatives=20, patch_after=0)
    where = None
    keys = None
    if model.contrastive:
        where = torch.rand(4, 2, device="cuda")
        keys = model.encode_keys(x, where)
        assert_on_gpu(*keys.values())
    assert_on_gpu(*model(x, where, keys).values())
    if model.discriminator:
        assert_on_gpu(*model(x, where, keys, player="discriminator").values())
    if model.contrastive:
        model.enqueue(keys)
    model.eval()
    assert_on_gpu(model.sample(2), model.reconstruct(x), model.interpolate(x, x, 3))
    assert_on_gpu(model.mix(x, x), model.edit(x, torch.zeros(128, device="cuda"), [0, 1]))


def test_augmentation():
    """Flips and shifts of a batch that lies on the device."""
    pixels = torch.zeros(4, 16, 16, 3, dtype=torch.uint8, device="cuda")
    assert_on_gpu(common.augment(pixels), common.from_uint8(pixels))


def left_on_the_cpu(y, dim, offset):
    """`selfvae.shifted` with an index that is not where y is."""
    index = torch.arange(y.shape[dim], device="cpu") + offset
    return y.index_select(dim, index.clamp(0, y.shape[dim] - 1))


def read_by_the_host(y, dim, offset):
    """`selfvae.shifted` with a look at a pixel."""
    return y * int(y.amax().item() > 0)


@pytest.mark.parametrize("fault", [left_on_the_cpu, read_by_the_host])
def test_faults_are_seen(on_gpu, fault, monkeypatch):
    """Else all of the above would pass whatever the code did."""
    model, x = on_gpu("selfvae", transform="sketch")
    monkeypatch.setattr(selfvae, "shifted", fault)
    with pytest.raises(Exception):
        model.terms(x)
