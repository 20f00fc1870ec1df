"""Tokenize the corpus once, both splits, into data/pretokenized/<dataset>/<tokenizer>/. A valid result is kept.

usage: megalens pretokenize [config=conf/x.yaml] [key=value ...]
       torchrun --nproc_per_node N tools/pretokenize.py ...      (one rank works, the others wait)

  dataset.name=...             wiki-leads, a Hugging Face dataset, or a .txt/.json/.jsonl/.parquet file or folder
  pretokenize.num_proc=N       processes (default: one per core)
  force_redump=true            make it anew

conf/config.yaml lists every key.
"""

from __future__ import annotations

from megalens.config import load_config
from megalens.data.dump import say
from megalens.data.pretokenize import pretokenize, why_stale


def main(arguments: list[str]) -> None:
    config = load_config(arguments)
    reason = "force_redump=true" if config.force_redump else why_stale(config)
    if reason:
        say(f"tokenizing: {reason}")
    folder = pretokenize(config)
    say(f"{folder} is ready" if reason else f"{folder} is valid and kept")
