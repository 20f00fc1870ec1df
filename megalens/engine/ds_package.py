"""The package deepspeed: imported quietly, and asked what it thinks of a configuration before a model loads."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator


def import_deepspeed(on_gpu: bool):
    """DeepSpeed without its chatter and, on a CPU, without its shared-memory collectives: gloo's serve, and nothing has to be compiled."""
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not on_gpu:
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    return deepspeed


def complaints_of_section(zero: dict, on_gpu: bool) -> Iterator[str]:
    """All that DeepSpeed's own model of ``zero_optimization`` refuses, each with its place."""
    import_deepspeed(on_gpu)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        for problem in error.errors():
            place = ".".join(["zero_optimization", *map(str, problem["loc"])])
            if problem["type"] == "extra_forbidden":
                yield f"{place} is no key of this DeepSpeed's; leave it out"
            else:
                yield f"{place}={json.dumps(problem['input'], default=str)}: DeepSpeed says: {problem['msg']}"
    except (AssertionError, TypeError) as error:
        yield f"zero_optimization: DeepSpeed says: {_line(error)}"


def complaint(settings: dict, on_gpu: bool) -> str | None:
    """The first thing that DeepSpeed refuses of a whole configuration, its ``"auto"`` replaced; None: it takes it."""
    import_deepspeed(on_gpu)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    asked = copy.deepcopy(settings)
    del asked["train_batch_size"]  # the ranks have not joined: it believes it is alone
    try:
        DeepSpeedConfig(asked)
    except (DeepSpeedConfigError, AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return said_by(error)
    return None


def said_by(error: Exception) -> str:
    """An error of DeepSpeed's in one line."""
    return f"DeepSpeed says: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
