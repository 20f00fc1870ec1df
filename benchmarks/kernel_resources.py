"""What the Triton kernels of ops/ cost on GPUs that are not here: compiled ahead of time, one JSON line for each.

``python benchmarks/kernel_resources.py [--arch 80 90 100] [--dtype bf16 fp32] [--rows 8 64]``

For each kernel, chip, dtype and number of rows: registers per thread, bytes of stack (a spill would be there), shared memory
beside the chip's limit per block. All switches are on (bias, soft-cap, untied embeddings): the widest code there is. Width of the
model and size of the vocabulary are arguments of the kernels and not of their compilation, beyond being multiples of 16, as
4096, 8192, 128k and 256k are: the figures hold for them all. ``mb``: what one pass over the vocabulary must move at each of those sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megalens.ops import gumbel_triton, log_prob_triton
from megalens.ops.tile_triton import blocks, switches

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KERNELS = {f"gumbel {name}": kernel for name, kernel in gumbel_triton.KERNELS.items()}
KERNELS |= {f"log_prob {name}": kernel for name, kernel in log_prob_triton.KERNELS.items()}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use (CUDA programming guide, table of capabilities)
POINTERS = {"partial": "*fp32", "per_row": "*fp32", "mean": "*fp32", "keys": "*i32", "best": "*i32", "token": "*i64"}
FLOATS, COUNTS = ("softcap", "noise", "sharpness"), ("B", "first_id", "end_id", "span")
DIVISIBLE = ("V", "D", "E", "weight_stride", "out_stride", "in_stride")


def sizes(name: str, rows: int, dtype: str) -> dict:
    """Block sizes and launch settings as the kernel's module takes them."""
    return blocks(rows, DTYPES[dtype], *((log_prob_triton.ROWS,) if name.startswith("log_prob") else ()))


def compile_for(name: str, arch: int, dtype: str, rows: int):
    """The kernel as its module launches it, for a chip that need not be here."""
    kernel, torch_dtype, constants = KERNELS[name], DTYPES[dtype], sizes(name, rows, dtype)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= switches(True, True, torch_dtype) | {"TIED": False}
    signature, hints = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name in COUNTS or name in DIVISIBLE:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}")
        if signature[name].startswith("*") or name in DIVISIBLE:
            hints[(at,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items() if name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, values, hints), target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled) -> dict:
    """Registers and stack bytes per thread, read from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def megabytes(name: str, rows: int, vocabulary: int, width: int, dtype: str) -> float:
    """What a kernel must read and write in one pass over the vocabulary, each number once (embeddings untied)."""
    size = {"bf16": 2, "fp32": 4}[dtype]
    parts, weights = vocabulary / sizes(name, rows, dtype)["BV"], vocabulary * width * size
    moved = {
        "gumbel statistics": weights + 7 * 4 * parts * rows,  # six statistics and an id per block and row
        "gumbel factors": 2 * weights + 2 * rows * vocabulary * size + 4 * parts * rows,  # both embeddings; two factors
        "log_prob sums": weights + 4 * 4 * min(parts, log_prob_triton.SPANS) * rows,
        "log_prob gradient": weights + rows * vocabulary * size,
    }
    return moved[name] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=list(SHARED_LIMIT))
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    arguments = parser.parse_args()
    for arch in arguments.arch:
        for dtype in arguments.dtype:
            for rows in arguments.rows:
                for name in KERNELS:
                    compiled = compile_for(name, arch, dtype, rows)
                    line = {
                        "claim": "kernel_resources",
                        "kernel": name,
                        "arch": arch,
                        "dtype": dtype,
                        "rows": rows,
                        "triton": triton.__version__,
                    }
                    line |= resources(compiled) | {"shared": compiled.metadata.shared, "shared_limit": SHARED_LIMIT[arch]}
                    line["mb"] = {f"V{v} D{d}": round(megabytes(name, rows, v, d, dtype)) for v in (131072, 262144) for d in (4096, 8192)}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
