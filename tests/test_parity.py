"""The table of benchmarks/parity.py, in small: a lens under FSDP2 on two ranks beside one process."""

import json
import subprocess
import sys

from launched import ROOT, environment


def test_sharded_lens_is_trained_as_by_one_process(tmp_path):
    options = ["--optimizers", "adamw", "--modes", "lora", "--engines", "fsdp", "--ranks", "2", "--steps", "2"]
    command = [sys.executable, "benchmarks/parity.py", *options, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (row,) = (row for row in json.loads((tmp_path / "rows.json").read_text()) if row["ranks"] == 2)
    assert row["engine"] == "fsdp"
    assert row["loss"] < 1e-5
    assert row["weights"] < 1e-4
    assert row["collectives"]["all_gather"] > row["collectives"]["reduce_scatter"] > 0
