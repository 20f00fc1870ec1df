"""Say what a trained lens reads in each token of a text, and how well its words rebuild the activation.

FVE: 1 is a perfect rebuild, 0 no better than the training mean.

usage: python tools/explain.py checkpoint=outputs/<run>/best "any text" [--json] [--html FILE] [search=best_of:8]
       [device=cpu|cuda] [dtype=bf16|fp32] [trust_remote_code=true]

  "any text"   the text; - reads it from the standard input
  --json       print a JSON list of token, explanation, fve and search instead of a table
  trust_remote_code=true  run code that comes with the subject; a checkpoint never says so itself
  --html FILE  also write a page with the tokens coloured by their FVE, the explanations on hover
  search=S     how explanations are chosen: greedy (the default), or best_of:K, of K the one from which the lens rebuilds best

A * marks positions outside those the lens was trained on (the first ones are attention sinks): read them with care.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from megalens import cli

SETTINGS = ("checkpoint", "device", "dtype", "model_name", "search", "trust_remote_code")
USAGE = 'python tools/explain.py checkpoint=outputs/<run>/best "any text"'


def main(arguments: list[str]) -> None:
    from megalens import Lens
    from megalens.evaluate import report
    from megalens.explain.search import search_named

    options, text = read_arguments(arguments)
    as_json, page, changes = options.pop("--json", False), options.pop("--html", None), options
    search = changes.pop("search", "greedy")
    name = search_named(search).name
    lens = Lens.from_pretrained(changes.pop("checkpoint"), **changes)
    tokens = lens.explain(sys.stdin.read().removesuffix("\n") if text == "-" else text, search=search)
    dumper = lens.module.config.activation_dumper
    trained = range(dumper.min_pos, dumper.seq_len)
    if page:
        report.write_explanation(page, tokens, f"layer {lens.module.config.layer_l} of {lens.module.config.model_label}, {name}", trained)
    print(json.dumps([asdict(token) for token in tokens], indent=1) if as_json else as_table(tokens, trained, name))


def read_arguments(arguments: list[str]) -> tuple[dict, str]:
    """Options by name, and the text."""
    from megalens.config import ConfigError

    options, texts, rest = {}, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        name, _, value = argument.removeprefix("--").partition("=")
        if argument == "--json":
            options[argument] = True
        elif argument == "--html" or argument.startswith("--html="):
            options["--html"] = value or (rest.pop(0) if rest else "")
            if not options["--html"]:
                raise ConfigError("--html wants a file, e.g. --html page.html")
        elif name in SETTINGS and "=" in argument:
            options[name] = value
        elif argument.startswith("--"):
            raise ConfigError(f"unknown option {argument}; write: {USAGE} [--json] [--html FILE]")
        else:
            texts.append(argument)
    if "checkpoint" not in options or len(texts) != 1:
        missing = "no checkpoint is named" if "checkpoint" not in options else f"{len(texts)} texts are given; quote one"
        raise ConfigError(f"{missing}: {USAGE}")
    return options, texts[0]


def as_table(tokens: list, trained: range, search: str) -> str:
    """Token, explanation and FVE in aligned columns."""
    from megalens.evaluate.table import align
    from megalens.evaluate.text import visible

    rows = [["token", f"explanation ({search})", "FVE "]]
    for at, each in enumerate(tokens):
        said = visible(each.explanation).strip() or "(nothing)"
        rows.append([visible(each.token) or "·", said, f"{each.fve:.2f}" + (" " if at in trained else "*")])
    return align(rows, "><>")


if __name__ == "__main__":
    cli.run(main, __doc__)
