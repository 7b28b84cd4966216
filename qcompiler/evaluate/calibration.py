"""Calibration data: windows of token ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import InputError, UsageError
from qcompiler.evaluate.text import Text, as_text, calibration_text
from qcompiler.evaluate.tokens import load_tokens, sequence

if TYPE_CHECKING:
    from qcompiler.report.progress import Reporter


def calibration_batches(
    tokenizer: Any,
    text: Text | str | os.PathLike | Iterable[str | os.PathLike] | None = None,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> list[np.ndarray]:
    """Choose `samples` windows of `length` tokens from the text, without overlap, in the text's order.

    Equal arguments (and, for the default text, an equal version of Python) give equal windows.

    Args:
        tokenizer: a tokenizer, or a model directory with one.
        text: files (UTF-8) or a `Text`; by default `calibration_text()`.
        samples: how many windows. A text that has fewer gives all that it has, and the reporter is warned: record how
            many came.
        length: tokens a window, with the special tokens that the tokenizer puts before a text.
        seed: which windows are chosen.

    Returns:
        int64 arrays `[length]`.

    Raises:
        UsageError: `samples` or `length` is out of range.
        InputError: the text cannot be read or has not one whole window.
    """
    tokens = load_tokens(tokenizer)
    if samples < 1:
        raise UsageError(f"samples is {samples}, expected at least 1")
    size = length - len(tokens.prefix)
    if size < 1:
        raise UsageError(f"length is {length}, expected more than the {len(tokens.prefix)} special tokens of a text")
    source = as_text(text, calibration_text)
    ids = tokens.encode(source.content)
    # The rest that fills no window is left out: batches of one shape serve every consumer.
    whole = len(ids) // size
    if whole == 0:
        raise InputError(f"{source.description} has {len(ids)} tokens, expected at least {size}, one window")
    if whole < samples and reporter is not None:
        reporter.warning(
            f"calibration: {source.description} gives {whole} windows of {length} tokens, {samples} were asked for; "
            f"all {whole} are used"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(whole)[:samples])
    return [sequence(tokens.prefix, ids[i * size : (i + 1) * size]) for i in chosen]
