"""Every causal language model of transformers, tiny and random: walked exactly, or refused in one line; docs/subjects.md says which."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from megalens.config import ConfigError, Lora
from megalens.families import subjects
from megalens.families.adapters import adapter, add_adapter
from megalens.families.cache import KVCache
from megalens.families.causal_lm import CausalLM
from megalens.families.stacked import StackedAdapters, stacks_of
from megalens.families.subjects import examine, main, model_types, page
from megalens.families.weights import WeightFiles, converted
from megalens.lens.subject import Subject

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "subjects.md").read_text(encoding="utf-8")
PRINTED_FOR = re.search(r"of transformers ([\d.]+),", PAGE).group(1)
LINES = {re.match(r"\| `(.+?)` ", line).group(1): line for line in PAGE.splitlines() if line.startswith("| `")}
STUDIED = {
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "jamba",
    "llama",
    "llama4",
    "mamba2",
    "mistral",
    "mistral3",
    "mixtral",
    "mpt",
    "olmo2",
    "olmo3",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_5_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "stablelm",
    "starcoder2",
}
POSITION = torch.tensor([6, 3])
LENGTH = 9


@pytest.mark.parametrize("model_type", sorted(model_types()))
def test_model_of_each_type_is_walked_exactly_or_refused_in_one_line(model_type, tmp_path):
    verdict = examine(model_type)
    if transformers.__version__ == PRINTED_FOR:
        assert verdict.line == LINES[model_type]
    if verdict.refusal is not None:
        assert verdict.refusal and "\n" not in verdict.refusal
        assert model_type not in STUDIED
        return
    subject = Subject(CausalLM(verdict.model), 1, "tiny")
    assert_shards_as_the_table_says(subject.lm.model, tmp_path)
    assert_patched_as_by_its_own_forward(subject)
    assert_same_with_a_cache(subject.lm)
    assert_adapted_everywhere(subject)


def ids_of(lm, rows=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.randint(3, lm.vocabulary.in_weight.shape[0] - 20, (rows, LENGTH))


def assert_patched_as_by_its_own_forward(subject):
    """Read, patched logits and their gradient, at positions of which one is far from the end of its context."""
    ids, each = ids_of(subject.lm), torch.arange(2)
    read = subject.read(ids, POSITION)
    with torch.no_grad():
        own = subject.lm.model(ids, use_cache=False).logits.float()
    torch.testing.assert_close(subject.lm.logits(read.normed_BD), own[each, POSITION], atol=3e-4, rtol=1e-3)
    a_BD = (read.activation_BD.flip(0) * 1.3).requires_grad_()
    found = subject.patched_logits(read, a_BD)

    def replace(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.index_put((each, POSITION), a_BD)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = subject.lm.blocks[1].register_forward_hook(replace)
    expected = subject.lm.model(ids, use_cache=False).logits.float()[each, POSITION]
    hook.remove()
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    mine, theirs = (torch.autograd.grad((logits * weight).sum(), a_BD)[0] for logits in (found, expected))
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


@torch.no_grad()
def assert_same_with_a_cache(lm):
    """A prefix read once for both rows, then token by token, into room made before and without."""
    ids, positions, last = ids_of(lm), torch.arange(LENGTH)[None], len(lm.blocks)
    ids[1, :4] = ids[0, :4]
    entered = lm.enter(lm.embed(ids), positions)
    whole = lm.run(entered, 0, last, positions)
    for room in (None, LENGTH):
        cache = KVCache(room)
        lm.run(entered[:1, :4], 0, last, positions[:, :4], cache=cache)
        for t in range(4, LENGTH):
            token = lm.run(entered[:, t : t + 1], 0, last, positions[:, t : t + 1], cache=cache)
            torch.testing.assert_close(token[:, 0], whole[:, t], atol=3e-4, rtol=1e-3)


def assert_adapted_everywhere(subject):
    """LoRA on every linear layer and stack of experts: nothing at first, something once it is trained, off outside its context."""
    lm = subject.lm
    linear = {name: part for name, part in lm.blocks.named_modules() if isinstance(part, nn.Linear | Conv1D)}
    layers = sum(
        not type(part).__name__.endswith("Router") and not set(name.split(".")) & set(lm.family.uncalled) for name, part in linear.items()
    )
    stacks = sum(len(stacks_of(part)) for part in lm.blocks.modules())
    ids, positions, last = ids_of(lm), torch.arange(LENGTH)[None], len(lm.blocks)

    def run():
        return lm.run(lm.enter(lm.embed(ids), positions), 0, last, positions)

    before = run().detach()
    added = add_adapter(lm, "verbalizer", range(last), Lora(r=2), seed=0)
    assert len(added) == 2 * (layers + stacks)
    with adapter(lm, "verbalizer"):
        torch.testing.assert_close(run(), before, atol=1e-5, rtol=1e-4)
        run().square().sum().backward()
    reached = [name for name, parameter in added.items() if ".lora_B." in name and parameter.grad is not None and parameter.grad.any()]
    unreached = {name for name in added if ".lora_B." in name} - set(reached)
    chosen_by_none = [name for name in unreached if ".experts." in name or "router" in name]  # experts, and routers that only choose
    assert len(chosen_by_none) == len(unreached), unreached
    for parameter in added.values():
        parameter.data = parameter.data + 0.05
    with torch.no_grad():
        torch.testing.assert_close(run(), before, atol=1e-5, rtol=1e-4)
        with adapter(lm, "verbalizer"):
            assert (run() - before).abs().max() > 1e-3


def assert_shards_as_the_table_says(model, folder):
    """Weights are read one by one, as engines read them into shards; else the model is refused in one line that names those that can."""
    model.save_pretrained(folder)
    if converted(model):
        with pytest.raises(ConfigError, match="only engines do that load the model whole") as refusal:
            WeightFiles(str(folder), model)
        assert "\n" not in str(refusal.value)
        return
    files = WeightFiles(str(folder), model)
    for name, parameter in model.named_parameters():
        assert torch.equal(files.read(name), parameter)


def test_page_is_about_every_type_and_counts_right():
    if transformers.__version__ != PRINTED_FOR:
        pytest.skip(f"docs/subjects.md is about transformers {PRINTED_FOR}")
    assert LINES.keys() == model_types().keys()
    walked = PAGE.partition("## Refused")[0].count("\n| `")
    assert f"Of {len(LINES)} model types {walked} are walked and {len(LINES) - walked} are refused." in PAGE
    assert walked >= 100


def test_lines_of_some_types_are_printed_by_the_command(capsys):
    main(["llama", "openai-gpt"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("`")[1] for line in printed] == ["llama", "openai-gpt"]
    assert "Of 1 model types 1 are walked and 0 are refused" in page([examine("llama")])
    with pytest.raises(SystemExit, match="lama is no causal language model of transformers"):
        main(["lama"])
    main(["--help"])
    assert "docs/subjects.md" in capsys.readouterr().out


def test_stacked_experts_with_adapters_are_experts_with_other_weights():
    """The plain reference: the same layer whose parameters are W + scale * B @ A."""
    lm = CausalLM(examine("gpt_oss").model)
    added = add_adapter(lm, "verbalizer", range(2), Lora(r=2, alpha=6), seed=0)
    for parameter in added.values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 8
    carrier = next(part for part in lm.blocks.modules() if isinstance(part, StackedAdapters))
    calls, positions = [], torch.arange(LENGTH)[None]
    hook = carrier.register_forward_hook(lambda _, args, options, out: calls.append((args, options, out)), with_kwargs=True)
    with adapter(lm, "verbalizer"):
        lm.run(lm.embed(ids_of(lm)), 0, 1, positions)
    hook.remove()
    ((args, options, found),) = calls
    for name in carrier.targets["verbalizer"]:
        factors = carrier.get_submodule(name)
        a, b = factors.lora_A["verbalizer"].weight, factors.lora_B["verbalizer"].weight
        getattr(carrier.base_layer, name).data += 3.0 * b @ a
    torch.testing.assert_close(found, carrier.base_layer(*args, **options))
    assert subjects.stacks_of(carrier.base_layer) == carrier.targets["verbalizer"]
