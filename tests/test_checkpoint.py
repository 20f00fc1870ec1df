"""A saved lens needs no engine, keeps its names, runs no code that it asks for itself, and is refused in one line where it does not fit."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from endure import flip_checkpoint_bytes
from safetensors.torch import load_file, save_file
from tiny_run import make_subject_and_dump, tiny_config

from megalens import Lens
from megalens.checkpoint import CheckpointError, formats
from megalens.checkpoint.checksums import CHECKSUMS, check_checkpoint
from megalens.checkpoint.formats import LoadedLens, load_lens, megalens_v1
from megalens.checkpoint.formats.megalens import Megalens, read_about, read_config, read_optimizer, read_weights
from megalens.config import ConfigError, config_from_dict
from megalens.data import DataError
from megalens.families.loading import subject_fingerprint
from megalens.files import checksum
from megalens.lens.names import stable_names
from megalens.objective import Step, build_lens
from megalens.statistics import ActivationStatistics
from megalens.tiny import make_model
from megalens.train import train

ROOT = Path(__file__).resolve().parents[1]
VERSION1 = ROOT / "tests" / "data" / "version1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_subject_and_dump(folder)
    return folder


@pytest.fixture
def saved(folder, tmp_path):
    config = tiny_config(folder)
    draw = torch.Generator().manual_seed(1)
    statistics = ActivationStatistics(
        torch.randn(64, generator=draw), torch.rand(64, generator=draw) + 0.5, torch.randn(64, generator=draw) / 8
    )
    lens = build_lens(config, statistics.mean, statistics.var)
    with torch.no_grad():
        for group in lens.parameter_groups().values():
            for parameter in group.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    Megalens().save(tmp_path / "saved", LoadedLens(lens, statistics))
    return tmp_path / "saved", lens, statistics


def test_loaded_lens_is_the_saved_one(saved):
    folder, lens, statistics = saved
    loaded, read = load_lens(folder).lens, load_lens(folder).statistics
    a_BD = torch.randn(4, 64)
    batch = {"activation": a_BD, "input_ids": torch.arange(48).view(4, 12), "position": torch.full((4,), 9), "sample_id": torch.arange(4)}
    assert torch.equal(loaded.verbalize(a_BD), lens.eval().verbalize(a_BD))
    assert torch.equal(loaded(batch, Step.fixed(lens.config))["loss"], lens(batch, Step.fixed(lens.config))["loss"])
    assert not loaded.training
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(read.mean_normalised, statistics.mean_normalised)
    check_checkpoint(folder)


def test_a_lens_keeps_what_it_standardises_by_beside_its_training_statistics(saved, tmp_path):
    _, lens, statistics = saved
    other = ActivationStatistics(statistics.mean + 1, statistics.var * 2, statistics.mean_normalised)
    Megalens().save(tmp_path / "other", LoadedLens(lens, other))
    again = load_lens(tmp_path / "other")
    assert torch.equal(again.lens.mean, statistics.mean)
    assert torch.equal(again.lens.verbalizer.projection.mean, statistics.mean)
    assert torch.equal(again.statistics.mean, statistics.mean + 1)


def test_a_checkpoint_of_before_standardises_by_its_statistics(saved):
    folder, _, statistics = saved
    save_file({name: getattr(statistics, name) for name in ("mean", "var", "mean_normalised")}, folder / "stats.safetensors")
    (folder / CHECKSUMS).unlink()
    again = load_lens(folder)
    assert torch.equal(again.lens.mean, statistics.mean)
    assert torch.equal(again.lens.var, statistics.var)


def test_any_flipped_byte_of_a_checkpoint_is_found_and_its_file_named(folder):
    config = tiny_config(folder, "flips", max_train_steps="2s")
    assert train(config) == 0
    counts = flip_checkpoint_bytes(config.run_dir, 40)
    assert counts.keys() == {
        "lens.safetensors",
        "lens.json",
        "stats.safetensors",
        "trainer.json",
        "engine/optimizer.safetensors",
        "checksums.json",
    }


def test_damaged_lens_is_refused_where_it_is_used(folder):
    config = tiny_config(folder, "used", max_train_steps="2s")
    assert train(config) == 0
    path = config.run_dir / "best" / "lens.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"lens.safetensors does not match its checksum.*; copy it anew"):
        load_lens(config.run_dir / "best")


def test_settings_may_be_other_ones_where_a_lens_is_used(saved):
    loaded = load_lens(saved[0], dtype="bf16", device="cpu", evaluation={"examples": 1}).lens
    assert (loaded.config.evaluation.examples, loaded.config.evaluation.batch_size) == (1, saved[1].config.evaluation.batch_size)
    assert loaded.config.dtype == "bf16"
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())


@pytest.mark.parametrize("other", [{"seed": 1}, {"hidden_size": 96}], ids=["weights", "width"])
def test_checkpoint_of_another_subject_is_refused_before_anything_of_it_is_loaded(saved, tmp_path, monkeypatch, other):
    make_model(tmp_path / "other", **other)
    for factory in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{factory}.from_pretrained", None)
    with pytest.raises(CheckpointError, match=r"is a lens of .*/model with weights .*; set model_name"):
        load_lens(saved[0], model_name=str(tmp_path / "other"))


def test_folder_without_a_lens_and_damaged_files_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing is no checkpoint: it does not exist; a run's best one is outputs/<run>/best"):
        load_lens(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"holds no lens.json, no av/nla_meta.yaml; a run's best one is outputs/<run>/best"):
        load_lens(tmp_path)
    (saved[0] / CHECKSUMS).unlink()
    path = saved[0] / "lens.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="lens.safetensors cannot be read"):
        load_lens(saved[0])
    path.write_bytes(whole)
    (saved[0] / "lens.json").write_text("{")
    with pytest.raises(CheckpointError, match="lens.json cannot be read"):
        load_lens(saved[0])


def test_weights_that_do_not_fit_are_named(saved):
    path = saved[0] / "lens.safetensors"
    (saved[0] / CHECKSUMS).unlink()
    weights = load_file(path)
    weights["reconstructor.head.bias"] = torch.zeros(3)
    save_file(weights, path)
    with pytest.raises(ConfigError, match=r"reconstructor.head.bias is \(3,\) there, \(64,\) here"):
        load_lens(saved[0])


def test_weights_and_optimizer_state_lie_under_stable_names(folder):
    config = tiny_config(folder, "names", max_train_steps="2s")
    assert train(config) == 0
    lens = build_lens(config, torch.zeros(64), torch.ones(64))
    names = set(stable_names(lens.lens_state_names()).values())
    last = config.run_dir / "last"
    assert load_file(last / "lens.safetensors").keys() == names
    moments = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    assert load_file(last / "engine" / "optimizer.safetensors").keys() == moments | {"step"}


def test_missing_weights_are_told_and_foreign_ones_are_not_read(saved):
    shutil.copy(saved[0] / "lens.safetensors", saved[0] / "lens-backup.safetensors")
    assert read_weights(saved[0]).keys() == set(stable_names(saved[1].lens_state_names()).values())
    (saved[0] / "lens.safetensors").rename(saved[0] / "lens-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="lens-00001-of-00002.safetensors is not a file of the checkpoint"):
        load_lens(saved[0])
    (saved[0] / "lens-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no lens.safetensors; copy the checkpoint anew"):
        load_lens(saved[0])


# ------------------------------------------------------------------------------------------------------------- formats


class Foreign:
    name, looked_for = "foreign", "foreign.txt"

    def __init__(self, loaded):
        self.loaded = loaded

    def detect(self, folder):
        return (folder / self.looked_for).is_file()

    def load(self, folder, **changes):
        return self.loaded, folder, changes


def test_a_format_that_is_listed_is_loaded_by_its_files_and_named_in_refusals(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, Foreign("a lens")])
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it holds no lens.json, no av/nla_meta.yaml, no foreign.txt;"):
        load_lens(tmp_path)
    (tmp_path / "foreign.txt").touch()
    assert load_lens(str(tmp_path), device="cpu") == ("a lens", tmp_path, {"device": "cpu"})


def rewrite(folder, change):
    """Change lens.json, and its checksum with it, as anyone can."""
    path = folder / "lens.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    sums = json.loads((folder / CHECKSUMS).read_text())
    (folder / CHECKSUMS).write_text(json.dumps(sums | {"lens.json": checksum(path)}))


def test_format_of_a_later_version_is_refused(saved):
    rewrite(saved[0], lambda about: about.update(format_version=3))
    with pytest.raises(CheckpointError, match=r"format megalens-lens version 3, not megalens-lens version 2 or older; update megalens"):
        load_lens(saved[0])


def test_key_that_this_version_does_not_know_is_told_with_the_version_that_wrote_it(saved):
    rewrite(saved[0], lambda about: (about["config"]["lora"].update(flavour="sour"), about["versions"].update(megalens="9.7")))
    with pytest.raises(CheckpointError, match=r"lens.json has the key 'lora.flavour' of megalens 9.7, which megalens \d\S* does not know;"):
        load_lens(saved[0])


def test_key_that_the_writer_did_not_know_takes_its_default(saved):
    rewrite(saved[0], lambda about: (about["config"].pop("evaluation"), about["config"]["lora"].pop("dropout")))
    config = read_config(saved[0])
    assert (config.evaluation.batch_size, config.lora.dropout, config.lora.r) == (64, 0.0, 2)


@pytest.mark.parametrize("key", ["width", "subject", "config"])
def test_lens_json_without_a_part_is_refused_in_a_line(saved, key):
    rewrite(saved[0], lambda about: about.pop(key))
    with pytest.raises(CheckpointError, match=f"lens.json holds no '{key}'"):
        load_lens(saved[0])


# ---------------------------------------------------------------------------------------------------------- remote code


@pytest.fixture
def evil(saved, folder, tmp_path):
    """A checkpoint that asks for code to be run, of a model that brings some; and the file that the code makes."""
    mark, model = tmp_path / "MARK", tmp_path / "evil"
    shutil.copytree(folder / "model", model)
    ran = f"open({str(mark)!r}, 'a').write('ran')\n"
    (model / "configuration_evil.py").write_text(
        f"from transformers import LlamaConfig\n{ran}class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
    )
    path = model / "config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}, "model_type": "evil"}
    path.write_text(json.dumps(settings))
    rewrite(saved[0], lambda about: about["config"].update(trust_remote_code=True, model_name=str(model)))
    return saved[0], model, mark


def trust_weights(checkpoint, model):
    """Let the checkpoint say that the model is its subject."""
    fingerprint = subject_fingerprint(config_from_dict({"model_name": str(model)}))
    rewrite(checkpoint, lambda about: about["subject"].update(fingerprint=fingerprint))


@pytest.mark.parametrize("same_weights", [False, True])
def test_checkpoint_cannot_switch_on_remote_code(evil, same_weights):
    checkpoint, model, mark = evil
    if same_weights:
        trust_weights(checkpoint, model)
    assert not read_config(checkpoint).trust_remote_code
    refusal = ConfigError if same_weights else CheckpointError
    with pytest.raises(refusal):
        Lens.from_pretrained(checkpoint)
    for tool, arguments in (("explain", ["hello"]), ("eval", [])):
        with pytest.raises((refusal, DataError)):
            importlib.import_module(f"megalens.commands.{tool}").main([f"checkpoint={checkpoint}", *arguments])
    assert not mark.exists()


def test_remote_code_runs_where_the_caller_says_so_but_not_of_another_model(evil):
    checkpoint, model, mark = evil
    with pytest.raises(CheckpointError, match="is a lens of"):
        load_lens(checkpoint, trust_remote_code=True)
    assert not mark.exists()
    trust_weights(checkpoint, model)
    assert read_config(checkpoint, ["trust_remote_code=true"]).trust_remote_code
    with pytest.raises((ConfigError, ValueError)):  # there is a configuration's code, but no model's
        load_lens(checkpoint, trust_remote_code="true")
    assert mark.exists()


# ------------------------------------------------------------------------------------------------------------ version 1


@pytest.fixture
def version1(tmp_path, monkeypatch):
    """A run that version 1 saved in the middle; its paths are relative."""
    shutil.copytree(VERSION1, tmp_path / "version1", symlinks=True)
    monkeypatch.chdir(tmp_path / "version1")
    return load_file("expected.safetensors")


def test_lens_of_version_1_says_and_rebuilds_what_it_did(version1):
    lens = load_lens("outputs/run/best").lens
    assert torch.equal(lens.verbalize(version1["activation"]), version1["ids"])
    torch.testing.assert_close(lens.reconstruct(version1["ids"], torch.full((3,), 3)), version1["rebuilt"], rtol=1e-5, atol=1e-5)
    assert read_weights("outputs/run/best").keys() == set(stable_names(lens.lens_state_names()).values())


def test_training_of_version_1_goes_on_to_the_same_end(version1):
    folder = Path("outputs/run/checkpoints/step-00000004")
    config = read_config(folder, ["early_termination.steps=null"])
    rates = config.lr_multipliers
    assert (rates.verbalizer.projection.value, rates.reconstructor.prompt.value, rates.reconstructor.adapters.value) == (2.0, 0.5, 1.5)
    saved = read_optimizer(folder, [])
    assert saved.steps_taken("any") == 2
    assert train(config) == 0
    expected = megalens_v1.weights_of_now({name[6:]: value for name, value in version1.items() if name.startswith("final.")})
    found = read_weights("outputs/run/last")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert read_about("outputs/run/last")["format_version"] == 2
    assert not any("lora" in name for name in load_file("outputs/run/last/engine/optimizer.safetensors"))


def test_keys_of_version_1_that_moved_are_found_where_they_are_now():
    moved = {"old.rate": ("new.a.rate", "new.b.rate"), "old.gone": (), "top": ("kept.top",), "absent": ("nowhere",)}
    config = {"old": {"rate": 2.0, "gone": 1}, "top": None, "kept": {"list": [1]}}
    assert megalens_v1.config_of_now(config, moved) == {"new": {"a": {"rate": 2.0}, "b": {"rate": 2.0}}, "kept": {"list": [1], "top": None}}


def test_weights_of_version_1_that_no_lens_has_are_refused(version1):
    weights = load_file("outputs/run/last/lens.safetensors") | {"mystery": torch.zeros(1)}
    save_file(weights, "outputs/run/last/lens.safetensors")
    (Path("outputs/run/last") / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="mystery is no parameter of a lens"):
        load_lens("outputs/run/last")


# -------------------------------------------------------------------------------------------------------- hub models


def hub_cache(cache, model):
    """A model folder as the hub's cache keeps it; returns the folder of its files."""
    snapshot = cache / "models--org--subject" / "snapshots" / "abc"
    shutil.copytree(model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return snapshot


def test_subject_of_the_hub_is_fingerprinted_with_its_weights_or_refused_without(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = hub_cache(tmp_path, folder / "model")
    config = config_from_dict({"model_name": "org/subject"})
    assert subject_fingerprint(config) == subject_fingerprint(config_from_dict({"model_name": str(folder / "model")}))
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot load org/subject: .*; fetch it where there is a network \(hf download org/subject\)"):
        subject_fingerprint(config)
