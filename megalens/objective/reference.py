"""The training step written down plainly: no cache, no shared prompt, whole forward passes.

What the fast step must equal, and is measured against.

Every token of the decode runs prompt and text again; the subject reads the context once for M(a) and once more, patched, for M(a_hat).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from megalens.batch import Batch
from megalens.families.adapters import adapter
from megalens.lens.lens import ConsistencyLens
from megalens.objective.functions import kl_from_logits, relative_mse, resample_error, weighted_sum
from megalens.objective.step import Step
from megalens.ops import gumbel_embed, noise_keys


class ReferenceStep(nn.Module):
    """A lens whose forward is the plain step: same arguments, same terms, same gradients as :class:`ConsistencyLens`."""

    def __init__(self, lens: ConsistencyLens):
        super().__init__()
        self.lens = lens

    def forward(self, batch: Batch, at: Step) -> dict[str, Tensor]:
        """The round trip's terms (``mse``, ``kl``, ``lm``, ``entropy``) and their weighted sum ``loss``."""
        lens, weights = self.lens, self.lens.objective.weights(at)
        a_BD = batch["activation"]
        ids_BT, embeds_BTD, logits_BTV, entropy_BT = decode(lens, batch, at)
        rows, lengths = range(len(ids_BT)), text_lengths(lens, ids_BT)
        a_hat_BD = torch.cat([reconstruct(lens, embeds_BTD[i : i + 1, : lengths[i]]) for i in rows])
        terms = {"mse": relative_mse(a_BD, a_hat_BD), "entropy": torch.stack([entropy_BT[i, : lengths[i] + 1].mean() for i in rows]).mean()}
        if weights["kl"]:
            patched_BD = a_hat_BD + resample_error(a_BD.to(a_hat_BD.dtype), a_hat_BD)
            with torch.no_grad():
                true_BV = next_logits(lens, batch, None)
            terms["kl"] = kl_from_logits(true_BV, next_logits(lens, batch, patched_BD)).mean()
        if weights["lm"]:
            plain_ids = torch.cat([lens.plain_ids.expand(len(a_BD), -1), ids_BT], dim=1)
            with torch.no_grad(), adapter(lens.subject.lm, None):
                plain_BTV = lens.subject.lm.model(plain_ids).logits[:, lens.plain_ids.shape[1] - 1 : -1]
            kl_BT = kl_from_logits(logits_BTV, plain_BTV.to(logits_BTV.dtype))
            terms["lm"] = torch.stack([kl_BT[i, : lengths[i] + 1].mean() for i in rows]).mean()
        return {"loss": weighted_sum(terms, weights)} | {name: value.detach() for name, value in terms.items()}


def decode(lens: ConsistencyLens, batch: Batch, at: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids ``[B, T]``, straight-through embeddings ``[B, T, D]``, logits ``[B, T, V]`` and entropies ``[B, T]``."""
    v, lm, c, a_BD = lens.verbalizer, lens.subject.lm, lens.config, batch["activation"]
    tau = at.values["gumbel_tau_schedule"]
    own = {int(i): block for i, block in v.own.items()}
    text: list[Tensor] = []
    ids, logits, entropies = [], [], []
    with adapter(lm, v.adapter):
        for t in range(c.t_text):
            x = torch.cat([v.prompt().expand(len(a_BD), -1, -1), *text], dim=1)
            value = v.projection(a_BD).to(x.dtype)[:, None]
            positions = torch.arange(x.shape[1], device=x.device)[None]
            if v.enters == 0:
                x = torch.cat([x[:, : v.slot], value, x[:, v.slot + 1 :]], dim=1)
            x = lm.run(lm.enter(x, positions), 0, v.enters, positions, own=own)
            if v.enters:
                x = torch.cat([x[:, : v.slot], value, x[:, v.slot + 1 :]], dim=1)
            normed_BD = v._norm(lm.run(x, v.enters, v.blocks, positions, own=own))[:, -1]
            keys_B = noise_keys(c.seed, at.update, batch["sample_id"], t)
            drawn = lm.vocabulary(
                lambda out, into, bias, h=normed_BD, k=keys_B: tuple(
                    gumbel_embed(h, out, into, tau, k, noise=c.gumbel_noise, bias_V=bias, softcap=lm.softcap, impl="reference")
                )
            )
            text.append((drawn[1] * lm.embed_scale)[:, None].to(x.dtype))
            ids.append(drawn[0])
            entropies.append(drawn[4])
            logits.append(lm.logits(normed_BD))
    return torch.stack(ids, 1), torch.cat(text, 1), torch.stack(logits, 1), torch.stack(entropies, 1)


def text_lengths(lens: ConsistencyLens, ids_BT: Tensor) -> list[int]:
    """How many tokens of each text stand before its end token; all where it says none, or there is none."""
    return [row.index(lens.verbalizer.end_id) if lens.verbalizer.end_id in row else len(row) for row in ids_BT.tolist()]


def reconstruct(lens: ConsistencyLens, embeds_BTD: Tensor) -> Tensor:
    """Activations ``[B, D]`` from whole sequences: prompt, text, suffix."""
    r, lm = lens.reconstructor, lens.subject.lm
    if r.first_is_last:
        embeds_BTD = torch.cat([embeds_BTD[:, 1:], embeds_BTD[:, :1]], dim=1)
    parts = [r.prompt().expand(len(embeds_BTD), -1, -1), embeds_BTD]
    if r.suffix is not None:
        parts.append(r.suffix().expand(len(embeds_BTD), -1, -1))
    x = torch.cat(parts, dim=1)
    positions = torch.arange(x.shape[1], device=x.device)[None]
    with adapter(lm, r.adapter):
        x = lm.run(lm.enter(x, positions), 0, r.last, positions, own={int(i): block for i, block in r.own.items()})
    return r.head(x[:, -1])


def next_logits(lens: ConsistencyLens, batch: Batch, patch_BD: Tensor | None) -> Tensor:
    """The subject's next-token logits ``[B, V]`` at P from a whole forward pass, its residual there replaced by ``patch_BD``."""
    lm, rows = lens.subject.lm, torch.arange(len(batch["position"]), device=batch["position"].device)

    def replace(patch_BD: Tensor, _, __, output: Tensor) -> Tensor:
        output = output.clone()
        output[rows, batch["position"]] = patch_BD.to(output.dtype)
        return output

    block = lm.blocks[lens.subject.layer_l]
    hook = None if patch_BD is None else block.register_forward_hook(partial(replace, patch_BD))
    try:
        with adapter(lm, None):
            logits_BV = lm.model(batch["input_ids"]).logits[rows, batch["position"]]
    finally:
        if hook is not None:
            hook.remove()
    return logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
