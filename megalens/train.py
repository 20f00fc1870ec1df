"""Train a lens.

    python megalens/train.py config=conf/demo.yaml key=value ...
    torchrun --nproc_per_node 2 megalens/train.py config=conf/demo.yaml ...
    deepspeed --num_gpus 2 megalens/train.py --deepspeed ds_configs/z3.json config=conf/demo.yaml ...

With no config= and no setting but the engine's (`deepspeed megalens/train.py --deepspeed ds_configs/z3.json`), a small default
experiment is trained in outputs/default_<name>: the demo's warm start once `make demo` has dumped its activations, before that
conf/tiny.yaml, a tiny random model that needs no download and seconds.

Every key is described in conf/config.yaml. The activations must have been dumped (tools/dump_acts.py; tools/run_pipeline.py does both).
The run lies in outputs/<run_name>/: checkpoints, the links last and best, metrics.jsonl, wandb/. The same command again goes on from the
last checkpoint; checkpoint.resume=false starts anew and removes the run's earlier checkpoints. Under `wandb agent` the run is called
<run_name>-<the trial's W&B id>, so that trials keep apart and one that was preempted goes on.

Exit codes: 0 finished; 1 an error, told in one line; 143, 138, 130 or 129 stopped by SIGTERM, SIGUSR1 (ahead of a time limit), Ctrl-C or
SIGHUP (the terminal is gone) behind a saved checkpoint (a second Ctrl-C stops at once, without saving).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

_HERE = Path(__file__).resolve().parent
if Path(sys.path[0] or ".").resolve() == _HERE:  # run by path: megalens/ itself must not hide packages of its modules' names
    sys.path[0] = str(_HERE.parent)

from megalens import cli  # noqa: E402

if TYPE_CHECKING:
    from megalens.config import Config


def main(arguments: list[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    from megalens.config import load_config
    from megalens.engine import join_ranks
    from megalens.engine.failure import told_once
    from megalens.pipeline.default_experiment import with_experiment
    from megalens.sweep.trial import as_trial
    from megalens.training.ready import check_ready
    from megalens.training.signals import stop_with_deepspeed
    from megalens.training.start import sole_training

    stop_with_deepspeed()
    with told_once():
        config = as_trial(load_config(with_experiment(arguments)))
        device = check_ready(config)
        with sole_training(config):
            join_ranks(device)
            return train(config)


def train(config: Config) -> int:
    """Build everything, train, close."""
    from megalens.checkpoint.formats.megalens import read_optimizer
    from megalens.data.source import held_out_loader, training_loader
    from megalens.engine import build_engine, data_share, rank_and_size, shards_weights
    from megalens.families.loading import subject_fingerprint
    from megalens.objective import build_lens
    from megalens.training.progress import clock_of, is_finished
    from megalens.training.start import find_start, identity, open_folder
    from megalens.training.track import Run
    from megalens.training.trainer import Trainer
    from megalens.training.validate import Validator

    rank, world_size = rank_and_size()
    folder = open_folder(config, rank)
    loader = training_loader(config, *data_share(config))
    held_out = held_out_loader(config, rank)
    clock = clock_of(config, loader.steps_per_epoch)
    same = identity(config, subject_fingerprint(config), loader.identity)
    start = find_start(config, folder, loader, same)
    if is_finished(start.progress, clock):
        if rank == 0:
            longer = "max_train_steps" if clock.last_step == clock.total_steps else "early_termination.steps"
            asked = f", and {longer} asks for {clock.last_step}" if start.progress.step > clock.last_step else ""
            print(f"{config.run_dir} is finished: {start.progress.step} micro-steps{asked}; {longer} trains it longer", file=sys.stderr)
        return 0

    lens = build_lens(config, *start.standard, empty_blocks=shards_weights(config))
    weights = None if start.weights is None else lens.load_lens_state(start.weights)
    engine = build_engine(config, lens, lens.parameter_groups(), weights)
    if shards_weights(config):  # those that were loaded whole are checked by now
        lens.subject.check(engine.device)
    if start.resumed is not None:
        engine.load_state(read_optimizer(start.resumed, lens.lens_state_names()))
    validator = Validator(engine, lens, held_out, start.statistics)
    run = Run.open(config, folder, start.progress, clock) if engine.is_main else Run(folder)
    run.say(f"training {config.run_dir} from {start.where} on {world_size} x {engine.device.type}, {clock.last_step} micro-steps")
    code = 1
    try:
        stopped_by = Trainer(config, engine, lens, loader, validator, start.statistics, start.progress, same, run).fit()
        code = 128 + stopped_by if stopped_by else 0
        end = "finished" if code == 0 else f"stopped by signal {stopped_by}, the same command goes on from here"
        run.say(f"{end}: {config.run_dir}/last at micro-step {start.progress.step}")
    finally:
        run.close(code)
    engine.close()
    return code


if __name__ == "__main__":
    cli.run(main, __doc__)
