"""Measure a lens on held-out rows while it trains: loss terms, the figures of :mod:`megalens.evaluate.metrics`, sample explanations.

The figures are those of ``megalens eval``: greedy explanations, read back from their string, scored by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megalens.batch import Batch
from megalens.data.loader import ActivationLoader
from megalens.engine.base import Engine, to_device, with_rollouts
from megalens.evaluate.measure import RowScorer, read_by_lens
from megalens.evaluate.metrics import figures, join, row_fve
from megalens.explain.search import Greedy
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics

TAIL_TOKENS = 16  # of the context, shown beside a sample explanation


class Validator:
    """Measures the same held-out rows every time. The ranks share them; each calls the lens equally often, on equally many rows.

    Args:
        engine: for its rank and collectives.
        lens: the one that is trained.
        loader: of the held-out dump.
        statistics: of the TRAINING activations.

    The rows are the first ``validation.num_samples`` of the dump, which was shuffled when it was made. Their number is rounded down so that
    each rank gets the same number of pairs.
    """

    def __init__(self, engine: Engine, lens: ConsistencyLens, loader: ActivationLoader, statistics: ActivationStatistics):
        self.engine, self.lens, self.loader, self.statistics = engine, lens, loader, statistics
        self.config, self.search = engine.config, Greedy()
        unit = 2 * engine.data_ranks  # pairs: a row's partner gives the loss its resampled error
        count = max(unit, min(self.config.validation.num_samples, loader.num_rows) // unit * unit)
        share = count // engine.data_ranks
        self._rows = np.arange(count)[engine.data_rank * share : (engine.data_rank + 1) * share] % loader.num_rows

    @torch.no_grad()
    def __call__(self, at: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Measure.

        Args:
            at: the step, which gives the scheduled loss weights and the noise.

        Returns:
            the figures, ``val/...``, the same on all ranks (``val/loss_kl`` is the loss term, ``val/kl`` the figure), and sample
            explanations (``context``, ``explanation``, ``fve``) on rank 0.
        """
        self.lens.eval()
        losses: dict[str, float] = {}
        parts, samples = [], []
        for batch in self._batches():
            ((_, rollouts),) = with_rollouts([batch], self.engine.sample([batch], at))
            for name, value in self.lens(batch, at, *rollouts).items():
                losses[name] = losses.get(name, 0.0) + value.item() * len(batch["position"]) / len(self._rows)
            said = self.search(self.lens, batch["activation"], batch["sample_id"])
            rows = RowScorer(self.lens, batch, self.statistics)(read_by_lens(self.lens, said.texts))
            parts.append(rows | said.rows(np.arange(len(said.texts)), self.lens))
            samples += self._samples(batch, said.texts, row_fve(rows)) if self.engine.is_main else []
        self.lens.train()
        rows = join(self.engine.gather(join(parts))[:: self.engine.world_size // self.engine.data_ranks])
        measured = figures(rows)
        terms = {f"loss_{name}" if name in measured else name: value for name, value in self.engine.reduce_mean(losses).items()}
        return {f"val/{name}": value for name, value in (terms | measured).items()}, samples[: self.config.validation.num_examples]

    def _batches(self) -> Iterator[Batch]:
        size = max(2, self.config.batch_size // self.engine.data_ranks // 2 * 2)
        for first in range(0, len(self._rows), size):
            yield to_device(self.loader.rows(self._rows[first : first + size]), self.engine.device)

    def _samples(self, batch: Batch, texts: list[str], fve_B: np.ndarray) -> list[dict[str, Any]]:
        result = []
        contexts, positions = batch["input_ids"].tolist(), batch["position"].tolist()
        for ids_C, position, text, fve in zip(contexts, positions, texts, fve_B, strict=True):
            tail = ids_C[max(0, position + 1 - TAIL_TOKENS) : position + 1]
            result.append({"context": self.lens.tokenizer.decode(tail), "explanation": text, "fve": float(fve)})
        return result


def examples_table(examples: list[dict[str, Any]]) -> str:
    """Sample explanations as text, a line each."""
    lines = []
    for row in examples:
        context, explanation = (" ".join(row[key].split()) for key in ("context", "explanation"))
        lines.append(f"  fve {row['fve']:6.2f}  ...{context[-48:]:<48} -> {explanation}")
    return "\n".join(lines)
