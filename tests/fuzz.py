"""The property tests with new inputs, round after round, for as long as is asked.

usage: python tests/fuzz.py [MINUTES] [pytest's own options, e.g. -k corpus]      default: 10 minutes

Each round is a process of its own, with a seed that is printed; HYPOTHESIS_SEED=... tries the inputs of a round again.
Findings are printed whole. Exit code 1: there were some.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = "3"  # as many inputs a round as the test suite tries


def main(arguments: list[str]) -> int:
    """Run rounds until the time is up."""
    minutes, options = (float(arguments[0]), arguments[1:]) if arguments else (10.0, [])
    until, rounds, found = time.monotonic() + 60 * minutes, 0, 0
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_fuzz_*.py"))
    while time.monotonic() < until:
        seed = os.environ.get("HYPOTHESIS_SEED") or str(random.SystemRandom().randrange(2**32))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", *options, *tests]
        environment = os.environ | {"FUZZ_TIMES": os.environ.get("FUZZ_TIMES", TIMES)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        rounds, found = rounds + 1, found + (done.returncode != 0)
        if done.returncode:
            print(done.stdout)
        left = max(0.0, until - time.monotonic()) / 60
        last = done.stdout.strip().splitlines()[-1:]
        stamp = time.strftime("%H:%M:%S")
        print(f"{stamp} round {rounds}, seed {seed}: {' '.join(last)}; {found} rounds with findings, {left:.0f} minutes left", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
