"""A trained lens in a few lines of Python::

from megalens import Lens

lens = Lens.from_pretrained("outputs/demo/best")
for each in lens.explain("The tower was built in 1889."):
    print(each.token, each.explanation, each.fve)
a_hat_D = lens.reconstruct("a tower in Paris")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalens.checkpoint.formats import load_lens
from megalens.data.pretokenize import encode
from megalens.evaluate import EvaluationError
from megalens.evaluate.text import check_text, to_ids
from megalens.evaluate.tokens import TokenExplanation, explain_ids
from megalens.explain.search import search_named
from megalens.lens.lens import ConsistencyLens
from megalens.lens.prompts import window_of
from megalens.statistics import ActivationStatistics

__all__ = ["Lens", "TokenExplanation"]


class Lens:
    """A trained lens and the statistics of the activations it was trained on.

    Args:
        module: the lens itself, for everything that is not here.
        statistics: of its training activations, what a rebuild is measured against.
    """

    def __init__(self, module: ConsistencyLens, statistics: ActivationStatistics):
        self.module, self.statistics = module.eval(), statistics

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

    def explain(self, text: str, batch_size: int = 64, search: str = "greedy") -> list[TokenExplanation]:
        """What the lens says at each token of a text, in order.

        A tokenizer that puts a BOS first has it explained too. The lens was not trained on the first positions
        (``config.activation_dumper.min_pos``) nor behind ``seq_len``: read its words there with care.

        Args:
            text: any text that fits the subject's window. Names of special tokens in it are plain text.
            batch_size: positions at a time.
            search: how explanations are chosen (:mod:`megalens.explain.search`): ``greedy``, or e.g. ``best_of:8``, the one of eight
                from which the lens rebuilds the activation best.

        Returns:
            ``token``, ``explanation``, ``fve`` and ``search`` of each token (:class:`~megalens.evaluate.tokens.TokenExplanation`).

        Raises:
            EvaluationError: the text is empty, no UTF-8 or too long, or there is no such search.
        """
        check_text(text)
        ids = encode(self.module.tokenizer, [text])[0]
        self._check_window(len(ids), "the text")
        return explain_ids(self.module, ids, self.statistics, search_named(search), batch_size)

    @torch.no_grad()
    def reconstruct(self, text: str) -> Tensor:
        """The activation ``[d]`` (float32) that the reconstructor rebuilds from a text, read as an explanation.

        Raises:
            EvaluationError: the text is empty, no UTF-8 or too long.
        """
        check_text(text)
        ids = to_ids(self.module.tokenizer, [text])[0]
        self._check_window(self.module.reconstructor.length_with(len(ids)), "the text with the reconstructor's prompts")
        return self.module.reconstruct(torch.tensor([ids]), torch.tensor([len(ids)]))[0]

    def _check_window(self, length: int, what: str) -> None:
        window = window_of(self.module.subject.lm.config)
        if window is not None and length > window:
            name = self.module.config.model_name
            raise EvaluationError(f"{what} has {length} tokens, more than the window of {name} ({window}); shorten it")
