"""What a step on rollouts costs, in time and peak memory, beside the same step written plainly with transformers.

    python benchmarks/policy_step.py [--size smol] [--t-text 8] [--activations 16] [--draws 8] [--micro-batches 8] [--repeats 5]

A step samples ``draws`` texts of each activation, scores them, and updates the policy (GRPO, strictly on-policy) and the reconstructor on
them: LoRA on both roles, clipping, AdamW. Ours samples all texts together and trains in micro-batches. Plain: ``generate`` on
prompts repeated for every text, whole forward passes, ``log_softmax`` of whole logits, all texts at once; ``--plain-micro-batches`` divides
its training pass too. Both take turns; seconds are medians, ``ratio`` is the median of turns. Peak memory is measured in a fresh process
per side: peak resident set minus the resident set after loading (Linux). ``largest_mb`` is the largest single tensor that a step
allocates, ``logits_mb`` what one of [texts, tokens, vocabulary] in float32 would be. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

SIZES = {
    "tiny": {"model_name": None, "layer_l": 1, "context": 16},
    "smol": {"model_name": "data/models/SmolLM2-135M-Instruct", "layer_l": 19, "context": 64},
}
SIDES = ("ours", "plain")


class PlainStep(nn.Module):
    """Sampling, scoring and both losses with transformers' own forward and ``generate``: no shared prompt, whole logits."""

    def __init__(self, lens, draws: int, tokens: int):
        super().__init__()
        self.lens, self.draws, self.tokens = lens, draws, tokens

    def forward(self, batch, at, ids_NT: Tensor | None = None) -> dict[str, Tensor]:
        """``loss`` of a batch, of texts that :meth:`generate` gave."""
        from megalens.objective.reference import reconstruct

        lens, a_BD = self.lens, batch["activation"]
        ids_NT = self.generate(a_BD) if ids_NT is None else ids_NT
        a_hat_ND = reconstruct(lens, lens.subject.lm.embed(ids_NT))
        a_ND = a_BD.repeat_interleave(self.draws, 0)
        mse_N = (a_ND - a_hat_ND).square().sum(1) / a_ND.square().sum(1)
        reward_BK = -2 * (1 - nn.functional.cosine_similarity(a_ND, a_hat_ND.detach())).view(len(a_BD), -1)
        advantage_N = (reward_BK - reward_BK.mean(1, keepdim=True)).flatten()
        log_p_NTV = self._logits(a_ND, ids_NT).float().log_softmax(-1)
        log_prob_NT = log_p_NTV.gather(-1, ids_NT[..., None])[..., 0]
        loss = -(advantage_N[:, None] * log_prob_NT).mean() + mse_N.mean()
        return {"loss": loss}

    @torch.no_grad()
    def generate(self, a_BD: Tensor) -> Tensor:
        """Sampled texts ``[B * draws, T]``."""
        a_ND = a_BD.repeat_interleave(self.draws, 0)
        prompt_NLD = self.lens.verbalizer.prompt().expand(len(a_ND), -1, -1)
        with self._injected(a_ND):
            return self.lens.subject.lm.model.generate(
                inputs_embeds=prompt_NLD,
                attention_mask=torch.ones(prompt_NLD.shape[:2], dtype=torch.long),
                do_sample=True,
                top_k=0,
                max_new_tokens=self.tokens,
                min_new_tokens=self.tokens,
                pad_token_id=0,
            )

    def _logits(self, a_ND: Tensor, ids_NT: Tensor) -> Tensor:
        v, lm = self.lens.verbalizer, self.lens.subject.lm
        embeds = torch.cat([v.prompt().expand(len(a_ND), -1, -1), lm.embed(ids_NT)], dim=1)
        with self._injected(a_ND):
            return lm.model(inputs_embeds=embeds).logits[:, v.length - 1 : -1]

    def _injected(self, a_ND: Tensor):
        """The verbalizer's adapters, and the projected activation in the slot's place behind block ``layer_l``."""
        from contextlib import ExitStack

        from megalens.families.adapters import adapter

        v, lm = self.lens.verbalizer, self.lens.subject.lm

        def replace(_, __, output: Tensor) -> Tensor:
            if output.shape[1] == 1:  # a token of the decode
                return output
            value = v.projection(a_ND)[:, None].to(output.dtype)
            return torch.cat([output[:, : v.slot], value, output[:, v.slot + 1 :]], dim=1)

        stack = ExitStack()
        stack.enter_context(adapter(lm, v.adapter))
        stack.callback(lm.blocks[self.lens.subject.layer_l].register_forward_hook(replace).remove)
        return stack


def main() -> None:
    """Measure."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if options.side:
            print(json.dumps(peak_megabytes(options, folder)))
            return
        figures = timings(options, folder) | {f"peak_mb_{side}": fresh_process(options, side) for side in SIDES}
    figures["peak_ratio"] = round(figures["peak_mb_ours"] / figures["peak_mb_plain"], 3)
    about = {name: getattr(options, name) for name in ("size", "activations", "draws", "t_text", "micro_batches", "plain_micro_batches")}
    print(json.dumps({"claim": "step on rollouts"} | about | {"threads": torch.get_num_threads(), "torch": torch.__version__} | figures))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--activations", type=int, default=16)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--t-text", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=8, help="of our training pass")
    parser.add_argument("--plain-micro-batches", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="only the peak memory of one side")
    return parser.parse_args()


def make(options: argparse.Namespace, folder: str):
    """The lens, and the step of a side."""
    from megalens.config import Config, ConfigError
    from megalens.engine.local import LocalEngine
    from megalens.objective import Step, build_lens
    from megalens.tiny import make_model

    size = SIZES[options.size]
    name = size["model_name"] or str(make_model(folder))
    settings = Path(name) / "config.json"
    width = json.loads(settings.read_text())["hidden_size"] if settings.is_file() else 0
    config = Config(model_name=name, layer_l=size["layer_l"], t_text=options.t_text, dtype=options.dtype, train_mode="lora", device="cpu")
    config.mse_weight.value, config.rollouts.draws, config.gates.gap = 0.0, options.draws, None
    config.terms = {"policy": _constant(1.0), "rollout_read": _constant(1.0)}
    try:
        lens = build_lens(config, torch.zeros(width), torch.ones(width))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    draw, rows = torch.Generator().manual_seed(0), torch.arange(options.activations)
    ids = torch.randint(3, 500, (options.activations, size["context"]), generator=draw)
    batch = {"activation": lens.subject.residual(ids)[:, -1].float(), "sample_id": rows}
    engine, plain = LocalEngine(config, lens, lens.parameter_groups()), PlainStep(lens, options.draws, options.t_text)

    def step(side: str) -> None:
        count = options.micro_batches if side == "ours" else options.plain_micro_batches
        chunks = [x.chunk(count) for x in batch.values()]
        at, parts = Step.fixed(config), [dict(zip(batch, part, strict=True)) for part in zip(*chunks, strict=True)]
        if side == "ours":
            engine.module = lens
            engine.train_step(parts, at, engine.sample(parts, at))
        else:
            engine.module = plain
            engine.train_step(parts, at, list(plain.generate(batch["activation"]).chunk(count)))

    return lens, step


def _constant(value: float):
    from megalens.config import Weight

    return Weight(value=value)


def timings(options: argparse.Namespace, folder: str) -> dict:
    """Medians of both steps, taken in turns; the largest tensor that each allocates."""
    lens, step = make(options, folder)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(options.repeats + 1):
        for side in SIDES:
            started = time.perf_counter()
            step(side)
            if turn:
                seconds[side].append(time.perf_counter() - started)
        print(f"turn {turn + 1} of {options.repeats + 1}", file=sys.stderr)
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    texts = options.activations * options.draws
    logits = texts * options.t_text * len(lens.subject.lm.vocabulary.out_weight) * 4
    return {
        **{f"seconds_{side}": round(statistics.median(spent), 3) for side, spent in seconds.items()},
        "ratio": round(ratio, 3),
        **{f"largest_mb_{side}": round(largest_allocation(partial(step, side)) / 1e6, 2) for side in SIDES},
        "logits_mb": round(logits / 1e6, 2),
    }


def largest_allocation(work) -> int:
    """The largest tensor in bytes that PyTorch's CPU allocator gives out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    return max(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


def fresh_process(options: argparse.Namespace, side: str) -> float:
    """The side's peak memory in a process of its own."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name not in ("side", "repeats")]
    done = subprocess.run([sys.executable, __file__, *settings, "--side", side], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def peak_megabytes(options: argparse.Namespace, folder: str) -> dict:
    """Peak resident set of two steps minus the resident set after loading, in MB."""
    _, step = make(options, folder)
    status = Path("/proc/self/status").read_text().split()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = int(status[status.index("VmRSS:") + 1])
    for _ in range(2):
        step(options.side)
    status = Path("/proc/self/status").read_text().split()
    return {"peak_mb": round((int(status[status.index("VmHWM:") + 1]) - before) / 1024, 1)}


if __name__ == "__main__":
    main()
