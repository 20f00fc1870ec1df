"""Make a dump of activations that others have read out, to be trained on with mix=[FOLDER=1].

usage: megalens convert SOURCE FOLDER [ids=FILE.npy] [split=train] [model_name=... layer_l=L or any key=value]

SOURCE is one of
  .parquet       columns activation_vector (numbers) and input_ids or token_ids (the context up to the activation's token); doc_id if there
  .safetensors   activation [N, d] and input_ids [N, C]; position [N] and doc_id [N] if there
  .npy           activations [N, d]; ids=FILE.npy holds their token ids [N, C]

Without `position` a row's context is all of its token ids. model_name and layer_l say what was read; activation_dumper.encoding,
rows_per_shard and rows_per_batch how it is kept. conf/config.yaml lists every key.
"""

from __future__ import annotations

from pathlib import Path

from megalens.arguments import Arguments
from megalens.config import load_config
from megalens.data.convert import convert


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens convert acts.parquet data/activations/mine model_name=...")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    args, settings = parser.split(arguments)
    rows, width = convert(load_config(settings), args.source, args.folder, args.ids, args.split)
    print(f"{args.folder}: {rows:,} rows of width {width}")
