"""The Python API: what a user gets from a saved lens, and what is refused."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

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


def test_positions_are_explained_in_the_order_asked_for(lens):
    whole = lens.explain(TEXT)
    chosen = lens.explain(TEXT, positions=[5, -1, 5])
    assert [token.explanation for token in chosen] == [whole[at].explanation for at in (5, -1, 5)]
    assert [token.token for token in chosen] == [whole[at].token for at in (5, -1, 5)]
    with pytest.raises(EvaluationError, match="no position 99 in a text of"):
        lens.explain(TEXT, positions=[99])


def test_vectors_are_verbalized_as_the_text_they_come_from_is_explained(lens):
    a_ND = lens.activations(TEXT)
    assert [text for (text,) in lens.verbalize(a_ND)] == [token.explanation for token in lens.explain(TEXT)]
    samples = lens.verbalize(a_ND[:2], draws=3)
    assert [len(texts) for texts in samples] == [3, 3] and samples == lens.verbalize(a_ND[:2], draws=3)
    assert samples != lens.verbalize(a_ND[:2], draws=3, seed=1)


def test_a_score_is_that_of_the_explanation(lens):
    a_ND, tokens = lens.activations(TEXT), lens.explain(TEXT)
    scores = lens.score([token.explanation for token in tokens], a_ND)
    assert [score.fve for score in scores] == pytest.approx([token.fve for token in tokens], abs=1e-5)
    assert all(score.mse == pytest.approx(2 * (1 - score.cos)) for score in scores)
    assert lens.score([""], a_ND[:1])[0].failed


def test_directions_are_scaled_to_the_norm_of_activations(lens):
    scaled_ND = lens.as_activations(torch.randn(3, 64))
    assert scaled_ND.norm(dim=-1) == pytest.approx(torch.full((3,), lens.norm), rel=1e-5)
    assert 0.3 < lens.norm / lens.activations(TEXT)[3:].norm(dim=-1).mean() < 3
    with pytest.raises(EvaluationError, match="zero"):
        lens.as_activations(torch.zeros(1, 64))


def test_vectors_of_another_shape_or_not_finite_are_refused(lens):
    for use in (lens.verbalize, lens.as_activations, lambda a: lens.score(["x"], a)):
        with pytest.raises(EvaluationError, match=r"activations are \[N, 64\], not \[2, 63\]"):
            use(torch.zeros(2, 63))
        with pytest.raises(EvaluationError, match="not finite"):
            use(torch.full((1, 64), float("nan")))


def test_a_patched_activation_goes_on_as_with_a_hook_in_the_subjects_own_forward(lens):
    subject, at, vector_D = lens.module.subject, 4, torch.randn(64)
    ids = lens.module.tokenizer(TEXT)["input_ids"]

    def replace(_, __, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        if hidden.shape[1] > at:
            hidden[:, at] = vector_D
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    patched = lens.patch(TEXT, at, vector_D, tokens=3)
    expected = []
    for hook in (None, replace):
        handle = subject.lm.blocks[subject.layer_l].register_forward_hook(hook) if hook else None
        grown = torch.tensor([ids])
        with torch.no_grad():
            for _ in range(3):
                grown = torch.cat([grown, subject.lm.model(grown, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if handle:
            handle.remove()
        expected.append(lens.module.tokenizer.decode(grown[0, len(ids) :].tolist(), skip_special_tokens=True))
    assert [patched.plain, patched.patched] == expected
    assert lens.patch(TEXT, at, lens.activations(TEXT)[at]).kl == pytest.approx(0, abs=1e-5)
    assert lens.patch(TEXT, at, "a river").score == lens.score(["a river"], lens.activations(TEXT)[at][None])[0]


def test_two_activations_are_compared_by_both_texts(lens):
    a_ND = lens.activations(TEXT)
    found = lens.compare(a_ND[3], a_ND[7])
    assert found.texts == tuple(lens.explain(TEXT)[at].explanation for at in (3, 7))
    assert [found.fve[0][0], found.fve[1][1]] == pytest.approx([lens.explain(TEXT)[at].fve for at in (3, 7)], abs=1e-4)
    assert lens.compare(a_ND[3], a_ND[3]).cos == pytest.approx(1, abs=1e-5)


def test_threads_get_what_a_single_caller_gets(lens):
    a_ND = lens.activations(TEXT)
    alone = lens.verbalize(a_ND), lens.activations(TEXT)
    with ThreadPoolExecutor(4) as pool:
        texts = [pool.submit(lens.verbalize, a_ND) for _ in range(4)]
        read = [pool.submit(lens.activations, TEXT) for _ in range(4)]
    assert all(each.result() == alone[0] for each in texts)
    assert all(torch.equal(each.result(), alone[1]) for each in read)


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
