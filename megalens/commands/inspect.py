"""Show what a dump holds: its making, its statistics, and a few rows with their text.

usage: megalens inspect FOLDER [rows=5] [sample=4096] [html=PAGE] [model_name=... or any key=value]

  rows=N       rows printed with the end of their text (the subject's tokenizer is loaded; rows=0: none)
  sample=N     rows that norms and positions are measured on (the first N; a dump's rows are shuffled)
  html=PAGE    also write a page that draws the norms, the norms by position and the dimensions' shares of the variance

A position is called a sink when its median norm is more than 5 times that of all rows.
"""

from __future__ import annotations

from pathlib import Path

from megalens.arguments import Arguments, whole_number
from megalens.data import inspect


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens inspect data/activations/<model>/layer_<L>/<dataset>_train")
    parser.add_argument("folder")
    parser.add_argument("--rows", type=whole_number(0), default=5)
    parser.add_argument("--sample", type=whole_number(1), default=4096)
    parser.add_argument("--html", type=Path)
    args, settings = parser.split(arguments)
    lines, figures = inspect.inspect(args.folder, args.rows, args.sample, settings)
    print("\n".join(lines))
    if args.html is not None:
        args.html.write_text(inspect.page(args.folder, lines, figures), encoding="utf-8")
        print(f"\nwritten: {args.html}")
