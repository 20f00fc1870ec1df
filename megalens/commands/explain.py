"""Say what a trained lens reads in each token of a text, and how well its words rebuild the activation.

FVE: 1 is a perfect rebuild, 0 no better than the training mean.

usage: megalens explain checkpoint=outputs/<run>/best "any text" [--json] [--html FILE] [search=best_of:8]
       [device=cpu|cuda] [dtype=bf16|fp32] [trust_remote_code=true]
       torchrun --nproc_per_node N tools/explain.py ... engine=fsdp     (a lens that fits in no process: each holds its share)

  "any text"   the text; - reads it from the standard input; write -- before a text that looks like an option or a setting
  --json       print a JSON list of token, explanation, fve, search and reads instead of a table
  trust_remote_code=true  run code that comes with the subject; a checkpoint never says so itself
  --html FILE  also write a page with the tokens coloured by their FVE, and each explanation beside a copy of the context and others' texts,
               with what goes with each of its phrases; it needs no server
  search=S     how explanations are chosen: greedy (the default); best_of:K, of K the one from which the lens rebuilds best;
               best_of:K+swaps, then with other tokens in its places; docs/search.md has all

A * marks positions outside those the lens was trained on (the first ones are attention sinks): read them with care.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

from megalens import Lens
from megalens.arguments import Arguments
from megalens.checkpoint.formats import read_config
from megalens.config import ConfigError
from megalens.config.running import Fsdp
from megalens.engine.failure import told_once
from megalens.evaluate import EvaluationError
from megalens.evaluate.table import align
from megalens.evaluate.text import NO_TEXT, check_text
from megalens.explain.search import search_named
from megalens.files import new_file
from megalens.launcher import launched, rank
from megalens.page.text import visible
from megalens.page.workbench import workbench
from megalens.serve.still import found

SETTINGS = ["device", "dtype", "model_name", "trust_remote_code", "engine", "deepspeed", *(f"fsdp.{field.name}" for field in fields(Fsdp))]
EXAMPLE = 'megalens explain checkpoint=outputs/<run>/best "any text"'


def main(arguments: list[str]) -> None:
    parser = Arguments(EXAMPLE)
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--html", type=Path)
    parser.add_argument("--search", default="greedy")
    args, settings = parser.split(arguments, SETTINGS)
    if len(args.texts) != 1:
        raise ConfigError(f"{len(args.texts)} texts are given; quote one: {EXAMPLE}")
    (text,) = args.texts
    name = search_named(args.search).name
    if args.html is not None:
        check_page(args.html)
    text = standard_input() if text == "-" else text
    check_text(text)
    with told_once():
        changes = asdict(read_config(args.checkpoint, settings))
        lens = Lens.from_pretrained(args.checkpoint, **changes)
        tokens = lens.explain(text, search=args.search)
        lens.module.ranks.close()
    if rank():
        return
    dumper = lens.module.config.activation_dumper
    trained = range(dumper.min_pos, dumper.seq_len)
    if args.html is not None:
        title = f"layer {lens.module.config.layer_l} of {lens.module.config.model_label}, {name}"
        with new_file(args.html) as file:
            file.write(workbench(title, found(lens, text, tokens, whole=launched().size == 1)).encode(errors="replace"))
    print(json.dumps([asdict(token) for token in tokens], indent=1) if args.json else as_table(tokens, trained, name))


def check_page(path: Path) -> None:
    """Refuse a place where no page can be written, before the work is done."""
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder; name a file in it, e.g. --html {path / 'page.html'}")
    if not path.parent.is_dir():
        raise ConfigError(f"--html {path}: there is no folder {path.parent}; make it, or name another place")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--html {path}: nothing may be written in {path.parent}; name another place")


def standard_input() -> str:
    """The text that comes on the standard input, without its last line break."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise EvaluationError(NO_TEXT) from None


def as_table(tokens: list, trained: range, search: str) -> str:
    """Token, explanation and FVE in aligned columns."""
    rows = [["token", f"explanation ({search})", "FVE "]]
    for at, each in enumerate(tokens):
        said = visible(each.explanation).strip() or "(nothing)"
        rows.append([visible(each.token) or "·", said, f"{each.fve:.2f}" + (" " if at in trained else "*")])
    table = align(rows, "><>")
    reads = sum(each.reads for each in tokens) / len(tokens)
    return f"{table}\n\n{search}: {reads:.1f} texts read for a token" if reads else table
