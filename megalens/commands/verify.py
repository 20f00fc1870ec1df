"""Check dumps: every shard and meta.json against its checksum, nothing missing, nothing foreign.

usage: megalens verify FOLDER...
       megalens verify --all [ROOT...]      every dump below ROOT (data/activations)

Prints one line for each folder and for each thing that is wrong; exit code 1 if anything is.
"""

from __future__ import annotations

from megalens.arguments import Arguments
from megalens.config import ConfigError
from megalens.data.inspect import every_dump
from megalens.data.shards import read_meta, verify

EXAMPLE = "megalens verify data/activations/<model>/layer_<L>/<dataset>_train"


def main(arguments: list[str]) -> int:
    parser = Arguments(EXAMPLE)
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--all", action="store_true")
    args = parser.read(arguments)
    folders = every_dump(args.folders or ["data/activations"]) if args.all else args.folders
    if not folders:
        raise ConfigError(f"name the folders to check: {EXAMPLE} ..., or --all")
    failed = False
    for folder in folders:
        problems = verify(folder)
        failed |= bool(problems)
        for problem in problems:
            print(f"WRONG  {problem}")
        if not problems:
            meta = read_meta(folder)
            size = sum(shard["bytes"] for shard in meta["shards"])
            print(f"ok     {folder}: {meta['rows']:,} rows in {len(meta['shards'])} shards, {size:,} bytes")
    return int(failed)
