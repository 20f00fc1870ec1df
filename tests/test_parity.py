"""The table of benchmarks/parity.py, in small: sharded engines on two ranks beside one process."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_sharded_engines_compute_the_run_of_one_process(tmp_path):
    options = ["--modes", "full", "--engines", "z3,fsdp", "--ranks", "2", "--steps", "4", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([sys.executable, "benchmarks/parity.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = {(row["engine"], row["ranks"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {("local", 1), ("z3", 2), ("fsdp", 2)}
    for name in ("z3", "fsdp"):
        assert rows[name, 2]["loss"] < 1e-5
        assert rows[name, 2]["weights"] < 1e-3
    assert rows["fsdp", 2]["collectives"]["all_gather"] > rows["fsdp", 2]["collectives"]["reduce_scatter"] > 0
