"""Which device and dtype this machine computes with."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from megalens.config import Config, ConfigError
from megalens.launcher import launched


def resolve_device(device: str) -> torch.device:
    """``auto``: this process's GPU where there is one, else the CPU.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none, or none for this process.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(
            "device=cuda, but PyTorch sees no GPU here (nvidia-smi shows what the driver sees); use device=auto or device=cpu"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # a PyTorch for CPUs takes no notice: DeepSpeed's launcher sets it there too
    if device == "auto" and torch.version.cuda and not available and given not in ("", "-1"):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={given} gives this process a GPU, but PyTorch sees none: a dead GPU or driver (try nvidia-smi); "
            "device=cpu runs without"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    local_rank, gpus = launched().local_rank, torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(f"LOCAL_RANK={local_rank} has no GPU of its own: PyTorch sees {gpus} here; start one process per GPU")
    return torch.device("cuda", local_rank)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS pins nothing


def resolve_dtype(config: Config) -> str:
    """``float32`` or ``bfloat16``; ``dtype=auto`` is bf16 on GPUs and on CPUs with bf16 instructions.

    Other CPUs emulate bf16, several times slower than float32.
    """
    if config.dtype != "auto":
        return {"bf16": "bfloat16", "fp32": "float32"}[config.dtype]
    capabilities = torch.cpu.get_capabilities()
    native = resolve_device(config.device).type == "cuda" or any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def materialise(parameter: nn.Parameter, value: Tensor, device: torch.device) -> None:
    """Give a parameter on the meta device its values, on a device; whoever refers to it keeps the same object."""
    value = value.to(device, parameter.dtype, copy=True)  # it may be part of a mapped file
    real = nn.Parameter(value, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, real)
