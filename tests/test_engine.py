"""Engines move weights alike, skip what is not finite, and go on exactly from what they saved."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from megalens.config import Config, LrMultipliers
from megalens.engine import EngineError, build_engine
from megalens.engine.base import optimizer_groups


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
        mse = (y - x).float().square().mean() + 0 * batch["spoil"].mean() * y.sum()
        return {"loss": mse, "mse": mse.detach()}

    def parameter_groups(self):
        heads = {"head.weight": self.head.weight, "head.bias": self.head.bias}
        return {"projection_layers": heads, "prompts": {"prompt": self.prompt}, "base_model": {"adapter.weight": self.adapter.weight}}


def make_batch(seed, rows=4, spoil=0.0):
    return {"activation": torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), "spoil": torch.full((rows,), spoil)}


def make_engine(dtype=torch.float32, weights=None, **keys):
    config = Config(learning_rate=0.01, device="cpu", **keys)
    module = FakeLens(dtype)
    return build_engine(config, module, module.parameter_groups(), weights)


NAMES = ["prompt", "head.weight", "head.bias", "adapter.weight"]


def test_step_equals_plain_adamw_on_the_whole_batch():
    engine, module = make_engine(grad_clip=0.1), FakeLens()
    options = optimizer_groups(engine.config, module.parameter_groups())
    plain = torch.optim.AdamW(options, betas=(0.9, 0.95), fused=True)
    for update in range(3):
        halves = [make_batch(2 * update), make_batch(2 * update + 1)]
        metrics = engine.train_step(halves, At(update), 0.5)
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


def test_weight_decay_is_for_matrices_and_multipliers_for_groups():
    module = FakeLens()
    config = Config(weight_decay=0.1, learning_rate=0.01, custom_lr_multipliers=LrMultipliers(prompts=3.0))
    decay = {id(p): group["weight_decay"] for group in optimizer_groups(config, module.parameter_groups()) for p in group["params"]}
    rate = {id(p): group["lr"] for group in optimizer_groups(config, module.parameter_groups()) for p in group["params"]}
    assert [decay[id(p)] for p in (module.head.weight, module.head.bias, module.prompt, module.adapter.weight)] == [0.1, 0, 0, 0.1]
    assert rate[id(module.prompt)] == pytest.approx(0.03)
    assert id(module.base.weight) not in decay


def test_bf16_module_is_moved_through_float32_masters():
    engine = make_engine(torch.bfloat16)
    before = engine.full_state(NAMES)
    for update in range(4):
        engine.train_step([make_batch(update)], At(update), 1e-3)  # steps far below bf16's resolution
    after = engine.full_state(NAMES)
    assert all(not torch.equal(before[name], after[name]) for name in NAMES)
    for name in NAMES:
        assert torch.equal(dict(engine.module.named_parameters())[name], after[name].bfloat16())


def test_gradients_of_bf16_micro_batches_are_summed_in_float32():
    engine = make_engine(torch.bfloat16, grad_clip=0.0)
    engine.train_step([make_batch(i) for i in range(8)], At(1), 0.0)
    single = [copy.deepcopy(FakeLens(torch.bfloat16)) for _ in range(8)]
    for i, module in enumerate(single):
        (module(make_batch(i), At(1))["loss"] / 8).backward()
    expected = sum(module.head.weight.grad.float() for module in single)
    torch.testing.assert_close(engine.gradients["head.weight"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_step_that_is_not_finite_changes_nothing_and_is_counted(spoil):
    engine = make_engine()
    engine.train_step([make_batch(0)], At(0), 1.0)
    before, state = engine.full_state(NAMES), copy.deepcopy(engine.optimizer.state_dict())
    metrics = engine.train_step([make_batch(1), make_batch(2, spoil=spoil)], At(1), 1.0)
    assert metrics["skipped"] == 1
    assert all(torch.equal(before[name], value) for name, value in engine.full_state(NAMES).items())
    assert engine.optimizer.state_dict()["state"][0]["step"] == state["state"][0]["step"]
    assert engine.train_step([make_batch(3)], At(2), 1.0)["skipped"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_engine_goes_on_bitwise(tmp_path, dtype):
    engine = make_engine(dtype)
    for update in range(3):
        engine.train_step([make_batch(update)], At(update), 1.0)
    engine.save_state(tmp_path)
    other = make_engine(dtype, weights=engine.full_state(NAMES))
    other.load_state(tmp_path)
    for update in range(3, 6):
        assert engine.train_step([make_batch(update)], At(update), 1.0) == other.train_step([make_batch(update)], At(update), 1.0)
    mine, theirs = engine.full_state(NAMES), other.full_state(NAMES)
    assert all(torch.equal(mine[name], theirs[name]) for name in NAMES)


def test_state_saved_before_the_first_step_is_a_fresh_one(tmp_path):
    engine = make_engine()
    engine.save_state(tmp_path)
    other = make_engine()
    other.load_state(tmp_path)
    assert engine.train_step([make_batch(0)], At(1), 1.0) == other.train_step([make_batch(0)], At(1), 1.0)
    assert all(torch.equal(value, other.full_state(NAMES)[name]) for name, value in engine.full_state(NAMES).items())


def test_state_of_other_parameters_is_refused_by_name(tmp_path):
    engine = make_engine()
    engine.save_state(tmp_path)
    module = FakeLens()
    module.head.bias.requires_grad_(False)
    groups = module.parameter_groups()
    del groups["projection_layers"]["head.bias"]
    other = build_engine(Config(device="cpu"), module, groups)
    with pytest.raises(EngineError, match=r"head\.bias"):
        other.load_state(tmp_path)
    (tmp_path / "adamw.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError, match="can not be read"):
        engine.load_state(tmp_path)


def test_training_nothing_is_refused():
    with pytest.raises(EngineError, match="nothing is trained"):
        build_engine(Config(device="cpu"), FakeLens(), {"prompts": {}})
