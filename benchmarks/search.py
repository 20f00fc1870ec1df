"""What searches find for what they cost: fve_nrm against texts read, against another reader, and against perplexity.

    python benchmarks/search.py checkpoint=outputs/demo/best [--rows 64] [--searches greedy,best_of:8,best_of:16+swaps:1]
                                [--bootstrap 1000] [key=value ...]

One JSON line per search, in turn, on the same held-out rows, the first of the run's validation dump; ``copy`` first. Figures are those of
``megalens eval`` (docs/search.md). ``cpu_seconds`` is the process's CPU time for one activation. Other keys are the configuration's:
``evaluation.other_reader=...``, ``device=``, ``dtype=``.
"""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import torch
from tqdm import tqdm

from megalens import cli
from megalens.arguments import Arguments
from megalens.checkpoint.formats import load_lens, read_config
from megalens.commands.eval import reader_named
from megalens.data.loader import ActivationLoader
from megalens.evaluate.compare import compare
from megalens.evaluate.evaluation import explanations, training_statistics
from megalens.explain.search import searches_named

SEARCHES = (
    "greedy,best_of:4,best_of:8,best_of:16,best_of:32,best_of:64,best_of:128,swaps:1,best_of:8+swaps:1,best_of:16+swaps:1,best_of:16+swaps:2,"
    "best_of:128+swaps:2,best_of:16+swaps:2+price:0.005,best_of:16+swaps:2+price:0.01,best_of:16+swaps:2+price:0.02,best_of:16+swaps:2+price:0.04"
)
FIGURES = ("fve_nrm", "kl_recovered", "other_reader", "channel", "gain_over_copy")


def main(arguments: list[str]) -> None:
    """Measure every search asked for."""
    parser = Arguments("python benchmarks/search.py checkpoint=outputs/demo/best")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--searches", default=SEARCHES)
    parser.add_argument("--bootstrap", type=int, default=1000)
    options, settings = parser.split(arguments)
    searches = searches_named(options.searches)
    config = read_config(options.checkpoint, settings)
    evaluation = dataclasses.replace(config.evaluation, bootstrap=options.bootstrap)
    loader = ActivationLoader(config.activation_dir("val"), batch_size=1, seed=config.seed)
    loaded = load_lens(options.checkpoint, **dataclasses.asdict(config))
    statistics, _ = training_statistics(config, loaded)
    reader, rows = reader_named(config, loaded.lens), np.arange(min(options.rows, loader.num_rows))
    doc_ids = loader.documents()[: len(rows)].numpy()
    batches = np.split(rows, range(evaluation.batch_size, len(rows), evaluation.batch_size))
    about = {"claim": "search", "rows": len(rows), "documents": len(np.unique(doc_ids)), "other_reader_is": reader.name}
    about |= {
        "t_text": config.t_text,
        "dtype": str(loaded.lens.subject.lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    for number, search in enumerate(searches):
        with tqdm(total=len(batches), desc=search.name, unit="batch") as bar:
            started = time.process_time()
            said = explanations(loaded.lens, loader, batches, search, bar)
            seconds = (time.process_time() - started) / len(rows)
        found = compare(loaded.lens, loader, evaluation, doc_ids, {search.name: said}, statistics, reader)
        if not number:
            print(json.dumps(about | {"search": "copy"} | shown(found.copy) | {"copies": found.copies}), flush=True)
        (figures,) = found.searches.values()
        line = about | {"search": search.name} | shown(figures) | {"cpu_seconds": round(seconds, 4)}
        print(json.dumps(line), flush=True)


def shown(figures: dict[str, float]) -> dict[str, float]:
    """The figures of a line, with the ends of the first one's interval."""
    names = [*FIGURES, "fve_nrm_low", "fve_nrm_high", "gain_over_copy_low", "copied_tokens", "perplexity", "reads", "said", "priced"]
    return {name: round(figures[name], 4) for name in names if name in figures}


if __name__ == "__main__":
    cli.run(main, __doc__)
