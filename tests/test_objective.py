"""Terms compute what they need, once and only when they have a weight; weights and rates are schedules; rollouts are what was sampled."""

from collections import Counter

import pytest
import torch
from rollout_ranks import SayRollouts
from safetensors.torch import load_file
from test_lens import make_batch, make_lens, perturb
from tiny_run import make_subject_and_dump, tiny_config

from megalens.config import Config, ConfigError, Schedule, VerbalizerRates, Weight, config_from_dict, config_to_dict, load_config
from megalens.engine.local import LocalEngine
from megalens.objective import TERMS, Objective, Step, Term
from megalens.ops import noise_keys
from megalens.schedule import Clock
from megalens.tiny import make_model
from megalens.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture
def calls(monkeypatch):
    """How often the lens decodes, rebuilds and reads."""
    from megalens.lens.lens import ConsistencyLens
    from megalens.lens.reconstructor import Reconstructor
    from megalens.lens.verbalizer import Verbalizer

    counted = Counter()
    for cls, name in (
        (Verbalizer, "_decode"),
        (Verbalizer, "_sample"),
        (Verbalizer, "_score"),
        (Reconstructor, "_read"),
        (ConsistencyLens, "read"),
    ):
        method = getattr(cls, name)

        def call(self, *arguments, method=method, key=f"{cls.__name__}.{name}", **options):
            counted[key] += 1
            return method(self, *arguments, **options)

        monkeypatch.setattr(cls, name, call)
    return counted


SAMPLE, DECODE, SAY, REBUILD, READ = (
    "Verbalizer._sample",
    "Verbalizer._decode",
    "Verbalizer._score",
    "Reconstructor._read",
    "ConsistencyLens.read",
)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"mse_weight": 1.0}, {DECODE: 1, REBUILD: 1}),
        ({"kl_base_weight": 1.0}, {DECODE: 1, REBUILD: 1, READ: 1}),
        ({"entropy_weight": 1.0}, {DECODE: 1}),
        ({"lm_base_weight": 1.0}, {DECODE: 1}),
        ({"tail_say_weight": 1.0}, {SAY: 1}),
        ({"tail_read_weight": 1.0}, {REBUILD: 1}),
        ({"mse_weight": 1.0, "kl_base_weight": 1.0, "lm_base_weight": 1.0, "entropy_weight": 0.1}, {DECODE: 1, REBUILD: 1, READ: 1}),
    ],
)
def test_what_terms_need_is_computed_once_and_nothing_else(folder, calls, weights, expected):
    lens = make_lens(folder, **({"mse_weight": 0.0} | weights))
    lens(make_batch(), Step.fixed(lens.config))["loss"].backward()
    assert calls == expected


def test_activations_that_are_not_there_come_from_the_read_that_the_kl_needs_anyway(folder, calls):
    batch = {name: value for name, value in make_batch().items() if name != "activation"}
    lens = make_lens(folder, kl_base_weight=1.0)
    lens(batch, Step.fixed(lens.config))
    assert calls[READ] == 1


def test_a_weight_is_a_schedule(folder):
    config = load_config(["mse_weight=0.5", "kl_base_weight.type=linear", "kl_base_weight.start_value=0", "kl_base_weight.end_value=2"])
    assert config.mse_weight == Weight(value=0.5)
    values = [Step.at(config, step, Clock(10, 2, 20)).values["kl_base_weight"] for step in (0, 10, 20)]
    assert values == [0.0, 1.0, 2.0]
    assert config_from_dict(config_to_dict(config)) == config
    assert config_to_dict(config)["mse_weight"] == 0.5
    lens = make_lens(
        folder, mse_weight=Weight(type="step", start_value=0.0, end_value=2.0, constant_steps_before_decay="4s"), tail_say_weight=1
    )
    before, after = (lens(make_batch(), Step.at(lens.config, step, Clock(10, 1, 20))) for step in (3, 4))
    assert "mse" not in before
    torch.testing.assert_close(after["loss"].detach(), after["tail_say"] + 2 * after["mse"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mse_weight=yes", "mse_weight is a number or a schedule"),
        ("mse_weight=true", "mse_weight is a number or a schedule"),
        ("mse_weight=null", "mse_weight is a number or a schedule"),
        ("mse_weight=-1", "mse_weight=-1.0 must not be negative"),
        ("kl_base_weight.end_value=-1", None),  # of a constant schedule: never reached
        ("mse_weight.typ=linear", "did you mean 'mse_weight.type'"),
        ("mse_weight.type=lin", "must be one of"),
        ("mse_weight.num_steps=2x", "'2x' is no duration"),
        ("lr_multipliers.verbalizer.adapters=-1", "must not be negative"),
        ("lr_multipliers.verbalizer.adapter=1", "did you mean 'lr_multipliers.verbalizer.adapters'"),
        ("terms.my_term.typ=linear", "unknown key 'terms.my_term.typ'"),
    ],
)
def test_a_wrong_weight_is_refused_by_name(setting, message):
    if message is None:
        load_config([setting])
        return
    with pytest.raises(ConfigError, match=message):
        load_config([setting])


def test_a_step_at_which_nothing_has_a_weight_is_refused(folder):
    lens = make_lens(folder, mse_weight=Weight(type="step", start_value=0.0, end_value=1.0, constant_steps_before_decay="4s"))
    with pytest.raises(ConfigError, match="every weight of the loss is 0 at optimizer step 0"):
        lens(make_batch(), Step.at(lens.config, 0, Clock(10, 1, 20)))


class Norms(Term):
    """Squared difference of the norms of rebuild and activation, relative to the activation's."""

    name, needs = "norms", frozenset({"text", "rebuild"})

    def __call__(self, made):
        norm_B = made.activation_BD.norm(dim=-1)
        return ((made.a_hat_BD.norm(dim=-1) - norm_B) / norm_B).square().mean()


def test_a_new_term_is_one_class_and_its_registration(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"terms\.norms is the weight of no term of the objective"):
        make_lens(folder, terms={"norms": 0.5})
    monkeypatch.setattr("megalens.objective.TERMS", [*TERMS, Norms])
    lens = make_lens(folder, terms={"norms": 0.5})
    out = lens(make_batch(), Step.fixed(lens.config))
    torch.testing.assert_close(out["loss"].detach(), out["mse"] + 0.5 * out["norms"])
    assert load_config(["terms.norms=0.5"]).terms == {"norms": Weight(value=0.5)}
    scheduled = load_config(["terms.norms.type=linear", "terms.norms.start_value=0.1"]).terms["norms"]
    assert (scheduled.type, scheduled.start_value) == ("linear", 0.1)


class Misspelt(Norms):
    needs = frozenset({"text", "rebuilt"})


def test_a_term_that_needs_what_no_pass_gives_is_refused():
    with pytest.raises(ValueError, match=r"norms needs \['rebuilt', 'text'\]; a pass gives read, tails"):
        Objective(Config(), [Misspelt])


def test_rollouts_are_sampled_ahead_and_handed_to_the_terms_that_want_them(folder, calls):
    lens = perturb(make_lens(folder, terms={"say_rollouts": 1.0}, mse_weight=0.0, objective=[*TERMS, SayRollouts]))
    engine = LocalEngine(lens.config, lens, lens.parameter_groups())
    at = Step.fixed(lens.config, 3)
    rollouts = engine.sample([make_batch()], at)
    assert rollouts[0].ids_BKT.shape == (4, 3, 5)
    assert calls == {SAMPLE: 1}
    metrics = engine.train_step([make_batch()], at, rollouts)
    assert metrics["say_rollouts"] == pytest.approx(-rollouts[0].log_prob_BKT.mean().item(), rel=1e-5)
    assert make_engine_without_rollouts(folder).sample([make_batch()], at) is None


def make_engine_without_rollouts(folder):
    lens = make_lens(folder)
    return LocalEngine(lens.config, lens, lens.parameter_groups())


def test_a_rollout_is_a_function_of_its_sample_and_draw_alone(folder):
    lens, batch = perturb(make_lens(folder)), make_batch()
    whole = lens.rollout(batch["activation"], batch["sample_id"], 2, 4)
    part = lens.rollout(batch["activation"][1:3], batch["sample_id"][1:3], 2, 2)
    assert torch.equal(part.ids_BKT, whole.ids_BKT[1:3, :2])
    first = lens.verbalizer.decode(batch["activation"], lambda t: noise_keys(lens.config.seed, 2, batch["sample_id"], t))
    assert torch.equal(first.ids_BT, whole.ids_BKT[:, 0])
    assert len({tuple(ids) for ids in whole.ids_BKT.flatten(0, 1).tolist()}) > 8, "draws differ"
    log_prob = lens.verbalizer.log_prob_of(batch["activation"].repeat_interleave(4, 0), whole.ids_BKT.flatten(0, 1))
    torch.testing.assert_close(log_prob.unflatten(0, (4, 4)), whole.log_prob_BKT, atol=1e-5, rtol=1e-5)


def test_a_group_is_frozen_for_as_long_as_its_schedule_says(tmp_path):
    make_subject_and_dump(tmp_path)
    config = tiny_config(tmp_path)
    config.lr_multipliers.verbalizer = VerbalizerRates(
        adapters=Weight(type="step", start_value=0.0, end_value=1.0, constant_steps_before_decay="8s"), projection=0.0
    )
    config.checkpoint.keep_every = "4s"
    assert train(config) == 0
    saved = {step: load_file(config.run_dir / "checkpoints" / f"step-{step:08d}" / "lens.safetensors") for step in (4, 8, 16)}
    moved = {name for name in saved[4] if not torch.equal(saved[4][name], saved[8][name])}
    groups = {".".join(name.split(".")[:2]) if not name.startswith("subject.") else f"{name.split('.')[-2]}.adapters" for name in moved}
    assert "reconstructor.adapters" in groups
    assert not groups & {"verbalizer.adapters", "verbalizer.projection"}
    later = {name for name in saved[8] if not torch.equal(saved[8][name], saved[16][name])}
    assert any("verbalizer" in name and ("lora" in name or "adapters" in name) for name in later)
    assert not any(name.startswith("verbalizer.projection") for name in later)


def test_tau_and_weights_of_a_fixed_step_are_those_given():
    config = Config(gumbel_tau_schedule=Schedule(type="linear", start_value=0.9), mse_weight=2)
    at = Step.fixed(config, 7, alpha_schedule=0.3)
    assert (at.update, at.values["gumbel_tau_schedule"], at.values["alpha_schedule"], at.values["mse_weight"]) == (7, 0.9, 0.3, 2.0)
    weights = Objective(config, TERMS).weights(at)
    assert {name: value for name, value in weights.items() if value} == {"mse": 2.0}
    assert {"tail_say", "tail_read", "entropy", "kl", "lm"} < weights.keys()
