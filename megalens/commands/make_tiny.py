"""Make the tiny random model and corpus that conf/tiny.yaml names: data/models/tiny-<kind> and data/corpus/tiny.jsonl.

usage: megalens make-tiny [KIND] [--documents N] [--data FOLDER]

  KIND           family of the model: llama (the default), qwen2, qwen3, mistral, gemma2, gemma3, gpt2 or gpt_neox
  --documents N  articles of the corpus (200)
  --data FOLDER  where models/ and corpus/ are (data)
"""

from __future__ import annotations

from pathlib import Path

from megalens import tiny
from megalens.arguments import Arguments, whole_number


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens make-tiny llama")
    parser.add_argument("kind", nargs="?", default="llama", choices=tiny.KINDS)
    parser.add_argument("--documents", type=whole_number(1), default=200)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.read(arguments)
    print(f"model: {tiny.make_model(args.data / 'models' / f'tiny-{args.kind}', args.kind)}")
    print(f"corpus: {tiny.make_text(args.data / 'corpus' / 'tiny.jsonl', args.documents)}")
