"""Texts that end where they like, tags around them, and what is read, counted and compared of each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_baselines import Rows
from test_lens import at, make_batch, perturb

from megalens.config import Config, ConfigError, Evaluation, Lora, Reconstructor, Verbalizer, config_from_dict, validate
from megalens.evaluate.evaluation import evaluate, first_tokens
from megalens.evaluate.measure import said
from megalens.evaluate.report import render
from megalens.evaluate.table import by_length, table
from megalens.evaluate.text import to_ids
from megalens.explain.search import Greedy, search_named
from megalens.lens.prompts import prompts_of
from megalens.lens.text import drawn, lengths_of, prefix_lengths, tail_ids
from megalens.objective import build_lens
from megalens.objective.functions import token_mean
from megalens.objective.reference import ReferenceStep
from megalens.statistics import ActivationStatistics
from megalens.tiny import articles, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model") / "llama"))


def make_lens(model, t_text=6, suffix="", mode="lora", **keys):
    weights = {
        name: keys.pop(name) for name in tuple(keys) if name.endswith("_weight") or name in ("tail_order", "evaluation", "terms", "given")
    }
    config = Config(
        model_name=model,
        layer_l=1,
        t_text=t_text,
        dtype="fp32",
        device="cpu",
        verbalizer=Verbalizer(prompt="a thing<act> is about", mode=mode, **keys),
        reconstructor=Reconstructor(prompt="it says:", suffix=suffix, mode=mode),
        lora=Lora(r=4),
        **weights,
    )
    validate(config)
    return perturb(build_lens(config, torch.zeros(64), torch.ones(64)), 0.02)


def end_with(lens, end_id):
    """Let this token end the lens's texts."""
    lens.verbalizer.end_id = lens.frame.end_id = end_id
    lens.frame.room = lens.frame.t_text - len(lens.frame.before) - len(lens.frame.behind) - 1
    return lens


def ended_lens(model, batch, **keys):
    """A lens of which some texts are empty, some end and some do not."""
    lens = make_lens(model, **keys)
    ids = lens.decode(batch["activation"], batch["sample_id"], 3, 1.0).ids_BT.tolist()
    seen = {number: {row.index(number) for row in ids if number in row} for row in ids for number in row}
    return end_with(lens, max(sorted(seen), key=lambda number: (min(seen[number]) == 0, len(seen[number]))))


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize(("mode", "order", "suffix"), [("lora", "last_first", ""), ("full", "forward", " so")])
def test_step_with_texts_that_end_equals_the_plain_reference_step(model, mode, order, suffix):
    keys = {"kl_base_weight": 1.0, "lm_base_weight": 1.0, "entropy_weight": 0.1, "tail_order": order}
    batch = make_batch(rows=16)
    lens = ended_lens(model, batch, mode=mode, suffix=suffix, **keys).double()
    lens.config.verbalizer.end_token = "eos"
    batch["activation"] = batch["activation"].double()
    lengths = set(lens.decode(batch["activation"], batch["sample_id"], 3, 0.8).lengths_B.tolist())
    assert {0, 6} < lengths, lengths
    gradients = []
    for module in (lens, ReferenceStep(lens)):
        lens.zero_grad()
        terms = module(batch, at(lens))
        terms["loss"].backward()
        gradients.append((terms, {name: p.grad.clone() for name, p in lens.named_parameters() if p.grad is not None}))
    (fast, fast_gradients), (plain, plain_gradients) = gradients
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-9, rtol=1e-7)
    for name, gradient in plain_gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


def test_saying_an_ended_text_has_the_decodes_probability_up_to_its_end_token(model):
    batch = make_batch(rows=16)
    lens = ended_lens(model, batch)
    text = lens.decode(batch["activation"], batch["sample_id"], 3, 1.0)
    assert text.lengths_B.tolist() == lengths_of(text.ids_BT, lens.verbalizer.end_id).tolist()
    log_prob_BT = lens.verbalizer.log_prob_of(batch["activation"], text.ids_BT)
    torch.testing.assert_close(log_prob_BT.where(text.drawn_BT, 0.0), text.log_prob_BT, atol=1e-4, rtol=1e-4)
    assert (text.ids_BT[~text.drawn_BT] == lens.verbalizer.end_id).all() and (text.log_prob_BT[~text.drawn_BT] == 0).all()


def test_every_rank_goes_through_the_same_backward_however_long_its_texts_are(model):
    """Sharded engines gather a block in backward: a rank whose texts are all empty must run as many as any other."""
    batch, counts = make_batch(), []
    for end_id in (None, "all"):
        lens, calls = make_lens(model, kl_base_weight=1.0), []
        if end_id:
            end_with(lens, int(lens.decode(batch["activation"], batch["sample_id"], 3, 1.0).ids_BT[0, 0]))
            batch = {name: value[[0, 0]] for name, value in batch.items()}
        for block in lens.subject.lm.blocks:
            block.register_full_backward_pre_hook(lambda *_, calls=calls: calls.append(1))
        lens(batch, at(lens))["loss"].backward()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_division_of_the_batch_leaves_the_loss_of_ended_texts_as_it_is(model):
    batch = make_batch(rows=16)
    lens = ended_lens(model, batch, lm_base_weight=1.0, entropy_weight=0.1, tail_say_weight=1.0)
    halves = [lens({k: v[i : i + 8] for k, v in batch.items()}, at(lens)) for i in (0, 8)]
    whole = lens(batch, at(lens))
    for name in whole:
        torch.testing.assert_close(sum(half[name] for half in halves) / 2, whole[name], atol=1e-5, rtol=1e-5)


def test_a_mean_over_tokens_counts_each_row_once_and_nothing_without_weight():
    x = torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("inf"), 7.0]])
    assert token_mean(x, torch.tensor([[True, True, False], [True, False, False]])) == (2 + 5) / 2
    assert token_mean(x, torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])) == (1.5 + 0) / 2


# ------------------------------------------------------------------------------------------------------- what is taught


@pytest.mark.parametrize("order", ["forward", "last_first"])
@pytest.mark.parametrize("tag", [None, "explanation"])
def test_a_tail_that_is_taught_is_framed_and_read_without_its_frame(model, order, tag):
    lens = make_lens(model, t_text=24, end_token="eos", tag=tag, tail_order=order)
    batch = make_batch(context=30) | {"position": torch.tensor([29, 2, 14, 3])}
    words, lengths = lens.tails(batch)
    assert lengths.tolist() == [min(lens.frame.room, p + 1) for p in batch["position"].tolist()]
    for row, (p, n) in enumerate(zip(batch["position"].tolist(), lengths.tolist(), strict=True)):
        tail = batch["input_ids"][row, p + 1 - n : p + 1].tolist()
        assert words[row, :n].tolist() == (tail if order == "forward" else tail[-1:] + tail[:-1])
    ids, whole = lens.frame.put(words, lengths)
    before, behind = lens.frame.before, lens.frame.behind
    for row, n in enumerate(lengths.tolist()):
        framed = [*before, *words[row, :n].tolist(), *behind]
        assert ids[row].tolist() == framed + [lens.frame.end_id] * (24 - len(framed)) and whole[row] == len(framed)
    assert bool(before) == bool(tag)


def test_the_end_is_taught_and_what_is_behind_it_is_not(model, monkeypatch):
    lens, batch = make_lens(model, t_text=8, end_token="eos", tail_say_weight=1.0, mse_weight=0.0), make_batch()
    batch["position"] = torch.tensor([2, 3, 11, 11])
    ids, lengths = lens.frame.put(*lens.tails(batch))
    log_prob = lens.verbalizer.log_prob_of(batch["activation"], ids)
    expected = -torch.stack([log_prob[row, : n + 1].mean() for row, n in enumerate(lengths.tolist())]).mean()
    torch.testing.assert_close(lens(batch, at(lens))["tail_say"], expected)


def test_tails_of_given_lengths_are_the_tails_of_each_length():
    ids, position, lengths = torch.arange(20).view(2, 10), torch.tensor([9, 5]), torch.tensor([4, 2])
    for order in ("forward", "last_first"):
        together = tail_ids(ids, position, 4, order, lengths)
        for row, n in enumerate(lengths.tolist()):
            assert together[row, :n].tolist() == tail_ids(ids[row : row + 1], position[row : row + 1], n, order)[0].tolist()


# -------------------------------------------------------------------------------------------------------------- tags


def rows_of_text(lens, texts, t_text, end=True):
    rows = [ids + [lens.frame.end_id] * (t_text - len(ids) if end else 0) for ids in to_ids(lens.tokenizer, texts)]
    return torch.tensor([row[:t_text] for row in rows])


def test_what_stands_between_the_tags_is_the_explanation_and_all_else_has_failed(model):
    lens = make_lens(model, t_text=60, end_token="eos", tag="explanation")
    texts = [
        "<explanation>\nthe river\n</explanation>",
        "So: <explanation> a castle</explanation> and more",
        "<explanation>never closed",
        "no tags",
        "<explanation> \n </explanation>",
        "</explanation>the wrong way<explanation>",
        "<explanation>\nan Ünïcode wörd ✓\n</explanation>\n",
    ]
    ids = rows_of_text(lens, texts, 60)
    got = said(lens, ids)
    assert got.texts == ["the river", "a castle", "", "", "", "", "an Ünïcode wörd ✓"]
    assert not any(got.unfinished)
    explained = lens.frame.explained(ids, lens.frame.lengths(ids))
    assert explained.failed_B.tolist() == [text == "" for text in got.texts]
    kept = [row[:n].tolist() for row, n in zip(explained.of(ids), explained.lengths_B.tolist(), strict=True)]
    for text, tokens in zip(got.texts, kept, strict=True):
        assert lens.tokenizer.decode(tokens).strip() == text
    unfinished = said(lens, rows_of_text(lens, ["<explanation>the river</explanation>" + " of" * 60], 60, end=False))
    assert unfinished.texts == [""] and unfinished.unfinished == [True], "a text that goes on has failed, tags or not"


def test_the_reconstructor_reads_what_stands_between_the_tags_alone(model):
    lens = make_lens(model, t_text=60, end_token="eos", tag="explanation")
    ids = rows_of_text(lens, ["<explanation>\nthe river\n</explanation>", "what is this"], 60)
    explained = lens.frame.explained(ids, lens.frame.lengths(ids))
    embeds = explained.of(lens.subject.lm.embed(ids)).detach().requires_grad_()
    a_hat = lens.reconstructor(embeds, explained.lengths_B)
    (words,) = (row[:n] for row, n in zip(explained.of(ids)[:1], explained.lengths_B.tolist(), strict=False))
    torch.testing.assert_close(a_hat[0], lens.reconstruct(words[None], torch.tensor([len(words)]))[0], atol=1e-5, rtol=1e-5)
    bare = lens.reconstruct(torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]))
    torch.testing.assert_close(a_hat[1], bare[0], atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- chat prompts, markers, fixed norms

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[it] {% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model") / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_activation_enters_a_chat_prompt_as_readers_of_markers_put_it_there(chat_model):
    """Their rule: render, tokenise, find the marker, put the rescaled activation in the place of its embedding, generate."""
    keys = {"chat": True, "marker": "@", "inject": "embedding", "inject_norm": 3.0, "trainable_prompt": False, "mode": "frozen"}
    lens, a_BD = make_lens(chat_model, t_text=5, **keys), make_batch()["activation"]
    tokenizer, model = lens.tokenizer, lens.subject.lm.model
    message = [{"role": "user", "content": "a thing@ is about"}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert rendered == f"[user] a thing@ is about{tokenizer.eos_token}[it] "
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    place, prompts = ids.index(*tokenizer("@")["input_ids"]), prompts_of(lens.config, tokenizer)
    assert [*prompts.left, *prompts.marker, *prompts.right] == ids and tokenizer.eos_token_id in ids
    embeds = model.get_input_embeddings()(torch.tensor(ids)).repeat(len(a_BD), 1, 1)
    embeds[:, place] = a_BD * 3.0 / a_BD.norm(dim=-1, keepdim=True)
    said_ids = []
    for _ in range(5):
        said_ids.append(model(inputs_embeds=embeds).logits[:, -1].argmax(-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(said_ids[-1])[:, None]], dim=1)
    assert torch.equal(lens.verbalize(a_BD), torch.stack(said_ids, 1))
    assert not [name for name in lens.lens_state_names() if name.startswith("verbalizer.projection")]
    assert lens.verbalizer.projection(torch.zeros(1, 64)).abs().max() == 0


def test_a_marker_that_is_not_one_token_of_its_own_is_refused(chat_model, model):
    for marker, found in (("several tokens", "tokens"), (" a", "times in the prompt's ids")):
        with pytest.raises(ConfigError, match=f"must be one token that stands in the prompt once; it is .*{found}"):
            make_lens(chat_model, chat=True, marker=marker)
    with pytest.raises(ConfigError, match="verbalizer.chat=true needs a tokenizer with a chat template"):
        make_lens(model, chat=True)


def test_step_of_a_chat_lens_equals_the_plain_reference_step(chat_model):
    keys = {"chat": True, "marker": "@", "inject": "embedding", "inject_norm": 3.0, "lm_base_weight": 1.0}
    lens, batch = make_lens(chat_model, **keys), make_batch()
    fast, plain = (module(batch, at(lens)) for module in (lens, ReferenceStep(lens)))
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- measurement


@pytest.fixture(scope="module")
def measured(model):
    lens = make_lens(model, evaluation=Evaluation(batch_size=7, bootstrap=20, examples=2, report_documents=1, prefixes=[1, 3]))
    rows = Rows(lens, list(articles(12)))
    lens.config.verbalizer.end_token = "."
    end_with(lens, int(lens.verbalize(rows.batch["activation"])[:, 2].mode().values))
    a_BD = rows.batch["activation"].double()
    statistics = ActivationStatistics(a_BD.mean(0), a_BD.var(0), (a_BD / a_BD.norm(dim=-1, keepdim=True)).mean(0))
    result = evaluate(lens, rows, lens.config, statistics, Greedy(), progress=False)
    result.setting["statistics"] = "of these very rows"
    return lens, rows, result, statistics


def test_lengths_and_unfinished_texts_are_counted_and_told(measured):
    lens, rows, result, _ = measured
    ids = lens.verbalize(rows.batch["activation"])
    lengths = lengths_of(ids, lens.frame.end_id)
    assert len(set(lengths.tolist())) > 1
    ours = result.figures["lens"]
    assert ours["unfinished"] == pytest.approx((lengths == 6).float().mean().item())
    tokens = [len(row) for row in to_ids(lens.tokenizer, said(lens, ids).texts)]
    assert ours["tokens"] == pytest.approx(np.mean(tokens))
    assert f"{ours['tokens']:.1f} tokens in the mean; {ours['unfinished']:.1%} of its texts did not end" in table(result)
    assert "up to 6 tokens, each copy as long as its text" in table(result)
    page = render(result, "a run", [])
    assert f"{ours['tokens']:.1f} tokens in the mean" in page and "The first tokens alone" in page and "first 3 tokens" in page


def test_a_copy_is_as_long_as_the_very_text_it_stands_for(measured, monkeypatch):
    lens, rows, _, statistics = measured
    seen = {}
    import megalens.evaluate.baselines as baselines

    for name in ("read_by_lens", "read_by_subject"):
        read = getattr(baselines, name)
        monkeypatch.setattr(baselines, name, lambda lens, texts, n=name, r=read: (seen.setdefault(n, []).append(texts), r(lens, texts))[1])
    lens.config.evaluation = replace(lens.config.evaluation, num_samples=7, prefixes=[])
    evaluate(lens, rows, lens.config, statistics, Greedy(), progress=False, with_documents=False)
    wanted = [
        min(len(ids), lens.frame.room)
        for ids in to_ids(lens.tokenizer, Greedy()(lens, rows.batch["activation"][:7], torch.arange(7)).texts)
    ]
    for text, n, p, ids in zip(seen["read_by_subject"][0], wanted, rows.batch["position"], rows.batch["input_ids"], strict=False):
        assert text == lens.tokenizer.decode(ids[max(0, p + 1 - n) : p + 1])
    (copies, *_) = [texts for texts in seen["read_by_lens"] if texts != [""] * 7]
    for text, n, p, ids in zip(copies, wanted, rows.batch["position"], rows.batch["input_ids"], strict=False):
        tail = ids[max(0, p + 1 - n) : p + 1].tolist()
        assert text == lens.tokenizer.decode(tail[-1:] + tail[:-1])


def test_one_lens_is_measured_at_several_lengths(measured):
    lens, rows, result, _ = measured
    assert list(result.prefixes) == ["1", "3"]
    texts = Greedy()(lens, rows.batch["activation"][:5], torch.arange(5)).texts
    shown, counts = first_tokens(lens, texts, 3)
    for text, short, n in zip(texts, shown, counts.tolist(), strict=True):
        ids = to_ids(lens.tokenizer, [text])[0][:3]
        assert len(ids) == n and lens.tokenizer.decode(ids) == short
    assert result.prefixes["1"]["lens"]["fve_nrm"] != result.prefixes["3"]["lens"]["fve_nrm"]
    assert [row[0] for row in by_length(result)] == ["fve_nrm", "first 1 token", "first 3 tokens", "whole text"]
    assert by_length(result)[-1][-1].startswith(f"{result.figures['lens']['fve_nrm']:.3f}")


def test_the_best_of_several_keeps_what_is_known_of_each_text(measured):
    lens, rows, _, _ = measured
    found = search_named("best_of:3")(lens, rows.batch["activation"][:6], torch.arange(6))
    assert len(found.texts) == len(found.unfinished) == len(found.round_trips) == 6


# ------------------------------------------------------------------------------------------------- prefixes, settings


def test_a_prefix_is_one_for_all_draws_of_a_sample_and_uniform():
    ids = torch.arange(20000)
    lengths = prefix_lengths(0, 5, ids, 2, 9)
    assert torch.equal(prefix_lengths(0, 5, ids.flip(0), 2, 9), lengths.flip(0)), "a function of the sample, not of its place"
    share = torch.bincount(lengths, minlength=10)[2:] / len(ids)
    assert lengths.min() == 2 and lengths.max() == 9 and (share - 1 / 8).abs().max() < 0.01
    for other in (prefix_lengths(1, 5, ids, 2, 9), prefix_lengths(0, 6, ids, 2, 9)):
        assert (other == lengths).float().mean() < 0.2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"verbalizer": {"tag": "x"}}, "set verbalizer.end_token=eos"),
        ({"verbalizer": {"tag": "a b", "end_token": "eos"}}, "must be one word"),
        ({"verbalizer": {"shortest_prefix": 9}}, "must not be more than t_text=8"),
        ({"verbalizer": {"inject_norm": 3.0}}, "needs verbalizer.inject=embedding"),
        ({"evaluation": {"prefixes": [0, 2]}}, "must lie between 1 and t_text=8"),
        ({"evaluation": {"prefixes": [2, 9]}}, "must lie between 1 and t_text=8"),
    ],
)
def test_settings_of_texts_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        validate(config_from_dict(keys))


def test_an_end_of_several_tokens_and_a_frame_without_room_are_refused(model):
    with pytest.raises(ConfigError, match="must be eos or one token of the tokenizer, and it is"):
        make_lens(model, end_token=" several tokens")
    with pytest.raises(ConfigError, match="t_text=4 leaves no token for the text"):
        make_lens(model, t_text=4, end_token="eos", tag="explanation")


def test_drawn_tokens_are_a_texts_own_and_its_end():
    assert drawn(torch.tensor([0, 2, 3]), 3).tolist() == [[True, False, False], [True, True, True], [True, True, True]]
