"""Each term on rollouts alone makes its own figure rise, on three seeds; the figures are exact sums over every text there is."""

import pytest
import torch
from few_words import LENGTH, all_texts, make_lens, make_subject, plain_log_p
from tiny_run import make_subject_and_dump, tiny_config

from megalens.config import Gates, Rollouts, Weight
from megalens.engine.local import LocalEngine
from megalens.objective import Step
from megalens.train import train
from megalens.training.gates import GATES, Watch
from megalens.training.track import read_curve

ROWS, STEPS = 8, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_subject(tmp_path_factory.mktemp("few"))


def batch_of(lens):
    """Activations that the subject has at the end of some contexts."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 6, (ROWS, 4), generator=draw)
    a_BD = lens.subject.residual(ids)[:, -1].float()
    position = torch.full((ROWS,), 3)
    return {"activation": a_BD, "sample_id": torch.arange(ROWS), "input_ids": ids, "position": position, "doc_id": torch.arange(ROWS)}


@torch.no_grad()
def measured(lens, a_BD):
    """Means over the activations of: expected reward, its mean over all texts alike, probability of the best text, expected mse."""
    ids_NT, lengths_N = all_texts()
    a_hat_ND = lens.reconstruct(ids_NT, lengths_N)
    cos_BN = torch.nn.functional.cosine_similarity(a_BD[:, None], a_hat_ND[None], dim=2)
    failed_N = (lengths_N == LENGTH) | (lengths_N == 0)
    reward_BN = (-2 * (1 - cos_BN)).masked_fill(failed_N, lens.config.rollouts.floor)
    said_NT = torch.arange(LENGTH) <= lengths_N[:, None]
    log_prob_BNT = plain_log_p(lens, a_BD, ids_NT).gather(3, ids_NT[None, ..., None].expand(len(a_BD), -1, -1, 1))[..., 0]
    p_BN = log_prob_BNT.masked_fill(~said_NT, 0.0).sum(2).exp()
    mse_BN = (a_BD[:, None] - a_hat_ND).square().sum(2) / a_BD.square().sum(1, keepdim=True)
    return {
        "reward": (p_BN * reward_BN).sum(1).mean().item(),
        "most": reward_BN.amax(1).mean().item(),
        "best": p_BN.gather(1, reward_BN.argmax(1)[:, None]).mean().item(),
        "error": (p_BN * ~failed_N * mse_BN).sum(1).mean().item(),
    }


def learnt(folder, seed, inner=1, weighted=False, **keys):
    """What is measured before and after some steps, and the last step's metrics."""
    lens = make_lens(folder, seed=seed + 10, dtype=torch.float32, mse_weight=0.0, learning_rate=0.02, noise=seed, **keys)
    lens.config.rollouts.inner_steps, lens.config.rollouts.imitate = inner, "weighted" if weighted else "best"
    lens.config.rollouts.imitate_temperature = 0.1
    engine, batch = LocalEngine(lens.config, lens, lens.parameter_groups()), batch_of(lens)
    before, halves = measured(lens, batch["activation"]), [{name: x[half::2] for name, x in batch.items()} for half in (0, 1)]
    for step in range(STEPS):
        at = Step.fixed(lens.config, step)
        rollouts = engine.sample(halves, at)
        for _ in range(lens.config.rollouts.inner_steps):
            metrics = engine.train_step(halves, at, rollouts)
        assert not metrics["skipped"]
    return before, measured(lens, batch["activation"]), metrics


CASES = {  # the figure, and the share of what it lacks that it must gain
    "policy": ({"terms": {"policy": 1.0}}, "reward", 0.6),
    "policy, two steps on the same texts": ({"terms": {"policy": 1.0}, "inner": 2}, "reward", 0.6),
    "imitate the best": ({"terms": {"imitate": 1.0}}, "best", 0.2),
    "imitate all by their reward": ({"terms": {"imitate": 1.0}, "weighted": True}, "reward", 0.3),
    "rollout_read": ({"terms": {"rollout_read": 1.0}}, "error", 0.9),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_term_alone_makes_its_own_figure_better(folder, case, seed):
    keys, figure, share = CASES[case]
    before, after, metrics = learnt(folder, seed, **keys)
    most = {"reward": before["most"], "best": 1.0, "error": 0.0}[figure]
    assert (after[figure] - before[figure]) / (most - before[figure]) > share
    assert metrics.get("rollout_drift", 0.0) < 1e-4 or "inner" in keys  # what is scored is what was sampled


def test_terms_on_rollouts_mix_with_all_others_and_each_weight_may_be_a_schedule(folder):
    falling = Weight(type="linear", start_value=1.0, end_value=0.0)
    terms = {"policy": falling, "imitate": 0.5, "rollout_read": 1.0, "reference_kl": 0.1}
    others = {"mse_weight": 1.0, "tail_say_weight": 1.0, "tail_read_weight": 1.0, "kl_base_weight": 1.0, "entropy_weight": 0.01}
    lens = make_lens(folder, dtype=torch.float32, terms=terms, **others)
    engine, batch = LocalEngine(lens.config, lens, lens.parameter_groups()), batch_of(lens)
    for policy in (1.0, 0.0):
        at = Step.fixed(lens.config, 0, **{"terms.policy": policy})
        metrics = engine.train_step([batch], at, engine.sample([batch], at))
        weights = lens.objective.weights(at)
        assert not metrics["skipped"] and ("policy" in metrics) == bool(policy)
        assert metrics["loss"] == pytest.approx(sum(weight * metrics[name] for name, weight in weights.items() if weight), rel=1e-5)
    assert {"rollout_reward", "rollout_spread", "rollout_gap", "rollout_distinct", "rollout_length", "rollout_unfinished"} <= metrics.keys()


def test_the_gap_is_what_the_texts_lose_without_their_activation(folder):
    lens = make_lens(folder, terms={"policy": 1.0})
    batch = {name: x.double() if x.is_floating_point() else x for name, x in batch_of(lens.float()).items()}
    lens.double()
    (rollouts,) = lens.objective.rollout(lens, [batch], Step.fixed(lens.config, 0))
    ids_BT, said_BT = rollouts.ids_BKT[:, 0], rollouts.said_BKT[:, 0]
    real, mean = (
        torch.cat([plain_log_p(lens, a_1D, ids[None])[0] for a_1D, ids in zip(a_BD[:, None], ids_BT, strict=True)])
        for a_BD in (batch["activation"], torch.zeros_like(batch["activation"]))
    )
    gap_BT = (real - mean).gather(2, ids_BT[..., None])[..., 0].masked_fill(~said_BT, 0.0)
    expected = (gap_BT.sum(1) / said_BT.sum(1)).mean().item()
    found = lens.objective(lens, batch, Step.fixed(lens.config, 0), rollouts)["rollout_gap"].item()
    assert found == pytest.approx(expected, rel=1e-6) and abs(found) > 0.01


def test_a_gate_warns_once_when_its_figure_crosses_the_bound_and_again_when_it_was_back():
    watch = Watch(Gates(distinct=0.5, reference_kl=1.0, unfinished=None))
    good = {"train/rollout_distinct": 0.9, "train/reference_kl": 0.1, "train/rollout_unfinished": 1.0}
    bad = {"train/rollout_distinct": 0.2, "train/reference_kl": 3.0}
    lines = [list(watch(figures)) for figures in (good, bad, bad, good, bad | {"train/reference_kl": 0.5})]
    assert [len(found) for found in lines] == [0, 2, 0, 0, 1]
    assert lines[1][0] == (
        "warning: train/rollout_distinct is 0.2, below gates.distinct=0.5: "
        "the texts are nearly all the same; raise policy.entropy or terms.reference_kl"
    )
    assert "train/reference_kl is 3, above gates.reference_kl=1" in lines[1][1]
    assert all(hasattr(Gates(), gate.bound) for gate in GATES)


def test_a_training_takes_several_steps_on_the_same_texts_and_says_once_that_nothing_is_learnt(tmp_path, monkeypatch, capsys):
    make_subject_and_dump(tmp_path)
    rollouts, step, seen = Rollouts(draws=2, inner_steps=2), LocalEngine.train_step, []

    def noted(self, batches, at, rollouts=None):
        seen.append((at.update, rollouts[0].ids_BKT))
        return step(self, batches, at, rollouts)

    monkeypatch.setattr(LocalEngine, "train_step", noted)
    config = tiny_config(tmp_path, terms={"policy": 1.0}, rollouts=rollouts, gates=Gates(distinct=1.1), max_train_steps="8s")
    config.lora.dropout = 0.0
    assert train(config) == 0
    assert [update for update, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][1], seen[2][1])
    said = capsys.readouterr()
    assert (said.out + said.err).count("gates.distinct=1.1") == 1
    logged = read_curve(config.run_dir / "metrics.jsonl")
    assert all(f"train/rollout_{name}" in logged[-1] or f"train/rollout_{name}" in logged[-2] for name in ("reward", "gap", "spread"))
