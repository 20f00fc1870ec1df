"""The Triton versions equal their references in Triton's interpreter.

Run by test_ops_triton.py, in a process that has TRITON_INTERPRET=1 from its start: Triton reads it when it is imported, and
``torch.compile`` imports Triton.
"""

import pytest
import torch

from megalens.ops import OpError, gumbel_embed, gumbel_triton, log_prob_triton, noise_keys, vocab_log_prob

# unsigned arithmetic wraps as it should, and masked lanes may hold anything
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


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


def take_larger_blocks(monkeypatch, module, rows, dtype):
    """The interpreter takes the same time for a program of any size: a larger block means fewer of them."""
    sizes = module.blocks(rows, dtype) | {"BV": 2048, "BD": 64}
    monkeypatch.setattr(module, "blocks", lambda *_: dict(sizes))


SHAPES = [(B, V, D) for B in (1, 3, 17) for V in (257, 4096) for D in (64, 576)] + [(3, 50257, 64)]


@pytest.mark.parametrize(("B", "V", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "tau"), [(torch.float32, 1.0), (torch.bfloat16, 0.1)])
def test_kernels_equal_the_exact_op_in_the_interpreter(monkeypatch, B, V, D, dtype, tau):
    if V > 257:
        take_larger_blocks(monkeypatch, gumbel_triton, B, dtype)
    assert_equals_reference(B, V, D, dtype, tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_softcap_untied_embeddings_and_weight_gradients(dtype):
    assert_equals_reference(17, 700, 64, dtype, 0.5, softcap=5.0, tied=False, bias=True, wanted=("hidden", "out", "in", "bias"))


def assert_log_prob_equals_reference(N, V, D, dtype, softcap=None, bias=False, wanted=("hidden",)):
    draw = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,)}
    parts = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    parts["weight"] = (parts["weight"] * 3 / D**0.5).to(dtype)
    ids = torch.randint(V, (N,), generator=draw)
    ids[0], ids[-1] = V - 1, 0
    found = []
    for impl, cast in (("triton", lambda t: t), ("reference", lambda t: t.double())):
        leaves = {name: cast(t).clone().requires_grad_(name in wanted) for name, t in parts.items()}
        bias_V = leaves["bias"] if bias else None
        out = vocab_log_prob(leaves["hidden"], leaves["weight"], ids, bias_V=bias_V, softcap=softcap, impl=impl)
        weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
        (weights * (out.log_prob.double() - 0.3 * out.entropy.double())).sum().backward()
        found.append((*out, *(leaves[name].grad for name in wanted)))
    for at, (a, b) in enumerate(zip(*found, strict=True)):
        rel = 2e-6 if at < 2 else 2e-5 if dtype == torch.float32 else 2e-2
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= rel * b.double().abs().max()


@pytest.mark.parametrize(("N", "V", "D"), [(1, 257, 64), (3, 100, 64), (17, 4096, 64), (70, 4099, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_kernels_equal_the_exact_op_in_the_interpreter(monkeypatch, N, V, D, dtype):
    if V > 257:
        take_larger_blocks(monkeypatch, log_prob_triton, N, dtype)
    assert_log_prob_equals_reference(N, V, D, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_in_few_spans_with_bias_softcap_and_weight_gradients(monkeypatch, dtype):
    monkeypatch.setattr(log_prob_triton, "SPANS", 2)  # several blocks of ids a program, folded as it goes
    monkeypatch.setattr("megalens.ops.tile.MAX_LOGITS", 2**12)  # several chunks in the backward
    assert_log_prob_equals_reference(17, 700, 64, dtype, softcap=5.0, bias=True, wanted=("hidden", "weight", "bias"))


def test_log_prob_of_an_id_beyond_the_vocabulary_is_nan():
    hidden, weight = torch.randn(3, 16), torch.randn(300, 16)
    log_prob, _, _ = log_prob_triton.forward(hidden, weight, torch.tensor([0, 300, -1]), None, None)
    assert log_prob.isnan().tolist() == [False, True, True]


def test_float64_is_refused():
    weight = torch.randn(300, 8, dtype=torch.float64)
    with pytest.raises(OpError, match="no float64"):
        vocab_log_prob(weight[:2], weight, torch.arange(2), impl="triton")
    with pytest.raises(OpError, match="no float64"):
        gumbel_embed(weight[:2], weight, weight, 1.0, torch.arange(2), impl="triton")
