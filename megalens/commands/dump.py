"""Read activations out of the subject into data/activations/<model>/layer_<L>/<dataset>_<split>/, both splits.

usage: megalens dump [config=conf/x.yaml] [key=value ...]
       torchrun --nproc_per_node N tools/dump_acts.py ...        (any number of ranks and nodes on one shared disk)
       torchrun --nproc_per_node N tools/dump_acts.py engine=fsdp ...   (a subject that fits in no process: each holds its share)

  layer_l=L                                the block after which activations are read (0-based); layer_l=[10,15,20]: several in one pass
  activation_dumper.num_samples=N          rows of the train split (-1: all there are); val_num_samples likewise
  activation_dumper.num_tokens=N           context tokens of the train split's documents in all (-1: no limit)
  activation_dumper.encoding=int8          lossy, smaller; the loss of FVE is in meta.json
  activation_dumper.vectors_per_sequence=N positions sampled per document
  force_redump=true                        make finished dumps anew

An interrupted dump goes on when the same command runs again, on as many ranks as you like. Needs the tokens of `pretokenize` first.
conf/config.yaml lists every key.
"""

from __future__ import annotations

from megalens.config import load_config
from megalens.data.dump import dump
from megalens.engine.failure import told_once


def main(arguments: list[str]) -> None:
    with told_once():
        dump(load_config([a.replace("layer_l=", "activation_dumper.layers=") if "layer_l=[" in a else a for a in arguments]))
