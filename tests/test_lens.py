"""Verbalizer, reconstructor and their loss, on tiny models of several families."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megalens.config import Config, ConfigError, Lora, Reconstructor, Verbalizer
from megalens.families.loading import load_tokenizer
from megalens.lens.lens import ConsistencyLens
from megalens.lens.names import stable_names
from megalens.lens.prompts import prompts_of
from megalens.lens.subject import load_subject, shared_contexts
from megalens.lens.text import read_order, tail_ids
from megalens.objective import Objective, Step, build_lens
from megalens.objective.functions import relative_mse, resample_error
from megalens.objective.reference import ReferenceStep
from megalens.ops import native, noise_keys, vocab_log_prob
from megalens.tiny import make_model

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="the tile version needs a C++ compiler")
KINDS = ["llama", "gemma2", "gpt2", "gpt_neox", "mistral", "granite", "cohere"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(make_model(tmp_path_factory.mktemp("model") / kind, kind=kind)) for kind in KINDS}


def make_lens(folder, mode="frozen", inject="block", objective=None, **keys):
    verbalizer = Verbalizer(prompt="a thing<act> is about", inject=inject, mode=mode)
    reconstructor = Reconstructor(prompt="it says:", suffix=keys.pop("suffix", ""), mode=mode)
    config = Config(
        model_name=folder,
        layer_l=1,
        t_text=5,
        dtype="fp32",
        device="cpu",
        verbalizer=verbalizer,
        reconstructor=reconstructor,
        lora=Lora(r=4),
        **keys,
    )
    generator = torch.Generator().manual_seed(5)
    mean_D, var_D = torch.randn(64, generator=generator), torch.rand(64, generator=generator) + 0.5
    if objective is None:
        return build_lens(config, mean_D, var_D)
    return ConsistencyLens(config, load_subject(config), load_tokenizer(config), mean_D, var_D, Objective(config, objective))


def make_batch(rows=4, context=12):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 500, (rows, context), generator=generator)
    position = torch.randint(6, context, (rows,), generator=generator)
    return {
        "activation": torch.randn(rows, 64, generator=generator),
        "input_ids": ids,
        "position": position,
        "sample_id": torch.arange(rows) + 100,
        "doc_id": torch.arange(rows),
    }


def at(lens):
    """The third optimizer step."""
    return Step.fixed(lens.config, 3, gumbel_tau_schedule=0.8, alpha_schedule=0.5)


def perturb(lens, scale=0.05):
    """Move every trainable parameter off its start, so that no role is the identity."""
    torch.manual_seed(11)
    for parameter in lens.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    return lens


@pytest.mark.parametrize("inject", ["block", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decode_equals_uncached_decode(folders, kind, inject):
    lens = perturb(make_lens(folders[kind], mode="full", inject=inject))
    a_BD, sample_ids = make_batch()["activation"], torch.arange(4)
    text = lens.verbalizer.decode(a_BD, lambda t: noise_keys(0, 1, sample_ids, t))
    for t in range(lens.config.t_text):
        normed = uncached_normed(lens, a_BD, text.embeds_BTD[:, :t])
        torch.testing.assert_close(text.normed_BTD[:, t], normed, atol=1e-4, rtol=1e-4)


def uncached_normed(lens, a_BD, embeds_BtD):
    """The last position's normed hidden state with everything run again, without a cache."""
    v, lm = lens.verbalizer, lens.subject.lm
    own = {int(i): block for i, block in v.own.items()}
    x = torch.cat([v.prompt().expand(len(a_BD), -1, -1), embeds_BtD], dim=1)
    value = v.projection(a_BD)
    if v.enters == 0:
        x = torch.cat([x[:, : v.slot], value[:, None], x[:, v.slot + 1 :]], dim=1)
    positions = torch.arange(x.shape[1])[None]
    x = lm.run(lm.enter(x, positions), 0, v.enters, positions, own=own)
    if v.enters:
        x = torch.cat([x[:, : v.slot], value[:, None], x[:, v.slot + 1 :]], dim=1)
    return v._norm(lm.run(x, v.enters, v.blocks, positions, own=own)[:, -1])


@pytest.mark.parametrize("kind", KINDS)
def test_saying_a_decoded_text_has_the_decodes_probability(folders, kind):
    lens = perturb(make_lens(folders[kind], mode="lora"))
    a_BD = make_batch()["activation"]
    text = lens.verbalizer.decode(a_BD)
    torch.testing.assert_close(lens.verbalizer.log_prob_of(a_BD, text.ids_BT), text.log_prob_BT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", pytest.param("tile", marks=needs_compiler)])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probability_of_a_text_is_cross_entropy_on_whole_logits(folders, monkeypatch, kind, impl):
    monkeypatch.setattr("megalens.lens.sampling.vocab_log_prob", partial(vocab_log_prob, impl=impl))
    lens = perturb(make_lens(folders[kind], mode="full"))
    lm, v, a_BD = lens.subject.lm, lens.verbalizer, make_batch()["activation"]
    ids_BT = torch.randint(3, 500, (4, 5), generator=torch.Generator().manual_seed(3))
    trained = [parameter for parameter in v.parameters() if parameter.requires_grad]
    normed_BTD = torch.stack([uncached_normed(lens, a_BD, lm.embed(ids_BT[:, :t])) for t in range(5)], dim=1)
    loss_BT = F.cross_entropy(lm.logits(normed_BTD).flatten(0, 1), ids_BT.flatten(), reduction="none").view(4, 5)
    log_prob_BT = v.log_prob_of(a_BD, ids_BT)
    torch.testing.assert_close(-log_prob_BT, loss_BT, atol=1e-4, rtol=1e-5)
    grads, expected = torch.autograd.grad(-log_prob_BT.mean(), trained), torch.autograd.grad(loss_BT.mean(), trained)
    for mine, theirs in zip(grads, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-3)


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_checkpointed_decode_keeps_less_and_computes_the_same(folders, kind, every):
    lens = perturb(make_lens(folders[kind], mode="lora", kl_base_weight=1.0, lm_base_weight=1.0))
    found = []
    for n in (None, every):
        lens.verbalizer.checkpoint_every = n
        lens.zero_grad()
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = lens(make_batch(), at(lens))
        terms["loss"].backward()
        found.append((kept, terms["loss"], {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}))
    (all_kept, loss, gradients), (kept, same_loss, same_gradients) = found
    assert kept < all_kept and torch.equal(loss, same_loss)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_one_document_share_its_read_and_never_see_each_others_patch(folders, kind):
    lens, batch = make_lens(folders[kind], kl_base_weight=1.0), make_batch(rows=6)
    batch["doc_id"] = torch.tensor([4, 9, 4, 4, 9, 1])
    for doc in (4, 9):
        of_doc = batch["doc_id"] == doc
        batch["input_ids"][of_doc] = batch["input_ids"][of_doc][:1]
    behind = torch.arange(12) > batch["position"][:, None]
    batch["input_ids"][behind] = 0  # as a dump has it
    rows, sequence = shared_contexts(batch)
    assert len(rows) == 3 and (batch["doc_id"][rows[sequence]] == batch["doc_id"]).all()
    a_BD = torch.randn(6, 64)
    shared, alone = lens.read(batch), lens.subject.read(batch["input_ids"], batch["position"])
    for name in ("activation_BD", "normed_BD"):
        torch.testing.assert_close(getattr(shared, name), getattr(alone, name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens.subject.patched(shared, a_BD), lens.subject.patched(alone, a_BD), atol=1e-4, rtol=1e-4)


def test_contexts_that_only_share_a_document_are_read_apart():
    batch = make_batch(rows=4) | {"doc_id": torch.tensor([1, 1, 2, 3])}
    rows, sequence = shared_contexts(batch)
    assert rows.tolist() == sequence.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hidden_state_that_is_not_finite_is_named(folders, value):
    batch, lens = make_batch(), make_lens(folders["llama"], detect_anomaly=True)
    lens(batch, at(lens))
    batch["activation"][2, 0] = value
    with pytest.raises(FloatingPointError, match="sample 102 before token 0 is not finite"):
        lens(batch, at(lens))


def test_straight_through_embeddings_are_the_tokens_embeddings(folders):
    lens = make_lens(folders["gemma2"])
    text = lens.verbalizer.decode(make_batch()["activation"], lambda t: noise_keys(0, 1, torch.arange(4), t))
    torch.testing.assert_close(text.embeds_BTD, lens.subject.lm.embed(text.ids_BT), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_reconstructor_is_the_truncated_subject_reading_the_first_token_last(folders, kind, mode):
    lens = make_lens(folders[kind], mode=mode)
    prompt = lens.tokenizer("it says:")["input_ids"]
    ids = make_batch()["input_ids"][:, :5]
    whole = torch.cat([torch.tensor([prompt]).expand(4, -1), ids[:, 1:], ids[:, :1]], dim=1)
    torch.testing.assert_close(lens.reconstruct(ids, torch.full((4,), 5)), lens.subject.residual(whole)[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suffix", ["", " so"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_padding_behind_a_text_changes_nothing(folders, kind, suffix):
    lens = perturb(make_lens(folders[kind], mode="lora", suffix=suffix))
    ids, lengths = make_batch()["input_ids"][:, :5], torch.tensor([5, 0, 3, 1])
    padded = lens.reconstruct(ids, lengths)
    for row, length in enumerate(lengths):
        alone = lens.reconstruct(ids[row : row + 1, :length], length[None])
        torch.testing.assert_close(padded[row], alone[0], atol=1e-4, rtol=1e-4)


def test_training_the_roles_leaves_the_subject_as_it_was(folders):
    lens, ids = make_lens(folders["llama"], mode="lora"), make_batch()["input_ids"]
    before = lens.subject.read(ids, torch.full((4,), 11)).normed_BD
    perturb(lens, 0.5)
    assert torch.equal(lens.subject.read(ids, torch.full((4,), 11)).normed_BD, before)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_after_a_validation_switches_only_the_adapters_dropout_on(folders, mode):
    lens = make_lens(folders["gpt2"], mode=mode)
    lens.eval()
    assert not any(module.training for module in lens.modules())
    lens.train()
    of_the_model = ("subject.lm", "verbalizer.own.", "reconstructor.own.")
    on = [name for name, module in lens.named_modules() if module.training and name.startswith(of_the_model)]
    assert all("lora_dropout" in name for name in on) and bool(on) == (mode == "lora")


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_every_trainable_parameter_gets_a_gradient_and_the_subject_none(folders, mode):
    lens = perturb(
        make_lens(
            folders["llama"],
            mode=mode,
            kl_base_weight=1.0,
            lm_base_weight=1.0,
            entropy_weight=0.1,
            tail_say_weight=1.0,
            tail_read_weight=1.0,
        )
    )
    out = lens(make_batch(), at(lens))
    out["loss"].backward()
    assert set(out) == {"loss", "mse", "kl", "lm", "entropy", "tail_say", "tail_read"}
    trained = [name for group in lens.parameter_groups().values() for name in group]
    without = [name for name in trained if (p := dict(lens.named_parameters())[name]).grad is None or not p.grad.abs().sum() > 0]
    assert not without, without
    assert all(p.grad is None for name, p in lens.named_parameters() if name not in trained)
    assert set(trained) == set(lens.lens_state_names())
    if mode != "frozen":
        kind = {"lora": "adapters", "full": "blocks"}[mode]
        assert {"verbalizer", "reconstructor"} == {name.split(".")[0] for name in lens.parameter_groups() if name.endswith(kind)}


def test_loss_is_the_weighted_sum_of_its_terms(folders):
    weights = {
        "mse_weight": 2.0,
        "kl_base_weight": 0.7,
        "lm_base_weight": 0.3,
        "entropy_weight": 0.1,
        "tail_say_weight": 0.2,
        "tail_read_weight": 0.4,
    }
    lens = make_lens(folders["llama"], **weights)
    out = lens(make_batch(), at(lens))
    expected = (
        2.0 * out["mse"] + 0.7 * out["kl"] + 0.3 * 0.5 * out["lm"] - 0.1 * out["entropy"] + 0.2 * out["tail_say"] + 0.4 * out["tail_read"]
    )
    torch.testing.assert_close(out["loss"].detach(), expected)


def test_a_term_of_weight_zero_is_reported_where_it_comes_for_free(folders):
    lens = make_lens(folders["llama"], mse_weight=0.0, tail_say_weight=1.0)
    assert "mse" not in lens(make_batch(), at(lens)), "no round trip is run for nothing"
    lens = make_lens(folders["llama"], mse_weight=0.0, kl_base_weight=1.0)
    out = lens(make_batch(), at(lens))
    torch.testing.assert_close(out["loss"].detach(), out["kl"])
    assert "mse" in out


def test_without_text_gradient_only_the_reconstructor_learns_from_the_rebuild(folders):
    lens = make_lens(folders["llama"], text_gradient=False)
    lens(make_batch(), at(lens))["loss"].backward()
    assert lens.verbalizer.projection.linear.weight.grad is None
    assert lens.reconstructor.head.linear.weight.grad.abs().sum() > 0


def test_a_sample_draws_the_same_noise_wherever_it_stands(folders):
    lens, batch = make_lens(folders["llama"], kl_base_weight=1.0, lm_base_weight=1.0), make_batch()
    halves = [lens({k: v[i : i + 2] for k, v in batch.items()}, at(lens)) for i in (0, 2)]
    whole = lens(batch, at(lens))
    for name in whole:
        torch.testing.assert_close(sum(half[name] for half in halves) / 2, whole[name], atol=1e-5, rtol=1e-5)


def test_checkpoint_of_another_shape_is_refused_by_name(folders):
    lens = make_lens(folders["llama"])
    names = stable_names(lens.lens_state_names())
    state = {stable: lens.get_parameter(name).detach().clone() for name, stable in names.items()}
    by_name = lens.load_lens_state(state)
    assert all(by_name[name] is state[stable] for name, stable in names.items())
    state["reconstructor.head.weight"] = torch.zeros(32, 32)
    with pytest.raises(ConfigError, match=r"reconstructor.head.weight is \(32, 32\) there, \(64, 64\) here"):
        lens.load_lens_state(state)


def test_activations_of_another_width_are_refused(folders):
    config = Config(model_name=folders["llama"], layer_l=1, dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="32 wide"):
        build_lens(config, torch.zeros(32), torch.ones(32))


def test_entering_above_the_last_block_is_refused(folders):
    config = Config(model_name=folders["llama"], layer_l=3, dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match="verbalizer.inject=embedding"):
        build_lens(config, torch.zeros(64), torch.ones(64))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # rotary and learned positions
def test_what_the_subject_cannot_read_is_refused_before_it_is_loaded(folders, monkeypatch, kind):
    monkeypatch.setattr("megalens.objective.load_subject", lambda *_, **__: pytest.fail("the subject was loaded"))
    config = Config(model_name=folders[kind], layer_l=1, t_text=300)
    with pytest.raises(ConfigError, match=r"t_text=300 with the longest prompt before it \(.* tokens\) is more than the window of .* 256"):
        build_lens(config, torch.zeros(64), torch.ones(64))
    config.t_text, config.activation_dumper.seq_len = 8, 257
    with pytest.raises(ConfigError, match=r"activation_dumper.seq_len=257 is more than the window"):
        build_lens(config, torch.zeros(64), torch.ones(64))


def test_the_longest_text_that_fits_is_said_and_read_and_a_longer_one_refused(folders):
    lens = make_lens(folders["gpt2"])
    longest = 256 - lens.reconstructor.length
    lens.reconstruct(torch.zeros(1, longest, dtype=torch.long), torch.tensor([longest]))
    with pytest.raises(ConfigError, match=f"a text of {longest + 1} tokens does not fit the window"):
        lens.reconstruct(torch.zeros(1, longest + 1, dtype=torch.long), torch.tensor([1]))


@pytest.mark.parametrize("key", ["reconstructor.prompt", "verbalizer.plain_prompt"])
def test_an_empty_prompt_needs_an_end_of_text_token(folders, key):
    tokenizer, config = load_tokenizer(Config(model_name=folders["llama"])), Config()
    section, name = key.split(".")
    setattr(getattr(config, section), name, "")
    end = tokenizer.eos_token_id
    assert [end] in prompts_of(config, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=f"{key} is empty, and the tokenizer has no end-of-text token"):
        prompts_of(config, tokenizer)


def test_layer_out_of_range_names_the_range(folders):
    with pytest.raises(ConfigError, match="layer_l is 0 to 3"):
        build_lens(Config(model_name=folders["llama"], layer_l=4, device="cpu"), torch.zeros(64), torch.ones(64))


def test_tails_end_at_the_position_and_never_look_behind_it():
    ids, position = torch.arange(20).view(2, 10), torch.tensor([9, 2])
    assert tail_ids(ids, position, 4, "forward").tolist() == [[6, 7, 8, 9], [10, 10, 11, 12]]
    assert tail_ids(ids, position, 4, "last_first").tolist() == [[9, 6, 7, 8], [12, 10, 10, 11]]
    assert tail_ids(ids, position, 1, "last_first").tolist() == [[9], [12]]


def test_a_text_that_says_the_last_token_first_is_read_in_the_contexts_order():
    texts = torch.tensor([[9, 6, 7, 8], [12, 10, 11, 0], [5, 0, 0, 0], [0, 0, 0, 0]]).float()[..., None]
    assert read_order(texts, torch.tensor([4, 3, 1, 0]))[..., 0].tolist() == [[6, 7, 8, 9], [10, 11, 12, 0], [5, 0, 0, 0], [0, 0, 0, 0]]
    assert read_order(texts[:1], None)[..., 0].tolist() == [[6, 7, 8, 9]]


def test_resample_swaps_neighbours_and_refuses_odd_batches():
    a, a_hat = torch.arange(8.0).view(4, 2), torch.zeros(4, 2)
    assert resample_error(a, a_hat).tolist() == [[2, 3], [0, 1], [6, 7], [4, 5]]
    with pytest.raises(ValueError, match="must be even"):
        resample_error(a[:3], a_hat[:3])


def test_relative_mse_is_zero_for_the_truth_and_one_for_nothing():
    a = torch.randn(5, 8)
    assert relative_mse(a, a) == 0 and relative_mse(a, torch.zeros_like(a)) == 1


@pytest.mark.parametrize("inject", ["block", "embedding"])
@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_step_equals_the_plain_reference_step(folders, kind, mode, inject):
    """Same noise: the same terms, and the same gradient of every trained parameter."""
    keys = {"kl_base_weight": 1.0, "lm_base_weight": 1.0, "entropy_weight": 0.1, "suffix": " so"}
    lens = perturb(make_lens(folders[kind], mode=mode, inject=inject, **keys), 0.02).double()
    batch = make_batch()
    batch["activation"] = batch["activation"].double()
    gradients = []
    for module in (lens, ReferenceStep(lens)):
        lens.zero_grad()
        terms = module(batch, at(lens))
        terms["loss"].backward()
        gradients.append((terms, {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}))
    (fast, fast_gradients), (plain, plain_gradients) = gradients
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-9, rtol=1e-7)
    assert fast_gradients.keys() == plain_gradients.keys() and fast_gradients
    for name, gradient in plain_gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_step_in_float32_equals_the_plain_step_to_its_rounding(tmp_path, kind, tied):
    folder = str(make_model(tmp_path / "model", kind=kind, tie_word_embeddings=tied))
    lens = perturb(make_lens(folder, mode="lora", kl_base_weight=1.0, lm_base_weight=1.0), 0.02)
    assert (lens.subject.lm.vocabulary.out_weight is lens.subject.lm.vocabulary.in_weight) == tied
    batch, gradients = make_batch(), []
    for module in (lens, ReferenceStep(lens)):
        lens.zero_grad()
        module(batch, at(lens))["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in lens.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


def test_compiled_blocks_compute_the_same_and_are_compiled_once(folders):
    """A graph for each kind of call in the first step; other batches, lengths and blocks bring none."""
    from torch._dynamo.utils import counters

    lens = perturb(make_lens(folders["llama"], kl_base_weight=1.0, lm_base_weight=1.0))
    plain = lens(make_batch(), at(lens))
    counters.clear()
    lens.subject.lm.compile_blocks(backend="eager")
    for rows, context in [(4, 12), (6, 16), (4, 12)]:
        compiled = lens(make_batch(rows, context), at(lens))
        compiled["loss"].backward()
    settled = counters["stats"]["unique_graphs"]
    for rows, context in [(8, 20), (2, 14), (10, 24)]:
        lens(make_batch(rows, context), at(lens))["loss"].backward()
    assert 0 < settled <= 20 and counters["stats"]["unique_graphs"] == settled
    assert not counters["graph_break"]
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
