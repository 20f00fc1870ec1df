"""Check dumps: every shard and meta.json against its checksum, nothing missing, nothing foreign.

usage: python tools/verify_shards.py FOLDER...

Prints one line for each folder and for each thing that is wrong; exit code 1 if anything is.
"""

from __future__ import annotations

from megalens import cli
from megalens.config import ConfigError
from megalens.data.shards import read_meta, verify


def main(arguments: list[str]) -> int:
    if not arguments or any(argument.startswith("-") or "=" in argument for argument in arguments):
        raise ConfigError("name the folders to check: python tools/verify_shards.py data/activations/<model>/layer_<L>/<dataset>_train ...")
    failed = False
    for folder in arguments:
        problems = verify(folder)
        failed |= bool(problems)
        for problem in problems:
            print(f"WRONG  {problem}")
        if not problems:
            meta = read_meta(folder)
            size = sum(shard["bytes"] for shard in meta["shards"])
            print(f"ok     {folder}: {meta['rows']:,} rows in {len(meta['shards'])} shards, {size:,} bytes")
    return int(failed)


if __name__ == "__main__":
    cli.run(main, __doc__)
