"""What the suite knows beside a lens and its rows: what follows each context, the documents' labels, and training rows."""

from __future__ import annotations

import torch

from megalens.config import Config
from megalens.data import DataError
from megalens.data.corpus import labels_of
from megalens.data.loader import ActivationLoader
from megalens.data.pretokenize import load_tokens
from megalens.evaluate.measure import Search
from megalens.evaluate.text import to_texts
from megalens.evaluate.token_means import TokenMeans
from megalens.evaluate.trust.parts import Known, Leads
from megalens.evaluate.trust.rows import TrustRows, chunks
from megalens.statistics import ActivationStatistics

FOLLOWING, TRAINING_ROWS = 16, 10_000
LABELS = ("title", "topic", "gloss")


def known_of(rows: TrustRows, config: Config, search: Search) -> Known:
    """All that can be found out; what is not there (a corpus without labels, a training dump that is gone) is left out."""
    known = little_known(rows, search, token_means_of(config, rows.statistics))
    known.leads = leads_of(config, rows.lens.tokenizer)
    known.following = _following(rows, config)
    known.labels = labels_of(config, rows.doc_id_N.tolist(), LABELS, held_out=True)
    try:
        loader = ActivationLoader(config.activation_dir("train"), 1, config.seed)
    except DataError:
        return known
    batch = loader.rows(range(min(TRAINING_ROWS, loader.num_rows)))
    known.training_ND = batch["activation"].double().numpy()
    return known


def little_known(rows: TrustRows, search: Search, token_means: TokenMeans | None) -> Known:
    """What the short parts need, which every evaluation has."""
    return Known(search, copies_of(rows), token_means=token_means)


def token_means_of(config: Config, statistics: ActivationStatistics) -> TokenMeans | None:
    """From the training dump; None where it cannot be read."""
    try:
        return TokenMeans.of(ActivationLoader(config.activation_dir("train"), 1, config.seed), statistics)
    except DataError:
        return None


def copies_of(rows: TrustRows) -> list[str]:
    """The tail of each context in the explanation's place, as long as that."""
    length_N, texts = torch.from_numpy(rows.length_N), []
    for numbers in chunks(range(len(rows)), rows.batch_size):
        texts += to_texts(rows.lens.tokenizer, *rows.lens.tails(rows.batch(numbers), length_N[list(numbers)].to(rows.lens.mean.device)))
    return texts


def leads_of(config: Config, tokenizer) -> Leads | None:
    """Training documents with a gloss; None where the corpus has no glosses or its tokens are gone."""
    tokens = _tokens(config, "train")
    if tokens is None:
        return None
    doc_ids, ids = list(tokens["doc_id"]), [row[: config.activation_dumper.seq_len] for row in tokens["input_ids"]]
    labels = labels_of(config, doc_ids, LABELS)
    if not labels:
        return None
    return Leads(ids, tokenizer.batch_decode(ids, skip_special_tokens=True), labels["gloss"])


def _following(rows: TrustRows, config: Config) -> list[str] | None:
    """The 16 tokens behind each context, as text."""
    tokens = _tokens(config, "val")
    if tokens is None:
        return None
    place = {int(doc): i for i, doc in enumerate(tokens["doc_id"])}
    wanted = sorted(set(rows.doc_id_N.tolist()))
    if not place.keys() >= set(wanted):
        return None
    documents: dict[int, list[int]] = {doc: tokens[place[doc]]["input_ids"] for doc in wanted}
    ids = [documents[doc][len(context) :][:FOLLOWING] for doc, context in zip(rows.doc_id_N.tolist(), rows.contexts, strict=True)]
    return rows.lens.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokens(config: Config, split: str):
    try:
        return load_tokens(config, split)
    except (DataError, OSError):
        return None
