"""Threads that read and write pictures while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of threads, a context manager: when it is left all writes are done, or the first error is raised.

    Reads and writes have a pool each, so that neither waits behind the other; what is in flight is bounded.

    Args:
        count: threads for reading, and as many for writing.
    """

    def __init__(self, count: int) -> None:
        self._readers, self._writers = ThreadPoolExecutor(count), ThreadPoolExecutor(count)
        self._most = 2 * count
        self._writes: deque[Future[None]] = deque()
        self._begun = self._told = 0
        self._done: dict[int, Callable[[], None]] = {}
        self._telling = Lock()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            while self._writes and kind is None:
                self._writes.popleft().result()
        finally:
            for pool in (self._readers, self._writers):
                pool.shutdown(cancel_futures=True)

    def read(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """function(item) of each, in order; the following ones are already being worked on."""
        ahead: deque[Future[Result]] = deque()
        for item in items:
            ahead.append(self._readers.submit(function, item))
            if len(ahead) > self._most:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def write(self, function: Callable[..., None], *arguments: Any, then: Callable[[], None] | None = None) -> None:
        """Call function(*arguments) soon; waits, and raises what an earlier one raised, where too many are pending.

        `then` is called when this and all earlier ones are done, in their order, by one thread at a time.
        """
        self._writes.append(self._writers.submit(self._write, self._begun, function, arguments, then or _nothing))
        self._begun += 1
        while len(self._writes) > self._most:
            self._writes.popleft().result()

    def _write(
        self, place: int, function: Callable[..., None], arguments: tuple[Any, ...], then: Callable[[], None]
    ) -> None:
        function(*arguments)
        with self._telling:
            self._done[place] = then
            while self._told in self._done:
                self._done.pop(self._told)()
                self._told += 1


def _nothing() -> None:
    pass
