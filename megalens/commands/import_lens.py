"""Take over a lens that other tools wrote (av/ and ar/ with nla_meta.yaml), as a checkpoint that evaluates, explains and can be trained on.

usage: megalens import-lens FOLDER to=outputs/<run>/checkpoints/imported [model_name=MODEL] [key=value ...]
       megalens import-lens av=FOLDER ar=FOLDER to=FOLDER [key=value ...]

  FOLDER                   holds av/ and ar/; or name each half by itself
  to=FOLDER                where to write; it must not exist
  model_name=MODEL         the model that the halves were made from, a local folder or a hub name (the sidecar's base_checkpoint)
  key=value                any other setting, e.g. t_text=150, dataset.name=...
  trust_remote_code=true   run code that comes with the subject; a checkpoint never says so itself

Without statistics of its own a lens needs a dump of activations of its subject and layer (tools/dump_acts.py): figures are measured against
their mean. docs/nla.md says what is read and what is refused.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from megalens.arguments import Arguments
from megalens.checkpoint import CheckpointError
from megalens.checkpoint.formats import load_lens, read_config
from megalens.checkpoint.formats.megalens import Megalens
from megalens.config import ConfigError


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens import-lens FOLDER to=outputs/<run>/checkpoints/imported")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--av", type=Path)
    parser.add_argument("--ar", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    args, settings = parser.split(arguments)
    if (len(args.folders) == 1) == (args.av is not None and args.ar is not None) or len(args.folders) > 1:
        raise ConfigError(f"name one folder that holds av/ and ar/, or both halves: {parser.example}")
    if args.to.exists():
        raise CheckpointError(f"{args.to} is there already; name a folder that is not")
    with tempfile.TemporaryDirectory() as pair:
        if args.folders:
            (folder,) = args.folders
        else:
            folder = Path(pair)
            for half in ("av", "ar"):
                (folder / half).symlink_to(getattr(args, half).resolve())
        config = read_config(folder, settings)
        loaded = load_lens(folder, **dataclasses.asdict(config))
        Megalens().save(args.to, loaded)
    print(f"written: {args.to}; measure it with: python tools/eval.py checkpoint={args.to}")
