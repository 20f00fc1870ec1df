"""The Triton version without a GPU: equal to the reference in Triton's interpreter, and compiled ahead of time for three chips."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from megalens.ops import OpError, gumbel_embed, noise_keys

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered:RuntimeWarning"
)  # the interpreter's unsigned arithmetic wraps, as it should


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Triton reads the variable when the kernels are defined, at the module's first import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("megalens.ops.gumbel_triton")


def run(impl, parts, tau, softcap, tied, bias, wanted, noise=1.0):
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in parts.items()}
    keys = noise_keys(0, 1, torch.arange(len(leaves["hidden"])), 0)
    in_weight, bias_V = leaves["out" if tied else "in"], leaves["bias"] if bias else None
    out = gumbel_embed(leaves["hidden"], leaves["out"], in_weight, tau, keys, noise=noise, bias_V=bias_V, softcap=softcap, impl=impl)
    probe = torch.linspace(-1, 1, out.embeds.numel(), dtype=torch.float64).reshape(out.embeds.shape)
    ((out.embeds * probe).sum() + (out.log_prob + 0.5 * out.lse - 0.3 * out.entropy).double().sum()).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_equals_reference(B, V, D, dtype, tau, softcap=None, tied=True, bias=False, wanted=("hidden",)):
    draw = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, D), "out": (V, D), "in": (V, D), "bias": (V,)}
    parts = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    parts["out"] = (parts["out"] * 3 / D**0.5).to(dtype)
    mine, my_grads = run("triton", parts, tau, softcap, tied, bias, wanted)
    exact, exact_grads = run("reference", {name: t.double() for name, t in parts.items()}, tau, softcap, tied, bias, wanted)
    assert torch.equal(mine.ids, exact.ids)
    assert torch.equal(mine.embeds, parts["out" if tied else "in"][mine.ids])
    assert my_grads.keys() == exact_grads.keys() == set(wanted)
    pairs = [(getattr(mine, name), getattr(exact, name), 2e-6) for name in ("log_prob", "lse", "entropy")]
    pairs += [(my_grads[name], exact_grads[name], 2e-5 if dtype == torch.float32 else 2e-2) for name in wanted]
    for a, b, rel in pairs:
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= rel * b.double().abs().max()


SHAPES = [(B, V, D) for B in (1, 3, 17) for V in (257, 4096) for D in (64, 576)] + [(3, 50257, 64)]


@pytest.mark.parametrize(("B", "V", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "tau"), [(torch.float32, 1.0), (torch.bfloat16, 0.1)])
def test_kernels_equal_the_exact_op_in_the_interpreter(monkeypatch, interpreter, B, V, D, dtype, tau):
    if V > 257:  # the interpreter takes the same time for a program of any size: a larger block means fewer
        sizes = interpreter.blocks(B, dtype) | {"BV": 2048, "BD": 64}
        monkeypatch.setattr(interpreter, "blocks", lambda rows, dtype: dict(sizes))
    assert_equals_reference(B, V, D, dtype, tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_softcap_untied_embeddings_and_weight_gradients(dtype):
    assert_equals_reference(17, 700, 64, dtype, 0.5, softcap=5.0, tied=False, bias=True, wanted=("hidden", "out", "in", "bias"))


def test_float64_is_refused():
    weight = torch.randn(300, 8, dtype=torch.float64)
    with pytest.raises(OpError, match="no float64"):
        gumbel_embed(weight[:2], weight, weight, 1.0, torch.arange(2), impl="triton")


def test_ahead_of_time_for_three_chips_without_spills_and_within_shared_memory():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), *sys.path])
    command = [sys.executable, "benchmarks/kernel_resources.py", "--rows", "8", "64", "--dtype", "bf16"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    assert {(line["kernel"], line["arch"]) for line in lines} == {(k, a) for k in ("statistics", "factors") for a in (80, 90, 100)}
    for line in lines:
        assert line["stack"] == 0 and line["local"] == 0, line  # a spill lies in either
        assert 0 < line["reg"] <= 255 and 0 < line["shared"] <= line["shared_limit"], line
