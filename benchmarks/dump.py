"""Rows per second of the real dump beside the bare truncated forward over the same tokens, and what a row takes on the disk.

usage: python benchmarks/dump.py [--rows 512] [--ranks 1 2] [--repeats 3] [config=conf/x.yaml] [key=value ...]

`dump` is everything tools/dump_acts.py does but loading the model: checking the text, choosing rows, reading, compressing, hashing,
writing, syncing. `bare` is the model's blocks 0 to layer_l over the very same forward batches, which are made beforehand; it keeps
nothing. Both run in turns, on so many processes at once; a run's time is from the first process that starts to the last that ends.
`ratio` is bare's seconds over dump's (1: the dump costs nothing). `bytes_per_raw` is the activations' bytes in the shards over 2 bytes
per value. Needs a pretokenized corpus (tools/pretokenize.py) and prints one JSON line for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]


def child(kind: str, rank: int, ranks: int, arguments: list[str]) -> None:
    """One process of a run: prints when it began and ended, the model's loading left out."""
    import torch

    from megalens.config import load_config
    from megalens.data import dump
    from megalens.data.pretokenize import load_tokens
    from megalens.data.read_out import Contexts, ForwardBatches
    from megalens.device import usable_cores

    torch.set_num_threads(max(1, usable_cores() // ranks))
    config = load_config(arguments)
    reading = dump.load_to_read(config)
    subject, dump.load_to_read = reading[0], lambda _: reading
    dump.SPLITS = ("train",)
    os.environ["RANK"] = str(rank)
    batches = []
    if kind == "bare":
        tokens = load_tokens(config, "train")
        plan = dump.row_order(config, "train", tokens)
        for index in range(rank, -(-plan.rows // config.activation_dumper.rows_per_shard), ranks):
            rows = plan.shard(index)
            contexts = Contexts(tokens, rows.source_K, config.activation_dumper.seq_len)
            batches += [ids_BC for ids_BC, _ in ForwardBatches(config, contexts, rows)]
    subject.residual(torch.zeros(1, 8, dtype=torch.long))
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.time()
    if kind == "bare":
        for ids_BC in batches:
            subject.residual(ids_BC.to(subject.device))
    else:
        dump.dump(config)
    print(json.dumps([started, time.time()]))


def run(kind: str, ranks: int, arguments: list[str]) -> float:
    """Seconds of one run."""
    from megalens.device import usable_cores

    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cores() // ranks))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    command = [sys.executable, __file__, "--child", kind]
    processes = [subprocess.Popen([*command, str(rank), str(ranks), *arguments], **pipes) for rank in range(ranks)]
    for process in processes:
        if process.stdout.readline() != "ready\n":
            sys.exit("error: a process of the benchmark failed")
    times = []
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        times.append(json.loads(process.communicate()[0].splitlines()[-1]))
    return max(end for _, end in times) - min(start for start, _ in times)


def activation_share(shard: Path) -> float:
    """The activations' share of a shard's bytes: written again with and without the other columns."""
    import pyarrow as pa

    table = pa.ipc.open_file(str(shard)).read_all()
    sizes = []
    for part in (table.select([name for name in table.column_names if name.startswith("activation")]), table):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, part.schema, options=pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1))) as writer:
            writer.write_table(part)
        sizes.append(sink.getvalue().size)
    return sizes[0] / sizes[1]


def main() -> None:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return
    if arguments[:1] == ["--child"]:
        child(arguments[1], int(arguments[2]), int(arguments[3]), arguments[4:])
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options, settings = parser.parse_known_args(arguments)
    for ranks in options.ranks:
        measure(ranks, options.rows, options.repeats, settings)


def measure(ranks: int, rows: int, repeats: int, settings: list[str]) -> None:
    """One JSON line."""
    import torch

    from megalens.config import load_config
    from megalens.data.shards import ShardReader

    seconds: dict[str, list[float]] = {"bare": [], "dump": []}
    for turn in range(repeats):
        for kind, taken in seconds.items():
            with tempfile.TemporaryDirectory() as place:
                sizes = [f"activation_dumper.num_samples={rows}", f"activation_dumper.rows_per_shard={max(1, rows // 8)}"]
                arguments = [*settings, *sizes, f"activation_dumper.root={place}"]
                taken.append(run(kind, ranks, arguments))
                if kind == "dump":
                    config = load_config(arguments)
                    reader = ShardReader(config.activation_dir("train"))
                    stored = sum(shard["bytes"] for shard in reader.meta["shards"])
                    share = activation_share(config.activation_dir("train") / reader.meta["shards"][0]["file"])
        print(f"{ranks} ranks: turn {turn + 1} of {repeats}", file=sys.stderr)
    line = {"claim": "dump beside the bare forward", "subject": config.model_label, "layer": config.layer_l, "rows": rows, "ranks": ranks}
    line |= {"batch": config.activation_dumper.batch_size, "context": config.activation_dumper.seq_len, "torch": torch.__version__}
    line |= {"encoding": config.activation_dumper.encoding, "bytes_per_row": round(stored / rows, 1)}
    line |= {"bytes_per_raw": round(stored * share / (2 * rows * reader.meta["d"]), 3)}
    line |= {f"rows_per_second_{kind}": round(rows / statistics.median(taken), 1) for kind, taken in seconds.items()}
    line["ratio"] = round(statistics.median(bare / real for bare, real in zip(seconds["bare"], seconds["dump"], strict=True)), 3)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
