"""Run exporters without their prints, logs and warnings: our stdout is data."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


class Quiet(contextlib.AbstractContextManager["Quiet"]):
    """Swallow stdout, logging and warnings inside the block: a failure is an exception, with its message.

    `aloud()` lifts the silence for a while: our own passes run inside the exporter and may report as they please.
    """

    def __enter__(self) -> Quiet:
        self._level = logging.root.manager.disable
        self._stdout = sys.stdout
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        self._silence()
        return self

    def __exit__(self, *exception: object) -> None:
        self._speak()
        self._warnings.__exit__(None, None, None)

    @contextlib.contextmanager
    def aloud(self) -> Iterator[None]:
        self._speak()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                yield
        finally:
            self._silence()

    def _silence(self) -> None:
        sys.stdout = io.StringIO()
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")

    def _speak(self) -> None:
        sys.stdout = self._stdout
        logging.disable(self._level)
