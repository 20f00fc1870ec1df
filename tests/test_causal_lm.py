"""The lens walks every family's model exactly as Hugging Face does."""

import pytest
import torch

from megalens.config import Config
from megalens.families.cache import KVCache
from megalens.lens.subject import load_subject
from megalens.tiny import KINDS, make_model

LENGTHS = [24, 9, 17]


@pytest.fixture(scope="module", params=KINDS)
def config(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("model") / request.param, kind=request.param)
    return Config(model_name=str(folder), layer_l=1, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def subject(config):
    return load_subject(config)


@pytest.fixture(scope="module")
def ids_BC():
    ids = torch.randint(3, 500, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        ids[row, length:] = 0
    return ids


@torch.no_grad()
def test_residual_is_hidden_states_of_the_next_index(config, subject, ids_BC):
    resid_BCD = subject.residual(ids_BC)
    for row, length in enumerate(LENGTHS):
        expected = subject.lm.model(ids_BC[row : row + 1, :length], output_hidden_states=True).hidden_states[config.layer_l + 1]
        torch.testing.assert_close(resid_BCD[row, :length], expected[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_last_block_is_read_before_the_final_norm(config, subject):
    ids = torch.arange(3, 20)[None]
    last = load_subject(Config(model_name=config.model_name, layer_l=3, dtype="fp32", device="cpu"))
    logits = last.lm.logits(last.lm.final_norm(last.residual(ids)))
    torch.testing.assert_close(logits, subject.lm.model(ids).logits.float(), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_read_gives_the_true_next_token_logits(subject, ids_BC):
    position = torch.tensor(LENGTHS) - 1
    read = subject.read(ids_BC, position)
    for row, length in enumerate(LENGTHS):
        expected = subject.lm.model(ids_BC[row : row + 1, :length]).logits[0, -1].float()
        torch.testing.assert_close(subject.lm.logits(read.normed_BD)[row], expected, atol=5e-5, rtol=1e-4)


def full_forward_with_residual_replaced(subject, ids, position, value_D):
    def replace(_, __, output):
        output = output.clone()
        output[0, position] = value_D
        return output

    handle = subject.lm.blocks[subject.layer_l].register_forward_hook(replace)
    try:
        return subject.lm.model(ids).logits[0, position].float()
    finally:
        handle.remove()


@torch.no_grad()
def test_patched_suffix_equals_full_forward(subject, ids_BC):
    position = torch.tensor(LENGTHS) - torch.tensor([1, 1, 4])  # the last row is patched inside its context
    read = subject.read(ids_BC, position)
    a_BD = torch.randn(3, subject.d, generator=torch.Generator().manual_seed(1)) * read.activation_BD.std()
    patched_BV = subject.patched_logits(read, a_BD)
    again_BV = subject.patched_logits(read, a_BD)
    for row, length in enumerate(LENGTHS):
        expected = full_forward_with_residual_replaced(subject, ids_BC[row : row + 1, :length], int(position[row]), a_BD[row])
        torch.testing.assert_close(patched_BV[row], expected, atol=5e-5, rtol=1e-4)
    assert torch.equal(patched_BV, again_BV), "patching must leave the read as it was"


@torch.no_grad()
def test_gold_patched_back_changes_nothing(subject, ids_BC):
    position = torch.tensor(LENGTHS) - 1
    read = subject.read(ids_BC, position)
    torch.testing.assert_close(subject.patched_logits(read, read.activation_BD), subject.lm.logits(read.normed_BD), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_cached_run_equals_uncached_run(subject, ids_BC):
    """A prefix of batch 1 in the cache, broadcast to the rows appended to it, token by token and all at once."""
    lm, split = subject.lm, 7
    prefix = ids_BC[:1, :split]
    whole = torch.cat([prefix.expand(3, -1), ids_BC[:, split:]], dim=1)
    positions = torch.arange(whole.shape[1])[None]
    expected = lm.run(lm.enter(lm.embed(whole), positions), 0, subject.num_blocks, positions)
    for room in (None, whole.shape[1]):
        cache = KVCache(room)
        lm.run(lm.enter(lm.embed(prefix), positions[:, :split]), 0, subject.num_blocks, positions[:, :split], cache=cache)
        rest = lm.enter(lm.embed(whole[:, split:]), positions[:, split:])
        at_once = lm.run(rest, 0, subject.num_blocks, positions[:, split:], cache=cache.fork())
        torch.testing.assert_close(at_once, expected[:, split:], atol=5e-5, rtol=1e-4)
        for t in range(split, whole.shape[1]):
            here = positions[:, t : t + 1]
            token = lm.run(lm.enter(lm.embed(whole[:, t : t + 1]), here), 0, subject.num_blocks, here, cache=cache)
            torch.testing.assert_close(token[:, 0], expected[:, t], atol=5e-5, rtol=1e-4)


def test_decode_with_room_copies_nothing_twice():
    """The keys of every token are one buffer's, and keep their gradients."""
    cache, value = KVCache(room=6), torch.randn(1, 2, 2, 4, requires_grad=True)
    cache.update(value, value, 0)
    tokens = [torch.randn(3, 2, 1, 4, requires_grad=True) for _ in range(4)]
    keys = [cache.update(token, token, 0)[0] for token in tokens]
    assert len({key.data_ptr() for key in keys}) == 1
    weight = [torch.randn_like(key) for key in keys]
    found = torch.autograd.grad(sum((k * w).sum() for k, w in zip(keys, weight, strict=True)), [value, *tokens])
    joined = [torch.cat([value.expand(3, -1, -1, -1), *tokens[: i + 1]], dim=2) for i in range(4)]
    expected = torch.autograd.grad(sum((k * w).sum() for k, w in zip(joined, weight, strict=True)), [value, *tokens])
    for mine, theirs, key, whole in zip(found, expected, [None, *keys], [None, *joined], strict=True):
        torch.testing.assert_close(mine, theirs)
        assert key is None or torch.equal(key, whole)


@torch.no_grad()
def test_plain_continuation_states_give_the_models_own_logits(subject, ids_BC):
    prompt, text = torch.tensor([[5, 6, 7]]), ids_BC[:, :5]
    states = subject.next_states(prompt, text)
    expected = subject.lm.model(torch.cat([prompt.expand(3, -1), text[:, :-1]], dim=1)).logits[:, 2:].float()
    torch.testing.assert_close(subject.lm.logits(states), expected, atol=5e-5, rtol=1e-4)
