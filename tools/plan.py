"""What a training needs, before anything is bought or queued: memory, traffic, time and disk, and an engine that fits.

    python tools/plan.py config=conf/demo.yaml nodes=8 gpus_per_node=8 gpu=h100-80g [tokens=1e9] [key=value ...]
    python tools/plan.py table      the tables of docs/scale.md, for the subjects of conf/subjects/

Only the model's config.json is read. gpu is one of a100-40g, a100-80g, h100-80g, h200-141g, b200-180g; tokens is the text read for the dump
(each seq_len of them give vectors_per_sequence activations), trained on for num_train_epochs. Of what fits, the simplest within 5 % of the
fastest is taken, as predicted: arithmetic at 30 % of the maker's FLOPs, reading weights from memory, sending at 50 GB/s per GPU between
nodes, one after the other. Exit code 1 when nothing fits.
"""

from __future__ import annotations

from megalens import cli
from megalens.planning.command import main

if __name__ == "__main__":
    cli.run(main, __doc__)
