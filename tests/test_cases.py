"""Inputs from public reports that once broke something: each gives a result, or a line that says what is wrong and mends it."""

from __future__ import annotations

import shutil

import pytest
from conftest import ROOT
from fuzzed import outcome

from megalens.config import Config, config_from_dict, load_config
from megalens.data.corpus import load_documents, stream_documents
from megalens.data.pretokenize import pretokenize
from megalens.engine import ds_config
from megalens.lens.prompts import prompts_of
from megalens.sweep.file import read_sweep
from megalens.tiny import make_tokenizer

CASES = ROOT / "tests" / "cases"
CORPORA = {  # how many documents, or what is said
    "badz.jsonl.zst": "badz.jsonl.zst: it is cut short; copy it anew",
    "data [en].jsonl": 60,
    "empty.parquet": "empty.parquet is empty: it holds no documents",
    "glob/part*.jsonl": 60,
    "glob/part2.jsonl": 100,
    "hidden_files": 60,
    "latin1.jsonl": "latin1.jsonl: it is not UTF-8",
    "one.jsonl": "one.jsonl has a single usable document",
    "trail.txt": 60,
    "trunc.jsonl": "trunc.jsonl: JSON parse error",
    "ws.txt": 60,
    "zero.jsonl": "zero.jsonl is empty",
    "zero.txt": "zero.txt is empty",
}
DEEPSPEED = {  # None: it is taken
    **dict.fromkeys(["bf16_null", "bom", "dt_null", "fp16_null", "offp_devnull", "offp_null", "opt_params_null", "optimizer_null"]),
    **dict.fromkeys(["sched_null", "zero_null"]),
    "bf16_true": "bf16=true must be a section",
    "bucket_float": "stage3_prefetch_bucket_size=15099494.4: DeepSpeed says: ",
    "bucket_zero": "reduce_bucket_size=0: DeepSpeed says: Input should be greater than 0",
    "fp16_true": "take out the section fp16; the setting is dtype",
    "hpz": "zero_hpz_partition_size=2 cannot be had",
    "optimizer_str": 'optimizer="AdamW" must be a section',
    "optother": "optimizer.params.eps=1e-06 cannot be had, only 1e-08",
    "unknownzero": "zero_optimization.foo is no key of this DeepSpeed's",
    "zero_true": "zero_optimization=true must be a section",
    "zpp": "zero_quantized_weights=true cannot be had",
}
SWEEPS = {
    "command_mapping": "command: is a list of text and macros",
    "command_string": "command: is a list of text and macros",
    "log_uniform_overflow": "log_uniform takes logarithms; write distribution: log_uniform_values",
    "looks_million": None,
    "metric_not_measured": "metric.name: val_loss is no figure of a training; names begin with train/ or val/",
    "q_uniform_batch": None,
    "q_zero": "learning_rate.q: 0 must be a number greater than 0",
    "unknown_macro": "'${argz}' is no macro that runs here",
}


def told(said: str | None, expected: str | None) -> None:
    """It says this in one line; or nothing."""
    assert (said is None) == (expected is None), said
    assert expected is None or (expected in said and "\n" not in said)


def test_every_case_is_run():
    assert {path.stem for path in (CASES / "deepspeed").iterdir()} == DEEPSPEED.keys()
    assert {path.stem for path in (CASES / "sweeps").iterdir()} == SWEEPS.keys()
    assert {path.name for path in (CASES / "data").iterdir()} == {name.partition("/")[0] for name in CORPORA}
    assert {path.name for path in (CASES / "config").iterdir()} == {"run_name_env.yaml", "empty_prompt_no_eos.yaml"}


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(name, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", tmp_path)
    config = config_from_dict({"dataset": {"name": str(CASES / "data" / name)}, "pretokenize": {"num_proc": 1}})
    found, said = outcome(lambda: {row["text"] for split in load_documents(config).values() for row in split})
    streamed, said_of_stream = outcome(lambda: {text for split in ("train", "val") for _, text in stream_documents(config, split)})
    if isinstance(CORPORA[name], int):
        assert (said, said_of_stream) == (None, None)
        assert found == streamed
        assert len(found) == CORPORA[name]
    else:
        told(said, CORPORA[name])
        if name != "one.jsonl":  # a stream knows only at its end
            told(said_of_stream, CORPORA[name])


@pytest.mark.parametrize("name", ["badz.jsonl.zst", "one.jsonl", "trunc.jsonl", "zero.jsonl", "empty.parquet"])
def test_streaming_tells_a_bad_corpus_in_a_line_and_leaves_nothing(name, tmp_path, tiny_data):
    settings = {"name": str(CASES / "data" / name)}
    model = {"model_name": str(tiny_data / "models" / "tiny-llama"), "layer_l": 1}
    config = config_from_dict({**model, "dataset": settings, "pretokenize": {"root": str(tmp_path), "streaming": True, "num_proc": 1}})
    _, said = outcome(lambda: pretokenize(config))
    assert said is not None
    assert name.partition(".")[0] in said
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_file(name):
    config = Config(deepspeed=str(CASES / "deepspeed" / f"{name}.json"), batch_size=8, dtype="fp32", device="cpu")
    told(outcome(lambda: ds_config.resolve(config, 1))[1], DEEPSPEED[name])


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_file(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep, said = outcome(lambda: read_sweep(CASES / "sweeps" / f"{name}.yaml"))
    told(said, SWEEPS[name])
    if name == "q_uniform_batch":
        assert sweep.config({"batch_size": sweep.ranges["batch_size"].samples()[2]}).batch_size == 16


def test_settings_file_that_refers_to_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv("NOPE_X", raising=False)
    for path in (CASES / "config" / "run_name_env.yaml", ROOT / "conf" / "tiny.yaml"):
        shutil.copy(path, tmp_path)
    told(outcome(lambda: load_config([f"config={tmp_path / 'run_name_env.yaml'}"]))[1], "NOPE_X")


def test_an_empty_prompt_without_an_end_of_text(tmp_path):
    for path in (CASES / "config" / "empty_prompt_no_eos.yaml", ROOT / "conf" / "tiny.yaml"):
        shutil.copy(path, tmp_path)
    config = load_config([f"config={tmp_path / 'empty_prompt_no_eos.yaml'}"])
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = None
    told(outcome(lambda: prompts_of(config, tokenizer))[1], "reconstructor.prompt is empty, and the tokenizer has no end-of-text token")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_lists_and_a_bad_file_of_many_are_named(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def said_of(name: str) -> str | None:
        config = config_from_dict({"dataset": {"name": str(tmp_path / name)}, "pretokenize": {"num_proc": 1}})
        return outcome(lambda: list(stream_documents(config, "train")) if streaming else load_documents(config))[1]

    (tmp_path / "lists.jsonl").write_text('{"text": ["a", "b"]}\n' * 3)
    told(said_of("lists.jsonl"), f"column 'text' of {tmp_path / 'lists.jsonl'} holds lists, not text; name a column of text")
    (tmp_path / "mixed.json").write_text('[\n {"text": "a"},\n 1\n]')
    told(said_of("mixed.json"), str(tmp_path / "mixed.json"))
    for kind, bad in (("jsonl", b'{"text": "cut'), ("txt", b"caf\xe9 latin-1"), ("parquet", b"PAR1 no more")):
        folder = tmp_path / kind
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        good = CASES / "data" / "hidden_files" / "a.jsonl"
        if kind != "parquet":
            shutil.copy(good, folder / f"a.{kind}")
        (folder / f"b.{kind}").write_bytes(bad)
        (folder / f"c.{kind}").write_bytes(bad)
        told(said_of(kind), str(folder / f"b.{kind}"))
