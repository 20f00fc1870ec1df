"""Have texts written for the rows of a dump, by a model on this machine or by an endpoint that you name.

usage: megalens write-texts config=conf/x.yaml prompts=FILE out=FILE.jsonl [option=value ...] [key=value ...] [--dry-run] [--yes]

  prompts=FILE       one prompt or several, parted by lines of ---; {context} is a row's text up to its token P, {token} that token
  out=FILE.jsonl     a line for each row and prompt; given.path=FILE.jsonl trains on it
  writer=W           subject (the default), a causal LM's folder, or the base URL of an OpenAI-compatible endpoint
  model=NAME         the model's name at the endpoint
  key_env=NAME       the environment variable that holds the endpoint's key (OPENAI_API_KEY); the key is never shown or kept
  split=train|val    rows of which dump; rows=N: its first N (-1: all)
  tokens=N           the most tokens of a text (64); temperature=T: 0 (the default) takes the most likely tokens
  at_once=N          prompts of a batch, or requests under way at once (16)
  price_in=X price_out=X   price of a million tokens of prompts and of texts, for the estimate
  --dry-run          tell what is left to do and what it costs, and end
  --yes              an endpoint is asked only with this: it may cost money, and it sees the texts

What is left to do is told before it begins. Every answer is kept as it comes: the same command goes on after a kill, and nothing is asked
twice. With verbalizer.tag=TAG a text is what stands between these tags of an answer. Needs the dump of `megalens dump` first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megalens.arguments import Arguments, number_above_zero, whole_number
from megalens.config import Config, ConfigError, load_config
from megalens.data.identity import model_identity
from megalens.data.shards import ShardReader
from megalens.data.writers import Endpoint, LocalWriter, Sampling, Writer
from megalens.data.writing import Writing, read_prompts
from megalens.families.loading import load_tokenizer
from megalens.shipped import find


def main(arguments: list[str]) -> None:
    parser = Arguments("megalens write-texts config=conf/x.yaml prompts=prompts.txt out=texts.jsonl")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--writer", default="subject")
    parser.add_argument("--model")
    parser.add_argument("--key_env", default="OPENAI_API_KEY")
    parser.add_argument("--split", default="train", choices=("train", "val"))
    parser.add_argument("--rows", type=int, default=-1)
    parser.add_argument("--tokens", type=whole_number(1), default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--at_once", type=whole_number(1), default=16)
    parser.add_argument("--price_in", type=number_above_zero)
    parser.add_argument("--price_out", type=number_above_zero)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--yes", action="store_true")
    args, settings = parser.split(arguments)
    config = load_config(settings)
    check(args)
    prompts = read_prompts(find(args.prompts))
    reader = ShardReader(config.activation_dir(args.split))
    reader.check_matches(model_identity(config))
    writer = writer_of(config, args)
    rows = len(reader) if args.rows == -1 else min(args.rows, len(reader))
    writing = Writing(reader, load_tokenizer(config), prompts, rows, writer, Path(config.pretokenize.root) / "written")
    plan = writing.plan()
    print(plan.told(args.tokens, args.price_in, args.price_out), file=sys.stderr)
    if args.dry_run:
        return
    if isinstance(writer, Endpoint) and plan.requests and not args.yes:
        raise ConfigError(f"{args.writer} is asked only with --yes: it may cost money, and it sees the texts")
    writer.check()
    kept, failed = writing.run(args.out, plan.requests, config.verbalizer.tag)
    note = f"; {failed:,} answers held no text" if failed else ""
    print(f"written: {kept:,} texts in {args.out}{note}")


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work before anything is read.

    Raises:
        ConfigError: one of them cannot.
    """
    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise ConfigError(f"out={args.out} must be a file that ends in .jsonl")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={args.out}: no folder can be made there ({error.strerror}); name another place") from None
    if args.rows == 0 or args.rows < -1:
        raise ConfigError(f"rows={args.rows} must be -1 (all) or greater than 0")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigError(f"temperature={args.temperature} must be 0 or more")
    if "://" in args.writer and args.model is None:
        raise ConfigError("an endpoint needs model=NAME, the model's name there")


def writer_of(config: Config, args: argparse.Namespace) -> Writer:
    """The writer that the options name."""
    sampling = Sampling(args.tokens, args.temperature, config.seed)
    if "://" in args.writer:
        return Endpoint(args.writer, args.model, args.key_env, sampling, args.at_once, load_tokenizer(config))
    return LocalWriter(config, None if args.writer == "subject" else args.writer, sampling, args.at_once)
