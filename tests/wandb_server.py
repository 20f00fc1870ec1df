"""A stand-in of the W&B server on loopback: enough of its GraphQL for an unmodified `wandb sweep` and `wandb agent`.

It keeps sweeps in memory and hands out trials as the real one does: a grid in order, random draws, and for bayes draws around the best
result so far. Training runs log offline, so their results are not posted here: ``metric_of`` looks them up where the runs wrote them.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY, PROJECT = "tester", "lenses"


@dataclass
class Trial:
    """A run of a sweep. ``state`` is running, finished or preempted; ``metric`` what ``metric_of`` found when it had ended."""

    id: str
    args: dict
    agent: str
    state: str = "running"
    metric: float | None = None


@dataclass
class Sweep:
    """A sweep as it was created, and its trials in the order they were handed out."""

    id: str
    config: dict
    trials: list[Trial] = field(default_factory=list)


class WandbServer:
    """The server; a context manager that listens while entered.

    Args:
        metric_of: (run id, metric name) -> the run's value of it, None when it has none.

    Attributes:
        sweeps: by id.
        unknown: operations that were asked for and not understood; empty when the stand-in is enough.
    """

    def __init__(self, metric_of: Callable[[str, str], float | None] = lambda run_id, name: None):
        self.metric_of = metric_of
        self.sweeps: dict[str, Sweep] = {}
        self.unknown: list[str] = []
        self._agents: dict[str, str] = {}  # agent -> sweep
        self._lock = threading.Lock()
        self._random = random.Random(0)

    def __enter__(self) -> WandbServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of_sweeps": self}))
        threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which the client talks to this server."""
        url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": PROJECT}

    def requeue(self, run_id: str) -> None:
        """Hand a run out again, under its own id, as W&B does with one that was preempted."""
        with self._lock:
            next(t for sweep in self.sweeps.values() for t in sweep.trials if t.id == run_id).state = "preempted"

    # ------------------------------------------------------------------------------------------------ the operations

    def answer(self, operation: str, variables: dict) -> dict | None:
        """The data of a GraphQL answer; None when the operation is unknown."""
        with self._lock:
            known = getattr(self, f"_{operation}", None)
            return known(variables) if known else None

    def _Viewer(self, _) -> dict:
        teams = {"edges": [{"node": {"id": "t", "name": ENTITY}}]}
        viewer = {"id": "u", "name": ENTITY, "username": ENTITY, "email": "t@example.org", "admin": False, "flags": "{}"}
        return {"viewer": viewer | {"entity": ENTITY, "teams": teams, "apiKeys": {"edges": []}, "deletedAt": None}}

    def _ServerInfo(self, _) -> dict:
        versions = {"max_cli_version": "99.0.0", "min_cli_version": "0.10.0"}
        features = {"name": "none", "isEnabled": False}
        return {"serverInfo": {"cliVersionInfo": versions, "latestLocalVersionInfo": None, "features": [features]}}

    _ServerFeaturesQuery = _ServerInfo

    def _UpsertSweep(self, variables: dict) -> dict:
        sweep = self.sweeps.get(self._name(variables.get("id") or ""))
        if sweep is None:
            sweep = Sweep(f"sweep{len(self.sweeps)}", {})
            self.sweeps[sweep.id] = sweep
        if variables.get("config"):
            sweep.config = yaml.safe_load(variables["config"])
        return {"upsertSweep": {"sweep": self._about(sweep), "configValidationWarnings": []}}

    def _SweepWithRuns(self, variables: dict) -> dict:
        sweep = self.sweeps.get(variables["sweep"])
        return {"project": {"sweep": None if sweep is None else self._about(sweep)}}

    _Sweep = _GetSweep = _GetSweepLegacy = _SweepWithRuns

    def _CreateAgent(self, variables: dict) -> dict:
        agent = f"agent{len(self._agents)}"
        self._agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def _Heartbeat(self, variables: dict) -> dict:
        agent = variables["id"]
        sweep, at_work = self.sweeps[self._agents[agent]], json.loads(variables["runState"])
        for trial in sweep.trials:
            if trial.agent == agent and trial.state == "running" and trial.id not in at_work:
                trial.state, trial.metric = "finished", self.metric_of(trial.id, self._metric(sweep))
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps([] if at_work else [self._next(sweep, agent)])}}

    # ------------------------------------------------------------------------------------------------------ the search

    def _next(self, sweep: Sweep, agent: str) -> dict:
        """The command that an idle agent gets."""
        kind, trial = "resume", next((t for t in sweep.trials if t.state == "preempted"), None)
        if trial is None:
            args = self._draw(sweep)
            if args is None:
                return {"type": "exit"}
            kind, trial = "run", Trial(f"{sweep.id}run{len(sweep.trials)}", args, agent)
            sweep.trials.append(trial)
        trial.agent, trial.state = agent, "running"
        args = {name: {"value": value} for name, value in trial.args.items()}
        return {"type": kind, "run_id": trial.id, "program": sweep.config["program"], "args": args}

    def _draw(self, sweep: Sweep) -> dict | None:
        """The next trial's parameters; None when there are no more."""
        parameters, count = sweep.config["parameters"], len(sweep.trials)
        if count >= sweep.config.get("run_cap", math.inf):
            return None
        if sweep.config["method"] == "grid":
            values = [p["values"] if "values" in p else [p["value"]] for p in parameters.values()]
            point = next(itertools.islice(itertools.product(*values), count, None), None)
            return None if point is None else dict(zip(parameters, point, strict=True))
        sign = -1 if sweep.config.get("metric", {}).get("goal") == "maximize" else 1
        known = sorted((t for t in sweep.trials if t.metric is not None), key=lambda t: sign * t.metric)
        best = known[0].args if sweep.config["method"] == "bayes" and len(known) > 1 else {}
        return {name: self._value(p, best.get(name)) for name, p in parameters.items()}

    def _value(self, parameter: dict, best):
        if "value" in parameter:
            return parameter["value"]
        if "values" in parameter:
            return self._random.choice(parameter["values"] if best is None else [best, *parameter["values"]])
        low, high = parameter["min"], parameter["max"]
        if parameter.get("distribution") == "log_uniform_values":
            low, high, best = math.log(low), math.log(high), best and math.log(best)
        share = self._random.random()
        value = low + share * (high - low) if best is None else min(high, max(low, best + 0.3 * (share - 0.5) * (high - low)))
        return math.exp(value) if parameter.get("distribution") == "log_uniform_values" else value

    @staticmethod
    def _metric(sweep: Sweep) -> str:
        return sweep.config.get("metric", {}).get("name", "")

    @staticmethod
    def _name(sweep_id: str) -> str:
        """A sweep's name from its GraphQL id."""
        return base64.b64decode(sweep_id).decode().removeprefix("Sweep:") if sweep_id else ""

    @staticmethod
    def _about(sweep: Sweep) -> dict:
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        about = {"id": base64.b64encode(f"Sweep:{sweep.id}".encode()).decode(), "name": sweep.id, "displayName": None, "project": project}
        nodes = [{"node": {"name": t.id, "state": t.state, "config": "{}", "summaryMetrics": "{}"}} for t in sweep.trials]
        about |= {"method": sweep.config["method"], "state": "RUNNING", "config": yaml.safe_dump(sweep.config)}
        return about | {"controller": None, "scheduler": None, "bestLoss": None, "runs": {"edges": nodes}}


class _Handler(BaseHTTPRequestHandler):
    server_of_sweeps: WandbServer

    def do_GET(self) -> None:
        self._reply(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith("/graphql"):  # telemetry
            return self._reply(200, {})
        request = json.loads(body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        data = self.server_of_sweeps.answer(name[1] if name else "", request.get("variables") or {})
        if data is None:
            self.server_of_sweeps.unknown.append(request["query"])
            return self._reply(200, {"errors": [{"message": f"the stand-in does not know {name and name[1]}"}]})
        return self._reply(200, {"data": data})

    def _reply(self, status: int, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        """No access log."""
