"""Measuring a lens on held-out rows while it trains: loss terms, the figures of :mod:`megalens.evaluate.metrics`, sample explanations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalens.engine.base import Engine, to_device
from megalens.evaluate.metrics import Reference, figures, join, logit_statistics, mean_where_failed, row_fve, row_statistics

TAIL_TOKENS = 16  # of the context, shown beside a sample explanation


class Validator:
    """The same held-out rows every time, shared by the ranks; every rank calls the lens equally often, on equally many rows.

    Args:
        engine: for its rank and collectives.
        lens: the :class:`~megalens.lens.lens.ConsistencyLens` that is trained.
        loader: of the held-out dump.
        reference: statistics of the TRAINING activations.

    The rows are the first ``validation.num_samples`` of the dump (shuffled when it was made), rounded down to what the ranks can share in
    pairs.
    """

    def __init__(self, engine: Engine, lens, loader, reference: Reference):
        self.engine, self.lens, self.loader, self.reference = engine, lens, loader, reference
        self.config = engine.config
        unit = 2 * engine.data_ranks  # pairs: a row's partner gives the loss its resampled error
        count = max(unit, min(self.config.validation.num_samples, loader.num_rows) // unit * unit)
        share = count // engine.data_ranks
        self._rows = np.arange(count)[engine.data_rank * share : (engine.data_rank + 1) * share] % loader.num_rows

    @torch.no_grad()
    def __call__(self, at: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure.

        Args:
            at: the lens' step, for the scheduled loss weights and the noise.

        Returns:
            the figures, ``val/...``, the same on all ranks (``val/loss_kl`` is the loss term, ``val/kl`` the figure), and sample
            explanations (``context``, ``explanation``, ``fve``) on rank 0.
        """
        self.lens.eval()
        losses: dict[str, float] = {}
        parts, samples = [], []
        for batch in self._batches():
            for name, value in self.lens(batch, at).items():
                losses[name] = losses.get(name, 0.0) + value.item() * len(batch["position"]) / len(self._rows)
            rows, ids_BT = self._measure(batch)
            parts.append(rows)
            samples += self._samples(batch, ids_BT, row_fve(rows)) if self.engine.is_main else []
        self.lens.train()
        rows = join(self.engine.gather(join(parts))[:: self.engine.world_size // self.engine.data_ranks])
        measured = figures(rows)
        terms = {f"loss_{name}" if name in measured else name: value for name, value in self.engine.reduce_mean(losses).items()}
        return {f"val/{name}": value for name, value in (terms | measured).items()}, samples[: self.config.validation.num_examples]

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        size = max(2, self.config.batch_size // self.engine.data_ranks // 2 * 2)
        for first in range(0, len(self._rows), size):
            yield to_device(self.loader.rows(self._rows[first : first + size]), self.engine.device)

    def _measure(self, batch: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], Tensor]:
        """Per-row statistics of the greedy round trip, and the explanations ``[B, T]``."""
        lens, a_BD = self.lens, batch["activation"]
        ids_BT = lens.verbalize(a_BD)
        a_hat_BD = lens.reconstruct(ids_BT, torch.full((len(ids_BT),), ids_BT.shape[1], device=ids_BT.device))
        rows = row_statistics(a_BD, a_hat_BD, self.reference)
        read = lens.read(batch)
        a_hat_BD, _ = mean_where_failed(a_hat_BD, lens.mean)
        patched = partial(lens.subject.patched_logits, read)
        true_BV = lens.subject.lm.logits(read.normed_BD)
        return rows | logit_statistics(true_BV, patched(a_hat_BD), patched(lens.mean.expand_as(a_hat_BD))), ids_BT

    def _samples(self, batch: dict[str, Tensor], ids_BT: Tensor, fve_B: np.ndarray) -> list[dict[str, Any]]:
        decode = self.lens.tokenizer.decode
        result = []
        contexts, positions = batch["input_ids"].tolist(), batch["position"].tolist()
        for ids_C, position, ids_T, fve in zip(contexts, positions, ids_BT.tolist(), fve_B, strict=True):
            tail = ids_C[max(0, position + 1 - TAIL_TOKENS) : position + 1]
            result.append({"context": decode(tail), "explanation": decode(ids_T), "fve": float(fve)})
        return result


def examples_table(examples: list[dict[str, Any]]) -> str:
    """Sample explanations as lines for the console."""
    lines = []
    for row in examples:
        context, explanation = (" ".join(row[key].split()) for key in ("context", "explanation"))
        lines.append(f"  fve {row['fve']:6.2f}  ...{context[-48:]:<48} -> {explanation}")
    return "\n".join(lines)
