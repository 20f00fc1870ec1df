"""Check dumps: every shard and meta.json against its checksum, nothing missing, nothing foreign.

usage: python tools/verify_shards.py FOLDER...
       python tools/verify_shards.py --all [ROOT]      every dump below ROOT (data/activations)

Prints one line for each folder and for each thing that is wrong; exit code 1 if anything is.
"""

from __future__ import annotations

from pathlib import Path

from megalens import cli
from megalens.config import ConfigError
from megalens.data.shards import read_meta, verify


def main(arguments: list[str]) -> int:
    folders = every_dump(arguments[1:]) if arguments[:1] == ["--all"] else arguments
    if not folders or any(argument.startswith("-") or "=" in argument for argument in folders):
        raise ConfigError("name the folders to check: python tools/verify_shards.py data/activations/<model>/layer_<L>/<dataset>_train ...")
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


def every_dump(roots: list[str]) -> list[str]:
    """Each folder with shards below the roots, those without a ``meta.json`` too."""
    roots = roots or ["data/activations"]
    found = sorted({str(path.parent) for root in roots for name in ("meta.json", "shard-*.arrow") for path in Path(root).rglob(name)})
    if not found:
        raise ConfigError(f"there is no dump below {', '.join(roots)}; name another folder: python tools/verify_shards.py --all FOLDER")
    return found


if __name__ == "__main__":
    cli.run(main, __doc__)
