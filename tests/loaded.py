"""Imported by the process that tests/quick.py forks: what most commands import.

Nothing that makes a temporary folder when it is imported, as wandb does: the first forked process to end would remove it.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch

import megalens.data.dump
import megalens.train
import megalens.training.trainer  # noqa: F401
from megalens.ops import native

torch.set_num_threads(1)
if native.compiler():
    native.library(torch.float32)  # built once, not by every process
