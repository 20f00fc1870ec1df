"""Builds and loads ``cpu/tile.cpp`` at its first use in a process, with the C++ compiler that ``torch.compile`` needs too.

The build takes two or three seconds. The library goes into a fresh private folder and is removed once it is loaded, so that nothing that
lay on disk before is ever run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megalens.ops.checks import OpError

SOURCE = Path(__file__).with_name("cpu") / "tile.cpp"
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fPIC"]
_POINTER, _INT64, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_TILE = [_POINTER, _INT64, _POINTER]  # a tile, its stride, a bias
SIGNATURES = {
    "gumbel_statistics": [*_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, *[_DOUBLE] * 2, _INT, *[_POINTER] * 2],
    "gumbel_gradient": [_POINTER, _INT64, *_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, *[_DOUBLE] * 2, *[_POINTER] * 2, _INT, *[_POINTER] * 2],
    "gumbel_few_forward": [
        _POINTER,
        _INT64,
        _POINTER,
        _INT64,
        _POINTER,
        _DOUBLE,
        _POINTER,
        *[_INT64] * 2,
        *[_DOUBLE] * 2,
        _INT,
        *[_POINTER] * 2,
    ],
    "gumbel_few_backward": [
        *[_POINTER, _INT64] * 4,
        _POINTER,
        _DOUBLE,
        _POINTER,
        *[_INT64] * 2,
        *[_DOUBLE] * 2,
        *[_POINTER] * 2,
        _INT,
        *[_POINTER] * 2,
    ],
    "kl_statistics": [*_TILE, *_TILE, _DOUBLE, *[_INT64] * 2, _INT, _POINTER],
    "kl_gradient": [*_TILE, *_TILE, _DOUBLE, *[_INT64] * 2, _POINTER, _INT, *[_POINTER] * 2],
    "log_prob_statistics": [*_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, _INT, _POINTER],
    "log_prob_gradient": [*_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, _POINTER, _INT, _POINTER],
}


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first that is found of g++, clang++ and c++."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


@functools.cache
def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL | OpError:
    """The library for tiles of a dtype, or the error that says why there is none."""
    cxx = compiler()
    if cxx is None:
        return OpError('the tile version needs a C++ compiler: install g++, set CXX, or use impl="reference"')
    # torch's own OpenMP runtime where it brings one: a second one's idle threads would spin against the first's
    runtime = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    flags, failure = [*FLAGS, f"-DTILES_{_name(dtype)}"], ""
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], []):
        with tempfile.TemporaryDirectory(prefix="megalens-") as folder:
            target, part = str(Path(folder) / "tile.so"), str(Path(folder) / "tile.o")
            link = runtime if runtime and "-fopenmp" in extra else extra
            try:
                for step in ([*flags, *extra, "-c", "-o", part, str(SOURCE)], ["-shared", "-o", target, part, *link]):
                    subprocess.run([cxx, *step], check=True, capture_output=True, text=True)
                return ctypes.CDLL(target)
            except (subprocess.CalledProcessError, OSError) as error:
                failure = str(getattr(error, "stderr", "") or error).strip().splitlines()[0]
    return OpError(f"the tile version could not be built with {cxx}: {failure}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _function(name: str, dtype: torch.dtype):
    loaded = library(torch.float32 if name.startswith("gumbel_few") else dtype)
    if isinstance(loaded, OpError):
        raise loaded
    function = getattr(loaded, f"{name}_{_name(dtype)}")
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Run a function of ``tile.cpp`` on tiles of ``dtype`` (with few rows: on embeddings). Tensors are passed as the address of their data.

    Raises:
        OpError: there is no library.
    """
    _function(name, dtype)(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments))
