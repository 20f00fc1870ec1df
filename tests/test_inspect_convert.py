"""`megalens inspect` and `megalens convert`: what they print and make of real files, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from megalens.commands import convert as convert_command
from megalens.commands import inspect as inspect_command
from megalens.config import ConfigError, load_config
from megalens.data import DataError, inspect
from megalens.data.dump import dump
from megalens.data.loader import ActivationLoader
from megalens.data.pretokenize import pretokenize
from megalens.data.shards import verify
from megalens.data.source import training_loader

TINY = ["config=conf/tiny.yaml", "device=cpu"]


@pytest.fixture
def dumped(checkout) -> Path:
    config = load_config(TINY)
    pretokenize(config)
    dump(config)
    return config.activation_dir("train")


def test_inspect_prints_statistics_and_rows_and_draws_them(dumped, capsys):
    inspect_command.main([str(dumped), "rows=3", "html=page.html"])
    printed = capsys.readouterr().out
    rows = ActivationLoader(dumped, 1, 0).rows(range(358))
    norms = rows["activation"].norm(dim=1)
    assert f"50 %: {float(norms.median()):.3g}"[:9] in printed
    top = int(rows["activation"].var(0, correction=0).argmax())
    assert f"top dimensions  {top}: " in printed
    assert "attention sinks  none" in printed
    for i in range(3):
        assert f"row {i}, document {int(rows['doc_id'][i])}, position {int(rows['position'][i])}, norm" in printed
    page = Path("page.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page


def test_inspect_finds_sinks_and_escapes_text(dumped):
    figures = {"norm": np.array([1.0, 1, 1, 90, 1]), "position": np.array([1, 2, 3, 0, 1])}
    assert inspect.medians(figures)[0] == 90
    drawn = figures | {"dimension": np.arange(2), "share": np.array([0.9, 0.1])}
    page = inspect.page("<b>", ["<b>"], drawn)
    assert "<b>" not in page
    assert "position 0: 90" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: folder; write: megalens inspect"),
        (["a", "b"], "'b' is one word too many"),
        (["a", "rows=few"], "rows: few must be a whole number of 0 or more"),
        (["a", "row=3"], "unknown key 'row' in the command line; did you mean 'rows'"),
        (["a", "layer_k=3"], "unknown key 'layer_k' in the command line; did you mean 'layer_l'"),
    ],
)
def test_what_inspect_does_not_understand_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        inspect_command.main(arguments)


def some_rows(dumped) -> dict[str, torch.Tensor]:
    rows = ActivationLoader(dumped, 1, 0).rows(range(40))
    return {name: rows[name].contiguous() for name in ("activation", "input_ids", "position", "doc_id")}


@pytest.mark.parametrize("kind", ["parquet", "safetensors", "npy"])
def test_converted_rows_are_the_source_and_can_be_trained_on(dumped, kind):
    rows, more = some_rows(dumped), []
    if kind == "parquet":
        contexts = [ids[: p + 1].tolist() for ids, p in zip(rows["input_ids"], rows["position"], strict=True)]
        columns = {"activation_vector": rows["activation"].tolist(), "token_ids": contexts, "doc_id": rows["doc_id"].tolist()}
        pq.write_table(pa.table(columns), "acts.parquet")
    elif kind == "safetensors":
        save_file(rows, "acts.safetensors")
    else:
        np.save("acts.npy", rows["activation"].numpy()), np.save("ids.npy", rows["input_ids"].numpy())
        rows |= {"position": torch.full((40,), rows["input_ids"].shape[1] - 1), "doc_id": torch.arange(40)}
        more = ["ids=ids.npy"]
    arguments = [f"acts.{kind}", "made", *more, *TINY, "activation_dumper.rows_per_shard=16"]
    convert_command.main(arguments)
    assert verify("made") == []
    loader = training_loader(load_config([*TINY, "mix=[made=1]"]))
    back = loader.rows(range(40))
    for name, value in rows.items():
        width = back[name].shape[1:2] if name == "input_ids" else ()
        assert torch.equal(back[name], value[:, : width[0]] if width else value), name
    with pytest.raises(DataError, match="there is a dump"):
        convert_command.main(arguments)


def test_what_cannot_be_converted_is_named(dumped):
    rows = some_rows(dumped)
    cases = {
        "there is no file": "none.npy",
        "name the token ids": "acts.npy",
        "do not fit": "short.safetensors",
        "has no input_ids": "bare.safetensors",
    }
    np.save("acts.npy", rows["activation"].numpy())
    save_file({**rows, "input_ids": rows["input_ids"][:3].clone()}, "short.safetensors")
    save_file({"activation": rows["activation"]}, "bare.safetensors")
    for message, source in cases.items():
        with pytest.raises(DataError, match=message):
            convert_command.main([source, "made", *TINY])
    save_file({**rows, "input_ids": rows["input_ids"] + 10_000}, "foreign.safetensors")
    with pytest.raises(DataError, match="token ids that the tokenizer"):
        convert_command.main(["foreign.safetensors", "made", *TINY])
    assert not Path("made").exists()
