"""One thread that owns the model, and the queue before it. Requests take turns, and rows of several requests share a batch.

A turn is one call, or one batch: a row of each waiting request that asks in the same way, then a second row of each, until the batch is
full. A request that has more rows goes to the end of the queue. So a request waits for at most one turn of each that came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Result = TypeVar("Result")


class Left(Exception):
    """Nobody waits for this any more."""


class Closed(Exception):
    """The server is stopping; nothing new is begun."""


class Failure:
    """What became of a row whose answer could not be made."""

    def __init__(self, error: Exception):
        self.error = error


@dataclass(eq=False)
class Job:
    """One request's work. The worker's thread fills it; the request's coroutine takes from it.

    A slow reader costs no memory: of each row only the newest progress is kept.

    Args:
        key: jobs of one key share batches; None: a call.
        rows: what is left of its rows, by number.
    """

    key: Hashable
    rows: deque[tuple[int, Any]]
    run: Callable[[Sequence[Any], Callable[[int, str], None]], Sequence[Any]]
    loop: asyncio.AbstractEventLoop
    total: int = 0
    left: bool = False
    progress: dict[int, str] = field(default_factory=dict)
    results: deque[tuple[int, Any]] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, number: int, text: str) -> None:
        """The text of a row so far."""
        with self.lock:
            self.progress[number] = text
        self._wake()

    def give(self, number: int, result: Any) -> None:
        """A row's result, or its :class:`Failure`."""
        with self.lock:
            self.progress.pop(number, None)
            self.results.append((number, result))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self.loop.call_soon_threadsafe(self.news.set)

    async def events(self) -> AsyncGenerator[tuple[int, Any, bool], None]:
        """Number, text or result, and whether it is the result, as they come; ends with the last result. Leaving it early is fine."""
        try:
            done = 0
            while done < self.total:
                await self.news.wait()
                self.news.clear()
                with self.lock:
                    progress, self.progress = self.progress, {}
                    results = list(self.results)
                    self.results.clear()
                for number, text in progress.items():
                    yield number, text, False
                for number, result in results:
                    done += 1
                    yield number, result, True
        finally:
            self.left = True


class Worker:
    """The thread and its queue.

    Args:
        batch: most rows at a time.

    Attributes:
        batches, batch_rows: batches that were run, and rows in them.
        busy: is something being run?
    """

    def __init__(self, batch: int = 32):
        self.batch, self.batches, self.batch_rows, self.busy = batch, 0, 0, False
        self._queue: deque[Job] = deque()
        self._ready, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="megalens-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows and calls that wait."""
        with self._ready:
            return sum(len(job.rows) for job in self._queue)

    @property
    def alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """A function's result, run on the thread.

        Raises:
            Closed: the server is stopping.
        """
        job = self.submit(None, [arguments], lambda rows, _: [function(*rows[0])])
        async for _, result, _ in job.events():
            if isinstance(result, Failure):
                raise result.error
            return result
        raise Closed

    def submit(self, key: Hashable, rows: Sequence[Any], run: Callable) -> Job:
        """Put rows into the queue.

        Args:
            key: what must be the same in a batch; None: never batched.
            run: given rows of this and other jobs of the key, and what to call with a row's index and text so far, it returns a result for
                each. It may call back often: the call raises :class:`Left` when nobody waits for any of them.

        Raises:
            Closed: the server is stopping.
        """
        job = Job(key, deque(enumerate(rows)), run, asyncio.get_running_loop(), total=len(rows))
        with self._ready:
            if self._closing:
                raise Closed("the server is stopping")
            self._queue.append(job)
            self._ready.notify()
        return job

    def close(self, timeout: float = 30) -> None:
        """Finish what is queued, and end the thread."""
        with self._ready:
            self._closing = True
            self._ready.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._ready:
                while not self._queue and not self._closing:
                    self._ready.wait()
                if not self._queue:
                    return
                taken = self._turn()
            self.busy = True
            self._run(taken)
            self.busy = False

    def _turn(self) -> list[tuple[Job, int, Any]]:
        """The rows of the next turn; jobs that have more of them go to the end."""
        for job in [job for job in self._queue if job.left]:
            self._queue.remove(job)
        if not self._queue:
            return []
        first = self._queue[0]
        jobs = [first] if first.key is None else [job for job in self._queue if job.key == first.key]
        taken: list[tuple[Job, int, Any]] = []
        while len(taken) < self.batch and any(job.rows for job in jobs):
            taken += [(job, *job.rows.popleft()) for job in jobs[: self.batch - len(taken)] if job.rows]
        served = list(dict.fromkeys(job for job, _, _ in taken))
        for job in served:
            self._queue.remove(job)
        self._queue.extend(job for job in served if job.rows)
        return taken

    def _run(self, taken: list[tuple[Job, int, Any]]) -> None:
        taken = [each for each in taken if not each[0].left]
        if not taken:
            return
        self.batches, self.batch_rows = self.batches + 1, self.batch_rows + len(taken)

        def tell(index: int, text: str) -> None:
            if all(job.left for job, _, _ in taken):
                raise Left
            job, number, _ = taken[index]
            job.tell(number, text)

        try:
            results = taken[0][0].run([row for _, _, row in taken], tell)
            for (job, number, _), result in zip(taken, results, strict=True):
                job.give(number, result)
        except Left:
            return
        except Exception as error:  # noqa: BLE001 (whatever a request does to the model, the others go on)
            if len({job for job, _, _ in taken}) == 1:
                for job, number, _ in taken:
                    job.give(number, Failure(error))
            else:  # one spoils it for the others: each by itself
                for job in dict.fromkeys(job for job, _, _ in taken):
                    self._run([each for each in taken if each[0] is job])
