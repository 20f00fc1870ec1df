"""Read activations out of the subject into data/activations/<model>/layer_<L>/<dataset>_<split>/, both splits.

usage: python tools/dump_acts.py [config=conf/x.yaml] [key=value ...]
       torchrun --nproc_per_node N tools/dump_acts.py ...        (any number of ranks and nodes on one shared disk)

  layer_l=L                                the block after which activations are read (0-based)
  activation_dumper.num_samples=N          rows of the train split (-1: all there are); val_num_samples likewise
  activation_dumper.vectors_per_sequence=N positions sampled per document
  force_redump=true                        make finished dumps anew

An interrupted dump goes on when the same command runs again, on as many ranks as you like. Needs tools/pretokenize.py first.
conf/config.yaml lists every key.
"""

from __future__ import annotations

from megalens import cli
from megalens.config import load_config
from megalens.data.dump import dump


def main(arguments: list[str]) -> None:
    dump(load_config(arguments))


if __name__ == "__main__":
    cli.run(main, __doc__)
