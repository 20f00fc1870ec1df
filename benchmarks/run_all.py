"""Every benchmark's figures as one table.

    python benchmarks/run_all.py [--quick] [--only step memory]

Runs each benchmark in turn with its own defaults (hours on two cores; ``--quick``: tiny sizes, one repeat, minutes), appends each line to
``outputs/benchmarks.jsonl`` and prints the table at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {  # what is run with and without --quick
    "step": ([], ["--size", "tiny", "--repeats", "1"]),
    "memory": ([], ["--size", "tiny", "--t-text", "4", "8"]),
    "dump": ([], ["--rows", "64", "--ranks", "1", "--repeats", "1"]),
    "loader": ([], ["--gb", "0.01", "--repeats", "1"]),
    "vocab_op": ([], ["--vocab", "5000", "--batch", "8", "--repeats", "1"]),
}
LABELS = ("claim", "op", "size", "kind", "batch", "context", "t_text", "dtype", "vocab")
NOT_SHOWN = {"threads", "torch", "transformers"}


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in options.only:
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *BENCHMARKS[name][options.quick]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in found)
        lines += found
    for line in lines:
        print(row(line))


def row(line: dict) -> str:
    """One line of the table: what was measured, then its figures."""
    label = ", ".join(str(line[name]) for name in LABELS if line.get(name) is not None)
    figures = "  ".join(f"{name} {value}" for name, value in line.items() if name not in {*LABELS, *NOT_SHOWN} and value is not None)
    return f"{label}:  {figures}"


if __name__ == "__main__":
    main()
