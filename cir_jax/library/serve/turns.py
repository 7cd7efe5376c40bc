"""Work by turns: a few at once, a few that wait, and no more."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cir_jax.library.serve.refusal import Refusal


class Turns:
    """at_once: turns at the same time, each with a thread; waiting: those that may wait."""

    def __init__(self, what: str, at_once: int, waiting: int):
        self._what, self._most = what, at_once + waiting
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix=what)
        self._free = asyncio.Semaphore(at_once)
        self._here = 0

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn. Raises Refusal (429) where too many wait already."""
        if self._here >= self._most:
            raise Refusal(
                429, f"too many {self._what} at once: {self._here} are waited for. Try again."
            )
        self._here += 1
        try:
            async with self._free:
                yield
        finally:
            self._here -= 1

    async def run(self, work: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """In a thread of a turn. One whose client went is ended with before the next begins."""
        loop = asyncio.get_running_loop()
        doing = loop.run_in_executor(self._threads, functools.partial(work, *args, **named))
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await doing
            raise

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
