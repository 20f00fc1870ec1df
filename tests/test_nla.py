"""Checkpoints that other tools read: written, read back to the bit, said the same by the plain algorithm, refused when malformed."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalens import Lens
from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats import LoadedLens, load_lens, read_config
from megalens.checkpoint.formats.megalens import Megalens
from megalens.checkpoint.formats.nla import Nla
from megalens.checkpoint.formats.nla_export import check_can_say, fold_head
from megalens.checkpoint.formats.nla_sidecar import read_sidecar
from megalens.commands import export_lens, import_lens
from megalens.config import ConfigError, config_from_dict
from megalens.lens.verbalizer import StandardisedLinear
from megalens.objective import build_lens
from megalens.statistics import ActivationStatistics
from megalens.tiny import make_model, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[it] {% endif %}"
)
SETTINGS = {
    "layer_l": 1,
    "t_text": 24,
    "tail_order": "forward",
    "dtype": "fp32",
    "device": "cpu",
    "lora": {"r": 4},
    "verbalizer": {
        "prompt": "Say {what} <concept><act></concept> is",
        "plain_prompt": "Say what it is",
        "chat": True,
        "marker": "@",
        "inject": "embedding",
        "inject_norm": 3.0,
        "end_token": "eos",
        "tag": "explanation",
        "trainable_prompt": False,
    },
    "reconstructor": {"prompt": "Of <text>", "suffix": "</text> it is", "head": "linear", "trainable_prompt": False},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model") / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def make(model, **changes):
    """A lens that has been moved from where it starts."""
    draw = torch.Generator().manual_seed(1)
    values = SETTINGS | {"model_name": str(model)} | changes
    statistics = ActivationStatistics(torch.randn(64, generator=draw), torch.rand(64, generator=draw) + 0.5, torch.zeros(64) + 0.02)
    lens = build_lens(config_from_dict(values), statistics.mean, statistics.var)
    for parameter in lens.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return LoadedLens(lens.eval(), statistics)


@pytest.fixture(scope="module")
def loaded(model):
    return make(model)


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nla") / "lens"
    Nla().save(folder, loaded)
    return folder


@pytest.fixture(scope="module")
def again(folder):
    return load_lens(folder)


def activations(count=16):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(5))


# ------------------------------------------------------------------------------------------------------- there and back


def test_an_imported_lens_says_and_rebuilds_what_the_exported_one_does(loaded, again):
    assert torch.equal(again.lens.verbalize(activations()), loaded.lens.verbalize(activations()))
    ids_BT, lengths_B = torch.arange(30).view(5, 6) + 40, torch.tensor([6, 3, 1, 4, 6])
    torch.testing.assert_close(again.lens.reconstruct(ids_BT, lengths_B), loaded.lens.reconstruct(ids_BT, lengths_B), atol=2e-3, rtol=1e-4)
    for name, value in vars(loaded.statistics).items():
        assert torch.equal(getattr(again.statistics, name), value)


def test_export_import_export_is_bitwise(folder, again, tmp_path):
    Nla().save(tmp_path / "second", again)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        one, other = load_file(folder / path), load_file(tmp_path / "second" / path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), path


def test_an_imported_lens_explains_and_can_be_trained_on(folder):
    lens = Lens.from_pretrained(folder)
    assert len(lens.explain("a river")) == len(lens.module.tokenizer("a river")["input_ids"])
    config = read_config(folder, ["terms.say=0.0"])
    assert config.mode_of("verbalizer") == config.mode_of("reconstructor") == "full" and config.init_from is None


def test_an_affine_head_is_folded_exactly():
    draw = torch.Generator().manual_seed(2)
    mean_D, std_D = torch.randn(8, generator=draw) * 5, torch.rand(8, generator=draw) + 0.5
    head = StandardisedLinear(mean_D, std_D, mean_D, std_D, torch.float64)
    head.linear.weight.data += 0.3 * torch.randn(8, 8, generator=draw)
    head.linear.bias.data += torch.randn(8, generator=draw)
    x_BD = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    a_DD, shift_D = fold_head(head)
    torch.testing.assert_close((x_BD + shift_D) @ a_DD.T, head(x_BD).detach(), atol=1e-9, rtol=1e-9)


def test_an_affine_lens_is_written_with_its_offset_in_a_bias(model, tmp_path):
    affine = make(model, reconstructor=SETTINGS["reconstructor"] | {"head": "affine"})
    Nla().save(tmp_path / "lens", affine)
    text = "a river of words"
    assert plain_reading(tmp_path / "lens" / "ar", text) == pytest.approx(rebuilt(affine.lens, text), abs=2e-3)


# -------------------------------------------------------------------------------------------------- as other readers do


def test_explanations_are_those_of_the_plain_algorithm_token_for_token(folder, loaded):
    """The reader's rule, from the format alone: render, tokenise, find the marker, rescale, replace, go on until the end token."""
    about = yaml.safe_load((folder / "av" / "nla_meta.yaml").read_text())
    tokenizer, av = AutoTokenizer.from_pretrained(folder / "av"), AutoModelForCausalLM.from_pretrained(folder / "av").eval()
    message = [{"role": "user", "content": about["prompt_templates"]["av"].format(injection_char=about["tokens"]["injection_char"])}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), add_special_tokens=False)
    (place,) = [i for i, number in enumerate(ids) if number == about["tokens"]["injection_token_id"]]
    neighbours = about["tokens"]["injection_left_neighbor_id"], about["tokens"]["injection_right_neighbor_id"]
    assert (ids[place - 1], ids[place + 1]) == neighbours
    expected = []
    for a_D in activations():
        embeds = av.get_input_embeddings()(torch.tensor([ids])).detach().clone()
        embeds[0, place] = a_D * about["extraction"]["injection_scale"] / a_D.norm()
        out = []
        with torch.no_grad():
            for _ in range(24):
                out.append(int(av(inputs_embeds=embeds).logits[0, -1].argmax()))
                if out[-1] == tokenizer.eos_token_id:
                    break
                embeds = torch.cat([embeds, av.get_input_embeddings()(torch.tensor([[out[-1]]]))], dim=1)
        expected.append(out)
    ids_BT = loaded.lens.verbalize(activations())
    lengths_B = loaded.lens.frame.lengths(ids_BT)
    ours = [row[: n + 1] for row, n in zip(ids_BT.tolist(), lengths_B.tolist(), strict=True)]
    assert ours == expected


def plain_reading(folder, text):
    about = yaml.safe_load((folder / "nla_meta.yaml").read_text())
    tokenizer, ar = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert ar.config.num_hidden_layers == about["critic"]["extraction_layer_index"] + 1
    ids = tokenizer(about["prompt_templates"]["ar"].format(explanation=text), return_tensors="pt")["input_ids"]
    ar.model.norm = torch.nn.Identity()
    head = load_file(folder / "value_head.safetensors")
    assert list(head) == ["weight"]
    with torch.no_grad():
        return (head["weight"] @ ar.model(ids).last_hidden_state[0, -1]).numpy()


def rebuilt(lens, text):
    """By id lists, of a string whose ids are the same when it is tokenised whole."""
    ids = lens.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = lens.tokenizer(lens.config.reconstructor.prompt + text + lens.config.reconstructor.suffix)["input_ids"]
    suffix = lens.tokenizer(lens.config.reconstructor.suffix, add_special_tokens=False)["input_ids"]
    assert whole == [*lens.tokenizer(lens.config.reconstructor.prompt)["input_ids"], *ids, *suffix]
    return lens.reconstruct(torch.tensor([ids]), torch.tensor([len(ids)]))[0].numpy()


def test_texts_are_read_as_the_plain_algorithm_reads_them(folder, loaded):
    for text in (" a river of words", " stone", " it was built in the north"):
        assert plain_reading(folder / "ar", text) == pytest.approx(rebuilt(loaded.lens, text), abs=2e-3)


def test_what_every_reader_asks_of_the_folders_holds(folder):
    av, ar = (yaml.safe_load((folder / half / "nla_meta.yaml").read_text()) for half in ("av", "ar"))
    assert (av["kind"], av["role"], ar["role"]) == ("nla_model", "av", "ar")
    assert isinstance(av["extraction"]["injection_scale"], float) and ar["extraction"]["injection_scale"] is None
    assert isinstance(ar["extraction"]["mse_scale"], float)
    for half in ("av", "ar"):
        names = list(load_file(folder / half / "model.safetensors"))
        assert sum(name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")) for name in names) == 1
    settings = json.loads((folder / "ar" / "tokenizer_config.json").read_text())
    assert settings["padding_side"] == "right"
    tokenizer = AutoTokenizer.from_pretrained(folder / "ar")
    assert tokenizer.bos_token_id is None or tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert "{{what}}" in av["prompt_templates"]["av"]


def test_a_lens_goes_out_and_comes_back_by_two_commands(loaded, folder, tmp_path, capsys):
    Megalens().save(tmp_path / "own", loaded)
    export_lens.main([f"checkpoint={tmp_path / 'own'}", f"to={tmp_path / 'out'}"])
    assert re.search(r"32 of 32 texts are the same, cosine of the rebuilds at least (0\.9999|1\.)", capsys.readouterr().out)
    import_lens.main([str(tmp_path / "out"), f"to={tmp_path / 'back'}"])
    import_lens.main([f"av={tmp_path / 'out' / 'av'}", f"ar={tmp_path / 'out' / 'ar'}", f"to={tmp_path / 'pair'}"])
    for name in ("back", "pair"):
        again = load_lens(tmp_path / name).lens
        assert torch.equal(again.verbalize(activations()), loaded.lens.verbalize(activations()))
    with pytest.raises(CheckpointError, match="is there already"):
        import_lens.main([str(tmp_path / "out"), f"to={tmp_path / 'back'}"])
    with pytest.raises(ConfigError, match="name one folder that holds av/ and ar/, or both halves"):
        import_lens.main([f"av={tmp_path / 'out' / 'av'}", f"to={tmp_path / 'x'}"])


# ------------------------------------------------------------------------------------------------------------ refusals

SPELLINGS = {
    "actor and critic": lambda av, ar: (av.update(role="actor"), ar.update(role="critic")),
    "older template keys": lambda av, ar: (
        av.update(prompt_templates={"actor": av["prompt_templates"]["av"]}),
        ar.update(prompt_templates={"critic": ar["prompt_templates"]["ar"]}),
    ),
    "only the top-level layer": lambda av, ar: (ar.pop("critic"), ar["extraction"].pop("layer_index")),
    "depth in place of layer": lambda av, ar: (ar.update(critic={"num_hidden_layers": 2}), ar.pop("extraction_layer_index")),
    "no role": lambda av, ar: (av.pop("role"), ar.pop("role")),
    "unknown keys": lambda av, ar: av.update(lineage=["x"], stage=None),
}


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(copied, change):
    sides = {half: yaml.safe_load((copied / half / "nla_meta.yaml").read_text()) for half in ("av", "ar")}
    change(sides["av"], sides["ar"])
    for half, values in sides.items():
        (copied / half / "nla_meta.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_sidecar_is_read(copied, folder, spelling):
    rewrite(copied, SPELLINGS[spelling])
    for half in ("av", "ar"):
        one, other = read_sidecar(copied / half, half), read_sidecar(folder / half, half)
        assert (one.template, one.width, one.layer, one.scale, one.marker) == (other.template, 64, 1, other.scale, other.marker)


def test_a_lens_of_another_trainer_is_read_from_its_sidecar_alone(copied, model, again):
    rewrite(copied, lambda av, ar: av.pop("megalens"))
    config = read_config(copied)
    assert (config.layer_l, config.model_name, config.t_text) == (1, str(model), 200)
    assert config.verbalizer == read_config(copied, ["t_text=24"]).verbalizer
    lens = load_lens(copied, t_text=24, dtype="fp32").lens
    assert torch.equal(lens.verbalize(activations()), again.lens.verbalize(activations()))
    (copied / "av" / "megalens_stats.safetensors").unlink()
    with pytest.raises(CheckpointError, match="says nothing of its training activations.*dump some"):
        load_lens(copied)


def tensor(half, change, file="model.safetensors"):
    def edit(folder):
        state = load_file(folder / half / file)
        change(state)
        save_file(state, folder / half / file)

    return edit


def sidecar(change):
    return lambda folder: rewrite(folder, change)


def written(half, name, text):
    return lambda folder: (folder / half / name).write_text(text)


def removed(half, name):
    return lambda folder: (folder / half / name).unlink()


def nan_in(name):
    return lambda state: state[name].view(-1)[0].fill_(float("nan"))


def settings(half, **changes):
    def edit(folder):
        path = folder / half / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


EMBED, DOWN = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
MALFORMED = {
    "no AR folder": (lambda f: shutil.rmtree(f / "ar"), "ar/nla_meta.yaml is not there"),
    "no AR sidecar": (removed("ar", "nla_meta.yaml"), "nla_meta.yaml is not there"),
    "sidecar no YAML": (written("av", "nla_meta.yaml", "a: [1"), "cannot be read"),
    "sidecar a list": (written("av", "nla_meta.yaml", "- 1"), "holds no keys"),
    "sidecar empty": (written("av", "nla_meta.yaml", ""), "holds no keys"),
    "sidecar binary": (lambda f: (f / "av/nla_meta.yaml").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "sidecar executes": (written("av", "nla_meta.yaml", "kind: !!python/object/apply:os.system [ls]"), "cannot be read"),
    "sidecar huge": (written("av", "nla_meta.yaml", "a: " + "x" * (1 << 20)), "no sidecar"),
    "a dataset's sidecar": (sidecar(lambda av, ar: av.update(kind="nla_dataset")), "kind is 'nla_dataset'"),
    "a block lens": (sidecar(lambda av, ar: av.update(kind="nla_block_lens")), "only nla_model"),
    "halves swapped": (sidecar(lambda av, ar: av.update(role="ar")), "role is 'ar'"),
    "no scale": (sidecar(lambda av, ar: av["extraction"].update(injection_scale=None)), "injection_scale must be a positive number"),
    "scale a word": (sidecar(lambda av, ar: av["extraction"].update(injection_scale="raw")), "not 'raw'"),
    "scale infinite": (sidecar(lambda av, ar: av["extraction"].update(injection_scale=float("inf"))), "positive number"),
    "no width": (sidecar(lambda av, ar: av.pop("d_model")), "d_model must be a whole number"),
    "widths differ": (sidecar(lambda av, ar: ar.update(d_model=32)), "64 wide and the AR 32"),
    "two layers": (sidecar(lambda av, ar: av.update(extraction_layer_index=2)), "names two layers: 2"),
    "another depth": (settings("ar", num_hidden_layers=3), "the AR has 3 blocks"),
    "no depth": (written("ar", "config.json", "{}"), "names no number of blocks"),
    "no template": (sidecar(lambda av, ar: av.pop("prompt_templates")), "must be a text that holds {injection_char} once"),
    "two slots": (sidecar(lambda av, ar: av["prompt_templates"].update(av="{injection_char}{injection_char}")), "once"),
    "a bare brace": (sidecar(lambda av, ar: ar["prompt_templates"].update(ar="{x} {explanation}")), "not doubled"),
    "no marker": (sidecar(lambda av, ar: av["tokens"].pop("injection_char")), "injection_char must be"),
    "no neighbour": (sidecar(lambda av, ar: av["tokens"].pop("injection_left_neighbor_id")), "injection_left_neighbor_id"),
    "another marker id": (sidecar(lambda av, ar: av["tokens"].update(injection_token_id=7)), "stands in this tokenizer's prompt"),
    "another neighbour": (sidecar(lambda av, ar: av["tokens"].update(injection_right_neighbor_id=7)), "between"),
    "no weights": (removed("av", "model.safetensors"), "holds no model.safetensors"),
    "weights damaged": (written("av", "model.safetensors", "x" * 100), "cannot be read"),
    "weights not finite": (tensor("av", nan_in(DOWN)), "not finite"),
    "no embedding": (tensor("av", lambda s: s.pop(EMBED)), "0 input embeddings"),
    "two embeddings": (tensor("av", lambda s: s.update({"vision.embed_tokens.weight": torch.zeros(2, 2)})), "2 input embeddings"),
    "a weight is missing": (tensor("ar", lambda s: s.pop(DOWN)), f"lacks the weight {DOWN}"),
    "a weight of another shape": (tensor("ar", lambda s: s.update({DOWN: torch.zeros(3, 3)})), "does not fit this lens"),
    "no head": (removed("ar", "value_head.safetensors"), "weight must be [64, 64], and is absent"),
    "a head of another width": (tensor("ar", lambda s: s.update(weight=torch.eye(3)), "value_head.safetensors"), "and is [3, 3]"),
    "a head with a bias": (tensor("ar", lambda s: s.update(bias=torch.zeros(64)), "value_head.safetensors"), "holds bias too"),
    "a head not finite": (tensor("ar", nan_in("weight"), "value_head.safetensors"), "not finite"),
    "a vocabulary of its own": (tensor("av", lambda s: s[EMBED].add_(1.0)), "differs by up to 1 from"),
    "another subject": (sidecar(lambda av, ar: av["megalens"].update(fingerprint="0")), "set model_name to where that model lies"),
    "an index that leads out": (
        written("av", "model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}'),
        "names a file outside its folder",
    ),
    "an index without a file": (written("av", "model.safetensors.index.json", '{"weight_map": {"a": "b"}}'), "holds no b"),
    "a setting of code": (sidecar(lambda av, ar: av["megalens"]["config"].update(no_such_key=1)), "no_such_key"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_folder_is_refused_in_one_line(copied, kind):
    spoil, told = MALFORMED[kind]
    spoil(copied)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(told)) as refused:
        load_lens(copied)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_cannot_allow_itself_to_run_code(copied):
    rewrite(copied, lambda av, ar: av["megalens"]["config"].update(trust_remote_code=True))
    assert read_config(copied).trust_remote_code is False


def test_what_the_format_cannot_say_is_refused_with_every_reason(model, tmp_path):
    ours = make(model, tail_order="last_first", verbalizer={"prompt": "a<act> b"}, reconstructor={})
    with pytest.raises(
        CheckpointError, match=r"inject is not embedding; .*marker is null; .*tail_order is last_first.*conf/nla\.yaml"
    ) as refused:
        Nla().save(tmp_path / "lens", ours)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_an_export_never_overwrites_and_leaves_nothing_half_done(folder, loaded, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is there already"):
        Nla().save(folder, loaded)
    monkeypatch.setattr("megalens.checkpoint.formats.nla_export._write_ar", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Nla().save(tmp_path / "lens", loaded)
    assert not list(tmp_path.iterdir())
    check_can_say(loaded.lens)
