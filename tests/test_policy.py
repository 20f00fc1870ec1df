"""The policy's gradient is that of the expected reward over every text there is; what texts are worth, and who learns from them."""

import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT
from few_words import END, LENGTH, WIDTH, all_texts, make_lens, make_subject, plain_log_p

from megalens.config import Config, ConfigError, config_from_dict, validate
from megalens.lens.rollouts import Rollouts
from megalens.lens.sampling import Law
from megalens.objective import Pass, Step
from megalens.objective.policy import Policy, advantages, clipped_gain, mean_of_tokens
from megalens.objective.reward import errors, judge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("few"))


def activation():
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def made_of(lens, rollouts, terms=None, a_BD=None):
    rows = len(rollouts.ids_BKT)
    batch = {"activation": activation().expand(rows, -1) if a_BD is None else a_BD, "sample_id": torch.arange(rows)}
    terms = lens.objective.terms if terms is None else terms
    return Pass(lens, batch, Step.fixed(lens.config, 1), terms, rollouts)


def trained(part):
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def parts_of(lens):
    """The verbalizer's trained parameters, its adapters among them."""
    return [*trained(lens.verbalizer), *(p for name, p in lens.named_parameters() if ".verbalizer.weight" in name)]


# ------------------------------------------------------------------------------------------------ every text there is


def plain_rewards(lens, a_1D, ids_NT, lengths_N):
    """Of each text, by the formula."""
    a_hat_ND = lens.reconstruct(ids_NT, lengths_N)
    cos_N = torch.nn.functional.cosine_similarity(a_1D, a_hat_ND)
    fails_N = (lengths_N == LENGTH) | (lengths_N == 0)  # never ended, or nothing said
    return torch.where(fails_N, lens.config.rollouts.floor, -2 * (1 - cos_N)).detach()


def plain_law(lens, a_1D, ids_NT, law):
    """Log-probabilities of each text's tokens under the law ``[N, T]``, and the floors of its nuclei ``[N, T]``."""
    log_p = (plain_log_p(lens, a_1D, ids_NT)[0] / law.temperature).log_softmax(-1)
    order = log_p.sort(-1, descending=True).values
    inside = (order.exp().cumsum(-1) - order.exp()).detach() < law.top_p
    edge, after = order.masked_fill(~inside, math.inf).amin(-1), order.masked_fill(inside, -math.inf).amax(-1)
    cut = log_p.masked_fill(log_p < edge[..., None], -math.inf).log_softmax(-1)
    return cut.gather(-1, ids_NT[..., None])[..., 0], ((edge + after) / 2).detach()


@pytest.mark.parametrize("mean_over", ["t_text", "tokens"])
@pytest.mark.parametrize(("baseline", "share"), [("leave_one_out", 1.0), ("mean", 0.5)])
@pytest.mark.parametrize("law", [Law(), Law(1.3, 0.9)], ids=["whole", "cooled and cut"])
def test_the_gradient_is_that_of_the_expected_reward_over_all_texts(folder, law, baseline, share, mean_over):
    """Every pair of texts, weighted by its probability, gives what the expected reward differentiated exactly gives."""
    lens, (ids_NT, lengths_N) = make_lens(folder, terms={"policy": 1.0}), all_texts()
    lens.config.policy.baseline, lens.config.policy.mean_over = baseline, mean_over
    said_NT = torch.arange(LENGTH) <= lengths_N[:, None]
    log_prob_NT, floor_NT = plain_law(lens, activation(), ids_NT, law)
    p_N = log_prob_NT.masked_fill(~said_NT, 0.0).sum(1).exp()
    assert p_N.sum().item() == pytest.approx(1.0, abs=1e-12)
    expected = (p_N * plain_rewards(lens, activation(), ids_NT, lengths_N)).sum()
    exact = torch.autograd.grad(expected, parts_of(lens))

    pairs_P2 = torch.cartesian_prod(torch.arange(len(ids_NT)), torch.arange(len(ids_NT)))
    pairs_P2 = pairs_P2[(p_N[pairs_P2] > 0).all(1)]  # a text outside its nuclei is never sampled
    tokens = 1.7
    rollouts = Rollouts(ids_NT[pairs_P2], lengths_N[pairs_P2], torch.zeros(*pairs_P2.shape, LENGTH), law, ends=True, tokens_per_text=tokens)
    if law.top_p < 1:
        rollouts = replace(rollouts, floor_BKT=floor_NT[pairs_P2])
    (term,) = (term for term in lens.objective.terms if isinstance(term, Policy))
    loss = (p_N[pairs_P2].prod(1).detach() * term.rows(made_of(lens, rollouts, [term]))).sum()
    scale = -share / (LENGTH if mean_over == "t_text" else tokens)
    largest = max(gradient.abs().max() for gradient in exact)
    assert largest > 1e-3
    for mine, plain in zip(torch.autograd.grad(loss, parts_of(lens)), exact, strict=True):
        torch.testing.assert_close(mine, scale * plain, rtol=1e-6, atol=1e-9 * largest.item())


def test_weighted_imitation_is_cross_entropy_on_all_texts_weighted_by_softmax_of_reward(folder):
    lens, (ids_NT, lengths_N) = make_lens(folder, terms={"imitate": 1.0}), all_texts()
    lens.config.rollouts.imitate, lens.config.rollouts.imitate_temperature = "weighted", 0.3
    (term,) = (term for term in lens.objective.terms if term.name == "imitate")
    loss = term(made_of(lens, Rollouts(ids_NT[None], lengths_N[None], torch.zeros(1, *ids_NT.shape), ends=True), [term]))
    log_prob_NT, _ = plain_law(lens, activation(), ids_NT, Law())
    said_NT = torch.arange(LENGTH) <= lengths_N[:, None]
    cost_N = -log_prob_NT.masked_fill(~said_NT, 0.0).sum(1) / said_NT.sum(1)
    reward_N = plain_rewards(lens, activation(), ids_NT, lengths_N)
    good_N = (lengths_N > 0) & (lengths_N < LENGTH)
    plain = ((reward_N[good_N] / 0.3).softmax(0) * cost_N[good_N]).sum()
    torch.testing.assert_close(loss, plain)
    for mine, theirs in zip(torch.autograd.grad(loss, parts_of(lens)), torch.autograd.grad(plain, parts_of(lens)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_best_text_is_imitated_and_none_where_all_failed(folder):
    lens, (ids_NT, lengths_N) = make_lens(folder, terms={"imitate": 1.0}), all_texts()
    (term,) = (term for term in lens.objective.terms if term.name == "imitate")
    failed = lengths_N == LENGTH
    groups = torch.stack([torch.arange(len(ids_NT))[~failed][1:4], torch.arange(len(ids_NT))[failed][:3]])
    loss = term(made_of(lens, Rollouts(ids_NT[groups], lengths_N[groups], torch.zeros(2, 3, LENGTH), ends=True), [term]))
    best = groups[0][plain_rewards(lens, activation(), ids_NT[groups[0]], lengths_N[groups[0]]).argmax()]
    log_prob_T = plain_law(lens, activation(), ids_NT[best][None], Law())[0][0]
    torch.testing.assert_close(loss, -log_prob_T[: lengths_N[best] + 1].mean() / 2)


# ------------------------------------------------------------------------------------------------------- pure functions


def test_groups_without_spread_cost_nothing_and_their_gradient_is_finite():
    reward_BK = torch.tensor([[0.1] * 3, [1 / 3] * 3, [-2.0] * 3])
    for baseline in ("mean", "leave_one_out"):
        assert (advantages(reward_BK, baseline, by_deviation=True) == 0).all()
    log_prob = torch.full((3, 3), -700.0, requires_grad=True)
    clipped_gain(log_prob, log_prob.detach(), advantages(reward_BK, by_deviation=True), 0.2).sum().backward()
    assert (log_prob.grad == 0).all()


def test_advantages_are_what_their_names_say():
    reward_BK = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advantages(reward_BK), reward_BK - reward_BK.mean(1, keepdim=True))
    others = torch.stack([reward_BK[:, [j for j in range(5) if j != k]].mean(1) for k in range(5)], 1)
    torch.testing.assert_close(advantages(reward_BK, "leave_one_out"), reward_BK - others)
    scaled = advantages(reward_BK, by_deviation=True)
    torch.testing.assert_close(scaled.std(1, correction=0), torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("moved", "advantage", "gradient"),
    [
        (0.0, 1.0, 1.0),
        (0.1, 1.0, math.exp(0.1)),
        (0.3, 1.0, 0.0),
        (0.3, -1.0, -math.exp(0.3)),
        (-0.3, -1.0, 0.0),
        (-0.3, 1.0, math.exp(-0.3)),
    ],
)
def test_a_ratio_that_has_moved_far_enough_gains_no_more(moved, advantage, gradient):
    log_prob = torch.tensor(moved - 2.0, requires_grad=True)
    clipped_gain(log_prob, torch.tensor(-2.0), torch.tensor(advantage), 0.2).backward()
    assert log_prob.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_padding_never_counts():
    value = torch.tensor([[[1.0, 2.0, math.nan], [3.0, 3.0, 3.0]]])
    said = torch.tensor([[[True, True, False], [True, True, True]]])
    assert mean_of_tokens(value, said, None).tolist() == [[1.5, 3.0]]
    assert mean_of_tokens(value, said, 2.0).tolist() == [[1.5, 4.5]]


def test_errors_have_finite_gradients_at_a_rebuild_of_zero():
    a_D, zero_D = torch.randn(5), torch.zeros(5, requires_grad=True)
    found = errors(a_D, zero_D)
    assert [found[0].item(), found[1].item()] == pytest.approx([2.0, 1.0], rel=1e-5)
    sum(found).backward()
    assert zero_D.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------- what texts are worth


def some_rollouts(lens):
    ids_NT, lengths_N = all_texts()
    return Rollouts(ids_NT[None], lengths_N[None], torch.zeros(1, *ids_NT.shape), ends=True)


def rewards(lens, a_BD=None, batch=None, **weights):
    made = made_of(lens, some_rollouts(lens))
    made.batch |= batch or {}
    made.at.values.update({"reward.direction": 0.0} | {f"reward.{name}": value for name, value in weights.items()})
    return judge(made, False)


def test_a_reward_is_the_weighted_sum_of_its_parts(folder):
    lens, (ids_NT, lengths_N) = make_lens(folder, terms={"policy": 1.0}), all_texts()
    context = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "position": torch.tensor([2]), "doc_id": torch.tensor([0])}
    a_hat_ND, a_1D = lens.reconstruct(ids_NT, lengths_N), activation()
    mse_N = (a_hat_ND - a_1D).square().sum(1) / a_1D.square().sum()
    cos_N = torch.nn.functional.cosine_similarity(a_1D, a_hat_ND)
    read = lens.read(context)
    true, patched = (lens.subject.lm.logits(read.normed_BD), [lens.subject.patched_logits(read, a_hat_D[None]) for a_hat_D in a_hat_ND])
    kl_N = torch.stack([(true.softmax(-1) * (true.log_softmax(-1) - one.log_softmax(-1))).sum() for one in patched])
    plain = torch.cat([lens.plain_ids.expand(len(ids_NT), -1), ids_NT], 1)
    log_p = lens.subject.lm.model(plain).logits[:, lens.plain_ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids_NT[..., None])[..., 0]
    in_text = torch.arange(LENGTH) < lengths_N[:, None]
    language_N = (log_p * in_text).sum(1) / lengths_N.clamp_min(1)
    parts = {
        "direction": -2 * (1 - cos_N),
        "mse": -mse_N,
        "log_mse": -mse_N.log(),
        "kl": -kl_N,
        "language": language_N,
        "price": -lengths_N,
    }
    good_N = (lengths_N > 0) & (lengths_N < LENGTH)
    total, weights = torch.zeros(len(ids_NT), dtype=torch.float64), {}
    for i, (name, part) in enumerate(parts.items()):
        found = rewards(lens, batch=context, **{name: 1.0}).reward_BK[0]
        torch.testing.assert_close(found[good_N], part.double()[good_N].detach(), msg=lambda text, name=name: f"{name}: {text}")
        weights[name], total = 0.5 + i, total + (0.5 + i) * part.detach()
    judged = rewards(lens, batch=context, **weights)
    torch.testing.assert_close(judged.reward_BK[0][good_N], total[good_N])
    assert torch.equal(judged.failed_BK[0], ~good_N) and (judged.reward_BK[0][~good_N] == -2.0).all()


def test_the_reconstructor_learns_from_its_share_of_texts_and_never_from_failed_ones(folder):
    lens = make_lens(folder, terms={"rollout_read": 1.0})
    (term,) = (term for term in lens.objective.terms if term.name == "rollout_read")
    for loss in ("mse", "direction"):
        lens.config.rollouts.read_loss, lens.config.rollouts.read_share = loss, 0.5
        made = made_of(lens, some_rollouts(lens), [term])
        share = math.ceil(len(all_texts()[0]) / 2)
        judged, ids_NT, lengths_N = made.judged, *all_texts()
        a_hat, a = lens.reconstruct(ids_NT, lengths_N), activation()
        cos = torch.nn.functional.cosine_similarity(a, a_hat)
        plain = (a_hat - a).square().sum(1) / a.square().sum()
        if loss == "direction":
            plain = 2 - 2 * cos + 0.1 * (a_hat.norm(dim=1) / a.norm()).log().square()
        value = term(made)
        torch.testing.assert_close(value, (plain * ~judged.failed_BK[0])[:share].mean())
        assert judged.read == share and all(g.isfinite().all() for g in torch.autograd.grad(value, trained(lens.reconstructor)))


def test_the_anchor_pulls_a_norm_back_that_the_direction_leaves_free():
    a_D = torch.randn(8)
    for factor in (0.1, 10.0):
        a_hat_D = (factor * a_D).requires_grad_()
        direction, _, log_norm = errors(a_D, a_hat_D)
        (direction + 0.1 * log_norm.square()).backward()
        assert (a_hat_D.grad @ a_D) * (factor - 1) > 0  # downhill is back to the activation's norm
        assert torch.autograd.grad(errors(a_D, a_hat_D)[0], a_hat_D)[0].abs().max() < 1e-5


def test_short_prefixes_are_judged_by_what_they_say(folder):
    lens = make_lens(folder, terms={"policy": 1.0}, ends=False)
    lens.config.verbalizer.shortest_prefix = 1
    ids_NT, _ = all_texts(ends=False)
    ids_BKT = ids_NT[ids_NT[:, 0] != END][None].expand(12, -1, -1)
    rollouts = Rollouts(ids_BKT, torch.full(ids_BKT.shape[:2], LENGTH), torch.zeros(ids_BKT.shape))
    reward_BK = judge(made_of(lens, rollouts), False).reward_BK.view(12, 5, 6)
    alike = reward_BK.std(2).amax(1) < 1e-9  # judged by the first token alone
    assert 0 < alike.sum() < 12


REFUSED = {
    "rollouts.draws=2": {"rollouts": {"draws": 1}},
    "lora.dropout=0": {"lora": {"dropout": 0.1}},
    "every weight of the reward is 0": {"reward": {"direction": 0.0}},
    "rollouts.top_p=1.5 must lie in": {"rollouts": {"top_p": 1.5}},
    "rollouts.read_share=0.0 must lie in": {"rollouts": {"read_share": 0.0}},
    "policy.baseline=median must be one of": {"policy": {"baseline": "median"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_cannot_work_are_refused(message):
    with pytest.raises(ConfigError, match=message):
        validate(config_from_dict({"terms": {"policy": 1.0}} | REFUSED[message]))
    validate(Config(terms={"policy": 1.0}))


def test_the_settings_of_the_page_on_rollouts_are_accepted():
    (settings,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8"), re.DOTALL)
    config = config_from_dict(yaml.safe_load(settings))
    validate(config)
    assert config.terms["policy"].value == 1 and config.policy.by_deviation
