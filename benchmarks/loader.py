"""How fast shuffled activations come out of the shards, beside other ways to keep them, and how much memory that takes.

usage: python benchmarks/loader.py [--gb 1.0] [--batch 32] [--repeats 3] [--sides ours pt] [--memory 1 10] [--model FOLDER]

Every side holds the same rows (bf16 activations of width 576, 64 token ids) and gives the same batches in the same two-level order, as
float32 activations and int64 ids. `gb_per_second` counts the bf16 bytes of the activations handed out. Sides: `ours`; `memmap`, raw numpy
arrays; `datasets`, Arrow with set_format("torch"); `parquet`, zstd row groups of 1024 rows; `pt`, one torch.save per shard. The last two
hold one window in memory, as ours does. Sides run in turns; the figure is the median, from opening to the last batch (the files are in
the page cache). `--memory` prints the peak resident set of reading dumps of so many GB, minus that of the imports. `--model` adds
`share_of_unit`: the loader's seconds per batch over those of one forward of that model over batch x 64 tokens, of which a training step
takes several.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from megalens.data.loader import ActivationLoader  # noqa: E402
from megalens.data.order import FolderOrder  # noqa: E402
from megalens.data.shards import ShardReader, ShardWriter  # noqa: E402

D, SEQ_LEN, ROWS_PER_SHARD, ROWS_PER_BATCH, WINDOW = 576, 64, 16384, 1024, 256 << 20
SIDES = ("ours", "memmap", "datasets", "parquet", "pt")


def make_dump(folder: Path, gigabytes: float) -> None:
    """A dump of so many GB of bf16 activations: Gaussian, each dimension of its own scale."""
    rows = max(1, round(gigabytes * 1e9 / (2 * D * ROWS_PER_SHARD))) * ROWS_PER_SHARD
    names = {"subject": {"name": "made up", "fingerprint": "-"}, "tokenizer": {"name": "made up", "fingerprint": "-"}, "layer": 0, "d": D}
    sizes = {"seq_len": SEQ_LEN, "rows": rows, "rows_per_shard": ROWS_PER_SHARD, "rows_per_batch": ROWS_PER_BATCH}
    writer = ShardWriter(folder, {**names, **sizes, "encoding": "bf16_planes", "token_type": "uint16"})
    writer.begin()
    draw = torch.Generator().manual_seed(0)
    scale_D = torch.randn(D, generator=draw).exp()
    for index in range(writer.num_shards):
        part = {
            "activation": (torch.randn(ROWS_PER_SHARD, D, generator=draw) * scale_D).bfloat16(),
            "input_ids": torch.randint(0, 49152, (ROWS_PER_SHARD, SEQ_LEN), generator=draw),
            "position": torch.full((ROWS_PER_SHARD,), SEQ_LEN - 1),
            "doc_id": torch.arange(ROWS_PER_SHARD) + index * ROWS_PER_SHARD,
        }
        writer.write(index, part)
    writer.finish()


def convert(dump: Path, folder: Path, sides: list[str]) -> None:
    """The same rows in the other sides' files."""
    reader = ShardReader(dump)
    if "memmap" in sides:
        bits = np.lib.format.open_memmap(folder / "bits.npy", "w+", np.int16, (len(reader), D))
        ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.int32, (len(reader), SEQ_LEN))
        for shard, rows in enumerate(shards_of(reader)):
            place = slice(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
            bits[place], ids[place] = rows["activation"].view(torch.int16).numpy(), rows["input_ids"].numpy()
    if "pt" in sides:
        for shard, rows in enumerate(shards_of(reader)):
            torch.save(rows, folder / f"{shard:05d}.pt")
    if "parquet" in sides or "datasets" in sides:
        schema = pa.schema({"bits": pa.list_(pa.int16(), D), "ids": pa.list_(pa.int32(), SEQ_LEN)})
        with pq.ParquetWriter(folder / "rows.parquet", schema, compression="zstd", use_dictionary=False) as parquet:
            for rows in shards_of(reader):
                values = (rows["activation"].view(torch.int16).numpy(), rows["input_ids"].numpy())
                columns = [pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), len(v[0])) for v in values]
                parquet.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=ROWS_PER_BATCH)
    if "datasets" in sides:
        datasets.disable_progress_bars()
        datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache")).save_to_disk(str(folder / "datasets"))


def shards_of(reader: ShardReader):
    """The rows of each shard."""
    per_shard = ROWS_PER_SHARD // ROWS_PER_BATCH
    for shard in range(len(reader.batch_rows) // per_shard):
        parts = [reader.read_batch(shard * per_shard + i) for i in range(per_shard)]
        yield {name: torch.cat([part[name] for part in parts]) for name in ("activation", "input_ids")}


class Side(Dataset):
    """The other ways: batch ``step`` of the first epoch, in the loader's order."""

    def __init__(self, side: str, dump: Path, folder: Path, batch: int):
        self.side, self.folder, self.batch = side, folder, batch
        meta = ShardReader(dump).meta
        self.order = FolderOrder(ShardReader(dump).batch_rows, WINDOW // ((2 * D + 4 * SEQ_LEN) * ROWS_PER_BATCH), 0)
        self.steps, self.held, self.window, self.shard = meta["rows"] // batch, -1, {}, (-1, {})

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        parts = []
        for number, start, stop in self.order.pieces(0, step * self.batch, (step + 1) * self.batch):
            if number != self.held:
                self.held, self.window = number, {}
                self.window = getattr(self, f"open_{self.side}")(*self.order.window(0, number))
            parts.append(self.window(start, stop) if callable(self.window) else {k: v[start:stop] for k, v in self.window.items()})
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        bits = rows["bits"].to(torch.int16) if rows["bits"].dtype != torch.bfloat16 else rows["bits"]
        return {"activation": bits.view(torch.bfloat16).float(), "input_ids": rows["ids"].long()}

    @staticmethod
    def rows_in_order(batches: np.ndarray, places: list[np.ndarray]) -> np.ndarray:
        rows = np.empty(sum(map(len, places)), np.int64)
        for index, place in zip(batches, places, strict=True):
            rows[place] = index * ROWS_PER_BATCH + np.arange(len(place))
        return rows

    def open_memmap(self, batches, places):
        rows = self.rows_in_order(batches, places)
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ("bits", "ids")}
        return lambda start, stop: {name: torch.from_numpy(array[rows[start:stop]]) for name, array in arrays.items()}

    def open_datasets(self, batches, places):
        rows = self.rows_in_order(batches, places)
        table = datasets.load_from_disk(str(self.folder / "datasets"))
        table.set_format("torch")
        return lambda start, stop: table[rows[start:stop]]

    def open_parquet(self, batches, places):
        source = pq.ParquetFile(self.folder / "rows.parquet")
        return self.gather(places, (source.read_row_group(int(index)) for index in batches), self.columns)

    def open_pt(self, batches, places):
        order = np.argsort(batches, kind="stable")  # so that a window loads each shard once
        return self.gather([places[i] for i in order], (self.of_shard(int(batches[i])) for i in order), lambda rows: rows)

    def of_shard(self, index: int) -> dict:
        shard, batch = divmod(index, ROWS_PER_SHARD // ROWS_PER_BATCH)
        if self.shard[0] != shard:
            self.shard = (shard, torch.load(self.folder / f"{shard:05d}.pt"))
        place = slice(batch * ROWS_PER_BATCH, (batch + 1) * ROWS_PER_BATCH)
        return {"bits": self.shard[1]["activation"][place], "ids": self.shard[1]["input_ids"][place]}

    @staticmethod
    def columns(table: pa.Table) -> dict:
        arrays = {name: table[name].combine_chunks().flatten().to_numpy().reshape(len(table), -1) for name in ("bits", "ids")}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    @staticmethod
    def gather(places, parts, convert) -> dict:
        window = {}
        for place, part in zip(places, parts, strict=True):
            for name, value in convert(part).items():
                if name not in window:
                    window[name] = value.new_empty(sum(map(len, places)), value.shape[1])
                numpy_of(window[name])[place] = numpy_of(value)
        return window


def numpy_of(values: torch.Tensor) -> np.ndarray:
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def one_epoch(side: str, dump: Path, folder: Path, batch: int, workers: int, seconds: float) -> tuple[float, float]:
    """Seconds per batch, and a checksum of the first rows, over an epoch or as many batches as ``seconds`` allow."""
    started, total, count = time.perf_counter(), 0.0, 0
    if side == "ours":
        loader = ActivationLoader(dump, batch, 0, window_bytes=WINDOW, workers=workers)
        steps, batches = loader.steps_per_epoch, loader.batches()
    else:
        source = Side(side, dump, folder, batch)
        steps, batches = len(source), iter(DataLoader(source, batch_size=None, num_workers=workers))
    for rows in batches:
        count += 1
        total += float(rows["activation"][0, :8].sum()) if count <= 5 else 0.0
        if count == steps or (count >= 5 and time.perf_counter() - started > seconds):
            break
    elapsed = time.perf_counter() - started
    del batches
    return elapsed / count, total


def peak_megabytes(dump: Path) -> float:
    """Peak resident set of one epoch over a dump in this process, minus what the imports took, in MB (Linux)."""
    status = Path("/proc/self/status").read_text().split()
    before = int(status[status.index("VmRSS:") + 1])
    loader = ActivationLoader(dump, 256, 0, window_bytes=WINDOW)
    for _, _batch in zip(range(loader.steps_per_epoch), loader.batches(), strict=False):
        pass
    status = Path("/proc/self/status").read_text().split()
    return round((int(status[status.index("VmHWM:") + 1]) - before) / 1024, 1)


def unit_seconds(model: str, batch: int) -> float:
    """Seconds of one forward of a model's blocks over batch x 64 tokens."""
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model
    ids = torch.randint(3, 500, (batch, SEQ_LEN))
    taken = []
    with torch.no_grad():
        for _ in range(7):
            started = time.perf_counter()
            lm(ids)
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the dump that is timed; 0: no timing")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ours is always one of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="a side that is slower is stopped and taken for the part it did")
    parser.add_argument("--memory", type=float, nargs="*", default=[], help="sizes in GB of dumps whose reading's memory is measured")
    parser.add_argument("--model", help="a model folder, for share_of_unit")
    parser.add_argument("--folder", default=None, help="where the dumps are made; default: the temporary folder")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(json.dumps({"peak_mb": peak_megabytes(Path(options.peak_of))}))
        return
    options.sides = ["ours", *(side for side in options.sides if side != "ours")]
    about = {"claim": "shuffled reads", "batch": options.batch, "d": D, "threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        if options.gb:
            for line in timings(options, Path(place)):
                print(json.dumps({**about, **line}), flush=True)
    for size in options.memory:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            make_dump(Path(place), size)
            done = subprocess.run([sys.executable, __file__, "--peak-of", place], stdout=subprocess.PIPE, text=True, check=True)
            line = {"claim": "memory of reading", "gb": size, "window_mb": WINDOW >> 20, **json.loads(done.stdout.splitlines()[-1])}
            print(json.dumps(line), flush=True)


def timings(options: argparse.Namespace, place: Path):
    """One line for each number of workers and side."""
    dump, other = place / "dump", place / "other"
    other.mkdir()
    make_dump(dump, options.gb)
    convert(dump, other, options.sides)
    unit = unit_seconds(options.model, options.batch) if options.model else None
    for workers in options.workers:
        taken = {side: [] for side in options.sides}
        for turn in range(options.repeats):
            sums = {}
            for side in options.sides:
                seconds, sums[side] = one_epoch(side, dump, other, options.batch, workers, options.seconds)
                taken[side].append(seconds)
            print(f"workers {workers}: turn {turn + 1} of {options.repeats}", file=sys.stderr)
            if len({round(value, 3) for value in sums.values()}) != 1:
                sys.exit(f"error: the sides gave different rows: {sums}")
        ours = statistics.median(taken["ours"])
        for side in options.sides:
            seconds = statistics.median(taken[side])
            line = {"side": side, "workers": workers, "gb_per_second": round(options.batch * D * 2 / seconds / 1e9, 3)}
            line["ratio"] = round(statistics.median(a / b for a, b in zip(taken["ours"], taken[side], strict=True)), 3)
            if side == "ours" and unit is not None:
                line["share_of_unit"] = round(ours / unit, 5)
            yield line


if __name__ == "__main__":
    main()
