"""The measurement of a finished lens: every figure of every source on the same held-out rows, and examples."""

from __future__ import annotations

import platform
from collections.abc import Sequence
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
from megalens.evaluate.baselines import SOURCES, Given, partners, sources_of
from megalens.evaluate.compare import Comparison, compare
from megalens.evaluate.measure import RowScorer, Said, Search
from megalens.evaluate.metrics import figures, join, row_fve
from megalens.evaluate.readers import SUBJECT, Reader
from megalens.evaluate.text import pad, to_ids, to_texts
from megalens.evaluate.token_means import TokenMeans
from megalens.evaluate.tokens import explain_ids
from megalens.lens.lens import ConsistencyLens
from megalens.statistics import ActivationStatistics

AllRows = dict[str, dict[str, np.ndarray]]  # row statistics by source
OF_LENGTH = ("lens", "copy", "copy_subject")  # sources that a text's length makes better or worse


@dataclass
class Result:
    """What was measured, ready for JSON.

    Args:
        setting: on what: model, layer, explanation length, search, rows, documents, ...
        figures: ``{source: {figure: value}}``; sources as in :data:`megalens.evaluate.baselines.SOURCES`, figures as in
            :mod:`megalens.evaluate.metrics`, each with its ``_low`` and ``_high``.
        comparison: searches side by side on the first rows (:class:`megalens.evaluate.compare.Comparison`).
        roundtrip: share of the lens's explanations that are re-tokenised to the very tokens that were said.
        examples: the first rows: ``context``, ``explanation``, ``fve``, ``position``, ``doc_id``.
        documents: some contexts explained at every token: ``doc_id`` and ``tokens``, a list of ``token``, ``explanation``, ``fve``.
        trust: what can be said of the words' worth, ``{part: {figure: value}}`` (:mod:`megalens.evaluate.trust`).
        prefixes: ``{number: {source: {figure: value}}}`` of the explanations' first tokens alone, and of copies of that length.
    """

    setting: dict
    figures: dict[str, dict[str, float]]
    roundtrip: float
    comparison: Comparison
    examples: list[dict] = field(default_factory=list)
    documents: list[dict] = field(default_factory=list)
    prefixes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    trust: dict[str, dict] = field(default_factory=dict)

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
    others: Sequence[Search] = (),
    reader: Reader = SUBJECT,
    token_means: TokenMeans | None = None,
) -> Result:
    """Measure a lens on held-out rows; writes nothing. Ranks that use the lens together divide the rows, and all get the result.

    Args:
        lens: with its subject.
        loader: of the held-out dump; the first ``config.evaluation.num_samples`` rows are used (the dump is shuffled already).
        config: its ``evaluation`` settings, and what is told about the setting.
        statistics: of the TRAINING activations (:func:`training_statistics`).
        search: chooses the explanations.
        progress: a bar on stderr.
        with_documents: explain ``evaluation.report_documents`` contexts token by token too.
        others: searches to compare with, on the first ``evaluation.search_rows`` rows.
        reader: reads what is compared too, and takes no part in any search.
        token_means: of the training activations, for the row "mean of the token at P".
    """
    options = config.evaluation
    count = loader.num_rows if options.num_samples < 0 else min(options.num_samples, loader.num_rows)
    doc_ids = loader.documents()[:count].numpy()
    batches = np.split(np.arange(count), range(options.batch_size, count, options.batch_size))
    first = np.arange(count if options.search_rows < 0 else min(options.search_rows, count))
    searched_batches = np.split(first, range(options.batch_size, len(first), options.batch_size))
    documents = _documents(loader, doc_ids, options.report_documents if with_documents else 0)
    was_training = lens.training
    lens.eval()
    steps = 2 * len(batches) + len(others) * len(searched_batches) + 1 + len(documents)
    with tqdm(total=steps, desc="evaluate", unit="batch", disable=not (progress and lens.ranks.is_main)) as bar:
        said = explanations(lens, loader, batches, search, bar)
        other_texts = [said.texts[i] for i in partners(doc_ids)]
        rows, shorter = _row_statistics(lens, loader, batches, said, other_texts, statistics, options.prefixes, bar, token_means)
        searched = {search.name: said.first(len(first))}
        searched |= {other.name: explanations(lens, loader, searched_batches, other, bar) for other in others}
        comparison = compare(lens, loader, options, doc_ids[: len(first)], searched, statistics, reader)
        bar.update()
        explained = []
        for document in documents:
            tokens = explain_ids(lens, document.pop("ids"), statistics, search, options.batch_size)
            explained.append(document | {"tokens": [asdict(token) for token in tokens]})
            bar.update()
    lens.train(was_training)
    measured, *of_prefixes = (
        {source: figures(each, doc_ids, options.bootstrap) for source, each in every.items()} for every in (rows, *shorter.values())
    )
    examples = _examples(lens, loader.rows(range(min(options.examples, count))), said.texts, row_fve(rows["lens"]))
    setting = _setting(config, doc_ids) | {"search": search.name}
    prefixes = dict(zip(map(str, shorter), of_prefixes, strict=True))
    return Result(setting, measured, float(np.mean(said.round_trips)), comparison, examples, explained, prefixes)


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


def explanations(lens: ConsistencyLens, loader: ActivationLoader, batches: list[np.ndarray], search: Search, bar: tqdm) -> Said:
    """The explanation of every row."""

    def explain(numbers: np.ndarray) -> Said:
        batch = loader.rows(numbers)
        bar.update(lens.ranks.data_ranks)
        return search(lens, batch["activation"], batch["sample_id"])

    said = Said([], [])
    for part in lens.ranks.divide_batches(batches, explain):
        said.texts += part.texts
        said.round_trips += part.round_trips
        said.unfinished += part.unfinished
        said.costs += part.costs
    return said


def _row_statistics(
    lens: ConsistencyLens,
    loader: ActivationLoader,
    batches: list[np.ndarray],
    said: Said,
    others: list[str],
    statistics: ActivationStatistics,
    prefixes: list[int],
    bar: tqdm,
    token_means: TokenMeans | None,
) -> tuple[AllRows, dict[int, AllRows]]:
    """Per-row statistics of every source; and with the explanations' first tokens alone, of what depends on a text's length."""

    def score(numbers: np.ndarray) -> list[AllRows]:
        batch = to_device(loader.rows(numbers), lens.mean.device)
        mean_D, scorer, found = statistics.mean.to(batch["activation"]), RowScorer(lens, batch, statistics), []
        texts, other_texts = ([each[i] for i in numbers] for each in (said.texts, others))
        for count in (None, *prefixes):
            shown, count_B = first_tokens(lens, texts, count)
            given = Given(lens, batch, shown, other_texts, count_B.to(lens.mean.device), mean_D, token_means)
            sources = OF_LENGTH if count else sources_of(token_means)
            found.append({source: scorer(SOURCES[source].rebuild(given)) for source in sources})
        found[0]["lens"] |= said.rows(numbers, lens)
        bar.update(lens.ranks.data_ranks)
        return found

    parts = lens.ranks.divide_batches(batches, score)
    whole, *shorter = (
        {source: join([each[source] for each in of_count]) for source in of_count[0]} for of_count in zip(*parts, strict=True)
    )
    return whole, dict(zip(prefixes, shorter, strict=True))


def first_tokens(lens: ConsistencyLens, texts: list[str], count: int | None = None) -> tuple[list[str], torch.Tensor]:
    """The beginnings of explanations, and how many tokens a copy in the place of each may have.

    Args:
        count: tokens of a beginning; None: the texts whole. Copies of texts of a fixed length have that length; no copy has more tokens
            than a text can have, though a string may be tokenised to more than were said.
    """
    if count is None and lens.frame.end_id is None:
        return texts, torch.full((len(texts),), lens.config.t_text)
    ids_BT, lengths_B = pad(to_ids(lens.tokenizer, texts))
    if count is None:
        return texts, lengths_B.clamp_max(lens.frame.room)
    lengths_B = lengths_B.clamp_max(count)
    return to_texts(lens.tokenizer, ids_BT, lengths_B), lengths_B


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
        "end": config.verbalizer.end_token,
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
