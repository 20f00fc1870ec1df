"""A trained lens in a few lines of Python::

from megalens import Lens

lens = Lens.from_pretrained("outputs/demo/best")
for each in lens.explain("The tower was built in 1889."):
    print(each.token, each.explanation, each.fve)
a_ND = lens.activations("The tower was built in 1889.")
texts = lens.verbalize(a_ND, draws=8)
scores = lens.score(["a tower in Paris"], a_ND[-1:])

Activations are the residual stream after block ``layer_l``, float32 ``[N, d]``. All methods may be called from several threads: one at a
time runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from megalens.checkpoint.formats import load_lens
from megalens.data.pretokenize import encode
from megalens.evaluate import EvaluationError
from megalens.evaluate.measure import said
from megalens.evaluate.text import check_text, to_ids
from megalens.evaluate.tokens import TokenExplanation, explain_ids
from megalens.explain import edit
from megalens.explain.edit import Comparison, Patched, Score
from megalens.explain.search import search_named
from megalens.lens.lens import ConsistencyLens
from megalens.lens.prompts import window_of
from megalens.statistics import ActivationStatistics

__all__ = ["Comparison", "Lens", "Patched", "Score", "TokenExplanation"]


P = ParamSpec("P")
R = TypeVar("R")


def _one_at_a_time(method: Callable[Concatenate[Lens, P], R]) -> Callable[Concatenate[Lens, P], R]:
    """Adapters are switched on and off in a model that all calls share."""

    @wraps(method)
    def locked(self: Lens, *args: P.args, **options: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **options)

    return locked


class Lens:
    """A trained lens and the statistics of the activations it was trained on.

    Args:
        module: the lens itself, for everything that is not here.
        statistics: of its training activations, what a rebuild is measured against.
    """

    def __init__(self, module: ConsistencyLens, statistics: ActivationStatistics):
        self.module, self.statistics = module.eval(), statistics
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **changes: Any) -> Lens:
        """Load a checkpoint.

        Args:
            folder: for example ``outputs/<run>/best``.
            changes: configuration keys that are other here, e.g. ``device="cpu"``, ``dtype="fp32"``, ``model_name="/models/x"``;
                ``trust_remote_code=True`` where the subject needs code of its own: a checkpoint never says so itself.

        Raises:
            CheckpointError: there is no such checkpoint, it is damaged, or its subject is another model.
            ConfigError: its subject cannot be loaded.
        """
        loaded = load_lens(folder, **changes)
        return cls(loaded.lens, loaded.statistics)

    @property
    def norm(self) -> float:
        """The root-mean-square norm of the training activations: the scale at which a direction looks like an activation."""
        return float((self.statistics.mean.double().square() + self.statistics.var.double()).sum().sqrt())

    # ------------------------------------------------------------------------------------------------- texts to read

    @_one_at_a_time
    def explain(
        self, text: str, batch_size: int = 64, search: str = "greedy", positions: Sequence[int] | None = None
    ) -> list[TokenExplanation]:
        """What the lens says at each token of a text, in order.

        A tokenizer that puts a BOS first has it explained too. The lens was not trained on the first positions
        (``config.activation_dumper.min_pos``) nor behind ``seq_len``: read its words there with care.

        Args:
            text: any text that fits the subject's window. Names of special tokens in it are plain text.
            batch_size: positions at a time.
            search: how explanations are chosen (:mod:`megalens.explain.search`): ``greedy``, or e.g. ``best_of:8``, the one of eight
                from which the lens rebuilds the activation best, or ``best_of:8+swaps``.
            positions: the tokens to explain, in this order, from 0 or, below 0, from the end; None: all.

        Returns:
            ``token``, ``explanation``, ``fve``, ``search``, ``reads`` of each token (:class:`~megalens.evaluate.tokens.TokenExplanation`).

        Raises:
            EvaluationError: the text is empty, no UTF-8 or too long, a position is not in it, or there is no such search.
        """
        ids = self._ids(text)
        chosen = None if positions is None else [self._position(position, len(ids)) for position in positions]
        return explain_ids(self.module, ids, self.statistics, search_named(search), batch_size, chosen)

    @_one_at_a_time
    def activations(self, text: str) -> Tensor:
        """The subject's activations ``[tokens, d]`` (float32) at each token of a text.

        Raises:
            EvaluationError: the text is empty, no UTF-8 or too long.
        """
        ids = self._ids(text)
        return self.module.subject.residual(torch.tensor([ids], device=self.module.mean.device))[0].float()

    # ------------------------------------------------------------------------------------------------ vectors of one's own

    @_one_at_a_time
    @torch.no_grad()
    def verbalize(self, activations: Tensor, draws: int = 1, search: str = "greedy", seed: int = 0) -> list[list[str]]:
        """Texts of activations.

        Args:
            activations: ``[N, d]``. A direction (of an SAE, a probe, a steering vector) needs the scale of an activation first:
                :meth:`as_activations`.
            draws: 1: one text each, chosen by ``search``; more: so many sampled from the verbalizer's own distribution.
            search: as in :meth:`explain`; not together with several draws.
            seed: of the samples, 0 to 2^31 - 1.

        Returns:
            a list of texts for each activation.

        Raises:
            EvaluationError: the activations are not ``[N, d]`` or not finite, or there is no such search.
        """
        a_ND = self._vectors(activations)
        number_N = torch.arange(len(a_ND), device=a_ND.device)
        if draws == 1:
            return [[text] for text in search_named(search)(self.module, a_ND, number_N).texts]
        if draws < 1 or search != "greedy":
            raise EvaluationError(f"draws={draws} with search={search}: several draws are samples; leave out search, or ask for one draw")
        ids_BKT = self.module.rollout(a_ND, number_N, seed, draws).ids_BKT
        return [said(self.module, ids_KT).texts for ids_KT in ids_BKT]

    def as_activations(self, directions: Tensor, norm: float | None = None) -> Tensor:
        """Directions ``[N, d]`` of any length as vectors of the norm of an activation.

        Args:
            norm: None: :attr:`norm`.

        Raises:
            EvaluationError: they are not ``[N, d]``, not finite, or one is zero.
        """
        a_ND = self._vectors(directions)
        length_N1 = a_ND.norm(dim=-1, keepdim=True)
        if not bool((length_N1 > 0).all()):
            raise EvaluationError("a direction is zero: it has no direction")
        return a_ND / length_N1 * (self.norm if norm is None else norm)

    @_one_at_a_time
    @torch.no_grad()
    def reconstruct(self, text: str | Sequence[str]) -> Tensor:
        """The activation ``[d]`` (float32) that the reconstructor rebuilds from a text, read as an explanation; ``[N, d]`` from several.

        Raises:
            EvaluationError: a text is empty, no UTF-8 or too long.
        """
        if not isinstance(text, str):
            return torch.stack([self.reconstruct(each) for each in text]) if text else self.module.mean.new_zeros(0, self.module.subject.d)
        check_text(text)
        ids = to_ids(self.module.tokenizer, [text])[0]
        self._check_window(self.module.reconstructor.length_with(len(ids)), "the text with the reconstructor's prompts")
        return self.module.reconstruct(torch.tensor([ids]), torch.tensor([len(ids)]))[0]

    @_one_at_a_time
    def score(self, texts: Sequence[str], activations: Tensor) -> list[Score]:
        """How well each text describes its activation, by what the reconstructor makes of it.

        Args:
            texts: N texts; one that says nothing is scored as the mean activation.
            activations: ``[N, d]``.

        Raises:
            EvaluationError: there are not as many texts as activations, or those are not ``[N, d]`` or not finite.
        """
        a_ND = self._vectors(activations)
        if len(texts) != len(a_ND):
            raise EvaluationError(f"{len(texts)} texts for {len(a_ND)} activations: give one text for each")
        return edit.score_texts(self.module, self.statistics, texts, a_ND)

    @_one_at_a_time
    def compare(self, a: Tensor, b: Tensor, draws: int = 8) -> Comparison:
        """What one activation ``[d]`` holds, in the lens's words, that another does not.

        Raises:
            EvaluationError: one is not ``[d]`` or not finite.
        """
        a_2D = self._vectors(torch.stack([torch.as_tensor(a), torch.as_tensor(b)]))
        return edit.compare(self.module, self.statistics, a_2D[0], a_2D[1], draws)

    @_one_at_a_time
    def patch(self, text: str, position: int, explanation: str | Tensor, tokens: int = 20) -> Patched:
        """Let the subject go on with an edited explanation in an activation's place.

        Args:
            text: what the subject reads.
            position: the token whose activation is replaced, from 0 or, below 0, from the end.
            explanation: a text, of which the rebuild takes the place; or a vector ``[d]``.
            tokens: of the continuation.

        Raises:
            EvaluationError: a text is empty, no UTF-8 or too long, the position is not in the text, or the vector is not ``[d]``.
        """
        ids = self._ids(text, room=tokens)
        place = self._position(position, len(ids))
        if not isinstance(explanation, str):
            return edit.patch(self.module, ids, place, self._vectors(torch.as_tensor(explanation)[None])[0], tokens)
        done = edit.patch(self.module, ids, place, self.reconstruct(explanation), tokens)
        return replace(done, score=self.score([explanation], self.activations(text)[place][None])[0])

    # ------------------------------------------------------------------------------------------------------ what is asked

    def _ids(self, text: str, room: int = 0) -> list[int]:
        check_text(text)
        ids = encode(self.module.tokenizer, [text])[0]
        self._check_window(len(ids) + room, "the text" + (f" with {room} tokens behind it" if room else ""))
        return ids

    def _position(self, position: int, length: int) -> int:
        if not -length <= position < length:
            raise EvaluationError(f"there is no position {position} in a text of {length} tokens")
        return position % length

    def _vectors(self, activations: Tensor) -> Tensor:
        a_ND = torch.as_tensor(activations)
        if a_ND.dim() != 2 or a_ND.shape[1] != self.module.subject.d:
            raise EvaluationError(f"activations are [N, {self.module.subject.d}], not {list(a_ND.shape)}")
        if not bool(a_ND.isfinite().all()):
            raise EvaluationError("an activation is not finite; look at where it comes from")
        return a_ND.detach().float().to(self.module.mean.device)

    def _check_window(self, length: int, what: str) -> None:
        window = window_of(self.module.subject.lm.config)
        if window is not None and length > window:
            name = self.module.config.model_name
            raise EvaluationError(f"{what} has {length} tokens, more than the window of {name} ({window}); shorten it")
