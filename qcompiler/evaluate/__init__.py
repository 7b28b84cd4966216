"""How good a model is, and how far a compiled one is from its float model.

`evaluate` is imported when it is first used; it needs torch for torch models only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.evaluate.calibration import calibration_batches
    from qcompiler.evaluate.evaluation import evaluate
    from qcompiler.evaluate.text import Text, calibration_text, evaluation_text, read_text

_HOME = {
    "evaluate": "evaluation",
    "calibration_batches": "calibration",
    "Text": "text",
    "calibration_text": "text",
    "evaluation_text": "text",
    "read_text": "text",
}

__all__ = ["Text", "calibration_batches", "calibration_text", "evaluate", "evaluation_text", "read_text"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
