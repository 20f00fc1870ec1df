"""What docs/extending.md shows works: its Python blocks are run, section by section."""

import json
import re
from pathlib import Path

import pytest
import torch
from dumps import header, make_rows
from saved_lens import make_run
from test_lens import make_batch, make_lens

from megalens import Lens
from megalens.checkpoint import CheckpointError, formats
from megalens.checkpoint.run_folder import RunFolder
from megalens.commands import eval as eval_command
from megalens.config import ConfigError, load_config
from megalens.data.encoding import ENCODINGS
from megalens.data.loader import ActivationLoader
from megalens.data.shards import ShardReader, ShardWriter
from megalens.evaluate import EvaluationError, baselines, metrics, report, table
from megalens.explain.search import SEARCHES, search_named
from megalens.families import registry
from megalens.families.causal_lm import CausalLM
from megalens.families.self_check import check_walk
from megalens.objective import TERMS, Step
from megalens.tiny import make_model
from megalens.training.start import find_start

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """The checkpoint of a finished run."""
    return make_run(tmp_path_factory.mktemp("run"))


def measured(folder, *settings):
    """``evaluation.json`` of a checkpoint, and its page."""
    eval_command.main([f"checkpoint={folder}", "evaluation.num_samples=12", "evaluation.report_documents=0", *settings])
    run = eval_command.run_folder(folder)
    return json.loads((run / "evaluation.json").read_text()), (run / "report.html").read_text()


def blocks_of(section):
    """The Python blocks of a section of the page, in order."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S).group(1)
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_model_family_of_the_page_is_walked_and_without_its_file_refused(monkeypatch):
    transformers_part, family_file, check = blocks_of("A model family")
    names = {}
    exec(transformers_part, names)
    registry.family_of(names["MupConfig"]())  # finds the makes, so that what is put back below has them
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    exec(family_file, names)
    exec(check, names)
    registry._families.pop("mup_llama")
    with pytest.raises(ConfigError, match=r"its own residual stream before block 0 differs by 91\.7%"):
        check_walk(CausalLM(names["model"]))


def test_objective_term_of_the_page_trains(tmp_path, monkeypatch):
    names = {}
    exec(blocks_of("An objective term")[0], names)
    monkeypatch.setattr("megalens.objective.TERMS", [*TERMS, names["Norms"]])
    lens = make_lens(str(make_model(tmp_path / "llama")), mse_weight=0.0, terms={"norms": 0.5})
    out = lens(make_batch(), Step.fixed(lens.config))
    out["loss"].backward()
    torch.testing.assert_close(out["loss"].detach(), 0.5 * out["norms"])
    assert lens.verbalizer.projection.linear.weight.grad.abs().sum() > 0
    for command in re.findall(r"train\.py config=conf/tiny\.yaml (terms.*)", PAGE.read_text(encoding="utf-8")):
        assert load_config(command.split()).terms["norms"].ends[-1] == 0.1


def test_shard_encoding_of_the_page_keeps_activations(tmp_path, monkeypatch):
    names = {}
    exec(blocks_of("A shard encoding")[0], names)
    monkeypatch.setitem(ENCODINGS, "fp16", names["Fp16"]())
    rows = make_rows(30)
    writer = ShardWriter(tmp_path, header(30) | {"encoding": "fp16"})
    writer.begin()
    writer.write(0, rows)
    assert writer.finish()
    read = ShardReader(tmp_path).read_batch(0)["activation"]
    assert read.dtype == torch.float16
    assert torch.equal(read, rows["activation"][: len(read)].half())


def test_checkpoint_format_of_the_page_gives_back_the_same_lens(best, tmp_path, monkeypatch):
    names = {}
    exec(blocks_of("A checkpoint format")[0], names)
    made = names["OneFile"]()
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, made])
    made.save(tmp_path / "kept", formats.load_lens(best))
    one, other = Lens.from_pretrained(best), Lens.from_pretrained(tmp_path / "kept")
    assert one.explain("Arden is a river") == other.explain("Arden is a river")
    assert measured(tmp_path / "kept")[0]["figures"] == measured(best)[0]["figures"]

    config = formats.read_config(best)
    starts = []
    for folder in (best, tmp_path / "kept"):
        config.init_from = str(folder)
        loader = ActivationLoader(config.activation_dir("train"), 8, 0)
        starts.append(find_start(config, RunFolder(tmp_path / "run"), loader, {"model_name": one.module.subject.fingerprint}))
    assert starts[0].weights.keys() == starts[1].weights.keys()
    assert all(torch.equal(starts[1].weights[name], value) for name, value in starts[0].weights.items())
    assert all(torch.equal(*pair) for pair in zip(starts[0].standard, starts[1].standard, strict=True))
    config.engine = "fsdp"
    with pytest.raises(CheckpointError, match="is of the format one file, which cannot be read in shards"):
        find_start(config, RunFolder(tmp_path / "run"), loader, {"model_name": ""})

    monkeypatch.setitem(names, "subject_fingerprint", lambda config: "another")
    with pytest.raises(CheckpointError, match="is a lens of another subject"):
        Lens.from_pretrained(tmp_path / "kept")
    (tmp_path / "kept" / made.looked_for).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Lens.from_pretrained(tmp_path / "kept")


def test_baseline_and_figure_of_the_page_are_measured_and_shown(best, monkeypatch):
    names = {}
    exec(blocks_of("A figure")[0], names)
    shown = (metrics.TABLES[0], (*metrics.TABLES[1], "near"))
    monkeypatch.setattr(metrics, "FIGURES", (*metrics.FIGURES, names["near"]))
    for module in (report, table):
        monkeypatch.setattr(module, "TABLES", shown)
    sources = list(baselines.SOURCES)
    try:
        exec(blocks_of("A baseline")[0], names)
        found, page = measured(best)
    finally:
        baselines.SOURCES.pop("last_token", None)
    assert list(found["figures"]) == [*sources, "last_token"]
    assert found["figures"]["gold"]["near"] == 1.0
    lens = found["figures"]["lens"]
    assert 0 <= lens["near_low"] <= lens["near"] <= lens["near_high"] <= 1
    assert page.count("copy of the last token") == 1 + len(shown)
    assert "<th>near</th>" in page


def test_search_of_the_page_is_asked_for_by_name(best, monkeypatch):
    names = {}
    exec(blocks_of("A search")[0], names)
    monkeypatch.setitem(SEARCHES, "sampled", names["asked"])
    assert measured(best, "evaluation.search=sampled:0.5")[0]["setting"]["search"] == "sampled with noise 0.5"
    lens = Lens.from_pretrained(best)
    searches = ("greedy", "sampled:1e-6", "sampled:2")
    greedy, cold, hot = ([each.explanation for each in lens.explain("Arden is a river", search=search)] for search in searches)
    assert cold == greedy
    assert hot != greedy
    with pytest.raises(EvaluationError, match=r"greedy, or best_of:K .*, or sampled:NOISE, e\.g\. sampled:0\.5"):
        search_named("sampled:warm")
