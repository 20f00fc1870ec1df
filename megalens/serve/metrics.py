"""Counts of a server in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """Requests by route and status, and how long they took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.in_flight = self.left = 0
        self._took: Counter[float] = Counter()
        self._seconds, self._count = 0.0, 0

    def begin(self) -> None:
        """A request has come."""
        with self._lock:
            self.in_flight += 1

    def end(self, route: str, status: int, seconds: float, left: bool) -> None:
        """It has been answered, or its client has left."""
        with self._lock:
            self.in_flight -= 1
            self.left += left
            self.requests[route, status] += 1
            self._seconds, self._count = self._seconds + seconds, self._count + 1
            for bound in SECONDS:
                self._took[bound] += seconds <= bound

    def text(self, gauges: Iterable[tuple[str, str, str, float]]) -> str:
        """All of it.

        Args:
            gauges: name, ``gauge`` or ``counter``, help and value of further figures.
        """
        with self._lock:
            lines = _head("megalens_requests_total", "counter", "requests answered, by route and status")
            lines += [f'megalens_requests_total{{route="{route}",status="{status}"}} {n}' for (route, status), n in self.requests.items()]
            lines += _head("megalens_request_seconds", "histogram", "from a request's first byte to its answer's last")
            lines += [f'megalens_request_seconds_bucket{{le="{bound:g}"}} {self._took[bound]}' for bound in SECONDS]
            lines += [f'megalens_request_seconds_bucket{{le="+Inf"}} {self._count}']
            lines += [f"megalens_request_seconds_sum {self._seconds:.6f}", f"megalens_request_seconds_count {self._count}"]
            own = [
                ("megalens_in_flight", "gauge", "requests being answered", self.in_flight),
                ("megalens_clients_left_total", "counter", "clients that left before their answer's end", self.left),
            ]
            for name, kind, about, value in [*own, *gauges]:
                lines += [*_head(name, kind, about), f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
