"""Several recipes on one model, side by side: size, closeness to the float model, speed, what compiling took.

The float model runs over the text once, window by window, beside all artifacts. Speeds are taken in rounds that go through the
recipes in turn, so that a machine that slows down slows all of them. With an output directory artifacts and measurements stay,
and are used again while what they depend on is the same (`compare_store`).
"""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from qcompiler import recipe as recipes
from qcompiler.artifact.files import digest
from qcompiler.artifact.manifest import NAME as MANIFEST
from qcompiler.compare_store import Run, Store, base_key, key
from qcompiler.errors import CapacityError, InputError, QCompilerError, Stopped, UsageError
from qcompiler.pipeline.instruments import HighestPeak
from qcompiler.recipe.schema import Recipe
from qcompiler.report.doctor import cpu_model
from qcompiler.report.progress import Reporter, Silent

SCHEMA = 1

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 64, 5

# A recipe's name becomes a directory's.
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")

# What an evaluation finds and a row repeats.
_SCORES = (
    "perplexity", "perplexity_se", "ratio", "ratio_se", "kld_mean", "kld_mean_se", "kld_p99", "same_top", "same_top_se",
    "outputs",
)  # fmt: skip
_SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second")


def compare(
    model: str | Path,
    chosen: Sequence[str | Path | dict | Recipe],
    *,
    output: str | Path | None = None,
    target: str = "onnx",
    text: Iterable[str | Path] | None = None,
    context: int | None = None,
    max_windows: int | None = None,
    calibration_text: Iterable[str | Path] | None = None,
    samples: int | None = None,
    length: int | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Compile a model with each recipe and measure every artifact against the float model.

    Args:
        model: a checkpoint directory, a hub id or `reference`.
        chosen: recipes, as `compile` takes them; their names must differ.
        output: keep everything here: artifacts in `output/<recipe's name>`, measurements in `output/compare.json`. None: in a
            temporary directory that is removed.
        target: what to compile for.
        text, context, max_windows: the evaluation, as `evaluate` takes it.
        calibration_text, samples, length: the calibration, as `compile` takes it.
        prompt_tokens, new_tokens, repeats: what speed is measured on (decoders), and in how many rounds.
        threads: of evaluation and speed.

    Returns:
        A dict for JSON, described in docs/cli.md. A recipe that failed has `error` in its row and nothing measured; `exit_code`
        is the highest of the failures', or 0.

    Raises:
        UsageError: an unknown recipe, two of one name, or an argument out of range.
        InputError: the model or a text cannot be read, or `output` holds something that is not from a comparison.
    """
    from qcompiler.capture.checkpoint import locate
    from qcompiler.evaluate import text as texts

    reporter = reporter or Silent()
    wanted = _recipes(chosen)
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise UsageError(f"{name} is {value}, expected at least 1")
    calibration_files = None if calibration_text is None else list(calibration_text)
    scored = texts.as_text(text, texts.evaluation_text)
    calibrated = texts.as_text(calibration_files, texts.calibration_text)
    directory, description = locate(model)
    base = key(base_key(directory), target, samples, length, calibrated.content)
    given = {"target": target, "text": calibration_files, "samples": samples, "length": length}
    given = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        store = Store(_folder(output, directory, stack))
        runs = [store.run(recipe, key(base, recipes.to_dict(recipe)), directory) for recipe in wanted]
        for i, run in enumerate(runs, 1):
            reporter.stage(f"{run.name} ({i}/{len(runs)})")
            _compile(model, run, store, given, reporter)
        windows = {"text": scored, "context": context, "max_windows": max_windows, "threads": threads}
        _evaluate(model, runs, store, key(scored.content, context, max_windows), windows, reporter)
        _speed(runs, store, {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}, repeats, threads, reporter)
        rows = [_row(run, kept=output is not None) for run in runs]
    result: dict[str, Any] = next((run.found["evaluation"]["result"] for run in runs if run.error is None), {})
    parameters = next((run.found["compile"]["parameters"] for run in runs if run.error is None), None)
    return {
        "schema": SCHEMA,
        "model": description,
        "target": target,
        "text": scored.description,
        **{name: result.get(name) for name in ("kind", "context", "stride", "windows", "tokens")},
        "calibration": {"text": calibrated.description, "samples": samples, "length": length},
        "speed": {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "threads": threads,
            "cpu": cpu_model(),
        },
        "float": {
            "parameters": parameters,
            "bytes": None if parameters is None else 4 * parameters,
            "perplexity": result.get("against_perplexity"),
            "perplexity_se": result.get("against_perplexity_se"),
        },
        "rows": rows,
        "pareto": _mark(rows),
        "exit_code": max((run.error.exit_code for run in runs if run.error is not None), default=0),
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: smaller is better on both axes; equal points do not beat each other."""
    return [
        not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points) for point in points
    ]


def _mark(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Set `pareto` in every row; returns the axes and the names of the set."""
    measured = [row for row in rows if row["error"] is None]
    # Without a vocabulary the distance is the error-to-signal ratio of the worst output, which falls as the SQNR rises.
    axis = "sqnr_db" if any(row["kld_mean"] is None for row in measured) else "kld_mean"
    distance = (lambda row: -_sqnr(row)) if axis == "sqnr_db" else (lambda row: row["kld_mean"])
    best = pareto([(row["bytes"], distance(row)) for row in measured])
    for row in rows:
        row["pareto"] = False
    for row, mark in zip(measured, best, strict=True):
        row["pareto"] = mark
    return {"axes": ["bytes", axis], "recipes": [row["recipe"] for row in rows if row["pareto"]]}


def _sqnr(row: Mapping[str, Any]) -> float:
    return float("inf") if row["sqnr_db"] is None else row["sqnr_db"]


def _recipes(chosen: Sequence[str | Path | dict | Recipe]) -> list[Recipe]:
    if not chosen:
        raise UsageError("no recipe is given: expected at least one")
    wanted: dict[str, tuple[Recipe, str]] = {}
    for source in chosen:
        recipe = recipes.load(source)
        said = str(source) if isinstance(source, (str, Path)) else "a recipe in memory"
        if recipe.name in wanted:
            raise UsageError(
                f"two recipes are named {recipe.name!r} ({wanted[recipe.name][1]} and {said}): every row needs a name of its "
                "own; change the key `name` of one, or leave it out"
            )
        if not _NAME.fullmatch(recipe.name):
            raise UsageError(
                f"recipe {said}: its name {recipe.name!r} becomes a directory's; expected letters, digits and . _ + - only"
            )
        wanted[recipe.name] = recipe, said
    return [recipe for recipe, _ in wanted.values()]


def _folder(output: str | Path | None, source: Path, stack: ExitStack) -> Path:
    if output is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-compare-")))
    folder = Path(output)
    if folder.resolve().is_relative_to(source.resolve()):
        raise InputError(f"the output {folder} lies inside the model {source}; choose one outside it")
    if not folder.parent.is_dir():
        raise InputError(f"cannot write {folder}: there is no directory {folder.parent}; create it first")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a directory, or a name for a new one")
    folder.mkdir(exist_ok=True)
    return folder


def _compile(model: str | Path, run: Run, store: Store, given: Mapping[str, Any], reporter: Reporter) -> None:
    if run.has("compile", run.key):
        reporter.note(f"{run.name}: compiled already, and nothing that it depends on has changed")
        return
    from qcompiler import compiler

    import_module("qcompiler.emit")  # what every compile imports should not be the first recipe's time
    # Before it begins, so that a directory left by an interruption is known to be ours.
    store.save(run)
    start = time.perf_counter()
    try:
        with HighestPeak() as peak:
            result = compiler.compile(model, output=run.path, recipe=run.recipe, overwrite=True, reporter=reporter, **given)
    except (QCompilerError, MemoryError) as error:
        _fail(run, error, reporter)
        gc.collect()
        return
    totals = result.layers["totals"]
    run.found["compile"] = {
        "key": run.key,
        "manifest": digest(run.path / MANIFEST)["sha256"],
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak.bytes,
        "bytes": totals["bytes"]["total"],
        "bits_per_weight": totals["bits_per_weight"],
        "coverage": totals["coverage"],
        "parameters": result.manifest["model"]["parameters"],
        "kind": result.manifest["kind"],
        "context": result.manifest["context"],
    }
    store.save(run)
    # What this compile held should not count in the next one's peak, nor stay beside what is evaluated.
    del result
    gc.collect()


def _fail(run: Run, error: BaseException, reporter: Reporter) -> None:
    if isinstance(error, Stopped):
        raise error
    if not isinstance(error, QCompilerError):
        error = CapacityError(f"out of memory: {error}")
    # Without its traceback, whose frames hold a whole model.
    run.error = error.with_traceback(None)
    run.error.__context__ = run.error.__cause__ = None
    reporter.warning(f"{run.name} failed: {error}")


def _evaluate(
    model: str | Path, runs: list[Run], store: Store, key_: str, windows: Mapping[str, Any], reporter: Reporter
) -> None:
    missing = [run for run in runs if run.error is None and not run.has("evaluation", key(run.key, key_))]
    if not missing:
        return
    from qcompiler.evaluate.evaluation import evaluate_each

    reporter.stage("evaluate")
    results = evaluate_each([str(run.path) for run in missing], str(model), reporter=reporter, **windows)
    for run, result in zip(missing, results, strict=True):
        if isinstance(result, QCompilerError):
            _fail(run, result, reporter)
        else:
            run.found["evaluation"] = {"key": key(run.key, key_), "result": result}
            store.save(run)


def _speed(
    runs: list[Run], store: Store, given: dict[str, Any], repeats: int, threads: int | None, reporter: Reporter
) -> None:
    """Rounds over all recipes; when one has no figure that was taken beside the others, all are measured again."""
    decoders = [run for run in runs if run.error is None and run.found["compile"]["kind"] == "decoder"]
    beside = key(sorted(run.key for run in decoders), given, repeats, threads, cpu_model())
    if all(run.found.get("speed", {}).get("key") == beside for run in decoders):
        for run in decoders:
            run.has("speed", beside)
        return
    from qcompiler.runtime.bench import bench, spread

    reporter.stage("speed")
    context = min((run.found["compile"]["context"] or given["new_tokens"] * 4 for run in decoders), default=0)
    given = given | {"new_tokens": max(1, min(given["new_tokens"], context // 4))}
    samples: dict[str, list[dict[str, Any]]] = {run.name: [] for run in decoders}
    for number in range(repeats):
        for i, run in enumerate(decoders):
            reporter.layer(number * len(decoders) + i + 1, repeats * len(decoders), f"{run.name}, round {number + 1}")
            # One session at a time, opened anew: it warms up before it is measured.
            samples[run.name].append(bench(run.path, repeats=1, threads=threads, seed=number, **given))
    for run in decoders:
        taken = samples[run.name]
        run.found["speed"] = {"key": beside, **{name: spread([s[name]["median"] for s in taken]) for name in _SPEEDS}}
        store.save(run)


def _row(run: Run, kept: bool) -> dict[str, Any]:
    """A row of the result: everything None where the recipe failed."""
    found = {} if run.error is not None else run.found
    compiled, scores = found.get("compile", {}), found.get("evaluation", {}).get("result", {})
    outputs = list((scores.get("outputs") or {}).values())
    error = None if run.error is None else {"exit_code": run.error.exit_code, "message": str(run.error)}
    return {
        "recipe": run.name,
        "description": run.recipe.description,
        "directory": str(run.path) if kept and run.error is None else None,
        "error": error,
        "bytes": compiled.get("bytes"),
        "bits_per_weight": compiled.get("bits_per_weight"),
        "coverage": compiled.get("coverage"),
        **{name: scores.get(name) for name in _SCORES},
        "cosine": min((o["cosine"] for o in outputs), default=None),
        "sqnr_db": min((o["sqnr_db"] for o in outputs if o["sqnr_db"] is not None), default=None),
        **{name: found.get("speed", {}).get(name) for name in _SPEEDS},
        "compile_seconds": compiled.get("seconds"),
        "peak_rss_bytes": compiled.get("peak_rss_bytes"),
        "reused": {kind: kind in run.reused for kind in ("compile", "evaluation", "speed")},
    }
