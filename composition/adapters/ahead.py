"""Files that will be asked for soon, read in another thread while the model works: reading and hashing leave Python to others."""

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Results by key, computed one after another in a thread of its own, each taken once."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._results: dict[Hashable, Future[Item]] = {}

    def want(self, reads: Mapping[Hashable, Callable[[], Item]]) -> None:
        """Compute these, and forget whatever else was computed and not taken."""
        for key in [key for key in self._results if key not in reads]:
            self._results.pop(key).cancel()
        for key, read in reads.items():
            if key not in self._results:
                self._pool = self._pool or ThreadPoolExecutor(1, "read-ahead")
                self._results[key] = self._pool.submit(read)

    def take(self, key: Hashable) -> Item | None:
        """The result, waited for where it is being computed; None where it was never wanted, had not begun, or failed."""
        result = self._results.pop(key, None)
        if result is not None and not result.cancel():
            with suppress(Exception):  # the caller computes it again, and meets what is wrong itself
                return result.result()
        return None

    def close(self) -> None:
        """Forget all; what is being computed is let go of when it is done."""
        self.want({})
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
