"""The table of benchmarks/parity.py, in small: a lens under FSDP2 on two ranks beside one process."""

import json
import sys

import parity
from launched import ROOT, run_ranks


def test_sharded_lens_is_trained_as_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "start", lambda ranks, line: run_ranks(ROOT, ranks, [sys.executable, parity.__file__, *line]))
    options = ["--optimizers", "adamw", "--modes", "lora", "--engines", "fsdp", "--ranks", "2", "--steps", "2"]
    assert parity.main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = (row for row in json.loads((tmp_path / "rows.json").read_text()) if row["ranks"] == 2)
    assert row["engine"] == "fsdp"
    assert row["loss"] < 1e-5
    assert row["weights"] < 1e-4
    assert row["collectives"]["all_gather"] > row["collectives"]["reduce_scatter"] > 0
