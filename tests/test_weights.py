"""Weights from disk: into a lens whose blocks are on the meta device, tensor by tensor, as into one that is loaded whole."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megalens.config import Config, ConfigError, Lora, Reconstructor, Verbalizer
from megalens.families.loading import load_tokenizer
from megalens.objective import build_lens
from megalens.tiny import KINDS, make_model


def make_lens(folder, mode, empty_blocks=True):
    config = Config(
        model_name=str(folder),
        layer_l=1,
        t_text=2,
        dtype="fp32",
        device="cpu",
        verbalizer=Verbalizer(mode=mode),
        reconstructor=Reconstructor(mode=mode),
        lora=Lora(r=4),
    )
    return build_lens(config, torch.zeros(64), torch.ones(64), empty_blocks=empty_blocks)


def assert_same_values(empty, whole):
    wanted, found = dict(whole.named_parameters()), dict(empty.named_parameters())
    assert list(found) == list(wanted)
    for name, parameter in found.items():
        inside = ".layers." in name or ".h." in name or ".own." in name
        assert parameter.is_meta == inside, name
        assert torch.equal(empty.initial(name) if parameter.is_meta else parameter, wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad
    for (name, mine), (_, theirs) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_starts_as_in_a_lens_that_was_loaded_whole(tmp_path, kind):
    folder = make_model(tmp_path / kind, kind=kind)
    for mode in ("lora", "full"):
        assert_same_values(make_lens(folder, mode), make_lens(folder, mode, empty_blocks=False))


def test_model_in_several_files_is_read_from_the_one_that_its_index_names(tmp_path):
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    whole = make_lens(folder, "frozen", empty_blocks=False)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_values(make_lens(folder, "frozen"), whole)


def spoil_weights(folder, spoil):
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(*names):
    return lambda folder: spoil_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


def misshape(folder):
    spoil_weights(folder, lambda tensors: tensors.update({"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 5)}))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])


def put_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")


def keep_pickle_only(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove(folder):
    (folder / "model.safetensors").unlink()


def quantise(folder):
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}
    (folder / "config.json").write_text(json.dumps(settings))


def name_a_file_that_is_gone(folder):
    tensors = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "gone.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("version https://git-lfs.github.com/spec/v1")


TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
DAMAGES = {
    "a weight is missing": (
        drop("model.layers.2.mlp.up_proj.weight"),
        r"lacks the weight model\.layers\.2\.mlp\.up_proj\.weight, where random numbers would stand; fetch the model anew",
        r"hold no model\.layers\.2\.mlp\.up_proj\.weight: fetch the model anew",
    ),
    "two weights are missing": (
        drop("model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        r"lacks 2 weights, the first of them model\.layers\.1\.self_attn\.q_proj\.weight",
        r"hold no model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "the head is missing": (drop("lm_head.weight"), r"lacks the weight lm_head\.weight", r"hold no lm_head\.weight"),
    "a weight has another shape": (misshape, *[r"down_proj\.weight is \[3, 5\] in its files, \[64, 128\] by its config\.json"] * 2),
    "cut short": (cut_short, *[r"model\.safetensors is cut short or damaged \(.*\); fetch it anew"] * 2),
    "pointer": (put_pointer, *[r"model\.safetensors is a pointer of Git LFS, not the weights; run 'git lfs pull'"] * 2),
    "pickle": (keep_pickle_only, *[r"holds pytorch_model\.bin but no safetensors, .*; convert it: python -c "] * 2),
    "nothing": (remove, *["holds no safetensors, the one format weights are read from; fetch the model anew"] * 2),
    "file gone": (name_a_file_that_is_gone, r"cannot load .*: No such file .*gone\.safetensors", r"lacks the file gone\.safetensors"),
    "index": (spoil_index, *[r"index\.json is no valid JSON: .* fetch it anew"] * 2),
    "quantised": (quantise, r"cannot load .*(hqq|HQQ)", "is quantised, which engines that shard the model cannot read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_is_refused_in_one_line_however_it_is_loaded(tmp_path, damage, caplog):
    spoil, whole, sharded = DAMAGES[damage]
    folder = make_model(tmp_path / "model")
    spoil(folder)
    for empty_blocks, message in ((False, whole), (True, sharded)):
        with pytest.raises(ConfigError, match=message) as refusal:
            lens = make_lens(folder, "frozen", empty_blocks)
            for name, _ in lens.subject.lm.model.named_parameters():
                lens.subject.files.read(name)
        assert "\n" not in str(refusal.value)
    assert "LOAD REPORT" not in caplog.text


def test_weights_that_are_joined_as_they_are_loaded_need_an_engine_that_loads_whole(tmp_path):
    folder = make_model(tmp_path / "model")
    config = AutoConfig.for_model("mixtral", **TINY)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_lens(folder, "frozen", empty_blocks=False)
    with pytest.raises(
        ConfigError, match=r"hold no .*experts.*: it is joined or turned as it is loaded, which only engines do that load the model whole"
    ):
        make_lens(folder, "frozen")


def test_tied_head_is_not_missing(tmp_path):
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    make_lens(folder, "frozen", empty_blocks=False)


def test_command_that_a_pickled_model_is_refused_with_converts_it(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "model")
    keep_pickle_only(folder)
    with pytest.raises(ConfigError, match="convert it") as refusal:
        make_lens(folder, "frozen")
    program = shlex.split(str(refusal.value).partition("convert it: ")[2])
    assert program[:2] == ["python", "-c"]
    exec(program[2], {})
    make_lens(folder, "frozen")


def test_tokenizer_that_is_not_there_is_refused_with_the_mend(tmp_path):
    folder = make_model(tmp_path / "model")
    config = Config(model_name=str(folder), device="cpu")
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no valid JSON: it is damaged or a pointer of Git LFS; fetch it anew"):
        load_tokenizer(config)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer files \(tokenizer\.json, .*\); copy them there, or set tokenizer_name to"):
        load_tokenizer(config)
