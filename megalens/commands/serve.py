"""Serve a trained lens to many clients at once: routes of the field's NLA servers, a page, metrics.

usage: megalens serve checkpoint=outputs/<run>/best [host=127.0.0.1] [port=5009] [batch=32] [device=cpu|cuda] [dtype=bf16|fp32]
       [model_name=FOLDER] [trust_remote_code=true]

Then open http://127.0.0.1:5009/page, or ask from a program:

  curl -s 127.0.0.1:5009/explain -H 'content-type: application/json' -d '{"text": "The tower was built in 1889.", "temperature": 0}'

  host=ADDRESS  where it listens; the default can be reached from this machine alone
  port=NUMBER   0: any that is free
  batch=NUMBER  explanations at a time; less needs less memory
  trust_remote_code=true  run code that comes with the subject; a checkpoint never says so itself

Environment: SECRET is a key that every request must bring in X-SECRET-KEY; set it where others can reach the server. NLA_MAX_INPUT_CHARS
and others set limits. docs/serving.md lists routes, fields and limits.

Ctrl-C or SIGTERM stops it when what is being answered is answered.
"""

from __future__ import annotations

import os
from dataclasses import asdict

from megalens import Lens
from megalens.arguments import Arguments, whole_number
from megalens.checkpoint.formats import read_config
from megalens.config import ConfigError
from megalens.serve.app import PORT, listen, make_app, names_of, serve
from megalens.serve.limits import Limits

SETTINGS = ["device", "dtype", "model_name", "trust_remote_code"]
EXAMPLE = "megalens serve checkpoint=outputs/<run>/best"


def main(arguments: list[str]) -> None:
    parser = Arguments(EXAMPLE)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole_number(0), default=PORT)
    parser.add_argument("--batch", type=whole_number(1), default=32)
    args, settings = parser.split(arguments, SETTINGS)
    if args.port > 65535:
        raise ConfigError(f"port={args.port} must be at most 65535")
    limits, changes = Limits.from_environment(), asdict(read_config(args.checkpoint, settings))
    with listen(args.host, args.port) as socket:
        lens = Lens.from_pretrained(args.checkpoint, **changes)
        app = make_app(lens, limits, os.environ.get("SECRET") or None, names_of(args.host), args.batch)
        host, port = socket.getsockname()[:2]
        print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/page; Ctrl-C stops it", flush=True)
        serve(app, [socket])
    print("stopped")
