"""Measure a trained lens on held-out documents, beside every floor and ceiling, and write evaluation.json and report.html into its run.

usage: python tools/eval.py checkpoint=outputs/<run>/best [key=value ...]

  checkpoint=FOLDER               the lens: outputs/<run>/best, last, or one of outputs/<run>/checkpoints/
  evaluation.num_samples=N        held-out rows (-1: all)
  evaluation.bootstrap=N          resamples of documents for the 95 % intervals (0: no intervals)
  device=cpu|cuda dtype=bf16|fp32 where and how to compute

Other keys are those the lens was trained with (conf/config.yaml lists them all). Needs the run's validation dump (tools/dump_acts.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalens import cli


def main(arguments: list[str]) -> None:
    from megalens.config import Config, ConfigError, config_from_dict
    from megalens.data.loader import ActivationLoader
    from megalens.engine.checkpoint import load_lens, read_about, read_statistics
    from megalens.evaluate import report
    from megalens.evaluate.evaluation import Result, evaluate
    from megalens.evaluate.metrics import Reference
    from megalens.evaluate.plots import read_curve
    from megalens.evaluate.table import examples, table
    from megalens.lens.subject import tokenizer_fingerprint

    checkpoints = [a.split("=", 1)[1] for a in arguments if a.removeprefix("--").startswith("checkpoint=")]
    if len(checkpoints) != 1 or not checkpoints[0]:
        raise ConfigError("name one checkpoint: python tools/eval.py checkpoint=outputs/<run>/best")
    folder = Path(checkpoints[0])
    overrides = [a for a in arguments if not a.removeprefix("--").startswith("checkpoint=")]
    config: Config = config_from_dict(read_about(folder)["config"], overrides)
    loader = ActivationLoader(config.activation_dir("val"), batch_size=1, seed=config.seed)
    lens = load_lens(folder, **dataclasses.asdict(config))
    loader.reader.check_matches(lens.subject.fingerprint, tokenizer_fingerprint(lens.tokenizer), config.layer_l, lens.subject.d)
    result: Result = evaluate(lens, loader, config, Reference.of(read_statistics(folder)))
    run = folder.resolve().parent.parent if folder.resolve().parent.name == "checkpoints" else folder.resolve()
    result.setting |= report.provenance(folder, config)
    report.save(run, result, read_curve(run / "metrics.jsonl"))
    print(f"\n{table(result)}\n\n{examples(result)}\n\nwritten: {run / 'evaluation.json'} and {run / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, __doc__)
