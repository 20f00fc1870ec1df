"""The Python API: what a user gets from a saved lens, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from saved_lens import make_run

from megalens import Lens, TokenExplanation
from megalens.checkpoint import CheckpointError
from megalens.evaluate import EvaluationError

TEXT = "Arden is a river known since 1300. été 漢字"


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def lens(request, tmp_path_factory):
    return Lens.from_pretrained(make_run(tmp_path_factory.mktemp("run"), kind=request.param))


def test_every_token_of_a_text_is_explained(lens):
    tokens = lens.explain(TEXT)
    ids = lens.module.tokenizer(TEXT)["input_ids"]
    assert len(tokens) == len(ids)
    bos = lens.module.tokenizer.bos_token if ids[0] == lens.module.tokenizer.bos_token_id else ""
    assert "".join(token.token for token in tokens) == bos + TEXT
    assert all(isinstance(token, TokenExplanation) and isinstance(token.explanation, str) and token.fve <= 1 for token in tokens)


def test_fve_of_a_token_is_that_of_its_own_round_trip(lens):
    module, statistics = lens.module, lens.statistics
    ids = module.tokenizer(TEXT)["input_ids"]
    a_BD = module.subject.residual(torch.tensor([ids]))[0]
    for at in (0, 5, len(ids) - 1):
        token = lens.explain(TEXT)[at]
        a = a_BD[at].double().numpy()
        a_hat = lens.reconstruct(token.explanation).double().numpy() if token.explanation.strip("\ufffd \n") else statistics.mean.numpy()
        u, u_hat = a / np.linalg.norm(a), a_hat / np.linalg.norm(a_hat)
        wanted = 1 - np.square(u - u_hat).sum() / np.square(u - statistics.mean_normalised.numpy()).sum()
        assert token.fve == pytest.approx(wanted, abs=1e-3)


def test_batches_do_not_change_an_explanation(lens):
    whole, split = lens.explain(TEXT), lens.explain(TEXT, batch_size=3)
    assert [token.explanation for token in whole] == [token.explanation for token in split]
    assert [token.fve for token in whole] == pytest.approx([token.fve for token in split], abs=1e-3)


def test_names_of_special_tokens_in_a_text_are_text(lens):
    text = f"a {lens.module.tokenizer.eos_token} b"
    assert "".join(token.token for token in lens.explain(text)).endswith(text)


def test_a_rebuilt_activation_has_the_subjects_width(lens):
    a_hat_D = lens.reconstruct("a river")
    assert a_hat_D.shape == (64,)
    assert a_hat_D.dtype == torch.float32
    assert not torch.equal(a_hat_D, lens.reconstruct("a castle"))


def test_empty_and_too_long_texts_are_refused_in_one_line(lens):
    for use in (lens.explain, lens.reconstruct):
        with pytest.raises(EvaluationError, match="is empty"):
            use("")
        with pytest.raises(EvaluationError, match=r"more than the window of .* \(256\); shorten it$"):
            use("x " * 300)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no lens\.json"):
        Lens.from_pretrained(tmp_path)


def test_importing_megalens_loads_no_library():
    code = (
        "import sys, megalens; before = set(sys.modules); megalens.Lens; print(sorted({'torch', 'numpy'} & before), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[-2] == "[] True"
    with pytest.raises(ImportError):
        from megalens import Lense  # noqa: F401
