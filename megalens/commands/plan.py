"""Plan what a training needs, before anything is bought or queued: memory, traffic, time and disk, and an engine that fits.

    megalens plan config=conf/demo.yaml nodes=8 gpus_per_node=8 gpu=h100-80g [tokens=1e9] [key=value ...]
    megalens plan table      the tables of docs/scale.md, for the subjects of conf/subjects/

Only the model's config.json is read. gpu is one of a100-40g, a100-80g, h100-80g, h200-141g, b200-180g; tokens is the text read for the dump
(each seq_len of them give vectors_per_sequence activations), trained on for num_train_epochs. Of what fits, the simplest within 5 % of the
fastest is taken, as predicted: arithmetic at 30 % of the maker's FLOPs, reading weights from memory, sending at 50 GB/s per GPU between
nodes, one after the other. Exit code 1 when nothing fits.
"""

from __future__ import annotations

from megalens.arguments import Arguments, number_above_zero, whole_number
from megalens.config import load_config
from megalens.planning.fit import GPUS
from megalens.planning.report import plan, print_table


def main(arguments: list[str]) -> int:
    parser = Arguments("megalens plan config=conf/demo.yaml nodes=8 gpus_per_node=8 gpu=h100-80g")
    parser.add_argument("table", nargs="?", choices=("table",))
    parser.add_argument("--nodes", type=whole_number(1), default=1)
    parser.add_argument("--gpus_per_node", type=whole_number(1), default=8)
    parser.add_argument("--gpu", choices=GPUS, default="h100-80g")
    parser.add_argument("--tokens", type=number_above_zero, default=1e9)
    args, settings = parser.split(arguments)
    if args.table:
        print_table()
        return 0
    lines, fits = plan(load_config(settings), args.gpu, args.nodes, args.gpus_per_node, args.tokens)
    print("\n".join(lines))
    return 0 if fits else 1
