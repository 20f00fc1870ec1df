"""A lens that knows six words, so that all of its texts of two tokens can be written down."""

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from megalens.config import Config, Lora, Reconstructor, Verbalizer
from megalens.families.adapters import adapter
from megalens.objective import build_lens

WORDS = ("end", "a", "b", "c", "d", "e")
WIDTH, LENGTH, END = 16, 2, 0


def make_subject(folder):
    """Save a GPT-2 of two blocks over the words (whose norms keep float64), and their tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="end"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="end", eos_token="end").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def make_lens(folder, seed=3, dtype=torch.float64, ends=True, noise=0, **keys):
    """Such a lens in float64, its trained parts off their start, so that no two texts are as likely or as good; ``noise`` seeds draws."""
    config = Config(
        seed=noise,
        model_name=folder,
        layer_l=0,
        t_text=LENGTH,
        dtype="fp32",
        device="cpu",
        verbalizer=Verbalizer(prompt="a b<act>c", plain_prompt="a b c", mode="lora"),
        reconstructor=Reconstructor(prompt="d", mode="lora"),
        lora=Lora(r=2, alpha=4.0),
        **keys,
    )
    lens = build_lens(config, torch.zeros(WIDTH), torch.ones(WIDTH)).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    for parameter in lens.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=dtype)
    lens.verbalizer.end_id = END if ends else None
    return lens


def all_texts(ends=True):
    """Every text of two tokens, padded with the end token: ids ``[N, T]`` and lengths without the end token ``[N]``."""
    words = range(len(WORDS))
    texts = [ids for ids in itertools.product(words, repeat=LENGTH) if not (ends and ids[0] == END and ids[1] != END)]
    ids_NT = torch.tensor(texts)
    said_NT = (ids_NT != END).cumprod(-1) if ends else torch.ones_like(ids_NT)
    return ids_NT, said_NT.sum(-1)


def plain_log_p(lens, a_BD, ids_NT):
    """Log-probabilities ``[B, N, T, V]`` of every next word, from whole forward passes without a cache."""
    v, lm = lens.verbalizer, lens.subject.lm
    own, rows = {int(i): block for i, block in v.own.items()}, []
    for a_D in a_BD:
        x = torch.cat([v.prompt().expand(len(ids_NT), -1, -1), lm.embed(ids_NT[:, :-1])], dim=1)
        positions = torch.arange(x.shape[1])[None]
        with adapter(lm, v.adapter):
            x = lm.run(lm.enter(x, positions), 0, v.enters, positions, own=own)
            value = v.projection(a_D[None]).expand(len(ids_NT), 1, -1)
            x = torch.cat([x[:, : v.slot], value, x[:, v.slot + 1 :]], dim=1)
            x = lm.run(x, v.enters, v.blocks, positions, own=own)
        rows.append(lm.logits(v._norm(x[:, v.length - 1 :])))
    return torch.stack(rows).log_softmax(-1)
