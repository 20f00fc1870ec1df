"""The reference is the verbalizer as the training found it; its KL on rollouts has the gradient of an exact KL."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_lens import make_batch, make_lens, perturb
from test_trainer import Killed, kill_at
from tiny_run import make_subject_and_dump, tiny_config

from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats import load_lens
from megalens.config import ConfigError, Weight, load_config
from megalens.config import Rollouts as Rolled
from megalens.families.adapters import adapter
from megalens.lens.names import stable_names
from megalens.lens.rollouts import Rollouts
from megalens.lens.sampling import Law
from megalens.objective import Pass, Step
from megalens.objective.anchor import ReferenceKl, mean_of_texts, sampled_kl
from megalens.tiny import make_model
from megalens.train import train

ON = {"reference_kl": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchored")
    make_subject_and_dump(folder)
    return folder


def gradients(*values, of):
    return [torch.autograd.grad(value, of, retain_graph=True)[0] for value in values]


@pytest.mark.parametrize("distance", [1.0, 0.01])
def test_expected_gradient_over_every_token_is_that_of_an_exact_kl(distance):
    draw = torch.Generator().manual_seed(0)
    logits_V = torch.randn(11, dtype=torch.float64, generator=draw)
    reference_V = (logits_V + distance * torch.randn(11, dtype=torch.float64, generator=draw)).log_softmax(-1)
    logits_V.requires_grad_(True)
    policy_V = logits_V.log_softmax(-1)
    expected = {name: (policy_V.detach().exp() * sampled_kl(policy_V, reference_V, name, 12.0)).sum() for name in ("k2", "k3")}
    forward, backward = (p.exp() @ (p - q) for p, q in ((policy_V, reference_V), (reference_V, policy_V)))
    k1, k2, k3, exact, other = gradients(policy_V.detach().exp() @ policy_V, *expected.values(), forward, backward, of=logits_V)
    assert k1.norm() < 1e-15 < 1e-3 * distance < exact.norm(), "the mean of log-ratios has no gradient to lose"
    torch.testing.assert_close(k2, exact, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(k3, other, rtol=1e-10, atol=1e-14)
    assert (k3 - exact).norm() <= distance * exact.norm(), "of first order the same"
    assert expected["k3"].item() == pytest.approx(forward.item())


def test_k3_pulls_back_however_far_a_token_has_fallen():
    fallen = torch.tensor([-20.0, -500.0], requires_grad=True)
    value = sampled_kl(fallen, torch.zeros(2), "k3", 12.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert (fallen.grad == 1.0 - torch.tensor(12.0).exp()).all(), "a smaller loss is a greater log-probability"


def test_a_lens_gradient_over_its_whole_vocabulary_is_that_of_the_exact_kl(model):
    lens = perturb(make_lens(model, "lora", terms=ON))
    a_1D, everything_V1 = make_batch(1)["activation"], torch.arange(lens.subject.lm.vocabulary.in_weight.shape[0])[:, None]
    a_VD = a_1D.expand(len(everything_V1), -1)
    policy_V = lens.verbalizer.log_prob_of(a_VD, everything_V1)[:, 0]
    reference_V = lens.reference_log_prob(a_VD, everything_V1)[:, 0]
    trained = [p for p in lens.verbalizer.parameters() if p.requires_grad] + list(lens.verbalizer.adapter_parameters.values())
    found, exact = (
        torch.autograd.grad(value, trained, retain_graph=True)
        for value in (policy_V.detach().exp() @ sampled_kl(policy_V, reference_V, "k2", 12.0), policy_V.exp() @ (policy_V - reference_V))
    )
    whole, difference = (
        torch.cat([x.flatten() for x in each]).norm() for each in (exact, [f - e for f, e in zip(found, exact, strict=True)])
    )
    assert difference < 1e-4 * whole
    assert not any(p.requires_grad for name, p in lens.named_parameters() if name in lens.reference_state_names())


def test_what_stands_behind_an_end_token_does_not_count():
    values_NT = torch.tensor([[1.0, 2.0, 100.0, 100.0], [4.0, 4.0, 4.0, 4.0]])
    rollouts = Rollouts(torch.zeros(1, 2, 4), torch.tensor([[1, 4]]), torch.zeros(1, 2, 4))
    assert mean_of_texts(values_NT, rollouts.said_BKT[0]) == (1.5 + 4.0) / 2


def test_the_term_is_the_mean_over_texts_of_what_was_sampled(model):
    lens, batch = perturb(make_lens(model, "lora", terms=ON, rollouts=Rolled(draws=2, temperature=0.7))), make_batch()
    at = Step.fixed(lens.config, 1)
    rollouts = lens.rollout(batch["activation"], batch["sample_id"], 1, 2)
    law = Law(0.7)
    cut = Rollouts(rollouts.ids_BKT, torch.full_like(rollouts.lengths_BK, 1), rollouts.log_prob_BKT, law)
    term = ReferenceKl(lens.config)
    assert term.draws == 2
    for each, tokens in ((rollouts, 5), (cut, 2)):
        found = term(Pass(lens, batch, at, [term], each))
        a_ND, ids_NT = batch["activation"].repeat_interleave(2, 0), each.ids_BKT.flatten(0, 1)
        d_NT = lens.verbalizer.score(a_ND, ids_NT, law).log_prob - lens.reference.score(a_ND, ids_NT, law).log_prob
        torch.testing.assert_close(found, 0.5 * d_NT[:, :tokens].square().mean())


@pytest.mark.parametrize("inject", ["block", "embedding"])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_reference_is_the_verbalizer_that_a_lens_starts_with_and_not_the_base(model, mode, inject):
    given = perturb(make_lens(model, mode, inject))
    state = {stable: given.get_parameter(name).detach().clone() for name, stable in stable_names(given.lens_state_names()).items()}
    lens, batch = make_lens(model, mode, inject, terms=ON), make_batch()
    ids_BT = batch["input_ids"][:, :5]

    def said(by):
        return by.log_prob_of(batch["activation"], ids_BT)

    assert torch.equal(said(lens.verbalizer), said(lens.reference)), "fresh"
    lens.load_lens_state(state)
    before = lens.reference_log_prob(batch["activation"], ids_BT)
    assert torch.equal(before, said(given.verbalizer))
    perturb(lens)
    assert torch.equal(before, lens.reference_log_prob(batch["activation"], ids_BT)), "it stays, whatever is trained"
    assert (said(lens.verbalizer) - before).abs().max() > 1e-3
    if mode == "lora":
        lens.verbalizer.adapter = None
        with adapter(lens.subject.lm, None):
            assert (said(lens.verbalizer) - before).abs().max() > 1e-3, "without adapters it is the base that speaks"


def test_without_a_weight_there_is_no_reference(model):
    plain = make_lens(model, "full")
    assert plain.reference is None
    assert plain.reference_state_names() == []
    never = make_lens(model, "full", terms={"reference_kl": Weight(type="linear", start_value=0.0, end_value=0.0)})
    assert sum(p.numel() for p in never.parameters()) == sum(p.numel() for p in plain.parameters())
    later = make_lens(model, "full", terms={"reference_kl": Weight(type="step", start_value=0.0, end_value=1.0)})
    assert later.reference is not None
    with pytest.raises(ValueError, match=r"only where terms\.reference_kl has a weight"):
        plain.reference_log_prob(torch.zeros(1, 64), torch.zeros(1, 1, dtype=torch.long))


def test_k1_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"reference\.estimator=k1 cannot train: .* zero in expectation; take k2 or k3"):
        load_config(["reference.estimator=k1"])


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_resume_keeps_the_reference_and_a_start_from_a_lens_takes_a_new_one(folder, monkeypatch, mode):
    keys = {"train_mode": mode, "terms": ON, "max_train_steps": "8s"}
    whole, cut = tiny_config(folder, f"{mode}-whole", **keys), tiny_config(folder, f"{mode}-cut", **keys)
    assert train(whole) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(cut)
    first = load_file(cut.run_dir / "last" / "reference.safetensors")
    assert train(cut) == 0
    last = {name: load_file(config.run_dir / "last" / "reference.safetensors") for name, config in (("whole", whole), ("cut", cut))}
    lens = {name: load_file(config.run_dir / "last" / "lens.safetensors") for name, config in (("whole", whole), ("cut", cut))}
    for one, other in ((last["cut"], first), (last["cut"], last["whole"]), (lens["cut"], lens["whole"])):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert load_lens(whole.run_dir / "last").lens.reference is None, "one that is used keeps none"

    onward = tiny_config(folder, f"{mode}-onward", **keys, init_from=str(whole.run_dir / "last"))
    assert train(onward) == 0
    anew = load_file(onward.run_dir / "last" / "reference.safetensors")
    given = {name.replace("verbalizer", "reference", 1): value for name, value in lens["whole"].items() if name.startswith("verbalizer.")}
    assert anew.keys() == given.keys()
    assert all(torch.equal(anew[name], given[name]) for name in anew)
    assert any(not torch.equal(anew[name], first[name]) for name in anew)


def test_a_reference_that_was_never_kept_is_not_made_up_on_resume(folder):
    config = tiny_config(folder, "late", max_train_steps="4s")
    assert train(config) == 0
    with pytest.raises(CheckpointError, match=r"terms\.reference_kl had no weight so far; set it to 0, or begin another run .* init_from="):
        train(dataclasses.replace(config, max_train_steps="8s", terms={"reference_kl": Weight(value=1.0)}))


def test_own_blocks_carry_no_adapters_of_another_role(model):
    """Where both roles use a block, one with adapters and the other with a copy of its own."""
    from megalens.config import Reconstructor, Verbalizer, config_from_dict
    from megalens.objective import build_lens

    roles = {
        "verbalizer": dataclasses.asdict(Verbalizer(inject="embedding", mode="lora")),
        "reconstructor": dataclasses.asdict(Reconstructor(mode="full")),
    }
    config = config_from_dict({"model_name": model, "layer_l": 1, "t_text": 2, "dtype": "fp32", "device": "cpu", **roles})
    lens = build_lens(config, torch.zeros(64), torch.ones(64))
    own = [name for name, _ in lens.named_parameters() if name.startswith("reconstructor.own.")]
    assert own
    assert not [name for name in own if "lora" in name or "base_layer" in name]
