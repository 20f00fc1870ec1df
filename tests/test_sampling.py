"""Rollouts are drawn by the law that their log-probabilities name: temperature, nucleus and end token included; a million texts say so."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from few_words import END, LENGTH, make_lens, make_subject, plain_log_p

from megalens.lens import sampling
from megalens.lens.sampling import Law, score
from megalens.objective import Step
from megalens.ops import OpError, gumbel_embed, noise_keys, nucleus, nucleus_log_mass, sample_nucleus, tile, vocab_log_prob

NAMES = ("hidden", "weight", "bias")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("few"))


def head(N, V, D, dtype=torch.float32):
    draw = torch.Generator().manual_seed(N + V)
    shapes = [(N, D), (V, D), (V,)]
    hidden, weight, bias = (torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes)
    return {"hidden": hidden, "weight": weight * 3 / D**0.5, "bias": bias}


def activations(rows, dtype=torch.float64):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)


# --------------------------------------------------------------------------------------------------------- the nucleus


@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("N", "V", "softcap"), [(3, 7, None), (40, 1030, 5.0), (5, 4099, None)])
def test_tiles_draw_from_the_very_nucleus_that_sorted_rows_give(monkeypatch, N, V, softcap, top_p):
    monkeypatch.setattr(tile, "MIN_TILE", 64)  # many tiles
    parts, keys = head(N, V, 16, torch.float64), noise_keys(0, 1, torch.arange(N), 2)
    args = (parts["hidden"], parts["weight"], top_p, keys)
    mine, plain = (sample_nucleus(*args, bias_V=parts["bias"], softcap=softcap, impl=impl) for impl in ("tile", "reference"))
    assert torch.equal(mine.ids, plain.ids)
    torch.testing.assert_close(mine.log_prob, plain.log_prob, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(mine.floor, plain.floor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("top_p", [0.02, 0.9, 0.999])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_nucleus_holds_enough_and_no_token_too_many_in_float32(softcap, top_p):
    parts, keys = head(40, 1030, 16), noise_keys(0, 1, torch.arange(40), 2)
    mine = sample_nucleus(parts["hidden"], parts["weight"], top_p, keys, bias_V=parts["bias"], softcap=softcap)
    log_p_NV = torch.nn.functional.linear(parts["hidden"], parts["weight"], parts["bias"])
    log_p_NV = (log_p_NV if softcap is None else softcap * torch.tanh(log_p_NV / softcap)).double().log_softmax(-1)
    inside_NV = log_p_NV >= mine.floor[:, None]
    mass_N = (log_p_NV.exp() * inside_NV).sum(-1)
    least_N = log_p_NV.masked_fill(~inside_NV, math.inf).amin(-1).exp()
    assert (mass_N >= top_p - 1e-6).all() and (mass_N - least_N < top_p + 1e-6).all()  # enough, and no token too many


def test_a_nucleus_of_everything_is_the_plain_draw():
    parts, keys = head(9, 300, 8), noise_keys(0, 1, torch.arange(9), 2)
    drawn = sample_nucleus(parts["hidden"], parts["weight"], 1.0, keys)
    plain = gumbel_embed(parts["hidden"], parts["weight"], parts["weight"], 1.0, keys, impl="reference")
    assert torch.equal(drawn.ids, plain.ids) and (drawn.floor < -15).all()  # -inf, but where rounding fills the nucleus early
    torch.testing.assert_close(drawn.log_prob, plain.log_prob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_the_mass_of_a_nucleus_and_its_gradients_equal_the_reference(monkeypatch, softcap):
    monkeypatch.setattr(tile, "MIN_TILE", 64)
    parts, found = head(11, 700, 8, torch.float64), []
    floor = sample_nucleus(
        parts["hidden"], parts["weight"], 0.7, noise_keys(0, 0, torch.arange(11), 0), bias_V=parts["bias"], softcap=softcap
    ).floor
    for impl in ("tile", "reference"):
        leaves = {name: part.clone().requires_grad_() for name, part in parts.items()}
        mass = nucleus_log_mass(leaves["hidden"], leaves["weight"], floor, bias_V=leaves["bias"], softcap=softcap, impl=impl)
        (mass * torch.linspace(0.5, 1.5, 11)).sum().backward()
        found.append([mass.detach(), *(leaf.grad for leaf in leaves.values())])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, atol=1e-10, rtol=1e-9)


def test_equal_logits_are_in_the_nucleus_together():
    drawn = sample_nucleus(torch.ones(4, 1), torch.zeros(5, 1), 0.3, noise_keys(0, 0, torch.arange(4), 0))
    torch.testing.assert_close(drawn.log_prob, torch.full((4,), -math.log(5)))


def test_no_tensor_of_rows_times_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(tile, "MIN_TILE", 64)
    monkeypatch.setattr(nucleus, "DIGITS", (4,) * 8)
    seen, real = [], torch.mm
    monkeypatch.setattr(nucleus.torch, "mm", lambda *args, **options: seen.append(real(*args, **options).numel()) or real(*args, **options))
    parts = head(8, 5000, 4)
    sample_nucleus(parts["hidden"], parts["weight"], 0.9, noise_keys(0, 0, torch.arange(8), 0))
    assert seen and max(seen) <= 8 * 256


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(top_p):
    parts = head(2, 9, 4)
    with pytest.raises(OpError, match="top_p must lie in"):
        sample_nucleus(parts["hidden"], parts["weight"], top_p, noise_keys(0, 0, torch.arange(2), 0))


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("law", [Law(), Law(0.7, 0.8)], ids=["whole", "cooled and cut"])
@pytest.mark.parametrize(("tokens", "texts"), [(1, 1_000_000), (2, 20_000)])
def test_a_million_tokens_are_as_frequent_as_their_log_probabilities_say(folder, monkeypatch, law, tokens, texts):
    monkeypatch.setattr(sampling, "sample_nucleus", partial(sample_nucleus, impl="reference"))  # the faster way for rows of six logits
    lens, counts, said = make_lens(folder, dtype=torch.float32), torch.zeros(36), torch.full((36,), -math.inf)
    lens.verbalizer.t_text, parts = tokens, 20
    lens.config.rollouts.temperature, lens.config.rollouts.top_p = law.temperature, law.top_p
    for update in range(parts):
        found = lens.rollout(activations(1, torch.float32), torch.arange(1), update, texts // parts)
        at = found.ids_BKT.flatten(0, 1) @ torch.tensor([6, 1][2 - tokens :])
        counts += torch.bincount(at, minlength=36)
        said[at] = found.log_prob_BKT.sum(-1).flatten()
    p = said.double().exp()
    assert counts.sum() == texts and p.sum() == pytest.approx(1.0, abs=1e-5)
    assert tokens == 1 or (counts[END + 1 : END + 6] == 0).all()  # nothing behind an end token
    drawn = counts > 0
    chi2 = ((counts[drawn] - texts * p[drawn]) ** 2 / (texts * p[drawn])).sum().item()
    degrees = int(drawn.sum()) - 1
    assert degrees >= (2 if law.top_p < 1 else 5) and degrees < 6**tokens
    assert abs(chi2 - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("law", [Law(), Law(0.6), Law(1.3, 0.7)])
@pytest.mark.parametrize("ends", [True, False])
def test_scores_of_rollouts_are_what_sampling_reported_and_whole_forward_passes_give(folder, law, ends):
    lens = make_lens(folder, ends=ends)
    lens.config.rollouts.temperature, lens.config.rollouts.top_p = law.temperature, law.top_p
    a_BD = activations(3)
    found = lens.rollout(a_BD, torch.arange(3), 5, 7)
    ids_NT = found.ids_BKT.flatten(0, 1)
    floor_NT = None if found.floor_BKT is None else found.floor_BKT.flatten(0, 1)
    scored = lens.verbalizer.score(a_BD, ids_NT, law, floor_NT)
    said = found.said_BKT
    torch.testing.assert_close(scored.log_prob.view_as(said)[said], found.log_prob_BKT[said].double(), atol=1e-9, rtol=1e-9)
    plain = torch.stack([plain_log_p(lens, a_BD[i : i + 1], ids)[0] for i, ids in enumerate(found.ids_BKT)])
    plain = (plain / law.temperature).log_softmax(-1)
    if law.top_p < 1:
        order = plain.sort(-1, descending=True).values
        edge = order.masked_fill(order.exp().cumsum(-1) - order.exp() >= law.top_p, math.inf).amin(-1, keepdim=True)
        plain = plain.masked_fill(plain < edge, -math.inf).log_softmax(-1)
    expected = plain.gather(-1, found.ids_BKT[..., None])[..., 0]
    torch.testing.assert_close(found.log_prob_BKT[said].double(), expected[said], atol=1e-9, rtol=1e-9)


def test_lengths_leave_the_end_token_out_and_say_which_texts_never_ended(folder):
    found = make_lens(folder).rollout(activations(4), torch.arange(4), 0, 50)
    ids_BKT, lengths_BK = found.ids_BKT, found.lengths_BK
    ends = ids_BKT == END
    assert torch.equal(lengths_BK, torch.where(ends.any(-1), ends.int().argmax(-1), LENGTH))
    assert torch.equal(found.finished_BK, ends.any(-1)) and 0 < found.finished_BK.float().mean() < 1
    assert torch.equal(found.said_BKT.sum(-1), (lengths_BK + 1).clamp_max(LENGTH))
    assert (found.log_prob_BKT[~found.said_BKT] == 0).all()


def test_the_prompt_is_run_once_per_activation_and_the_decode_stops_when_every_text_of_every_rank_has_ended(folder, monkeypatch):
    lens, rows = make_lens(folder), []
    lens.verbalizer.t_text = 40
    monkeypatch.setattr(type(lens.subject.lm), "run", _counting(type(lens.subject.lm).run, rows))
    asked = []

    class Ranks:
        def any(self, flag):
            asked.append(flag)
            return flag or len(asked) < 5  # another rank still decodes

    found = lens.rollout(activations(2), torch.arange(2), 0, 3, Ranks())
    prompt, decode = [n for n, length in rows if length > 1 or n < 6], [n for n, length in rows if n == 6]
    assert max(prompt) == 2 and found.finished_BK.all() and found.ids_BKT.shape == (2, 3, 40)
    assert len(asked) >= 5 and not asked[-1] and len(decode) == 4 * len(asked) - 1 < 39


def _counting(run, rows):
    def counted(self, hidden, *args, **options):
        rows.append(tuple(hidden.shape[:2]))
        return run(self, hidden, *args, **options)

    return counted


def test_micro_batches_are_sampled_together_or_in_parts_alike(folder):
    lens, batches = make_lens(folder), []
    lens.objective.draws = lambda at: 8
    for first in (0, 2, 4):
        batches.append({"activation": activations(6)[first : first + 2], "sample_id": torch.arange(first, first + 2)})
    at, found = Step.fixed(lens.config, 3), []
    for at_once in (None, 16, 1):
        lens.config.rollouts.at_once = at_once
        found.append(lens.objective.rollout(lens, batches, at))
    for one, other, alone in zip(*found, strict=True):
        assert one.ids_BKT.shape == (2, 8, LENGTH)
        assert torch.equal(one.ids_BKT, other.ids_BKT) and torch.equal(one.ids_BKT, alone.ids_BKT)
    assert found[0][0].tokens_per_text == pytest.approx(float(torch.cat([part.said_BKT for part in found[0]]).sum()) / 48)


def test_a_token_outside_its_nucleus_counts_as_inside(folder):
    """So that a policy that has moved since never divides by nothing."""
    lens, a_BD = make_lens(folder), activations(1)
    scored = lens.verbalizer.score(a_BD, torch.tensor([[1, 2]]), Law(), torch.zeros(1, LENGTH, dtype=torch.float64))
    assert scored.log_prob.isfinite().all() and (scored.log_prob <= 0).all()
    assert (scored.log_prob >= lens.verbalizer.log_prob_of(a_BD, torch.tensor([[1, 2]])) - 1e-12).all()


def test_temperature_divides_the_logits_of_a_capped_head_with_a_bias():
    parts, ids = head(5, 40, 8, torch.float64), torch.arange(5)
    logits = 3.0 * torch.tanh((parts["hidden"] @ parts["weight"].T + parts["bias"]) / 3.0) / 0.6
    lm = SimpleNamespace(softcap=3.0, vocabulary=lambda use: use(parts["weight"], parts["weight"], parts["bias"]))
    found = score(lm, parts["hidden"], ids, Law(0.6), None)
    torch.testing.assert_close(found.log_prob, logits.log_softmax(-1)[torch.arange(5), ids])
    assert not torch.allclose(found.log_prob, vocab_log_prob(parts["hidden"], parts["weight"], ids, bias_V=parts["bias"]).log_prob)


def test_every_step_and_every_draw_has_noise_of_its_own(folder):
    lens, a_BD = make_lens(folder), activations(2)
    first, again, later = (lens.rollout(a_BD, torch.arange(2), update, 40).ids_BKT for update in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert all(len(texts.unique(dim=0)) > 3 for texts in first)
