"""The tiled divergences equal the reference, in one pass, with gradients to either side."""

import pytest
import torch

from megalens.ops import OpError, kl_tile, native, vocab_divergences, vocab_kl

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="the tile version needs a C++ compiler")
NAMES = ("p_hidden", "q_hidden", "p_weight", "q_weight", "p_bias", "q_bias")


def sides(N, V, D, dtype, tied=False):
    """Both sides' hidden states, embeddings and biases; where tied, q's embedding is p's."""
    draw = torch.Generator().manual_seed(N + V)
    shapes = [(N, D), (N, D), (V, D), (V, D), (V,), (V,)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    tensors[2:4] = [t * 3 / D**0.5 for t in tensors[2:4]]
    return dict(zip(NAMES, (t.to(dtype) for t in tensors), strict=True)) | ({"q_weight": None} if tied else {})


def run(impl, parts, softcap, bias, wanted):
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in parts.items() if t is not None}
    p_weight = leaves["p_weight"]
    biases = {"p_bias": leaves["p_bias"], "q_bias": leaves["q_bias"]} if bias else {}
    hidden = leaves["p_hidden"], leaves["q_hidden"]
    out = vocab_divergences(*hidden, p_weight, leaves.get("q_weight", p_weight), softcap=softcap, impl=impl, **biases)
    weights = torch.linspace(0.5, 1.5, len(hidden[0]), dtype=torch.float64)
    sum(factor * (weights * part.double()).sum() for factor, part in zip((1.0, -0.4, 0.3, 0.2), out, strict=True)).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same(mine, theirs, rel):
    assert mine.shape == theirs.shape
    assert (mine.double() - theirs.double()).abs().max() <= rel * theirs.double().abs().max()


@pytest.mark.parametrize(("N", "V", "D"), [(1, 257, 64), (3, 4096, 576), (17, 4096, 64), (40, 1030, 64), (17, 50257, 64)])
@pytest.mark.parametrize(("softcap", "tied", "bias"), [(None, True, False), (5.0, False, True), (5.0, True, True), (None, False, False)])
def test_tiles_equal_reference_to_float32_rounding(N, V, D, softcap, tied, bias):
    parts = sides(N, V, D, torch.float32, tied)
    mine, my_grads = run("tile", parts, softcap, bias, ("p_hidden", "q_hidden"))
    exact_parts = {name: None if t is None else t.double() for name, t in parts.items()}
    exact, exact_grads = run("reference", exact_parts, softcap, bias, ("p_hidden", "q_hidden"))
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == torch.float32
        assert_same(a, b, 2e-6)
    assert my_grads.keys() == exact_grads.keys() == {"p_hidden", "q_hidden"}
    for name, gradient in my_grads.items():
        assert_same(gradient, exact_grads[name], 2e-5)


@pytest.mark.parametrize("wanted", [("p_hidden",), ("q_hidden",), ("p_weight",), ("q_bias",), ("p_hidden", "q_weight"), NAMES])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_go_where_they_are_wanted_and_nowhere_else(wanted, tied):
    parts = sides(3, 1100, 8, torch.float64, tied)
    wanted = tuple(name for name in wanted if parts[name] is not None) or ("p_bias",)
    mine, theirs = (run(impl, parts, 4.0, True, wanted)[1] for impl in ("tile", "reference"))
    assert mine.keys() == theirs.keys() == set(wanted)
    for name in wanted:
        assert_same(mine[name], theirs[name], 1e-11)


@pytest.mark.parametrize(("softcap", "tied", "bias"), [(None, True, False), (5.0, False, True)])
def test_tiles_of_another_device_do_the_same_with_torch_operations(monkeypatch, softcap, tied, bias):
    monkeypatch.setattr(kl_tile, "is_native", lambda tensor: False)
    parts = sides(17, 4096, 64, torch.float32, tied)
    mine, my_grads = run("tile", parts, softcap, bias, ("p_hidden", "q_hidden"))
    exact_parts = {name: None if t is None else t.double() for name, t in parts.items()}
    exact, exact_grads = run("reference", exact_parts, softcap, bias, ("p_hidden", "q_hidden"))
    for a, b in [*zip(mine, exact, strict=True), *((my_grads[name], exact_grads[name]) for name in exact_grads)]:
        assert_same(a, b, 2e-5)


def test_bfloat16_equals_the_exact_divergences_to_bfloat16_rounding():
    parts = sides(17, 4096, 64, torch.bfloat16)
    mine, my_grads = run("tile", parts, None, False, ("q_hidden",))
    exact, exact_grads = run("reference", {name: t.double() for name, t in parts.items()}, None, False, ("q_hidden",))
    assert_same(mine.kl, exact.kl, 1e-2)
    assert my_grads["q_hidden"].dtype == torch.bfloat16
    assert_same(my_grads["q_hidden"], exact_grads["q_hidden"], 2e-2)


def test_gradcheck():
    parts = sides(2, 9, 3, torch.float64)
    tensors = [t.requires_grad_() for t in parts.values()]

    def divergences(*t):
        return vocab_divergences(*t[:4], p_bias=t[4], q_bias=t[5], softcap=3.0, impl="tile")

    assert torch.autograd.gradcheck(divergences, tensors)


def test_a_distribution_is_at_no_distance_from_itself():
    parts = sides(5, 4200, 16, torch.float32, tied=True)
    hidden = parts["p_hidden"].requires_grad_()
    kl = vocab_kl(hidden, hidden.detach(), parts["p_weight"], parts["p_weight"], impl="tile")
    kl.sum().backward()
    assert kl.abs().max() < 1e-6 and hidden.grad.abs().max() < 1e-6


def test_nothing_of_the_vocabularys_width_is_kept_for_backward():
    parts = sides(8, 5000, 16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vocab_kl(parts["p_hidden"].requires_grad_(), parts["q_hidden"], parts["p_weight"], parts["q_weight"], impl="tile")
    inputs = {t.data_ptr() for t in parts.values()}
    own = [t for t in kept if t.data_ptr() not in inputs]
    assert own and all(t.shape == (8,) for t in own)


def test_compiles_without_a_graph_break():
    parts = sides(3, 4200, 8, torch.float32)

    def loss(p_hidden):
        return vocab_kl(p_hidden.tanh(), parts["q_hidden"], parts["p_weight"], parts["q_weight"], impl="tile").mean()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        hidden = parts["p_hidden"].clone().requires_grad_()
        function(hidden).backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


def test_vmap_is_refused():
    parts = sides(3, 4200, 8, torch.float32)
    with pytest.raises(OpError, match="no vmap"):
        torch.vmap(lambda h: vocab_kl(h, h, parts["p_weight"], parts["q_weight"], impl="tile"))(parts["p_hidden"][None])
