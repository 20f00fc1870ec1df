"""Pretokenize, dump and train in one command, reusing what is there and valid.

    megalens pipeline config=conf/demo.yaml
    megalens pipeline config=conf/demo.yaml force_redump=true learning_rate=1e-4
    megalens pipeline --deepspeed ds_configs/z3.json config=conf/demo.yaml

When the config's init_from names another config, that one's training runs first (and so on down the line). key=value settings hold for
the last training; those that say which data and which lens it is (model_name, layer_l, t_text, dataset.*, ...) for the earlier ones too.
It is also the program of a sweep's trials: several at a time share one dump and one warm start, made by whoever comes first, and
force_redump=true makes the data anew once per sweep.

Each stage is a command of its own and is printed before it runs. Ctrl-C and SIGTERM let the running stage finish cleanly, and the
same command goes on from there.
"""

from __future__ import annotations

from megalens.pipeline.run import run_stages
from megalens.pipeline.stages import phases_of


def main(arguments: list[str]) -> None:
    run_stages(phases_of(arguments))
