"""Write a lens as other tools read it, two models with merged weights and a sidecar each; then read it back and compare.

usage: megalens export-lens checkpoint=outputs/<run>/best to=FOLDER [dtype=fp32|bf16] [key=value ...]

  checkpoint=FOLDER        the lens; conf/nla.yaml trains one that the format can say, others are refused with the reasons
  to=FOLDER                where to write; it must not exist
  dtype=fp32|bf16          of the weights written (fp32)
  trust_remote_code=true   run code that comes with the subject; a checkpoint never says so itself

docs/nla.md says what lies where, and what is compared.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megalens.arguments import Arguments
from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats import load_lens
from megalens.checkpoint.formats.format import LoadedLens
from megalens.checkpoint.formats.nla import Nla
from megalens.evaluate.measure import read_by_lens, said
from megalens.evaluate.text import to_ids

SETTINGS = ("device", "dtype", "model_name", "trust_remote_code")
COMPARED = 32


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens export-lens checkpoint=outputs/<run>/best to=FOLDER")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    args, settings = parser.split(arguments, SETTINGS)
    changes = {"dtype": "fp32"} | dict(setting.removeprefix("--").split("=", 1) for setting in settings)
    loaded = load_lens(args.checkpoint, **changes)
    Nla().save(args.to, loaded)
    print(f"written: {args.to}\n{compare(loaded, load_lens(args.to, **changes))}")


@torch.no_grad()
def compare(one: LoadedLens, other: LoadedLens) -> str:
    """Hold two lenses against each other on 32 random activations, in words.

    Raises:
        CheckpointError: they rebuild differently.
    """
    draw = torch.Generator().manual_seed(0)
    noise_BD = torch.randn(COMPARED, one.lens.subject.d, generator=draw)
    a_BD = (one.statistics.mean.cpu() + one.statistics.var.cpu().sqrt() * noise_BD).to(one.lens.mean.device)
    texts, again = (said(each.lens, each.lens.verbalize(a_BD)).texts for each in (one, other))
    same = sum(a == b for a, b in zip(texts, again, strict=True))
    texts = [text or "a text" for text in texts]
    rebuilt = [read_by_lens(each.lens, texts).a_hat_BD for each in (one, other)]
    cos = float(torch.nn.functional.cosine_similarity(rebuilt[0], rebuilt[1]).min())
    if not cos > 0.999:
        raise CheckpointError(f"what was written rebuilds differently (cosine {cos:.4f}): do not use it; write it with dtype=fp32")
    tokenizer, r = one.lens.tokenizer, one.lens.config.reconstructor
    parts = [*(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (r.prompt, r.suffix))]
    whole = to_ids(tokenizer, [r.prompt + text + r.suffix for text in texts])
    joined = sum(parts[0] + ids + parts[1] == row for ids, row in zip(to_ids(tokenizer, texts), whole, strict=True))
    return (
        f"read back: {same} of {COMPARED} texts are the same, cosine of the rebuilds at least {cos:.6f}; {joined} of {COMPARED} texts are "
        "tokenised inside their prompt as they are alone (other tools tokenise the whole)"
    )
