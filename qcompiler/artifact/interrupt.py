"""Signals as exceptions, so that leaving by one runs the same clean-up as leaving by an error."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. A KeyboardInterrupt, so that nothing that catches `Exception` swallows it."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated("terminated")


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, unless somebody already handles it or this is no main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Postponed:
    """Whether SIGTERM has come; `arrived` becomes true when it does."""

    arrived = False


@contextlib.contextmanager
def sigterm_postponed(wanted: bool = True) -> Iterator[Postponed]:
    """Within the block SIGTERM is only noted: for work that looks at the note often and stops where it can be resumed.

    Nothing changes where `wanted` is false, or where this is no main thread.
    """
    stop = Postponed()
    before = signal.getsignal(signal.SIGTERM)
    if not wanted or threading.current_thread() is not threading.main_thread() or before is None:
        yield stop
        return
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(stop, "arrived", True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is left: for the few steps that must not stop half-way.

    A handler that the block itself installs stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    # Handlers that were not set from Python read as None and could not be put back: those signals stay as they are.
    before: dict[int, Any] = {n: handler for n in numbers if (handler := signal.getsignal(n)) is not None}

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append((number, frame))

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
        for number, frame in arrived[:1]:
            handler = before[number]
            if callable(handler):
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(number)
