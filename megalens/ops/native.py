"""Builds and loads ``tile.cpp``: a second or two at the first use in a process, with the C++ compiler that ``torch.compile`` needs too.

The library is built into a fresh private folder and the file removed once loaded: nothing that lay on disk before is ever run.
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

SOURCE = Path(__file__).with_name("tile.cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
_POINTER, _INT64, _DOUBLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_TILE = [_POINTER, _INT64, _POINTER]  # a tile, its stride, a bias
SIGNATURES = {
    "gumbel_statistics": [*_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, *[_DOUBLE] * 2, _INT, *[_POINTER] * 2],
    "gumbel_gradient": [_POINTER, _INT64, *_TILE, _DOUBLE, _POINTER, *[_INT64] * 3, *[_DOUBLE] * 2, *[_POINTER] * 2, _INT, *[_POINTER] * 2],
    "kl_statistics": [*_TILE, *_TILE, _DOUBLE, *[_INT64] * 2, _INT, _POINTER],
    "kl_gradient": [*_TILE, *_TILE, _DOUBLE, *[_INT64] * 2, _POINTER, _INT, *[_POINTER] * 2],
}


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, else the first of g++, clang++ and c++ there is."""
    return next((path for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL | OpError:
    """The loaded library, or the error that says why there is none."""
    cxx = compiler()
    if cxx is None:
        return OpError('the tile version needs a C++ compiler: install g++, set CXX, or use impl="reference"')
    # torch's own OpenMP runtime where it brings one: a second one's idle threads would spin against the first's
    runtime = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    failure = ""
    for extra in (["-march=native", "-fopenmp"], ["-march=native"], []):
        with tempfile.TemporaryDirectory(prefix="megalens-") as folder:
            target = Path(folder) / "tile.so"
            steps = [[cxx, *FLAGS, *extra, "-o", str(target), str(SOURCE)]]
            if "-fopenmp" in extra and runtime:
                part = str(Path(folder) / "tile.o")
                steps = [[cxx, *FLAGS[:-1], *extra, "-c", "-o", part, str(SOURCE)], [cxx, "-shared", "-o", str(target), part, *runtime]]
            try:
                for step in steps:
                    subprocess.run(step, check=True, capture_output=True, text=True)
                loaded = ctypes.CDLL(str(target))
            except (subprocess.CalledProcessError, OSError) as error:
                failure = str(getattr(error, "stderr", "") or error).strip().splitlines()[0]
                continue
            return loaded
    return OpError(f"the tile version could not be built with {cxx}: {failure}")


@functools.cache
def _function(name: str, dtype: torch.dtype):
    loaded = library()
    if isinstance(loaded, OpError):
        raise loaded
    function = getattr(loaded, f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run a function of ``tile.cpp`` on tiles of ``dtype``; tensors go as their first element's address.

    Raises:
        OpError: there is no library.
    """
    _function(name, dtype)(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments))
