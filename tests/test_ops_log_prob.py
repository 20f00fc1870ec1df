"""The log-probability of given tokens equals cross-entropy on whole logits, with their gradients, and in less memory."""

import pytest
import torch
import torch.nn.functional as F
from conftest import allocated_by

from megalens.ops import OpError, gumbel_embed, log_prob_tile, native, noise_keys, tile, vocab_log_prob

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="the tile version needs a C++ compiler")
NAMES = ("hidden", "weight", "bias")


def head(N, V, D, dtype):
    """Hidden states, embedding and bias, with logits of a language model's spread, and the tokens: first and last id among them."""
    draw = torch.Generator().manual_seed(N + V)
    hidden, weight, bias = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in [(N, D), (V, D), (V,)])
    ids = torch.randint(V, (N,), generator=draw)
    ids[0], ids[-1] = V - 1, 0
    return dict(zip(NAMES, (t.to(dtype) for t in (hidden, weight * 3 / D**0.5, bias)), strict=True)), ids


def run(impl, parts, ids, softcap=None, bias=True, wanted=NAMES):
    """Outputs, and the gradients of a sum that uses both."""
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in parts.items()}
    out = vocab_log_prob(leaves["hidden"], leaves["weight"], ids, bias_V=leaves["bias"] if bias else None, softcap=softcap, impl=impl)
    weights = torch.linspace(0.5, 1.5, len(ids), dtype=torch.float64)
    (weights * (out.log_prob.double() - 0.3 * out.entropy.double())).sum().backward()
    return out, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def exactly(parts, ids, **options):
    return run("reference", {name: t.double() for name, t in parts.items()}, ids, **options)


def assert_same(mine, theirs, rel):
    assert mine.shape == theirs.shape
    assert (mine.double() - theirs.double()).abs().max() <= rel * theirs.double().abs().max()


def test_reference_is_cross_entropy_and_the_entropy_of_torch_distributions():
    parts, ids = head(5, 11, 4, torch.float64)
    out, grads = run("reference", parts, ids, softcap=2.0)
    leaves = [t.clone().requires_grad_() for t in parts.values()]
    logits = 2.0 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 2.0)
    log_prob, entropy = -F.cross_entropy(logits, ids, reduction="none"), torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(tuple(out), (log_prob, entropy))
    (torch.linspace(0.5, 1.5, 5, dtype=torch.float64) * (log_prob - 0.3 * entropy)).sum().backward()
    torch.testing.assert_close(tuple(grads.values()), tuple(leaf.grad for leaf in leaves))


SHAPES = [(1, 257, 64), (3, 100, 64), (3, 4096, 576), (17, 4099, 64), (40, 1030, 64), (17, 50257, 64)]


@needs_compiler
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (5.0, True)])
def test_tiles_equal_reference_to_float32_rounding(N, V, D, softcap, bias):
    parts, ids = head(N, V, D, torch.float32)
    wanted = NAMES if bias else NAMES[:2]
    mine, my_grads = run("tile", parts, ids, softcap, bias, wanted)
    exact, exact_grads = exactly(parts, ids, softcap=softcap, bias=bias, wanted=wanted)
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == torch.float32
        assert_same(a, b, 2e-6)
    assert my_grads.keys() == exact_grads.keys() == set(wanted)
    for name, gradient in my_grads.items():
        assert_same(gradient, exact_grads[name], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("softcap", "bias"), [(None, False), (5.0, True)])
def test_tiles_of_another_device_do_the_same_with_torch_operations(monkeypatch, dtype, softcap, bias):
    monkeypatch.setattr(log_prob_tile, "is_native", lambda tensor: False)
    parts, ids = head(17, 4099, 64, dtype)
    wanted = NAMES if bias else NAMES[:2]
    mine, my_grads = run("tile", parts, ids, softcap, bias, wanted)
    exact, exact_grads = exactly(parts, ids, softcap=softcap, bias=bias, wanted=wanted)
    for a, b in [*zip(mine, exact, strict=True), *((my_grads[name], exact_grads[name]) for name in wanted)]:
        assert_same(a, b, 2e-5 if dtype == torch.float32 else 1e-11)


@needs_compiler
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), NAMES])
def test_gradients_go_where_they_are_wanted_and_nowhere_else(wanted):
    parts, ids = head(3, 1100, 8, torch.float64)
    mine, theirs = (run(impl, parts, ids, 4.0, wanted=wanted)[1] for impl in ("tile", "reference"))
    assert mine.keys() == theirs.keys() == set(wanted)
    for name in wanted:
        assert_same(mine[name], theirs[name], 1e-11)


@needs_compiler
@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_equals_the_exact_op_to_bfloat16_rounding(monkeypatch, product_dtype):
    monkeypatch.setattr("megalens.ops.tile.product_dtype", lambda tensor: product_dtype)
    parts, ids = head(17, 4096, 64, torch.bfloat16)
    mine, my_grads = run("tile", parts, ids)
    exact, exact_grads = exactly(parts, ids)
    for a, b in zip(mine, exact, strict=True):
        assert a.dtype == torch.float32
        assert_same(a, b, 2e-6 if product_dtype == torch.float32 else 1e-2)
    for name, gradient in my_grads.items():
        assert gradient.dtype == torch.bfloat16
        assert_same(gradient, exact_grads[name], 2e-2)


@needs_compiler
def test_log_probability_of_a_sampled_token_is_what_sampling_reported():
    """To the bit on more rows than gumbel_embed multiplies by itself: the ratio of a policy to itself is 1."""
    parts, _ = head(24, 4200, 32, torch.float32)
    drawn = gumbel_embed(parts["hidden"], parts["weight"], parts["weight"], 1.0, noise_keys(0, 0, torch.arange(24), 0), impl="tile")
    scored = vocab_log_prob(parts["hidden"], parts["weight"], drawn.ids, impl="tile")
    assert torch.equal(scored.log_prob, drawn.log_prob) and torch.equal(scored.entropy, drawn.entropy)


@needs_compiler
def test_gradcheck():
    parts, ids = head(2, 9, 3, torch.float64)
    leaves = [t.requires_grad_() for t in parts.values()]
    assert torch.autograd.gradcheck(lambda h, w, b: tuple(vocab_log_prob(h, w, ids, bias_V=b, softcap=3.0, impl="tile")), leaves)


@needs_compiler
def test_same_result_with_any_number_of_threads():
    parts, ids = head(17, 4096, 64, torch.float32)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(run("tile", parts, ids)[0])
    torch.set_num_threads(threads)
    assert_same(found[0].log_prob, found[1].log_prob, 1e-6)
    assert_same(found[0].entropy, found[1].entropy, 1e-6)


@needs_compiler
def test_nothing_of_the_vocabularys_width_is_kept_for_backward():
    parts, ids = head(8, 5000, 16, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vocab_log_prob(parts["hidden"].requires_grad_(), parts["weight"], ids, impl="tile")
    own = [t for t in kept if t.data_ptr() not in {t.data_ptr() for t in (*parts.values(), ids)}]
    assert own and all(t.shape == (8,) for t in own)


def step_bytes(impl, N, V, D=8):
    """The most that a forward and backward to the hidden states allocates."""
    parts, ids = head(N, V, D, torch.float32)
    hidden = parts["hidden"].requires_grad_()
    return allocated_by(lambda: vocab_log_prob(hidden, parts["weight"], ids, impl=impl).log_prob.sum().backward())


@needs_compiler
def test_memory_does_not_grow_with_rows_times_vocabulary(monkeypatch):
    monkeypatch.setattr(tile, "MAX_LOGITS", 2**17)  # so that a small case is many tiles
    small, large = step_bytes("tile", 128, 5000), step_bytes("tile", 512, 20_000)
    assert step_bytes("reference", 512, 20_000) > 2 * 4 * 512 * 20_000  # logits and their gradient
    assert large < 1.3 * 4 * 2**17  # one tile, and what a row takes
    assert large < 1.3 * small  # for sixteen times the logits


@needs_compiler
@pytest.mark.parametrize("impl", ["auto", "tile", "reference"])
def test_compiles_without_a_graph_break(impl):
    parts, ids = head(3, 4200, 8, torch.float32)

    def loss(hidden):
        return vocab_log_prob(hidden.tanh(), parts["weight"], ids, bias_V=parts["bias"], impl=impl).log_prob.mean()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        hidden = parts["hidden"].clone().requires_grad_()
        function(hidden).backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


@needs_compiler
def test_an_id_beyond_the_vocabulary_is_nan_where_it_cannot_be_looked_at():
    parts, ids = head(3, 1100, 8, torch.float32)
    ids[1] = 1100
    log_prob, entropy, _ = log_prob_tile.forward(parts["hidden"], parts["weight"], ids, None, None)
    assert log_prob.isnan().tolist() == [False, True, False] and entropy.isfinite().all()


REFUSED = {
    "ids 4 to 11 are not all in the vocabulary, 0 to 10": lambda h, w, i: vocab_log_prob(h, w, torch.tensor([4, 11])),
    "ids -100 to 3": lambda h, w, i: vocab_log_prob(h, w, torch.tensor([3, -100])),
    "ids must be int64": lambda h, w, i: vocab_log_prob(h, w, i.int()),
    "one per row": lambda h, w, i: vocab_log_prob(h, w, i[1:]),
    "one device": lambda h, w, i: vocab_log_prob(h, w, i.to("meta")),
    "softcap must be above 0": lambda h, w, i: vocab_log_prob(h, w, i, softcap=-1.0),
    "none of auto": lambda h, w, i: vocab_log_prob(h, w, i, impl="magic"),
    "the batch is empty": lambda h, w, i: vocab_log_prob(h[:0], w, i[:0]),
    "no vmap": lambda h, w, i: torch.vmap(lambda rows: vocab_log_prob(rows, w, i, impl="tile").log_prob)(h[None]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_arguments_are_refused_in_one_line(message):
    parts, ids = head(2, 11, 5, torch.float32)
    with pytest.raises(OpError, match=message) as error:
        REFUSED[message](parts["hidden"], parts["weight"], ids)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", ["reference", pytest.param("tile", marks=needs_compiler)])
def test_autocast_leaves_the_op_in_its_weights_dtype(impl):
    parts, ids = head(3, 4200, 8, torch.float32)
    plain = vocab_log_prob(parts["hidden"], parts["weight"], ids, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        cast = vocab_log_prob(parts["hidden"], parts["weight"], ids, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
