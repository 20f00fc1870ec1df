"""Make the tiny model and corpus that conf/tiny.yaml names: data/models/tiny-<kind> and data/corpus/tiny.jsonl."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalens import tiny


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python tools/make_tiny.py", description=__doc__)
    parser.add_argument("kind", nargs="?", default="llama", choices=tiny.KINDS, help="model family (default: llama)")
    parser.add_argument("--documents", type=int, default=200, help="articles of the corpus (default: 200)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where models/ and corpus/ are (default: data)")
    args = parser.parse_args(arguments)
    print(f"model: {tiny.make_model(args.data / 'models' / f'tiny-{args.kind}', args.kind)}")
    print(f"corpus: {tiny.make_text(args.data / 'corpus' / 'tiny.jsonl', args.documents)}")


if __name__ == "__main__":
    main()
