"""Imported by the process that tests/quick.py forks: what most commands import."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401
import wandb  # noqa: F401

import megalens.data.dump
import megalens.train
import megalens.training.trainer  # noqa: F401
from megalens.ops import native

torch.set_num_threads(1)
if native.compiler():
    native.library(torch.float32)  # built once, not by every process
