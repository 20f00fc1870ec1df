"""A server under load: how long clients wait that come at once, relative to one alone, and what memory it takes.

usage: python benchmarks/serve.py checkpoint=outputs/demo/best [clients=64] [rounds=4] [positions=4] [text="..."]

Starts `megalens serve` as a process of its own, asks it by one client after the other, then by all at once, `rounds` times each. Prints a
JSON line: clients, requests, failures, seconds of a single request (median), p50 and p99 of the requests at once in multiples of it, the
requests a second, and the server's memory in MiB when it is idle and at its peak. Every answer is compared with the single client's.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megalens.arguments import Arguments, whole_number

EXAMPLE = "python benchmarks/serve.py checkpoint=outputs/demo/best"
TEXT = "The tower was built in 1889 for the World's Fair in Paris, and many artists of the city did not like it."


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    parser = Arguments(EXAMPLE)
    parser.add_argument("--checkpoint", required=True)
    for name, value in (("clients", 64), ("rounds", 4), ("positions", 4)):
        parser.add_argument(f"--{name}", type=whole_number(1), default=value)
    parser.add_argument("--text", default=TEXT)
    args = parser.read(sys.argv[1:])
    command = [sys.executable, "-m", "megalens", "serve", f"checkpoint={args.checkpoint}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[2].rstrip(";").removesuffix("/page")
            print(json.dumps(measure(url, server.pid, args)))
        finally:
            server.terminate()


def measure(url: str, pid: int, args) -> dict:
    """The figures of one server."""
    wanted = {"text": args.text, "temperature": 0, "positions": list(range(-args.positions, 0))}
    body, idle = json.dumps(wanted).encode(), memory(pid, "VmRSS")

    def ask(_=None) -> tuple[float, str]:
        request, start = urllib.request.Request(f"{url}/explain", body, {"Content-Type": "application/json"}), time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                said = json.dumps([each["description"] for each in json.loads(reply.read())["results"]])
        except OSError as error:
            said = f"failed: {error}"
        return time.perf_counter() - start, said

    _, right = ask()
    alone = statistics.median(ask()[0] for _ in range(5))
    took, wrong, whole = [], 0, 0.0
    for _ in range(args.rounds):
        ready = threading.Barrier(args.clients)
        start = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            found = list(pool.map(lambda _, ready=ready: (ready.wait(60), ask())[1], range(args.clients)))
        whole += time.perf_counter() - start
        took += [seconds for seconds, _ in found]
        wrong += sum(said != right for _, said in found)
    took.sort()
    return {
        "clients": args.clients,
        "requests": len(took),
        "failed or other answers": wrong,
        "alone_s": round(alone, 4),
        "p50": round(statistics.median(took) / alone, 2),
        "p99": round(took[max(0, -(-99 * len(took) // 100) - 1)] / alone, 2),
        "requests_per_s": round(len(took) / whole, 2),
        "idle_MiB": idle,
        "peak_MiB": memory(pid, "VmHWM"),
    }


def memory(pid: int, kind: str) -> int:
    """Of a process, in MiB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    main()
