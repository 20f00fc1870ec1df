"""The tiny models are what the tests stand on: their own promises are tested first."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalens import tiny


@pytest.fixture(params=tiny.KINDS)
def kind(request):
    return request.param


def last_hidden_state(folder, text):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[3][0, -1]


def test_activations_of_different_texts_differ_clearly(kind, tmp_path):
    folder = tiny.make_model(tmp_path, kind)
    river, castle = (last_hidden_state(folder, f"Arden is a {topic}") for topic in ("river", "castle"))
    assert torch.cosine_similarity(river, castle, dim=0) < 0.9


def test_same_seed_same_weights_other_seed_other_weights(kind, tmp_path):
    first, same, other = (tiny.make_model(tmp_path / str(i), kind, seed=seed) / "model.safetensors" for i, seed in enumerate([0, 0, 1]))
    assert first.read_bytes() == same.read_bytes() != other.read_bytes()


def test_the_tokenizer_does_not_depend_on_the_seed(tmp_path):
    first, other = (tiny.make_model(tmp_path / str(seed), seed=seed) / "tokenizer.json" for seed in (0, 1))
    assert first.read_bytes() == other.read_bytes()


def test_making_a_model_leaves_the_random_state_alone(tmp_path):
    before = torch.random.get_rng_state()
    tiny.make_model(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_any_text_survives_the_tokenizer(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(tmp_path, kind))
    assert len(tokenizer) == tiny.VOCAB_SIZE
    text = "Zażółć 猫 — 🚂\n\ttabs, the river"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_only_gemma_tokenizers_put_a_bos_first(kind, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(tmp_path, kind))
    has_bos = tokenizer("river").input_ids[0] == tokenizer.bos_token_id
    assert has_bos == kind.startswith("gemma")


def test_overrides_reach_the_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path, num_hidden_layers=6, hidden_size=32, head_dim=8))
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 32)


def test_an_unknown_family_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="kind 'lama' must be one of: llama"):
        tiny.make_model(tmp_path, "lama")


def test_windows_and_soft_caps_are_smaller_than_a_context(tmp_path):
    gemma = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path, "gemma2")).config
    assert gemma.sliding_window == 8
    assert "sliding_attention" in gemma.layer_types
    assert "full_attention" in gemma.layer_types
    assert gemma.attn_logit_softcapping
    assert gemma.final_logit_softcapping


def test_the_corpus_is_repeatable_and_varied(tmp_path):
    path = tiny.make_text(tmp_path / "folder" / "tiny.jsonl", documents=50)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == 50
    assert len(set(texts)) == 50
    assert all(len(text.split()) >= 12 for text in texts)
    assert path.read_bytes() == tiny.make_text(tmp_path / "again.jsonl", documents=50).read_bytes()
