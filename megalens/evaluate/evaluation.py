"""The measurement of a finished lens: every figure of every source on the same held-out rows, and examples."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from megalens.config import Config
from megalens.data.loader import ActivationLoader
from megalens.device import resolve_dtype
from megalens.evaluate.baselines import partners, rebuilds
from megalens.evaluate.metrics import Reference, figures, join, logit_statistics, mean_where_failed, row_fve, row_statistics
from megalens.evaluate.text import round_trips, to_texts
from megalens.explain.tokens import explain_ids
from megalens.lens.lens import ConsistencyLens


@dataclass
class Result:
    """What was measured, ready for JSON.

    Args:
        setting: on what: model, layer, explanation length, rows, documents, ...
        figures: ``{source: {figure: value}}``; sources as in :data:`megalens.evaluate.baselines.LABELS`, figures as in
            :mod:`megalens.evaluate.metrics`, each with its ``_low`` and ``_high``.
        roundtrip: share of the lens's explanations that are re-tokenised to the very tokens that were said.
        examples: the first rows: ``context``, ``explanation``, ``fve``, ``position``, ``doc_id``.
        documents: some contexts explained at every token: ``doc_id`` and ``tokens``, a list of ``token``, ``explanation``, ``fve``.
    """

    setting: dict
    figures: dict[str, dict[str, float]]
    roundtrip: float
    examples: list[dict] = field(default_factory=list)
    documents: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Plain dictionaries and lists."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    lens: ConsistencyLens,
    loader: ActivationLoader,
    config: Config,
    reference: Reference,
    progress: bool = True,
    with_documents: bool = True,
) -> Result:
    """Measure a lens on held-out rows; writes nothing.

    Args:
        lens: with its subject.
        loader: of the held-out dump; the first ``config.evaluation.num_samples`` rows are used (the dump is shuffled already).
        config: its ``evaluation`` settings, and what is told about the setting.
        reference: the TRAINING activations' statistics.
        progress: a bar on stderr.
        with_documents: explain ``evaluation.report_documents`` contexts token by token too.
    """
    options = config.evaluation
    count = loader.num_rows if options.num_samples < 0 else min(options.num_samples, loader.num_rows)
    doc_ids = loader.documents()[:count].numpy()
    batches = np.split(np.arange(count), range(options.batch_size, count, options.batch_size))
    documents = _documents(loader, doc_ids, options.report_documents if with_documents else 0)
    was_training = lens.training
    lens.eval()
    with tqdm(total=2 * len(batches) + len(documents), desc="evaluate", unit="batch", disable=not progress) as bar:
        texts, whole = _explanations(lens, loader, batches, bar)
        rows = _statistics(lens, loader, batches, texts, partners(doc_ids), reference, bar)
        explained = []
        for document in documents:
            tokens = explain_ids(lens, document.pop("ids"), reference, options.batch_size)
            explained.append(document | {"tokens": [asdict(token) for token in tokens]})
            bar.update()
    lens.train(was_training)
    measured = {source: figures(each, doc_ids, options.bootstrap) for source, each in rows.items()}
    examples = _examples(lens, loader.rows(range(min(options.examples, count))), texts, row_fve(rows["lens"]))
    return Result(_setting(config, doc_ids), measured, float(np.mean(whole)), examples, explained)


def _explanations(lens: ConsistencyLens, loader: ActivationLoader, batches: list[np.ndarray], bar: tqdm) -> tuple[list[str], list[bool]]:
    """The explanation of every row, and whether it round-trips."""
    texts, whole = [], []
    for numbers in batches:
        ids_BT = lens.verbalize(loader.rows(numbers)["activation"])
        said = to_texts(lens.tokenizer, ids_BT)
        texts += said
        whole += round_trips(lens.tokenizer, ids_BT, said)
        bar.update()
    return texts, whole


def _statistics(
    lens: ConsistencyLens,
    loader: ActivationLoader,
    batches: list[np.ndarray],
    texts: list[str],
    others: np.ndarray,
    reference: Reference,
    bar: tqdm,
) -> dict[str, dict[str, np.ndarray]]:
    """Per-row statistics of every source."""
    parts: dict[str, list] = {}
    for numbers in batches:
        batch = {name: value.to(lens.mean.device) for name, value in loader.rows(numbers).items()}
        sources = rebuilds(lens, batch, [texts[i] for i in numbers], [texts[i] for i in others[numbers]])
        read = lens.read(batch)
        true_BV = lens.subject.lm.logits(read.normed_BD)
        for source, rebuilt in sources.items():
            a_hat_BD, failed_B = mean_where_failed(rebuilt.a_hat_BD, lens.mean, rebuilt.failed_B)
            logits_BV = lens.subject.patched_logits(read, a_hat_BD)
            rows = row_statistics(batch["activation"], a_hat_BD, reference, failed_B)
            parts.setdefault(source, []).append(rows | logit_statistics(true_BV, logits_BV))
        bar.update()
    rows = {source: join(each) for source, each in parts.items()}
    return {source: each | {"kl_mean": rows["mean"]["kl"]} for source, each in rows.items()}


def _examples(lens: ConsistencyLens, batch: dict[str, Tensor], texts: list[str], fve: np.ndarray) -> list[dict]:
    contexts = [row[: p + 1] for row, p in zip(batch["input_ids"].tolist(), batch["position"].tolist(), strict=True)]
    return [
        {
            "context": lens.tokenizer.decode(context, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "explanation": texts[i],
            "fve": float(fve[i]),
            "position": int(batch["position"][i]),
            "doc_id": int(batch["doc_id"][i]),
        }
        for i, context in enumerate(contexts)
    ]


def _documents(loader: ActivationLoader, doc_ids: np.ndarray, count: int) -> list[dict]:
    """The first documents in loader order, each as the longest context there is of it."""
    chosen = []
    _, first = np.unique(doc_ids, return_index=True)
    for row in np.sort(first)[:count]:
        batch = loader.rows(np.flatnonzero(doc_ids == doc_ids[row]))
        longest = int(batch["position"].argmax())
        ids = batch["input_ids"][longest, : int(batch["position"][longest]) + 1].tolist()
        chosen.append({"doc_id": int(doc_ids[row]), "ids": ids})
    return chosen


def _setting(config: Config, doc_ids: np.ndarray) -> dict:
    return {
        "model": config.model_name,
        "layer_l": config.layer_l,
        "t_text": config.t_text,
        "tail_order": config.tail_order,
        "train_mode": config.train_mode,
        "dataset": config.dataset_label,
        "rows": len(doc_ids),
        "documents": len(np.unique(doc_ids)),
        "min_pos": config.activation_dumper.min_pos,
        "seq_len": config.activation_dumper.seq_len,
        "bootstrap": config.evaluation.bootstrap,
        "dtype": resolve_dtype(config),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
