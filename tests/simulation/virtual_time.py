"""An event loop without I/O: its clock jumps to the next timer, and everything is in order."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

START_S = 1000.0


class _NoSelector:
    """Instead of waiting for events, moves the clock of its loop to the next timer."""

    loop: "SimulatedLoop"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits for ever")
        self.loop.now_s += timeout
        return []

    def close(self) -> None:
        pass


class Inline(Executor):
    """An executor whose work the simulated loop knows how to run in virtual time."""

    def run(self, work: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        """Return the result as a future of the running loop."""
        raise NotImplementedError


class SimulatedLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only while everybody waits; there are no other threads."""

    def __init__(self) -> None:
        self.now_s = START_S
        self.failures: list[str] = []
        """What went wrong where nobody could be told."""
        super().__init__()
        # The parent's own selector and its pipe are for I/O and for other threads.
        self._close_self_pipe()  # type: ignore[attr-defined]
        self._selector.close()  # type: ignore[has-type]
        selector = _NoSelector()
        selector.loop = self
        self._selector = selector
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self.now_s

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:
        return self.call_soon(*args, **options)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> "asyncio.Future[Any]":
        if isinstance(executor, Inline):
            return executor.run(func, *args)
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # told to whoever waits
            done.set_exception(error)
        return done

    def close(self) -> None:
        self._ssock = self._csock = None
        asyncio.BaseEventLoop.close(self)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.failures.append(f"{context['message']}: {context.get('exception')!r}")
