"""The CPU tile versions equal the reference, keep nothing of the vocabulary's width, and work inside torch.compile and autocast."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megalens.ops import OpError, gumbel_embed, native, noise_keys

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="the tile version needs a C++ compiler")
PARTS = ("hidden", "out", "in", "bias")


def heads(B, V, D, dtype, seed=0):
    """hidden [B, D], two embeddings [V, D], a bias [V]; logits of a language model's spread."""
    draw = torch.Generator().manual_seed(seed)
    hidden, out_weight, in_weight, bias = (torch.randn(s, generator=draw, dtype=torch.float64) for s in [(B, D), (V, D), (V, D), (V,)])
    return dict(zip(PARTS, (t.to(dtype) for t in (hidden, out_weight * 3 / D**0.5, in_weight, bias)), strict=True))


def run(impl, parts, tau, softcap, tied, bias, noise=1.0, wanted=("hidden",), seed=0):
    """Outputs, and the gradients of a sum that uses all of them."""
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in parts.items()}
    in_weight = leaves["out"] if tied else leaves["in"]
    keys = noise_keys(seed, 1, torch.arange(len(leaves["hidden"])), 0)
    bias_V = leaves["bias"] if bias else None
    out = gumbel_embed(leaves["hidden"], leaves["out"], in_weight, tau, keys, noise=noise, bias_V=bias_V, softcap=softcap, impl=impl)
    probe = torch.randn(out.embeds.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (out.embeds * probe).sum() + (out.log_prob + 0.5 * out.lse - 0.3 * out.entropy).double().sum()
    loss.backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def assert_same(mine, theirs, rel):
    assert mine.shape == theirs.shape
    assert (mine.double() - theirs.double()).abs().max() <= rel * theirs.double().abs().max()


SHAPES = [(B, V, D) for B in (1, 3, 17) for V in (257, 4096) for D in (64, 576)] + [(3, 50257, 64), (17, 50257, 64)]
# tau, softcap, tied, bias: every pair of settings of two of them occurs
SETTINGS = [(1.0, None, True, False), (0.1, 5.0, False, True), (0.5, None, False, False), (1.0, 5.0, True, True)]


@pytest.mark.parametrize(("B", "V", "D"), SHAPES)
@pytest.mark.parametrize(("tau", "softcap", "tied", "bias"), SETTINGS)
def test_tile_equals_reference_to_float32_rounding(B, V, D, tau, softcap, tied, bias):
    parts = heads(B, V, D, torch.float32)
    mine, my_grads = run("tile", parts, tau, softcap, tied, bias)
    exact, exact_grads = run("reference", {name: t.double() for name, t in parts.items()}, tau, softcap, tied, bias)
    assert torch.equal(mine.ids, exact.ids)
    assert torch.equal(mine.embeds, parts["out" if tied else "in"][mine.ids])
    for name in ("log_prob", "lse", "entropy"):
        assert getattr(mine, name).dtype == torch.float32
        assert_same(getattr(mine, name), getattr(exact, name), 2e-6)
    assert my_grads.keys() == exact_grads.keys() == {"hidden"}
    assert_same(my_grads["hidden"], exact_grads["hidden"], 2e-5)


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tau", "softcap", "tied", "bias"), SETTINGS)
def test_tile_in_bfloat16_equals_the_exact_op_to_bfloat16_rounding(monkeypatch, product_dtype, tau, softcap, tied, bias):
    monkeypatch.setattr("megalens.ops.tile.product_dtype", lambda tensor: product_dtype)
    parts = heads(17, 4096, 64, torch.bfloat16)
    mine, my_grads = run("tile", parts, tau, softcap, tied, bias, wanted=("hidden", "out"))
    exact, exact_grads = run(
        "reference", {name: t.double() for name, t in parts.items()}, tau, softcap, tied, bias, wanted=("hidden", "out")
    )
    same = mine.ids == exact.ids  # a bf16 logit is coarse: a near tie may fall otherwise
    assert same.float().mean() > 0.8 and (product_dtype == torch.bfloat16 or same.all())
    assert_same(mine.lse, exact.lse, 1e-2)
    assert my_grads["hidden"].dtype == my_grads["out"].dtype == torch.bfloat16
    rel = 1e-2 if product_dtype == torch.float32 else 8e-2  # a logit's rounding is divided by tau
    assert_same(my_grads["hidden"][same], exact_grads["hidden"][same], rel)
    if same.all():
        assert_same(my_grads["out"], exact_grads["out"], rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tau", "softcap", "tied", "bias"), SETTINGS)
@pytest.mark.parametrize("D", [64, 70])
def test_few_rows_have_products_of_their_own_with_the_same_result(monkeypatch, dtype, D, tau, softcap, tied, bias):
    parts = heads(7, 4099, D, dtype)
    exact, exact_grads = run("reference", {name: t.double() for name, t in parts.items()}, tau, softcap, tied, bias)
    for few_rows in (0, 8):
        monkeypatch.setattr("megalens.ops.gumbel_tile.FEW_ROWS", few_rows)
        monkeypatch.setattr("megalens.ops.tile.product_dtype", lambda tensor: torch.float32)
        mine, my_grads = run("tile", parts, tau, softcap, tied, bias)
        assert torch.equal(mine.ids, exact.ids)
        assert_same(mine.entropy, exact.entropy, 2e-6)
        assert_same(my_grads["hidden"], exact_grads["hidden"], 2e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("wanted", [("hidden",), ("out",), ("in",), ("bias",), ("hidden", "in"), PARTS])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_go_where_they_are_wanted_and_nowhere_else(wanted, tied):
    wanted = tuple(name for name in wanted if not (tied and name == "in"))
    if not wanted:
        return
    parts = heads(3, 1100, 8, torch.float64)
    mine = run("tile", parts, 0.7, 4.0, tied, True, noise=0.0, wanted=wanted)[1]
    theirs = run("reference", parts, 0.7, 4.0, tied, True, noise=0.0, wanted=wanted)[1]
    assert mine.keys() == theirs.keys() == set(wanted)
    for name in wanted:
        assert_same(mine[name], theirs[name], 1e-12)


@pytest.mark.parametrize("impl", ["reference", "tile"])
def test_gradcheck(impl):
    """The scalars by finite differences as they are; the embedding's gradient as that of the soft-max mixture it stands for."""
    parts = heads(2, 13, 3, torch.float64)
    leaves = [t.requires_grad_() for t in parts.values()]
    keys = noise_keys(0, 0, torch.arange(2), 0)

    def scalars(hidden, out_weight, in_weight, bias):
        return gumbel_embed(hidden, out_weight, in_weight, 0.7, keys, bias_V=bias, softcap=3.0, impl=impl)[2:]

    assert torch.autograd.gradcheck(scalars, leaves)


def test_same_result_with_any_number_of_threads():
    parts = heads(17, 4096, 64, torch.float32)
    threads = torch.get_num_threads()
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(run("tile", parts, 0.5, None, True, False))
    torch.set_num_threads(threads)
    assert torch.equal(found[0][0].ids, found[1][0].ids)
    assert_same(found[0][0].entropy, found[1][0].entropy, 1e-6)


def test_gradients_of_few_rows_are_the_same_bits_each_time_with_four_threads():
    parts, threads = heads(16, 4096, 64, torch.float32), torch.get_num_threads()
    torch.set_num_threads(4)
    found = [run("tile", parts, 0.5, None, True, False)[1]["hidden"] for _ in range(40)]
    torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found[1:])


def test_nothing_of_the_vocabularys_width_is_kept_for_backward():
    parts = heads(8, 5000, 16, torch.float32)
    kept = []
    keys = noise_keys(0, 0, torch.arange(8), 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gumbel_embed(parts["hidden"].requires_grad_(), parts["out"], parts["out"], 1.0, keys, bias_V=parts["bias"], impl="tile")
    inputs = {parts[name].data_ptr() for name in PARTS}
    own = [t for t in kept if t.data_ptr() not in inputs]
    assert own and all(5000 not in t.shape for t in own)
    assert sum(t.numel() for t in own) <= 8 * (16 + 6)


def test_infinite_or_nan_hidden_states_give_nan_and_no_crash():
    parts = heads(3, 1100, 8, torch.float32)
    parts["hidden"][1] = torch.nan
    out = gumbel_embed(parts["hidden"], parts["out"], parts["out"], 1.0, noise_keys(0, 0, torch.arange(3), 0), impl="tile")
    assert out.lse[1].isnan() and not out.lse[[0, 2]].isnan().any()
    assert (out.ids >= 0).all() and (out.ids < 1100).all()


@pytest.mark.parametrize("impl", ["auto", "tile", "reference"])
def test_compiled_caller_has_no_graph_break_and_does_not_compile_again(impl):
    parts = heads(4, 4200, 16, torch.float32)

    def decode(hidden, sample_id, update, tau):
        total = 0.0
        for token in range(3):
            keys = noise_keys(0, update, sample_id, token)
            out = gumbel_embed(hidden, parts["out"], parts["out"], tau, keys, impl=impl)
            hidden = torch.tanh(hidden + out.embeds)
            total = total + out.log_prob.sum()
        return total + hidden.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, backend=counter, fullgraph=True)
    counts = []
    for update in range(5):
        grads = []
        for function in (decode, compiled):
            hidden = parts["hidden"].clone().requires_grad_()
            function(hidden, torch.arange(4), update, 1.0 - 0.1 * update).backward()
            grads.append(hidden.grad)
        torch.testing.assert_close(*grads)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2  # the second call may settle what is dynamic; after that, never again


def test_autocast_leaves_the_op_in_its_weights_dtype():
    parts = heads(3, 4200, 8, torch.float32)
    keys = noise_keys(0, 0, torch.arange(3), 0)
    for impl in ("reference", "tile"):
        plain = gumbel_embed(parts["hidden"], parts["out"], parts["in"], 1.0, keys, impl=impl)
        with torch.autocast("cpu", torch.bfloat16):
            cast = gumbel_embed(parts["hidden"], parts["out"], parts["in"], 1.0, keys, impl=impl)
            assert gumbel_embed(parts["hidden"].bfloat16(), parts["out"], parts["in"], 1.0, keys, impl=impl).embeds.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_vmap_is_refused_by_tiles():
    parts = heads(3, 4200, 8, torch.float32)
    keys = noise_keys(0, 0, torch.arange(3), 0)
    with pytest.raises(OpError, match="no vmap"):
        torch.vmap(lambda h: gumbel_embed(h, parts["out"], parts["out"], 1.0, keys, impl="tile").lse)(parts["hidden"][None])


def test_without_a_compiler_auto_is_the_reference_and_tile_says_what_is_missing(monkeypatch):
    parts = heads(3, 4200, 8, torch.float32)
    keys = noise_keys(0, 0, torch.arange(3), 0)
    reference = gumbel_embed(parts["hidden"], parts["out"], parts["out"], 1.0, keys, impl="reference")
    monkeypatch.setattr(native, "compiler", lambda: None)
    native.library.cache_clear()
    native._function.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install g"):
            assert torch.equal(gumbel_embed(parts["hidden"], parts["out"], parts["out"], 1.0, keys).lse, reference.lse)
        with pytest.raises(OpError, match="install g"):
            gumbel_embed(parts["hidden"], parts["out"], parts["out"], 1.0, keys, impl="tile")
    finally:
        native.library.cache_clear()
        native._function.cache_clear()
