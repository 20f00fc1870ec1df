"""Engines move weights alike, skip what is not finite, and go on exactly from what they saved."""

import copy
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, allocated_by
from launched import run_ranks
from torch import nn

from megalens.config import Config
from megalens.engine import EngineError, build_engine, leave_ranks, state
from megalens.engine.base import optimizer_groups
from megalens.engine.local import PART
from megalens.engine.state import OptimizerState


@dataclass(frozen=True)
class At:
    update: int


class FakeLens(nn.Module):
    """A frozen base, three groups of trainable parts, one of which gets a gradient on odd updates only."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, 8)
        self.adapter = nn.Linear(8, 8, bias=False)
        self.to(dtype)

    def forward(self, batch, at):
        x = batch["activation"].to(self.head.weight.dtype)
        y = self.head(torch.tanh(self.base(x)) + self.prompt.mean(0))
        if at.update % 2:
            y = y + self.adapter(x)
        mse = (y - x).float().square().mean() + (batch["spoil"] * (y - y.detach()).float().sum(1)).mean()  # a gradient, no loss
        return {"loss": mse, "mse": mse.detach()}

    def parameter_groups(self):
        heads = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        return {"head": heads, "prompt": {"prompt": self.prompt}, "adapters": {"adapter.weight": self.adapter.weight}}


def make_batch(seed, rows=4, spoil=0.0):
    return {"activation": torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), "spoil": torch.full((rows,), spoil)}


def make_engine(dtype=torch.float32, weights=None, **keys):
    config = Config(learning_rate=0.01, device="cpu", **keys)
    module = FakeLens(dtype)
    return build_engine(config, module, module.parameter_groups(), weights)


GROUPS = ["head", "prompt", "adapters"]
NAMES = ["prompt", "head.weight", "head.bias", "adapter.weight"]


def test_step_equals_plain_adamw_on_the_whole_batch():
    engine, module = make_engine(grad_clip=0.1), FakeLens()
    options = optimizer_groups(engine.config, module.parameter_groups())
    plain = torch.optim.AdamW(options, betas=(0.9, 0.95), fused=True)
    for update in range(3):
        halves = [make_batch(2 * update), make_batch(2 * update + 1)]
        engine.set_rates(dict.fromkeys(GROUPS, 0.005))
        metrics = engine.train_step(halves, At(update))
        whole = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        loss = module(whole, At(update))["loss"]
        loss.backward()
        for p in module.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad and p.grad is None else p.grad
        norm = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 0.1)
        for group in plain.param_groups:
            group["lr"] = 0.005
        plain.step()
        plain.zero_grad()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert metrics["skipped"] == 0
    for name, value in engine.full_state(NAMES).items():
        torch.testing.assert_close(value, dict(module.named_parameters())[name].detach(), rtol=1e-5, atol=1e-7)


def test_weight_decay_is_for_matrices_but_not_of_prompts():
    module = FakeLens()
    config = Config(weight_decay=0.1, learning_rate=0.01)
    decay = {id(p): group["weight_decay"] for group in optimizer_groups(config, module.parameter_groups()) for p in group["params"]}
    assert [decay[id(p)] for p in (module.head.weight, module.head.bias, module.prompt, module.adapter.weight)] == [0.1, 0, 0, 0.1]
    assert id(module.base.weight) not in decay


@pytest.mark.parametrize("frozen", GROUPS)
def test_a_group_at_rate_zero_stays_and_moves_again_at_a_rate(frozen):
    engine = make_engine()
    before = engine.full_state(NAMES)
    engine.set_rates({group: 0.0 if group == frozen else 0.01 for group in GROUPS})
    engine.train_step([make_batch(1)], At(1))
    members = engine.module.parameter_groups()
    for group in GROUPS:
        for name in members[group]:
            assert torch.equal(before[name], engine.full_state([name])[name]) == (group == frozen), name
    engine.set_rates(dict.fromkeys(GROUPS, 0.01))
    engine.train_step([make_batch(1)], At(1))
    assert all(not torch.equal(before[name], value) for name, value in engine.full_state(list(members[frozen])).items())


def test_bf16_module_is_moved_through_float32_masters():
    engine = make_engine(torch.bfloat16)
    before = engine.full_state(NAMES)
    for update in range(4):
        engine.set_rates(dict.fromkeys(GROUPS, 1e-5))  # steps far below bf16's resolution
        engine.train_step([make_batch(update)], At(update))
    after = engine.full_state(NAMES)
    assert all(not torch.equal(before[name], after[name]) for name in NAMES)
    for name in NAMES:
        assert torch.equal(dict(engine.module.named_parameters())[name], after[name].bfloat16())


def test_gradients_of_bf16_micro_batches_are_summed_in_float32():
    engine = make_engine(torch.bfloat16, grad_clip=0.0)
    engine.set_rates(dict.fromkeys(GROUPS, 1e-9))
    engine.train_step([make_batch(i) for i in range(8)], At(1))
    single = [copy.deepcopy(FakeLens(torch.bfloat16)) for _ in range(8)]
    for i, module in enumerate(single):
        (module(make_batch(i), At(1))["loss"] / 8).backward()
    expected = sum(module.head.weight.grad.float() for module in single)
    torch.testing.assert_close(engine.gradients["head.weight"], expected, rtol=1e-6, atol=0)


def test_the_gradients_norm_takes_no_copy_of_it_and_is_exact():
    engine = make_engine()
    engine.gradient = torch.randn(8 * PART, generator=torch.Generator().manual_seed(0))
    exact = engine.gradient.double().square().sum().sqrt().item()
    assert engine._norm().item() == pytest.approx(exact, rel=1e-12)
    assert allocated_by(engine._norm) < 1.1 * 8 * PART  # one part in float64, of eight in float32


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e19, 1e9])
def test_step_that_is_not_finite_or_absurd_changes_nothing_and_is_counted(spoil):
    engine = make_engine()
    engine.train_step([make_batch(0)], At(0))
    before, state = engine.full_state(NAMES), copy.deepcopy(engine.optimizer.state_dict())
    metrics = engine.train_step([make_batch(1), make_batch(2, spoil=spoil)], At(1))
    assert metrics["skipped"] == 1
    assert all(torch.equal(before[name], value) for name, value in engine.full_state(NAMES).items())
    assert engine.optimizer.state_dict()["state"][0]["step"] == state["state"][0]["step"]
    assert engine.train_step([make_batch(3)], At(2))["skipped"] == 0


def test_the_limit_of_a_gradient_is_a_setting():
    assert make_engine(grad_limit=1e13).train_step([make_batch(1, spoil=1e9)], At(1))["skipped"] == 0
    assert make_engine(grad_limit=1e-3).train_step([make_batch(1)], At(1))["skipped"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_engine_goes_on_bitwise(tmp_path, dtype):
    engine = make_engine(dtype)
    for update in range(3):
        engine.train_step([make_batch(update)], At(update))
    engine.optimizer_part().write(tmp_path, "optimizer")
    other = make_engine(dtype, weights=engine.full_state(NAMES))
    other.load_state(OptimizerState(tmp_path))
    for update in range(3, 6):
        assert engine.train_step([make_batch(update)], At(update)) == other.train_step([make_batch(update)], At(update))
    mine, theirs = engine.full_state(NAMES), other.full_state(NAMES)
    assert all(torch.equal(mine[name], theirs[name]) for name in NAMES)


def test_state_saved_before_the_first_step_is_a_fresh_one(tmp_path):
    engine = make_engine()
    engine.optimizer_part().write(tmp_path, "optimizer")
    other = make_engine()
    other.load_state(OptimizerState(tmp_path))
    assert engine.train_step([make_batch(0)], At(1)) == other.train_step([make_batch(0)], At(1))
    assert all(torch.equal(value, other.full_state(NAMES)[name]) for name, value in engine.full_state(NAMES).items())


def test_state_of_other_parameters_is_refused_by_name(tmp_path):
    engine = make_engine()
    engine.optimizer_part().write(tmp_path, "optimizer")
    module = FakeLens()
    module.head.bias.requires_grad_(False)
    groups = module.parameter_groups()
    del groups["head"]["head.bias"]
    other = build_engine(Config(device="cpu"), module, groups)
    with pytest.raises(EngineError, match=r"head\.bias"):
        other.load_state(OptimizerState(tmp_path))
    with pytest.raises(EngineError, match="lacks exp_avg.no_such_parameter: it is damaged"):
        OptimizerState(tmp_path).moments("no_such_parameter")
    (tmp_path / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError, match="cannot be read"):
        engine.load_state(OptimizerState(tmp_path))


def test_sgd_moves_against_the_clipped_gradient_and_keeps_no_state(tmp_path):
    engine, module = make_engine(optimizer="sgd", grad_clip=0.5), FakeLens()
    engine.set_rates(dict.fromkeys(GROUPS, 0.005))
    metrics = engine.train_step([make_batch(0)], At(1))
    module(make_batch(0), At(1))["loss"].backward()
    expected = module.head.weight - 0.005 * min(1.0, 0.5 / metrics["grad_norm"]) * module.head.weight.grad
    torch.testing.assert_close(engine.full_state(["head.weight"])["head.weight"], expected.detach(), rtol=1e-6, atol=1e-7)
    engine.optimizer_part().write(tmp_path, "optimizer")
    engine.load_state(OptimizerState(tmp_path))
    with pytest.raises(EngineError, match=r"of another optimizer or other parameters \(exp_avg"):
        make_engine().load_state(OptimizerState(tmp_path))


def test_norm_of_a_million_gradients_is_exact():
    gradient = torch.randn(10**6, generator=torch.Generator().manual_seed(0))

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10**6))

        def forward(self, batch, at):
            return {"loss": self.weight @ batch["gradient"]}

    module = Large()
    engine = build_engine(Config(device="cpu", dtype="fp32"), module, {"prompt": {"weight": module.weight}})
    found = engine.train_step([{"gradient": gradient}], At(0))["grad_norm"]
    assert found == pytest.approx(gradient.double().norm().item(), rel=1e-7)


def test_large_state_is_divided_over_the_ranks_in_equal_shares(monkeypatch):
    monkeypatch.setattr(state, "FILE_BYTES", 100)
    sizes = {f"w{i}": 40 for i in range(20)}
    owner, count = state.owners(sizes, 4)
    assert (count, sorted(Counter(owner.values()).items())) == (4, [(0, 5), (1, 5), (2, 5), (3, 5)])
    assert state.owners(sizes, 64)[1] == 8, "no more files than are full"
    assert state.owners({"w": 40}, 64) == ({"w": 0}, 1)


def test_training_nothing_is_refused():
    with pytest.raises(EngineError, match="nothing is trained"):
        build_engine(Config(device="cpu"), FakeLens(), {"prompts": {}})


def test_what_deepspeed_refuses_only_with_the_model_is_a_line_with_the_files_name(monkeypatch):
    import deepspeed

    def refuse(**_):
        raise AssertionError("stage 9\n is unknown")

    monkeypatch.setattr(deepspeed, "initialize", refuse)
    with pytest.raises(EngineError, match=r"^ds_configs/z1\.json: DeepSpeed says: stage 9 is unknown; see ds_configs/z2\.json"):
        make_engine(deepspeed="ds_configs/z1.json")
    leave_ranks()


# ------------------------------------------------------------------------------------------------- every engine, 2 ranks

ENGINES = ["None", "z1", "z2", "z3", "z3_offload", "fsdp", "fsdp_offload"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Seven updates of one process, by dtype."""
    import engine_ranks

    result = {}
    for dtype in ("fp32", "bf16"):
        engine = engine_ranks.make_engine(None, dtype)
        result[dtype] = engine_ranks.finish(engine, [engine_ranks.step(engine, update) for update in range(7)])
    result["rest"], _ = engine_ranks.rest(None, tmp_path_factory.mktemp("resting"))
    engine = engine_ranks.make_engine(None, "fp32", optimizer="sgd")
    result["sgd"] = engine_ranks.finish(engine, [engine_ranks.step(engine, update) for update in range(4)])
    return result


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What two ranks saw on every engine."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(ROOT, 2, [sys.executable, "tests/engine_ranks.py", folder])
    return json.loads((folder / "seen-2.json").read_text())


def assert_same_training(one, other, rel, last=7):
    for mine, theirs in zip(one["metrics"][-last:], other["metrics"][-last:], strict=True):
        assert mine["skipped"] == theirs["skipped"]
        if not mine["skipped"]:
            assert mine == pytest.approx(theirs, rel=rel)
    for name in NAMES:
        torch.testing.assert_close(torch.tensor(one["weights"][name]), torch.tensor(other["weights"][name]), rtol=rel, atol=rel)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one_process_does(alone, together, engine):
    """Also where a parameter gets a gradient in every other step only, and a loss is not finite, or a gradient absurd, on one rank."""
    for dtype in ("fp32", "bf16"):
        assert [m["skipped"] for m in together[f"{dtype} {engine}"]["metrics"]] == [0, 0, 0, 1, 1, 0, 0]
    absurd = together[f"fp32 {engine}"]["metrics"][4]["grad_norm"]
    assert absurd == pytest.approx(alone["fp32"]["metrics"][4]["grad_norm"], rel=1e-5)
    assert 1e9 < absurd < math.inf
    assert_same_training(together[f"fp32 {engine}"], alone["fp32"], 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_sgd_on_two_ranks_trains_as_one_process_does(alone, together, engine):
    assert_same_training(together[f"sgd {engine}"], alone["sgd"], 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_on_two_ranks_trains_as_one_process_does(alone, together, engine):
    assert_same_training(together[f"bf16 {engine}"], alone["bf16"], 1e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_one_engine_saved_another_goes_on_from(alone, together, engine):
    following = ENGINES[(ENGINES.index(engine) + 1) % len(ENGINES)]
    assert_same_training(together[f"{engine} then {following}"], alone["fp32"], 1e-5, last=4)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resting_group_is_as_if_it_were_not_there_and_starts_anew_when_it_wakes(alone, together, engine):
    """No weight decay, no moment, no step of the optimizer, no part in the gradient's norm; also from where another engine stopped."""
    for seen in (alone["rest"], together[f"rest {engine}"]):
        assert seen["moved"] == {"prompt": True, "head.weight": False, "head.bias": False, "adapter.weight": True}
        assert set(seen["of_head"].values()) == {0.0}
        assert {"step.head.weight", "exp_avg.head.bias"} <= seen["of_head"].keys()
        assert seen["taken"] == {"prompt": 2, "head.weight": 0, "head.bias": 0, "adapter.weight": 2}
    assert_same_training(together[f"rest {engine}"], alone["rest"], 1e-5)
    following = ENGINES[(ENGINES.index(engine) + 1) % len(ENGINES)]
    assert_same_training(together[f"{engine} woken by {following}"], alone["rest"], 1e-5, last=1)


def test_the_gradient_of_a_resting_group_is_not_in_the_norm_and_need_not_be_finite():
    engine = make_engine(grad_clip=0.0)
    engine.set_rates(dict.fromkeys(GROUPS, 0.0) | {"prompt": 0.01})
    norm = engine.train_step([make_batch(1)], At(1))["grad_norm"]
    assert norm == pytest.approx(engine.gradients["prompt"].norm().item(), rel=1e-6)
    engine.parameters["adapter.weight"].register_hook(lambda gradient: gradient * float("nan"))
    assert engine.train_step([make_batch(1)], At(1))["skipped"] == 0


def test_stage_0_shards_nothing_and_is_the_local_engine(tmp_path):
    (tmp_path / "z.json").write_text('{"zero_optimization": {"stage": 0}}')
    config, module = Config(deepspeed=str(tmp_path / "z.json")), FakeLens()
    assert type(build_engine(config, module, module.parameter_groups())).__name__ == "LocalEngine"
