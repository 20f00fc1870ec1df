"""What a dump holds: its making, its statistics, a few rows with their text, and a page that draws them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np

from megalens.config import Config, config_from_dict
from megalens.data import DataError
from megalens.data.identity import tokenizer_identity
from megalens.data.loader import ActivationLoader
from megalens.data.shards import ShardReader
from megalens.families.loading import load_tokenizer
from megalens.page import frame
from megalens.page.charts import columns
from megalens.page.text import escape

SINK = 5.0  # times the median norm of all rows


def inspect(folder: str | Path, rows: int, sample: int, settings: list[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """A dump as lines of text, and the figures that :func:`page` draws.

    Args:
        folder: the dump.
        rows: how many are shown with the end of their text; 0 loads no tokenizer.
        sample: rows that norms and positions are measured on.
        settings: ``key=value``, e.g. another ``model_name``; without one it is the dump's subject.

    Raises:
        DataError: there is no such dump, or the tokenizer is another one.
        ConfigError: a setting is wrong.
    """
    reader = ShardReader(folder)
    figures = measure(reader, sample)
    names = ("subject", "tokenizer", "layer", "d", "encoding", "split", "rows", "seq_len", "min_pos", "vectors_per_sequence")
    lines = [f"{name:>22}  {json.dumps(reader.meta[name])}" for name in names if name in reader.meta]
    lines += [f"{name:>22}  {text}" for name, text in describe(reader, figures).items()]
    if count := min(rows, len(reader)):
        lines += ["", *rows_with_text(folder, count, config_from_dict(found_model(reader, settings), settings))]
    return lines, figures


def every_dump(roots: Iterable[str | Path]) -> list[str]:
    """Each folder with shards below the roots, those without a ``meta.json`` too.

    Raises:
        DataError: there is none.
    """
    roots = list(roots)
    found = sorted({str(path.parent) for root in roots for name in ("meta.json", "shard-*.arrow") for path in Path(root).rglob(name)})
    if not found:
        raise DataError(f"there is no dump below {', '.join(map(str, roots))}; name another folder: megalens verify --all FOLDER")
    return found


def measure(reader: ShardReader, sample: int) -> dict[str, np.ndarray]:
    """Norms and positions ``[N]`` of the first rows, and every dimension's share of the variance, the largest first."""
    parts = []
    for index in range(len(reader.batch_rows)):
        batch = reader.read_batch(index)
        parts.append((batch["activation"].float().norm(dim=1).numpy(), batch["position"].numpy()))
        if sum(len(norm_N) for norm_N, _ in parts) >= sample:
            break
    norm_N, position_N = (np.concatenate(column)[:sample] for column in zip(*parts, strict=True))
    order = np.argsort(-reader.statistics.var.numpy(), kind="stable")
    return {
        "norm": norm_N,
        "position": position_N,
        "dimension": order,
        "share": reader.statistics.var.double().numpy()[order] / float(reader.statistics.var.sum()),
    }


def describe(reader: ShardReader, figures: dict[str, np.ndarray]) -> dict[str, str]:
    """The statistics as text."""
    size = sum(shard["bytes"] for shard in reader.meta["shards"])
    norm_N, share = figures["norm"], figures["share"]
    quantiles = ", ".join(f"{q} %: {np.quantile(norm_N, q / 100):.4g}" for q in (0, 5, 50, 95, 100))
    top = ", ".join(f"{d}: {100 * s:.1f} %" for d, s in zip(figures["dimension"][:5], share[:5], strict=True))
    by_position = medians(figures)
    sinks = [f"{p} ({norm:.4g})" for p, norm in by_position.items() if norm > SINK * np.median(norm_N)]
    lossy = {"lost by int8": f"{reader.meta['fve_loss']:.2g} of the variance"} if "fve_loss" in reader.meta else {}
    return {
        "size": f"{len(reader.meta['shards'])} shards, {size:,} bytes, {size / len(reader):.1f} a row",
        "norm": f"{quantiles} (of {len(norm_N):,} rows)",
        "norm of the mean": f"{float(reader.statistics.mean.norm()):.4g}",
        "top dimensions": f"{top}; the first ten hold {100 * share[:10].sum():.1f} % of the variance",
        "positions": f"{figures['position'].min()} to {figures['position'].max()}",
        "attention sinks": ", ".join(sinks) or "none",
    } | lossy


def medians(figures: dict[str, np.ndarray]) -> dict[int, float]:
    """The median norm at each position."""
    return {int(p): float(np.median(figures["norm"][figures["position"] == p])) for p in np.unique(figures["position"])}


def found_model(reader: ShardReader, settings: list[str]) -> dict:
    """The dump's subject as a setting, unless it is named."""
    named = any(setting.startswith("model_name=") for setting in settings)
    local = Path(Config().model_name).parent / reader.meta["subject"]["name"]
    return {} if named else {"model_name": str(local) if local.is_dir() else reader.meta["subject"]["name"].replace("__", "/")}


def rows_with_text(folder: str | Path, count: int, config: Config) -> list[str]:
    """The first rows: where they are from, and the end of the text that leads up to them."""
    tokenizer, loader = load_tokenizer(config), ActivationLoader(folder, 1, 0)
    loader.reader.check_matches({"tokenizer": tokenizer_identity(config)})
    batch, lines = loader.rows(range(count)), []
    for i in range(count):
        position = int(batch["position"][i])
        text = str(tokenizer.decode(batch["input_ids"][i, : position + 1].tolist()))
        norm = float(batch["activation"][i].norm())
        lines.append(
            f"row {i}, document {int(batch['doc_id'][i])}, position {position}, norm {norm:.4g}: ...{' '.join(text.split())[-80:]}"
        )
    return lines


def page(folder: str | Path, lines: list[str], figures: dict[str, np.ndarray]) -> str:
    """A page of its own: three drawings, and the text of :func:`inspect`."""
    counts, edges = np.histogram(figures["norm"], 40)
    by_position = medians(figures)
    drawings = {
        "Rows by norm": (counts.tolist(), [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]),
        "Median norm by position": (list(by_position.values()), [f"position {p}" for p in by_position]),
        "Share of the variance, the largest dimensions": (figures["share"][:40], [f"dimension {d}" for d in figures["dimension"][:40]]),
    }
    parts = [f"<h1>{escape(str(folder))}</h1>", '<p class="soft">Point at a column to read its value.</p>']
    for title, (values, labels) in drawings.items():
        parts.append(f'<h2>{title}</h2><div class="card">{columns(title, values, labels)}</div>')
    text = "\n".join(escape(line) for line in lines)
    return frame.page(str(folder), "\n".join([*parts, f'<h2>In words</h2><div class="card"><pre>{text}</pre></div>']))
