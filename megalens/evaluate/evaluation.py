"""The measurement of a finished lens: every figure of every source on the same held-out rows, and examples."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import transformers
from tqdm import tqdm

from megalens.batch import Batch
from megalens.checkpoint.formats import LoadedLens
from megalens.config import Config
from megalens.data import DataError
from megalens.data.identity import model_identity
from megalens.data.loader import ActivationLoader
from megalens.data.source import mixture
from megalens.device import resolve_dtype
from megalens.engine.base import to_device
from megalens.evaluate.baselines import SOURCES, Given, partners
from megalens.evaluate.measure import RowScorer, Said, Search
from megalens.evaluate.metrics import figures, join, row_fve
from megalens.evaluate.tokens import explain_ids
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics


@dataclass
class Result:
    """What was measured, ready for JSON.

    Args:
        setting: on what: model, layer, explanation length, search, rows, documents, ...
        figures: ``{source: {figure: value}}``; sources as in :data:`megalens.evaluate.baselines.SOURCES`, figures as in
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
    statistics: ActivationStatistics,
    search: Search,
    progress: bool = True,
    with_documents: bool = True,
) -> Result:
    """Measure a lens on held-out rows; writes nothing.

    Args:
        lens: with its subject.
        loader: of the held-out dump; the first ``config.evaluation.num_samples`` rows are used (the dump is shuffled already).
        config: its ``evaluation`` settings, and what is told about the setting.
        statistics: of the TRAINING activations (:func:`training_statistics`).
        search: chooses the explanations.
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
        said = _explanations(lens, loader, batches, search, bar)
        rows = _row_statistics(lens, loader, batches, said.texts, partners(doc_ids), statistics, bar)
        explained = []
        for document in documents:
            tokens = explain_ids(lens, document.pop("ids"), statistics, search, options.batch_size)
            explained.append(document | {"tokens": [asdict(token) for token in tokens]})
            bar.update()
    lens.train(was_training)
    measured = {source: figures(each, doc_ids, options.bootstrap) for source, each in rows.items()}
    examples = _examples(lens, loader.rows(range(min(options.examples, count))), said.texts, row_fve(rows["lens"]))
    setting = _setting(config, doc_ids) | {"search": search.name}
    return Result(setting, measured, float(np.mean(said.round_trips)), examples, explained)


def training_statistics(config: Config, loaded: LoadedLens) -> tuple[ActivationStatistics, str]:
    """What figures are measured against, and where it is from.

    The training dump of the configuration that is evaluated, whatever the lens was started from; where that dump cannot be read, the
    training rows' statistics that came with the lens.

    Raises:
        DataError: the training dump is of another subject or layer.
    """
    if config.on_the_fly:
        return loaded.statistics, "kept in the checkpoint, trained on the fly"
    try:
        loader = ActivationLoader(mixture(config) or config.activation_dir("train"), 1, config.seed)
    except DataError as error:
        return loaded.statistics, f"kept in the checkpoint: {error}"
    for reader in loader.readers:
        reader.check_matches(model_identity(config))
    return loader.statistics, "the training dump"


def _explanations(lens: ConsistencyLens, loader: ActivationLoader, batches: list[np.ndarray], search: Search, bar: tqdm) -> Said:
    """The explanation of every row."""
    said = Said([], [])
    for numbers in batches:
        batch = loader.rows(numbers)
        part = search(lens, batch["activation"], batch["sample_id"])
        said.texts += part.texts
        said.round_trips += part.round_trips
        bar.update()
    return said


def _row_statistics(
    lens: ConsistencyLens,
    loader: ActivationLoader,
    batches: list[np.ndarray],
    texts: list[str],
    others: np.ndarray,
    statistics: ActivationStatistics,
    bar: tqdm,
) -> dict[str, dict[str, np.ndarray]]:
    """Per-row statistics of every source."""
    parts: dict[str, list] = {source: [] for source in SOURCES}
    for numbers in batches:
        batch = to_device(loader.rows(numbers), lens.mean.device)
        mean_D = statistics.mean.to(batch["activation"])
        given = Given(lens, batch, [texts[i] for i in numbers], [texts[i] for i in others[numbers]], mean_D)
        score = RowScorer(lens, batch, statistics)
        for name, source in SOURCES.items():
            parts[name].append(score(source.rebuild(given)))
        bar.update()
    return {source: join(each) for source, each in parts.items()}


def _examples(lens: ConsistencyLens, batch: Batch, texts: list[str], fve: np.ndarray) -> list[dict]:
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
