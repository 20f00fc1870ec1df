"""The held-out rows that figures of trust are taken on: activations, contexts, the lens's texts, and what it makes of other texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megalens.batch import Batch
from megalens.data.loader import ActivationLoader
from megalens.evaluate.measure import Said, Search, read_by_lens, said
from megalens.evaluate.metrics import mean_where_failed, normalised_error
from megalens.evaluate.text import pad, to_ids
from megalens.evaluate.trust.identify import drawn_partners, hard_partners
from megalens.lens.lens import ConsistencyLens
from megalens.lens.text import drawn
from megalens.statistics import ActivationStatistics

PARTNERS = 9


@dataclass
class TrustRows:
    """Some held-out rows of one lens.

    Args:
        lens: with its subject.
        statistics: of the TRAINING activations.
        a_ND: activations, float32 on the CPU.
        contexts: token ids of each context up to P.
        doc_id_N, sample_id_N: numbers of each row's document and of the row itself.
        texts: the lens's explanation of each row.
        round_trip_N: is it re-tokenised to the very tokens that were said?
        batch_size: rows at a time; no figure depends on it.
    """

    lens: ConsistencyLens
    statistics: ActivationStatistics
    a_ND: Tensor
    contexts: list[list[int]]
    doc_id_N: np.ndarray
    sample_id_N: np.ndarray
    texts: list[str]
    round_trip_N: np.ndarray
    batch_size: int = 64

    def __len__(self) -> int:
        return len(self.contexts)

    @cached_property
    def u_ND(self) -> np.ndarray:
        """Activations of unit length, float64."""
        return unit(self.a_ND.double().numpy())

    @property
    def mean_D(self) -> np.ndarray:
        """Training mean of the unit-length activations."""
        return self.statistics.mean_normalised.double().cpu().numpy()

    @cached_property
    def partners_NK(self) -> np.ndarray:
        """Nine rows of other documents for each row."""
        return drawn_partners(self.doc_id_N, self.sample_id_N, PARTNERS, self.lens.config.seed)

    @cached_property
    def hard_NK(self) -> np.ndarray:
        """Nine rows of other documents for each row, of the same token at P where there are such."""
        token_N = np.array([ids[-1] for ids in self.contexts])
        return hard_partners(self.doc_id_N, self.sample_id_N, token_N, self.a_ND.norm(dim=-1).numpy(), PARTNERS)

    @cached_property
    def rebuilt_ND(self) -> np.ndarray:
        """What the lens rebuilds from its own texts, of unit length."""
        return self.read(self.texts)

    @cached_property
    def fve_N(self) -> np.ndarray:
        """The FVE of each row by its own text."""
        return self.fve(self.rebuilt_ND)

    def fve(self, u_hat_ND: np.ndarray, rows_N: np.ndarray | None = None) -> np.ndarray:
        """``1 - |u - u_hat|^2 / |u - m|^2`` of rebuilds held against all rows, or those of some numbers."""
        u_ND = self.u_ND if rows_N is None else self.u_ND[rows_N]
        return 1 - normalised_error(u_ND, u_hat_ND) / np.maximum(np.square(u_ND - self.mean_D).sum(-1), 1e-12)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> np.ndarray:
        """Rebuilds of unit length ``[N, D]`` from strings; a text that says nothing is the training mean."""
        parts = []
        for chunk in chunks(list(texts), self.batch_size):
            rebuild = read_by_lens(self.lens, chunk)
            parts.append(mean_where_failed(rebuild.a_hat_BD, self.statistics.mean, rebuild.failed_B)[0].double().cpu().numpy())
        return unit(np.concatenate(parts))

    @torch.no_grad()
    def samples(self, draws: int) -> list[list[str]]:
        """``draws`` texts of each row, sampled from the verbalizer's own distribution; the first index is the draw."""
        result: list[list[str]] = [[] for _ in range(draws)]
        for numbers in chunks(range(len(self)), self.batch_size):
            a_BD, sample_B = self.a_ND[numbers].to(self.lens.mean.device), torch.from_numpy(self.sample_id_N[numbers])
            ids_BKT = self.lens.rollout(a_BD, sample_B.to(a_BD.device), 0, draws).ids_BKT
            for draw, texts in enumerate(result):
                texts += said(self.lens, ids_BKT[:, draw]).texts
        return result

    @torch.no_grad()
    def tail_nll(self, a_ND: Tensor) -> np.ndarray:
        """Nats per token ``[N]`` of the verbalizer saying each row's own tail, given an activation for each row."""
        parts = []
        for numbers in chunks(range(len(self)), self.batch_size):
            ids_BT, lengths_B = self.lens.frame.put(*self.lens.tails(self.batch(numbers)))
            log_prob_BT = self.lens.verbalizer.log_prob_of(a_ND[numbers].to(self.lens.mean.device), ids_BT).double()
            drawn_BT = torch.ones_like(log_prob_BT) if lengths_B is None else drawn(lengths_B, ids_BT.shape[1])
            parts.append((-(log_prob_BT * drawn_BT).sum(1) / drawn_BT.sum(1)).cpu().numpy())
        return np.concatenate(parts)

    @property
    def length_N(self) -> np.ndarray:
        """Tokens of each row's text."""
        return np.array([len(ids) for ids in to_ids(self.lens.tokenizer, self.texts)])

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some rows as a batch on the lens's device."""
        device, chosen = self.lens.mean.device, list(numbers)
        ids_BC, lengths_B = pad([self.contexts[i] for i in chosen])
        return Batch(
            activation=self.a_ND[chosen].to(device),
            input_ids=ids_BC.to(device),
            position=(lengths_B - 1).to(device),
            sample_id=torch.from_numpy(self.sample_id_N[chosen]).to(device),
            doc_id=torch.from_numpy(self.doc_id_N[chosen]).to(device),
        )


@torch.no_grad()
def trust_rows(
    lens: ConsistencyLens, loader: ActivationLoader, statistics: ActivationStatistics, search: Search, count: int, batch_size: int = 64
) -> TrustRows:
    """The first ``count`` rows of a held-out dump (it is shuffled already), explained."""
    a, contexts, doc_ids, sample_ids, whole = [], [], [], [], Said([], [])
    for numbers in chunks(range(min(count, loader.num_rows)), batch_size):
        batch = loader.rows(numbers)
        a.append(batch["activation"].float())
        contexts += [ids[: p + 1] for ids, p in zip(batch["input_ids"].tolist(), batch["position"].tolist(), strict=True)]
        doc_ids.append(batch["doc_id"].numpy())
        sample_ids.append(batch["sample_id"].numpy())
        explained = search(lens, batch["activation"], batch["sample_id"])
        whole.texts += explained.texts
        whole.round_trips += explained.round_trips
    numbers_N = np.concatenate(doc_ids), np.concatenate(sample_ids)
    return TrustRows(lens, statistics, torch.cat(a), contexts, *numbers_N, whole.texts, np.array(whole.round_trips), batch_size)


def chunks(items, size: int) -> Iterator:
    """Slices of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Vectors of length 1; zero stays zero."""
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12)
