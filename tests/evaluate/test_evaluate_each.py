"""Several models against one: what each alone would give, with the one run once over the text."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.errors import GateError, UsageError
from qcompiler.evaluate import Text, evaluate
from qcompiler.evaluate.evaluation import evaluate_each
from qcompiler.evaluate.targets import LOGITS, Target
from qcompiler.evaluate.tokens import load_tokens
from tests.artifacts import REFERENCE

TEXT = Text("The quick brown fox jumps over the lazy dog, said the documentation of the module. " * 6, "a fox")


class Counted:
    """Logits that depend on the tokens and on `shift`; NaN from the `broken`th run on."""

    def __init__(self, shift: float, broken: int | None = None) -> None:
        self.shift, self.broken, self.runs = shift, broken, 0

    def __call__(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        self.runs += 1
        if self.broken is not None and self.runs >= self.broken:
            return {LOGITS: np.full((len(tokens), 4096), np.nan, np.float32)}
        rows = np.arange(4096, dtype=np.float32)[None] * (1 + tokens[:, None] % 7)
        return {LOGITS: np.sin(rows * np.float32(0.1) + np.float32(self.shift))}


def target(run: Counted, name: str) -> Target:
    return Target(name, run, True, load_tokens(REFERENCE))


def test_each_as_alone_and_the_reference_once() -> None:
    expected = [evaluate(target(Counted(s), "t"), target(Counted(0), "float"), TEXT, context=32) for s in (0.1, 0.5)]
    reference, runs = Counted(0), [Counted(0.1), Counted(0.5)]
    found = evaluate_each([target(run, "t") for run in runs], target(reference, "float"), TEXT, context=32)
    assert found == expected
    assert expected[0]["kld_mean"] != expected[1]["kld_mean"]
    assert [reference.runs, *(run.runs for run in runs)] == [expected[0]["windows"]] * 3


def test_one_that_fails_does_not_stop_the_others() -> None:
    runs = [Counted(0.1, broken=2), Counted(0.5)]
    targets = [target(run, f"model {i}") for i, run in enumerate(runs)]
    failed, found = evaluate_each(targets, target(Counted(0), "float"), TEXT, 32)
    assert isinstance(failed, GateError) and "model 0 gives nan in logits" in str(failed) and "window 1" in str(failed)
    assert isinstance(found, dict)
    assert found == evaluate(target(Counted(0.5), "model 1"), target(Counted(0), "float"), TEXT, context=32)
    assert runs[0].runs == 2


def test_a_reference_that_fails_stops_all() -> None:
    with pytest.raises(GateError, match="float gives nan"):
        evaluate_each([target(Counted(0.1), "t")], target(Counted(0, broken=1), "float"), TEXT, 32)
    with pytest.raises(UsageError, match="max_windows is 0"):
        evaluate_each([target(Counted(0.1), "t")], target(Counted(0), "float"), TEXT, max_windows=0)
