"""Which causal language models of the installed transformers can be subjects, tried one by one on tiny random models of their classes.

    python -m megalens.families.subjects > docs/subjects.md

prints the table; with names of model types, only their lines. It takes about a minute.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megalens.config import ConfigError
from megalens.families.causal_lm import CausalLM
from megalens.families.protocol import KINDS, Settings
from megalens.families.registry import WRAPPERS
from megalens.families.self_check import check_walk
from megalens.families.stacked import stacks_of
from megalens.families.tiny_copy import make
from megalens.families.weights import converted

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "word_embed_proj_dim", "lru_width"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "intermediate_size_mlp", "dff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "linear_num_value_heads",
            "linear_num_heads",
            "mamba_n_heads",
            "mamba_num_heads",
        ),
        4,
    ),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "rotary_dim", "num_experts_per_layer"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "depth"), 1),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head"), 32),
}
_TURNS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_LATENT = {"num_key_value_heads": 4}  # attention over a latent has no groups
_SPECIAL: dict[str, dict] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "hy_v4", "minicpm3", "youtu"), _LATENT),
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{name: {"rope_parameters": _TURNS} for name in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text")},
    "bailing_hybrid": {**_LATENT, "n_group": 1, "topk_group": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "deepseek_v2": {**_LATENT, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "kimi_linear": {**_LATENT, "num_experts": 4, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "longcat_flash": {**_LATENT, "ffn_hidden_size": 96, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "state_size": 16},
}


_HEAD = """# Which models can be subjects

Every causal language model of transformers {version}, and some that read images around one, tried on a tiny random model of its class.
Of {types} model types {walked} are walked and {refused} are refused.

A model that is walked gives, block by block, what its own forward gives: the residual stream, the logits, the logits where a position is
patched, and a text read in parts. The same check runs whenever a model is loaded. A model that is refused is refused by it, in one line.
[extending.md](extending.md#a-model-family) says how to add one.

Stacked experts are the matrices of a mixture that lie in one parameter; LoRA adapts each of them. A model whose weights are joined or
turned as they are loaded does not load into shards: engines that shard blocks (FSDP2, ZeRO-3) refuse it, the others take it.

`python -m megalens.families.subjects > docs/subjects.md` prints this page.
"""


@dataclass(frozen=True)
class Verdict:
    """What was found of a model type."""

    model_type: str
    class_name: str
    model: PreTrainedModel | None = None  # a tiny one; None: there is none
    refusal: str | None = None  # None: it is walked

    @property
    def line(self) -> str:
        """Its line in the table."""
        found = self.refusal.replace("|", "/") if self.refusal else _what_it_is(cast(PreTrainedModel, self.model))
        return f"| `{self.model_type}` | {self.class_name} | {found} |"


def _what_it_is(model: PreTrainedModel) -> str:
    lm = CausalLM(model)
    keeps = dict.fromkeys(KINDS[kind] for kind in lm.kinds)
    experts = "stacked" if any(stacks_of(part) for part in lm.blocks.modules()) else ""
    return f"{', '.join(keeps)} | {experts} | {'no' if converted(model) else 'yes'}"


def model_types() -> dict[str, str]:
    """The class of each model type: all causal language models of transformers, and wrappers around one that people study."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) | WRAPPERS


def examine(model_type: str) -> Verdict:
    """Make a tiny model of a type and check it."""
    name = model_types()[model_type]
    try:
        model = make(tiny_settings(model_type))
    except Exception as error:  # noqa: BLE001  # whatever a class of transformers raises is the reason
        return Verdict(model_type, name, refusal=f"no tiny model can be made ({_first_line(error)})")
    try:
        check_walk(CausalLM(model))
    except ConfigError as error:
        reason = str(error).partition("cannot be studied: ")[2].partition("; choose another")[0]
        return Verdict(model_type, name, model, reason or str(error))
    return Verdict(model_type, name, model)


def tiny_settings(model_type: str) -> Settings:
    """The configuration of a tiny model: the type's own defaults, with small sizes and every kind of block."""
    default = AutoConfig.for_model(model_type)
    changed: dict[str, Any] = _small(default)
    for name, part in vars(default).items():
        if isinstance(part, PreTrainedConfig):
            changed[name] = {**_small(part), "model_type": part.model_type, **_SPECIAL.get(part.model_type, {})}
    return AutoConfig.for_model(model_type, **changed | _SPECIAL.get(model_type, {}))


def _small(config: PreTrainedConfig) -> dict:
    stored = {name: value for name, value in config.to_dict().items() if not isinstance(getattr(type(config), name, None), property)}
    changed: dict[str, Any] = {name: _SIZES[name] for name, value in stored.items() if name in _SIZES and type(value) is int and value > 0}
    changed |= {name: 1 for name, value in stored.items() if name.endswith("_token_id") and type(value) is int and value >= VOCABULARY}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"):
        if isinstance(stored.get(name), list) and len(stored[name]) > 4:
            changed[name] = (list(dict.fromkeys(stored[name])) * 4)[:4]
    aliases = getattr(type(config), "attribute_map", {})
    return {name: value for name, value in changed.items() if aliases.get(name) not in changed}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".:")


def page(verdicts: list[Verdict]) -> str:
    """The table as a page of Markdown."""
    walked = [verdict for verdict in verdicts if verdict.refusal is None]
    refused = [verdict for verdict in verdicts if verdict.refusal is not None]
    head = _HEAD.format(version=transformers.__version__, types=len(verdicts), walked=len(walked), refused=len(refused))
    tables = []
    columns = {"Walked": "its blocks keep | experts | loads into shards", "Refused": "because"}
    for (title, last), rows in zip(columns.items(), (walked, refused), strict=True):
        rule = "|---" * (last.count("|") + 3) + "|"
        tables.append(f"\n## {title}\n\n| model type | class | {last} |\n{rule}\n" + "".join(f"{row.line}\n" for row in rows))
    return head + "".join(tables)


def main(names: list[str]) -> None:
    """Print the page, or the lines of some model types."""
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return
    known = model_types()
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{unknown[0]} is no causal language model of transformers {transformers.__version__}; see docs/subjects.md")
    verdicts = []
    for number, name in enumerate(sorted(names or known), start=1):
        print(f"\r{number}/{len(names or known)} {name:40}", end="", file=sys.stderr)
        verdicts.append(examine(name))
    print(file=sys.stderr)
    print("\n".join(verdict.line for verdict in verdicts) if names else page(verdicts), end="\n" if names else "")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    main(sys.argv[1:])
