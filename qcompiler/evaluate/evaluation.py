"""Evaluate a model on a text, alone or against the float model that it was compiled from.

All see the same text in the same windows, one window at a time: never more than one window's outputs are held.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import GateError, InputError, QCompilerError, UsageError
from qcompiler.evaluate.metrics import Mean, OutputError, token_divergence, token_nll
from qcompiler.evaluate.targets import LOGITS, Target, open_target
from qcompiler.evaluate.text import Text, as_text, evaluation_text
from qcompiler.evaluate.tokens import Tokens, load_tokens, same_tokens
from qcompiler.evaluate.windows import Window, choose_context, cut

if TYPE_CHECKING:
    from qcompiler.report.progress import Reporter
    from qcompiler.runtime.device import Dtype

SCHEMA = 1

# Two tokenizers that agree on this much of the text are taken for one.
_SAMPLE_CHARACTERS = 20_000


def evaluate(
    target: Any,
    against: Any = None,
    text: Text | str | os.PathLike | Iterable[str | os.PathLike] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    reporter: Reporter | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> dict[str, Any]:
    """Measure `target`, and how far it is from `against`.

    Args:
        target: a directory with a compiled artifact, a model directory, `reference`, a hub id, a torch module, an open
            `Session`, or a function from tokens (int64 `[length]`) to logits (`[length, vocabulary]`).
        against: the float model to compare with; likewise.
        text: files to evaluate on (UTF-8), or a `Text`; by default `evaluation_text()`.
        context: tokens a window; by default what the models were trained at (see `windows`).
        stride: tokens from one window to the next; by default windows do not overlap.
        max_windows: stop after so many windows; by default the whole text.
        reporter: told of the progress.
        threads: threads for torch and for ONNX Runtime; None leaves it to them.
        tokenizer: a tokenizer, or a directory with one, where neither `target` nor `against` brings its own.
        device: `cpu`, `cuda` or `cuda:N`: where models and artifacts of target `torch` that are read here run.
        dtype: of an artifact's float activations; a checkpoint's own model is in float32.

    Returns:
        A dict for JSON. Always: `schema`, `kind`, `target` (a label, never a path), `text` (its description),
        `context`, `stride`, `windows`, `tokens` (how many were scored).

        `kind` `language-model`: `perplexity`, `perplexity_se`; with `against` also `against`, `against_perplexity`,
        `against_perplexity_se`, `ratio` (perplexity / against's) and `ratio_se` (of the paired difference), `kld_mean`,
        `kld_mean_se` and `kld_p99` (KL(against ‖ target) in nats a token), `same_top` and `same_top_se` (0 to 1).

        `kind` `outputs`, for models without a language model's head (needs `against`): `against` and `outputs`, which
        holds `cosine`, `cosine_se`, `sqnr_db` and `max_error` for each output that both have.

        Standard errors are over windows (see `metrics`) and None for a single window; `sqnr_db` is None without error.

    Raises:
        UsageError: no tokenizer, different tokenizers or vocabularies, a context or stride that does not fit, or a
            model without a head and nothing to compare it with.
        InputError: a model or text cannot be read, or the text is too short to score a token.
        GateError: NaN or infinity in an output; the message names the window.
    """
    source = evaluation_source(text, max_windows)
    with _threads(threads):
        models = [open_target(model, threads, device, dtype) for model in (target, against) if model is not None]
        plan = plan_windows(models, source, context, stride, max_windows, tokenizer)
        if reporter is not None:
            reporter.stage("evaluate")
        (result,) = _measure([models[0]], models[1] if len(models) == 2 else None, plan, reporter)
    if isinstance(result, QCompilerError):
        raise result
    return result


def evaluate_each(
    targets: Sequence[Any],
    against: Any,
    text: Text | str | os.PathLike | Iterable[str | os.PathLike] | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    reporter: Reporter | None = None,
    threads: int | None = None,
) -> list[dict[str, Any] | QCompilerError]:
    """`evaluate` for several targets against one model, which runs over the text once for all of them.

    Returns:
        For each target what `evaluate` returns, or the error that it alone ended with; the others are measured on.

    Raises:
        QCompilerError: as `evaluate`, where the text, the windows or `against` are to blame.
    """
    source = evaluation_source(text, max_windows)
    with _threads(threads):
        models = [open_target(model, threads) for model in (*targets, against)]
        plan = plan_windows(models, source, context, stride, max_windows, None)
        return _measure(models[:-1], models[-1], plan, reporter)


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        windows: of the text, in order.
        tokens: the tokenizer that cut it.
        setting: the part of every result that says so: `text`, `context`, `stride`, `windows`, `tokens`.
    """

    windows: list[Window]
    tokens: Tokens
    setting: dict[str, Any]


def evaluation_source(text: Any, max_windows: int | None) -> Text:
    """The text to evaluate on, by default `evaluation_text()`. What is wrong with the call is said before a model is read.

    Raises:
        UsageError: `max_windows` below 1.
        InputError: a file cannot be read.
    """
    if max_windows is not None and max_windows < 1:
        raise UsageError(f"max_windows is {max_windows}, expected at least 1")
    return as_text(text, evaluation_text)


def plan_windows(
    models: list[Target], source: Text, context: int | None, stride: int | None, max_windows: int | None, tokenizer: Any
) -> Plan:
    """Cut the text into windows that all of `models` take; arguments as of `evaluate`.

    Raises:
        UsageError: no tokenizer, different tokenizers, a context or stride that does not fit.
        InputError: the text is too short to score a token.
    """
    tokens = _tokens(models, tokenizer, source)
    only = {model.alone: model for model in models if model.alone is not None}
    context = next(iter(only), None) if context is None else context
    length = choose_context(context, [model.context.within(tokens.limit) for model in models])
    ids = tokens.encode(source.content)
    # What stands before a text begins every window. What stands after it would be scored, so only other models get it.
    marks = (tokens.prefix, () if models[0].causal is not False else tokens.suffix)
    found = cut(ids, length, stride, *marks)
    for size, model in only.items():
        if size != length:
            raise UsageError(
                f"{model.name} computes windows of {size} tokens alone as its float model does; context is {length}"
            )
    if only:
        # The last window may be shorter: filled up, it would be another text.
        found = (window for window in found if len(window.tokens) == length)
    windows = list(islice(found, max_windows))
    if not windows:
        raise InputError(f"{source.description}: {len(ids)} tokens are too few to score one")
    setting = {
        "text": source.description,
        "context": length,
        "stride": length if stride is None else stride,
        "windows": len(windows),
        "tokens": sum(window.last - window.first for window in windows),
    }
    return Plan(windows, tokens, setting)


def _measure(
    targets: Sequence[Target], against: Target | None, plan: Plan, reporter: Reporter | None
) -> list[dict[str, Any] | QCompilerError]:
    scores: list[_Scores | _Outputs | QCompilerError | None] = [None] * len(targets)
    for window in plan.windows:
        expected = None if against is None else run_window(against, window)
        for i, (target, score) in enumerate(zip(targets, tuple(scores), strict=True)):
            if not isinstance(score, QCompilerError):
                try:
                    scores[i] = _add(score, target, against, window, expected, plan.tokens)
                except QCompilerError as error:
                    scores[i] = error
        alive = [score for score in scores if isinstance(score, (_Scores, _Outputs))]
        if alive and reporter is not None:
            reporter.layer(window.index + 1, len(plan.windows), f"window {window.index + 1}", alive[0].progress())
    return [
        {"schema": SCHEMA, "kind": "language-model", "target": target.label, **plan.setting, **score.result()}
        if isinstance(score, (_Scores, _Outputs))
        else score
        for target, score in zip(targets, scores, strict=True)
        if score is not None
    ]


def _add(
    score: _Scores | _Outputs | None, target: Target, against: Target | None, window: Window, expected: Any, tokens: Tokens
) -> _Scores | _Outputs:
    """Score one window of one target; the first one decides of which kind the scores are."""
    models, outputs = [target], [run_window(target, window)]
    if against is not None:
        models, outputs = [*models, against], [*outputs, expected]
    if score is None:
        causal = all(_predicts(model, output, tokens) for model, output in zip(models, outputs, strict=True))
        score = _Scores(models) if causal else _Outputs(models)
    score.add(window, outputs)
    return score


class _Scores:
    """Language models: perplexity, and the divergence of their predictions."""

    def __init__(self, models: list[Target]) -> None:
        self._models = models
        self._nll = [Mean() for _ in models]
        self._difference, self._kld, self._same = Mean(), Mean(), Mean()
        self._klds: list[np.ndarray] = []

    def add(self, window: Window, outputs: list[dict[str, np.ndarray]]) -> None:
        logits = [window.scored(output[LOGITS]) for output in outputs]
        widths = [rows.shape[-1] for rows in logits]
        if len(set(widths)) > 1:
            names = [model.name for model in self._models]
            raise UsageError(
                f"{names[0]} has a vocabulary of {widths[0]} and {names[1]} one of {widths[1]}: "
                "they cannot be compared token by token; expected a model and what was compiled from it"
            )
        if window.labels.max() >= widths[0]:
            raise UsageError(
                f"the tokenizer gives token {window.labels.max()}, but {self._models[0].name} has a vocabulary of "
                f"{widths[0]}: the tokenizer is not the model's"
            )
        nll = [token_nll(rows, window.labels) for rows in logits]
        for mean, values in zip(self._nll, nll, strict=True):
            mean.add(values)
        if len(logits) == 2:
            kld, same = token_divergence(logits[1], logits[0])
            self._difference.add(nll[0] - nll[1])
            self._kld.add(kld)
            self._same.add(same)
            self._klds.append(kld)

    def progress(self) -> str:
        perplexity = f"perplexity {self._nll[0].exp()[0]:.2f}"
        return perplexity if len(self._nll) == 1 else f"{perplexity}  kl {self._kld.mean:.4f}"

    def result(self) -> dict[str, Any]:
        perplexity, se = self._nll[0].exp()
        found: dict[str, Any] = {"perplexity": perplexity, "perplexity_se": se}
        if len(self._nll) == 2:
            against, against_se = self._nll[1].exp()
            # Paired, token by token: the text's own difficulty cancels, and the error bar with it.
            ratio, ratio_se = self._difference.exp()
            found |= {
                "against": self._models[1].label,
                "against_perplexity": against,
                "against_perplexity_se": against_se,
                "ratio": ratio,
                "ratio_se": ratio_se,
                "kld_mean": self._kld.mean,
                "kld_mean_se": self._kld.se,
                "kld_p99": float(np.quantile(np.concatenate(self._klds), 0.99)),
                "same_top": self._same.mean,
                "same_top_se": self._same.se,
            }
        return found


class _Outputs:
    """Models without a head over the vocabulary: what comes out, against what the float model gives."""

    def __init__(self, models: list[Target]) -> None:
        if len(models) == 1:
            raise UsageError(
                f"{models[0].name} does not predict the next token, so it has no perplexity; "
                "give the float model to compare its outputs with (against)"
            )
        self._models = models
        self._errors: dict[str, OutputError] = {}
        self._tokens = 0

    def add(self, window: Window, outputs: list[dict[str, np.ndarray]]) -> None:
        ours, theirs = outputs
        if not self._errors:
            self._errors = {name: OutputError() for name in ours if name in theirs}
            if not self._errors:
                raise UsageError(
                    f"{self._models[0].name} gives {', '.join(ours)} and {self._models[1].name} gives "
                    f"{', '.join(theirs)}: there is no output to compare"
                )
        for name, error in self._errors.items():
            if ours[name].shape != theirs[name].shape:
                raise UsageError(
                    f"output {name} is {list(ours[name].shape)} from {self._models[0].name} and "
                    f"{list(theirs[name].shape)} from {self._models[1].name}: expected one shape"
                )
            error.add(theirs[name], ours[name])
        self._tokens += len(window.tokens)

    def progress(self) -> str:
        name, error = next(iter(self._errors.items()))
        return f"{name}: cosine {error.result()['cosine']:.5f}"

    def result(self) -> dict[str, Any]:
        return {
            "kind": "outputs",
            "against": self._models[1].label,
            "tokens": self._tokens,
            "outputs": {name: error.result() for name, error in self._errors.items()},
        }


def run_window(model: Target, window: Window) -> dict[str, np.ndarray]:
    """The model's outputs for one window, by name; `logits` are `[tokens, vocabulary]`.

    Raises:
        GateError: NaN or +infinity in an output; names the window.
    """
    outputs = model.run(window.tokens)
    for name, values in outputs.items():
        # -inf is how a padded vocabulary rules a token out; NaN and +inf are damage.
        wrong = np.isnan(values) | (values == np.inf)
        if wrong.any():
            where = [int(axis) for axis in np.argwhere(wrong)[0]]
            raise GateError(
                f"{model.name} gives {values[tuple(where)]} in {name} at {where} of window {window.index} "
                f"(tokens {window.start} to {window.start + len(window.tokens)} of the text)"
            )
    return outputs


def _predicts(model: Target, outputs: dict[str, np.ndarray], tokens: Tokens) -> bool:
    if model.causal is not None:
        return model.causal
    logits = outputs.get(LOGITS)
    return logits is not None and logits.ndim == 2 and logits.shape[-1] >= tokens.size


def _tokens(models: list[Target], given: Any, text: Text) -> Tokens:
    """The one tokenizer for all models."""
    if given is not None:
        return load_tokens(given)
    own = [(model, model.tokens) for model in models if model.tokens is not None]
    if not own:
        names = " and ".join(model.name for model in models)
        raise UsageError(f"{names} come{'s' if len(models) == 1 else ''} without a tokenizer: give one (tokenizer)")
    (first, tokens), *others = own
    for model, other in others:
        if not same_tokens(tokens, other, text.content[:_SAMPLE_CHARACTERS]):
            raise UsageError(
                f"{first.name} and {model.name} have different tokenizers, so they cannot be compared token by token; "
                "expected a model and what was compiled from it"
            )
    return tokens


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads, where it is loaded at all, and afterwards as many as before."""
    if count is None:
        yield
        return
    if count < 1:
        raise UsageError(f"threads is {count}, expected at least 1")
    try:
        import torch
    except ImportError:  # an install that runs artifacts only
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
