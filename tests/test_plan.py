"""The planner: its count of a step beside what a real step allocates, its parameters beside a real lens, and what it says fits."""

import dataclasses
import itertools

import pytest
import torch
from conftest import ROOT, allocated_by
from torch.utils.flop_counter import FlopCounterMode

from megalens.commands import plan as command
from megalens.config import ConfigError, Fsdp, Rollouts, load_config
from megalens.engine.local import LocalEngine
from megalens.objective import build_lens
from megalens.ops import gumbel_embed, gumbel_tile, kl_tile, log_prob_tile, native, vocab_divergences, vocab_log_prob
from megalens.planning import report
from megalens.planning.fit import ENGINES, GPU, choose, flops, need
from megalens.planning.flops import FLOPS
from megalens.planning.footprint import Sampling, footprint, meta_lens, take_step
from megalens.tiny import make_model

OBJECTIVE = ["config=conf/tiny.yaml", "kl_base_weight=0.1", "lm_base_weight=0.1", "tail_say_weight=0.2", "device=cpu"]
VOCABULARY = 4096  # from here on the vocabulary ops work in tiles on a CPU too


@pytest.fixture
def objective(checkout):
    """Arguments of a training on every term."""
    model = make_model(checkout / "data" / "wide" / "tiny-llama", vocab_size=VOCABULARY)
    return [*OBJECTIVE, f"model_name={model}"]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A configuration that trains everything, and its footprint."""
    model = make_model(tmp_path_factory.mktemp("model") / "tiny-llama", vocab_size=VOCABULARY)
    config = load_config([f"config={ROOT}/conf/tiny.yaml", *OBJECTIVE[1:], f"model_name={model}", "train_mode=full", "batch_size=64"])
    return config, footprint(config)


def real_lens(config):
    return build_lens(config, torch.zeros(64), torch.ones(64))


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_parameters_and_memory_of_a_step_are_those_of_a_real_one(objective, mode):
    config = load_config([*objective, f"train_mode={mode}"])
    step, lens = footprint(config), real_lens(config)
    prompts = sum(p.numel() for name, p in lens.named_parameters() if ".prompt." in name)
    trained = sum(p.numel() for p in lens.parameters() if p.requires_grad)
    assert abs(step.trained - trained) <= prompts  # its tokenizer counts words
    assert step.frozen == sum(p.numel() for p in lens.parameters()) - trained
    rows, context = 16, config.activation_dumper.seq_len
    draw = torch.Generator().manual_seed(0)
    batch = {
        "activation": torch.randn(rows, 64, generator=draw),
        "input_ids": torch.randint(3, 400, (rows, context), generator=draw),
        "position": torch.randint(8, context, (rows,), generator=draw),
        "sample_id": torch.arange(rows),
        "doc_id": torch.arange(rows),
    }
    take_step(lens, batch)  # what is made once
    measured = allocated_by(lambda: take_step(lens, batch))
    planned = need(config, step, "local", 1, rows).memory
    assert sum(planned[name] for name in ("keys and values", "other activations", "vocabulary tiles")) == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(native.compiler() is None, reason="the tile version needs a C++ compiler")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wanted", [("hidden",), ("hidden", "out")])
def test_flops_of_the_vocabulary_ops_are_those_of_their_products(monkeypatch, tied, wanted):
    counted = []
    for module, name in itertools.product((gumbel_tile, kl_tile, log_prob_tile), ("forward", "backward")):
        plain = getattr(module, name)

        def count(*inputs, plain=plain):
            with FlopCounterMode(display=False) as products:
                result = plain(*inputs)
            counted.append(products.get_total_flops())
            return result

        monkeypatch.setattr(module, name, count)
    rows, width = 20, 32  # more rows than ``cpu/few.h`` serves: its products are not PyTorch's
    make = {"hidden": (rows, width), "other": (rows, width), "out": (VOCABULARY, width), "in": (VOCABULARY, width)}
    tensors = {name: torch.randn(shape).requires_grad_(name in wanted) for name, shape in make.items()}
    in_weight = tensors["out"] if tied else tensors["in"]
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as planned:
        drawn = gumbel_embed(tensors["hidden"], tensors["out"], in_weight, 1.0, torch.arange(rows), impl="tile")
        compared = vocab_divergences(tensors["other"], drawn.embeds, tensors["out"], in_weight, impl="tile")
        scored = vocab_log_prob(tensors["hidden"], tensors["out"], drawn.ids, impl="tile")
        (drawn.lse.sum() + compared.kl.sum() + scored.log_prob.sum()).backward()
    assert planned.get_total_flops() == sum(counted)
    assert len(counted) == 6


def test_what_the_local_engine_keeps_is_what_is_planned(full):
    config = dataclasses.replace(full[0], dtype="bf16")
    lens = real_lens(config)
    engine = LocalEngine(config, lens, lens.parameter_groups())
    for master in engine.masters.values():
        master.grad = torch.zeros_like(master)
    engine.optimizer.step()
    planned = need(config, dataclasses.replace(full[1], width=2), "local", 1, 8).memory
    moments = [v for state in engine.optimizer.state.values() for v in state.values() if v.dim()]
    kept = {"weights": lens.parameters(), "masters": engine.masters.values(), "moments": moments, "gradients": [engine.gradient]}
    for name, tensors in kept.items():
        assert sum(t.nbytes for t in tensors) == pytest.approx(planned[name], rel=0.02), name


def test_the_fastest_that_fits_is_chosen_and_more_accumulation_before_nothing(full):
    config, step = full

    def with_memory(size):
        return GPU((size + 2 * 2**30) / 0.92, 1e12, 1e12, 1e12)

    local = need(config, step, "local", 4, 16)
    assert choose(config, {1: step}, 4, with_memory(local.total + 1))[0] == local
    sharded = choose(config, {1: step}, 4, with_memory(local.total - 1))[0]
    assert sharded.total < local.total
    assert sharded.engine != "local"
    least = min(need(config, step, engine, 4, 16).total for engine in ENGINES if "tensor" not in engine)
    assert choose(config, {1: step}, 4, with_memory(least - 1))[0].rows < 16
    assert choose(config, {1: step}, 4, with_memory(1000))[0] is None
    with pytest.raises(ConfigError, match="batch_size=64 cannot be shared by 3 GPUs"):
        choose(config, {1: step}, 3, with_memory(1e9))


def test_sharding_divides_what_it_shards(full):
    config, step = full
    one, two = (need(config, step, "z2", ranks, 4).memory for ranks in (1, 2))
    for name in ("masters", "moments", "gradients"):
        assert two[name] == one[name] / 2
    assert two["weights"] == one["weights"]
    one, two = (need(config, step, "fsdp", ranks, 4).memory for ranks in (1, 2))
    for name in ("weights", "masters", "moments", "gradients"):
        assert two[name] == one[name] / 2
    assert one["gather and reduce buffers"] == two["gather and reduce buffers"] > step.width * step.vocabulary
    offloaded = need(config, step, "z3_offload", 2, 4)
    assert offloaded.memory["moments"] == 0
    assert offloaded.host > 0


def test_ranks_of_a_node_slice_the_blocks_and_share_their_samples(full):
    config, step = full
    sliced = footprint(dataclasses.replace(config, fsdp=Fsdp(tensor_ranks=2)))
    lens = real_lens(config)
    blocks = [p for unit in lens.slicing(2) for p in unit.parameters()]
    matrices, rest = (sum(p.numel() for p in blocks if (p.dim() > 1) == is_matrix) for is_matrix in (True, False))
    assert sliced.frozen + sliced.trained == step.frozen + step.trained - matrices // 2
    assert (step.summed_fixed, step.summed_per_sample) == (0, 0)
    assert sliced.kv_per_sample == step.kv_per_sample / 2
    assert sliced.bytes_per_sample < step.bytes_per_sample
    assert rest > 0

    copies, shared = (need(config, sliced, engine, 4, 32, 2) for engine in ("tensor", "fsdp_tensor"))
    assert copies.shares == 2
    assert copies.memory["moments"] == 8 * sliced.trained == 2 * shared.memory["moments"]
    assert copies.inside == shared.inside > 0
    assert copies.wire - copies.inside == 4 * sliced.trained  # twice, from one of two nodes
    assert copies.wire < shared.wire < need(config, step, "fsdp", 4, 16).wire
    enough = GPU((copies.total + 1 + 2 * 2**30) / 0.92, 1e12, 1e12, 1e12)
    assert choose(config, {1: dataclasses.replace(step, frozen=10**12), 2: sliced}, 4, enough)[0] == copies


def test_texts_are_sampled_as_many_at_once_as_fit_and_their_gathers_are_told(full):
    config, step = full
    config = dataclasses.replace(config, rollouts=Rollouts(draws=4))
    each = Sampling(
        passed=600.0,
        gathers=3,
        summed_fixed=0,
        summed_per_sample=0,
        bytes_fixed=0,
        bytes_per_sample=1000,
        flops_fixed=7,
        flops_per_sample=11,
    )
    alone, sampled = (need(config, dataclasses.replace(step, sampling=s), "fsdp", 4, 16) for s in (None, each))
    assert (alone.texts, alone.calls, sampled.texts, sampled.calls) == (0, 0, 64, 1)
    assert sampled.wire - alone.wire == step.width * 600 * 3 / 4
    assert flops(config, sampled) - flops(config, alone) == 7 + 16 * 11
    assert sampled.total == alone.total, "what the step takes anyway"

    few = dataclasses.replace(config, rollouts=Rollouts(draws=4, at_once=9))
    twice = need(few, dataclasses.replace(step, sampling=each), "fsdp", 4, 16)
    assert (twice.texts, twice.calls) == (8, 8)
    large = dataclasses.replace(each, bytes_per_sample=10 * sampled.total)
    assert need(few, dataclasses.replace(step, sampling=large), "fsdp", 4, 16).total > 20 * sampled.total

    kept = need(config, dataclasses.replace(step, sampling=each), "fsdp_gathered", 4, 16)
    assert kept.wire < sampled.wire
    assert kept.memory["gather and reduce buffers"] > step.width * step.blocks
    said = "\n".join(report.sampling(config, sampled, 4, GPU(1e9, 1e12, 1e12, 1e12), 1))
    assert "rollouts.at_once=64 per GPU, 1 times per optimizer step" in said
    assert "fsdp.gather_gb=1: every block once" in said
    assert "fsdp.tensor_ranks=4: no gathers" in said


def test_heads_that_cannot_be_shared_are_no_slices(objective, monkeypatch):
    config = load_config(objective)
    monkeypatch.setattr(report, "footprint", meta_lens)
    assert sorted(report.footprints(config, 2)) == [1, 2]
    assert sorted(report.footprints(config, 6)) == [1, 2]
    assert sorted(report.footprints(config, 3)) == [1]


def test_the_command_prints_a_plan_or_what_does_not_fit(checkout, capsys):
    assert command.main([*OBJECTIVE, "nodes=1", "gpus_per_node=2", "gpu=a100-40g", "tokens=1e6"]) == 0
    said = capsys.readouterr().out
    assert "engine: local (torchrun)" in said
    assert "62,500 activations" in said  # two of each 32 tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("gpu=h800", "gpu: invalid choice: 'h800' .choose from 'a100-40g'"),
        ("nodes=none", "nodes: none must be a whole number of 1 or more"),
        ("nodez=2", "unknown key 'nodez' in the command line; did you mean 'nodes'"),
        ("tables", "invalid choice: 'tables'"),
    ],
)
def test_a_wrong_line_is_answered_with_the_mend(checkout, wrong, message):
    with pytest.raises(ConfigError, match=message):
        command.main([*OBJECTIVE, wrong])
