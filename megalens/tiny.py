"""Tiny random models, their tokenizer and a small corpus: what tests and dry runs train on, made in a second without a network.

The models are Hugging Face's own classes at d 64 with 4 blocks, one per family, each with what makes its family
different: grouped queries, soft-caps, sliding windows shorter than the context, learned positions, parallel residual,
scaled embeddings and logits.
Weights are drawn wider than Hugging Face's default (and norms and biases away from one and zero), so that activations of
different texts differ clearly and a forgotten norm, bias or scale shows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
EOS, BOS = "<|endoftext|>", "<|startoftext|>"

_ROPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _WINDOWS}
_FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _ROPE),
    "qwen2": ("qwen2", _ROPE),
    "qwen3": ("qwen3", {**_ROPE, "head_dim": 16}),
    "mistral": ("mistral", {**_ROPE, "head_dim": 16, "sliding_window": 8}),
    "gemma2": ("gemma2", {**_ROPE, **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**_ROPE, **_GEMMA}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 256},
    ),
    "granite": ("granite", {**_ROPE, "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0}),
    "cohere": ("cohere", {**_ROPE, "logit_scale": 0.3}),
}
KINDS = tuple(_FAMILIES)


def make_model(folder: str | Path, kind: str = "llama", seed: int = 0, **overrides) -> Path:
    """Save a tiny random causal LM of the family ``kind`` and its tokenizer to ``folder``.

    ``overrides`` are keys of the family's Hugging Face configuration (``num_hidden_layers=6``). The same ``kind``, ``seed`` and
    ``overrides`` give the same weights; the tokenizer never depends on ``seed``. Gemma's tokenizer puts a BOS first, as the real one does.

    Raises:
        ValueError: no such family.
    """
    if kind not in _FAMILIES:
        raise ValueError(f"kind '{kind}' must be one of: {', '.join(KINDS)}")
    folder = Path(folder)
    tokenizer = make_tokenizer(adds_bos=kind.startswith("gemma"))
    model_type, settings = _FAMILIES[kind]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(model_type, **{"vocab_size": VOCAB_SIZE, "initializer_range": 0.15, **special, **settings, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _scatter_vectors(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _scatter_vectors(model: PreTrainedModel) -> None:
    """Move norms and biases off their uniform starting values."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)


def make_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly ``VOCAB_SIZE`` tokens: any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[EOS, BOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(articles(400, seed=0), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=256)


def make_text(path: str | Path, documents: int = 200, seed: int = 0) -> Path:
    """Write ``documents`` short made-up articles to a ``.jsonl`` file with the column ``text``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in articles(documents, seed)), encoding="utf-8")
    return path


_PLACES = [
    "Arden",
    "Belmora",
    "Castwick",
    "Dunhaven",
    "Elsmere",
    "Farrow",
    "Glenholm",
    "Hartvale",
    "Istria",
    "Jorvik",
    "Kelmscott",
    "Lindow",
]
_PEOPLE = [
    "Ada Thorne",
    "Boris Vale",
    "Clara Winter",
    "Dmitri Frost",
    "Edith Stone",
    "Felix Marsh",
    "Greta Lund",
    "Hugo Brandt",
    "Ines Moreau",
]
_TOPICS = {
    "river": [
        "The water rises in spring and floods the meadows.",
        "Salmon and trout are caught along its banks.",
        "It flows south for {n} miles to the sea.",
    ],
    "composer": [
        "The symphony in {n} movements was first played in {p}.",
        "Critics praised the slow strings and the choir.",
        "A violin concerto followed.",
    ],
    "castle": [
        "Its walls of grey stone are {n} feet thick.",
        "The tower burned down and was built again.",
        "Visitors climb the stairs to see the old chapel.",
    ],
    "beetle": [
        "The insect feeds on oak leaves and rotting wood.",
        "Females lay about {n} eggs under the bark.",
        "It was first described near {p}.",
    ],
    "railway": [
        "The line opened with {n} stations and one tunnel.",
        "Steam engines pulled coal to the harbour of {p}.",
        "Passenger trains stopped running after the war.",
    ],
    "football club": ["The team won the cup {n} times.", "Its home matches are played in {p}.", "The goalkeeper was sold to a rival club."],
}


def articles(count: int, seed: int = 0) -> Iterator[str]:
    """Made-up articles of three to eight sentences, each on one topic."""
    draw = random.Random(seed)
    for _ in range(count):
        topic = draw.choice(sorted(_TOPICS))
        place, person = draw.choice(_PLACES), draw.choice(_PEOPLE)
        first = f"{place} is a {topic} known since {draw.randint(1200, 1990)} and named by {person}."
        rest = [draw.choice(_TOPICS[topic]).format(n=draw.randint(2, 90), p=draw.choice(_PLACES)) for _ in range(draw.randint(2, 6))]
        yield " ".join([first, *rest, f"{draw.choice(_PEOPLE)} wrote a book about it in {draw.randint(1900, 2020)}."])
