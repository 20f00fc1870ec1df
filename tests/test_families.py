"""Makes of models: what is walked is what the model computes, and what is walked wrongly is refused."""

import json

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megalens.config import Config, ConfigError
from megalens.families.causal_lm import CausalLM
from megalens.families.protocol import Family
from megalens.families.registry import attention_of, family_of, register
from megalens.families.self_check import check_layout, check_walk
from megalens.lens.subject import load_subject
from megalens.ops import gumbel_embed, vocab_kl
from megalens.tiny import KINDS, make_model

LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
GRANITE = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MORE_TYPES = {
    "apertus": {},
    "arcee": {},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "cwm": {},
    "exaone4": {},
    "gemma": {},
    "glm4": {"pad_token_id": 0},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE,
    "hyperclovax": GRANITE,
    "mixtral": {},
    "nemotron": {},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {"sliding_window": 4, "pad_token_id": 0},
    "phi3": {"pad_token_id": 0},
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "smollm3": {"pad_token_id": 0},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {"sliding_window": 4},
}


def build(model_type, **keys):
    config = AutoConfig.for_model(model_type, **{**LLAMA, **keys})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("model_type", MORE_TYPES)
@torch.no_grad()
def test_model_of_another_type_is_walked_exactly_and_its_check_says_so(model_type):
    model = build(model_type, **MORE_TYPES[model_type])
    lm, ids = CausalLM(model), torch.arange(3, 27)[None]
    positions = torch.arange(24)[None]
    normed = lm.final_norm(lm.run(lm.enter(lm.embed(ids), positions), 0, lm.num_blocks, positions))
    torch.testing.assert_close(lm.logits(normed), model(ids).logits, atol=5e-5, rtol=1e-4)
    check_walk(lm)
    check_layout(model.config)


# ------------------------------------------------------------------------------------- what nobody wrote down is refused


class StreamConfig(LlamaConfig):
    model_type = "multiplied_stream"


class EmbeddingConfig(LlamaConfig):
    model_type = "multiplied_embeddings"


class LogitConfig(LlamaConfig):
    model_type = "multiplied_logits"


class MultipliedStream(LlamaForCausalLM):
    """What each block reads is multiplied before it."""

    config_class = StreamConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.register_forward_pre_hook(lambda _, args: (1.5 * args[0], *args[1:]))
        self.model.norm.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


class MultipliedEmbeddings(LlamaForCausalLM):
    """Embeddings are multiplied behind the embedding, whoever calls the model."""

    config_class = EmbeddingConfig

    def forward(self, input_ids=None, **options):
        return super().forward(inputs_embeds=1.1 * self.model.embed_tokens(input_ids), **options)


class MultipliedLogits(LlamaForCausalLM):
    """Logits are multiplied behind the head."""

    config_class = LogitConfig

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits * 0.9
        return out


STRANGERS = {
    "multiplied_stream": (MultipliedStream, "its own residual stream before"),
    "multiplied_embeddings": (MultipliedEmbeddings, "its own residual stream before block 0 differs by"),
    "multiplied_logits": (MultipliedLogits, "its own logits differ by"),
}
for _model, _ in STRANGERS.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)


@pytest.mark.parametrize("empty_blocks", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_model_that_multiplies_where_nobody_wrote_it_down_is_refused(tmp_path, stranger, empty_blocks):
    model, message = STRANGERS[stranger]
    folder = make_model(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": stranger, "architectures": [model.__name__]}
    (folder / "config.json").write_text(json.dumps(settings))
    config = Config(model_name=str(folder), layer_l=1, dtype="fp32", device="cpu")
    with pytest.raises(ConfigError, match=f"models of type '{stranger}' cannot be studied: {message}") as refusal:
        load_subject(config, empty_blocks=empty_blocks)
    assert "\n" not in str(refusal.value)


def test_model_that_is_loaded_for_a_dump_is_checked_up_to_the_last_block_that_is_kept(tmp_path):
    folder = make_model(tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "multiplied_stream"}
    (folder / "config.json").write_text(json.dumps(settings))
    config = Config(model_name=str(folder), layer_l=1, dtype="bf16", device="cpu")
    with pytest.raises(ConfigError, match="its own residual stream before"):
        load_subject(config, upto_block=1)


def test_granite_that_is_walked_as_llama_is_refused(monkeypatch):
    """The fault that the check is there for."""
    model = build("granite", **GRANITE)
    lm = CausalLM(model)
    monkeypatch.setattr(lm, "family", Family(model))
    with pytest.raises(ConfigError, match="its own residual stream before block 0 differs by 91.7%"):
        check_walk(lm)


def test_embedding_scale_that_only_the_vocabulary_lacks_is_refused(monkeypatch):
    """A decode multiplies rows of the matrix itself, so that ``embed`` alone being right is not enough."""
    monkeypatch.setattr(family_of(AutoConfig.for_model("gemma")), "embed_scale", 1.0)
    with pytest.raises(ConfigError, match="its embeddings are not rows of its embedding matrix times 1"):
        check_walk(CausalLM(build("gemma")))


def test_window_longer_than_the_checked_text_is_checked_too(monkeypatch):
    model = build("mistral", sliding_window=4096)
    lm = CausalLM(model)
    check_walk(lm)
    assert model.config.sliding_window == 4096
    lm.kinds = ["full_attention"] * 4
    with pytest.raises(ConfigError, match="its own residual stream before block 1"):
        check_walk(lm)


def test_block_that_keeps_nothing_in_the_cache_is_refused():
    lm = CausalLM(build("gpt_neox"))
    lm.family.cache_argument = "past"
    with pytest.raises(ConfigError, match="block 0 does not keep its keys and values in the cache"):
        check_walk(lm)


def test_block_that_wants_other_arguments_is_refused_in_one_line(monkeypatch):
    lm = CausalLM(build("olmo3"))
    monkeypatch.setattr(type(lm.family), "rotary_per_kind", False)
    with pytest.raises(ConfigError, match="cannot be called block by block .TypeError: .*layer_type"):
        check_walk(lm)


def test_block_of_an_unknown_kind_is_refused():
    model = build("qwen3")
    model.config.layer_types = ["full_attention", "sparse_attention"] * 2
    with pytest.raises(ConfigError, match="models of type 'qwen3' cannot be studied: they have blocks of the kind 'sparse_attention'"):
        CausalLM(model)


@pytest.mark.parametrize(
    "model_type, longest, keys",
    [
        ("phi3", 12, {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 12, "pad_token_id": 0}),
        ("llama4_text", 15, {"floor_scale": 16, "num_local_experts": 2, "head_dim": 16}),
    ],
)
def test_text_in_which_positions_mean_something_else_is_refused(model_type, longest, keys):
    """There a patched position, read out of its text, would not be what it was in it."""
    if "rope_parameters" in keys:
        factors = [1.0] * 8
        keys["rope_parameters"] |= {"rope_theta": 1e4, "short_factor": factors, "long_factor": [2.0 * f for f in factors]}
    lm = CausalLM(build(model_type, **keys))
    check_walk(lm)

    def run(length):
        positions = torch.arange(length)[None]
        return lm.run(torch.zeros(1, length, 64), 0, 1, positions)

    run(longest)
    with pytest.raises(ConfigError, match=f"place tokens otherwise in texts of more than {longest}; shorten them"):
        run(longest + 1)


def test_weights_that_are_no_numbers_are_refused():
    lm = CausalLM(build("llama"))
    lm.blocks[1].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(ConfigError, match="gives logits that are not finite: its weights are damaged"):
        check_walk(lm)


# -------------------------------------------------------------------------------------------------- the check without weights


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_copy_of_a_large_model_is_tiny_and_passes(tmp_path, kind, monkeypatch):
    config = AutoConfig.from_pretrained(make_model(tmp_path / kind, kind=kind))
    large = {"num_hidden_layers": 48, "vocab_size": 200_000, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 16384}
    for name, size in large.items():
        setattr(config, name, size)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 48
    if slides:
        config.layer_types = (["sliding_attention"] * 5 + ["full_attention"]) * 8
    made = []
    original = CausalLM.__init__
    monkeypatch.setattr(CausalLM, "__init__", lambda self, model: (original(self, model), made.append(model))[0])
    check_layout(config)
    assert sum(parameter.numel() for parameter in made[0].parameters()) < 2e7
    if slides:
        assert set(made[0].config.layer_types) == {"sliding_attention", "full_attention"}
    assert config.num_hidden_layers == 48


def test_model_that_no_tiny_copy_can_be_made_of_is_refused_with_the_engines_that_load_it(monkeypatch):
    def build_nothing(*_, **__):
        raise ValueError("head_dim must be 7\nand more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", build_nothing)
    with pytest.raises(ConfigError, match=r"no small one can be made \(head_dim must be 7\); use an engine that loads whole"):
        check_layout(AutoConfig.for_model("llama", **LLAMA))


# ------------------------------------------------------------------------------------------------------- scaled logits


@torch.no_grad()
def test_logit_scale_reaches_every_operation_on_the_vocabulary_and_the_bias(monkeypatch):
    model = build("cohere", logit_scale=0.3)
    model.lm_head.bias = nn.Parameter(torch.randn(512))
    lm, ids = CausalLM(model), torch.arange(3, 11)[None]
    check_walk(lm)
    positions = torch.arange(8)[None]
    normed_ND = lm.final_norm(lm.run(lm.enter(lm.embed(ids), positions), 0, 4, positions))[0]
    log_p_NV = model(ids).logits[0].log_softmax(-1)
    other_ND = normed_ND.flip(0)
    kl_N = lm.vocabulary(lambda out, _, bias: vocab_kl(normed_ND, other_ND, out, out, p_bias=bias, q_bias=bias))
    torch.testing.assert_close(kl_N, (log_p_NV.exp() * (log_p_NV - log_p_NV.flip(0))).sum(-1), atol=1e-5, rtol=1e-4)
    key_N = torch.arange(8)
    drawn = lm.vocabulary(lambda out, into, bias: tuple(gumbel_embed(normed_ND, out, into, 1.0, key_N, noise=0.0, bias_V=bias)))
    assert torch.equal(drawn[0], log_p_NV.argmax(-1))
    torch.testing.assert_close(drawn[4], -(log_p_NV.exp() * log_p_NV).sum(-1), atol=1e-5, rtol=1e-4)


def test_norm_of_ones_own_is_scaled_as_the_models_is():
    lm = CausalLM(build("cohere", logit_scale=0.3))
    hidden = torch.randn(2, 64)
    assert torch.equal(lm.final_norm(hidden, lm.norm), lm.final_norm(hidden))
    torch.testing.assert_close(lm.final_norm(hidden), 0.3 * lm.norm(hidden))


# ------------------------------------------------------------------------------------------------------------ registry


def test_model_type_is_registered_once():
    assert family_of(AutoConfig.for_model("gpt2")).__name__ == "GPT2"
    with pytest.raises(ValueError, match="model type 'gpt2' is registered already, as GPT2"):
        register("gpt2")(Family)
    assert family_of(AutoConfig.for_model("llama")) is Family
