"""Settings of how a training runs: what it measures and keeps, on which engine, and how a finished lens is measured."""

from __future__ import annotations

from dataclasses import dataclass

from megalens.config.fields import setting


@dataclass
class Validation:
    """Measuring on held-out rows while training."""

    interval: str = setting("1e", "how often")
    num_samples: int = setting(256, "held-out rows used")
    num_examples: int = setting(8, "sample explanations logged each time")


@dataclass
class Checkpoint:
    """Saving and resuming."""

    save_interval: str = setting("1e", "how often the last checkpoint is written")
    track_best_n: int = setting(1, "how many of the best checkpoints are kept")
    keep_every: str | None = setting(None, "a checkpoint is saved, and kept for good, at each such interval; null: none")
    best_metric: str = setting("val/fve_nrm", "what best means; a metric of the validation")
    best_mode: str = setting("max", "max | min", ("max", "min"))
    resume: bool = setting(True, "go on from the run's last checkpoint when there is one")


@dataclass
class EarlyTermination:
    """Ending a training before its time, as sweeps do with trials that promise little."""

    steps: str | None = setting(
        None, "end here, a duration; schedules keep the full length, and the same run can go on later. null: at the end"
    )


@dataclass
class Fsdp:
    """FSDP2 (engine fsdp)."""

    shard_ranks: int | None = setting(
        None, "ranks that share one copy of the model, e.g. those of a node (hybrid sharding: whole copies between nodes); null: all ranks"
    )
    tensor_ranks: int = setting(
        1, "ranks, of those, that slice the matrices of every block among them and work on the same samples (tensor parallelism; in a node)"
    )
    offload: bool = setting(False, "keep parameters, gradients and optimizer state on the CPU")
    gather_gb: float = setting(0.0, "GPU memory for blocks that stay gathered through a micro-step, not anew for every decoded token")


@dataclass
class Wandb:
    """Weights & Biases."""

    project: str = setting("megalens", "project")
    entity: str | None = setting(None, "user or team")
    mode: str = setting(
        "offline", "offline | online | disabled; under `wandb agent` online, unless WANDB_MODE is set", ("offline", "online", "disabled")
    )


@dataclass
class Evaluation:
    """Measuring a finished lens (tools/eval.py)."""

    num_samples: int = setting(-1, "held-out rows; -1: all")
    batch_size: int = setting(64, "rows at a time")
    bootstrap: int = setting(1000, "resamples of documents for the 95 % intervals; 0: no intervals")
    search: str = setting(
        "greedy", "how explanations are chosen, e.g. greedy or best_of:16+swaps (docs/search.md); after a comma, others to compare with"
    )
    search_rows: int = setting(64, "held-out rows, the first, on which searches are compared; -1: all that are used")
    other_reader: str | None = setting(
        None, "checkpoint of another lens that reads the compared texts too; null: the untouched subject reads them"
    )
    prefixes: list[int] = setting([], "measure the explanations' first tokens alone too, so many of them each, e.g. [1,2,4]")
    trust_rows: int = setting(384, "held-out rows on which figures of trust are taken (tools/trust.py)")
    examples: int = setting(12, "held-out examples printed")
    report_documents: int = setting(8, "documents coloured token by token in report.html")
