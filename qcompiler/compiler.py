"""From a model to an artifact in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qcompiler import recipe as recipes
from qcompiler.artifact.manifest import build_manifest
from qcompiler.artifact.workspace import Workspace
from qcompiler.artifact.writer import ArtifactWriter
from qcompiler.errors import UsageError
from qcompiler.report.progress import Reporter, Silent

if TYPE_CHECKING:
    import torch

    from qcompiler.capture.checkpoint import Loaded
    from qcompiler.capture.prepared import Prepared
    from qcompiler.evaluate.windows import Context
    from qcompiler.quantizer import Quantizer
    from qcompiler.recipe.schema import Recipe

Target = Literal["onnx", "onnx-stock", "torch"]
TARGETS = ("onnx", "onnx-stock", "torch")

# Samples that the layers' output SQNR is measured on where the recipe's passes ask for no calibration.
DEFAULT_SAMPLES, DEFAULT_LENGTH = 4, 256


@dataclass(frozen=True)
class CompileResult:
    """What a compile produced.

    Attributes:
        path: the artifact's directory.
        manifest: as written.
        layers: content of layers.json: one record a layer, what was left in float, totals.
        seconds: wall time.
        quantizer: the graph as rewritten, the solutions and the trace, in memory.
    """

    path: Path
    manifest: dict[str, Any]
    layers: dict[str, Any]
    seconds: float
    quantizer: Quantizer


def compile(
    model: str | Path | torch.nn.Module,
    *,
    output: str | Path,
    recipe: str | Path | dict | Recipe = "int4",
    target: Target = "onnx",
    text: Iterable[str | Path] | None = None,
    calibration: Iterable[Any] | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    reproducible: bool = False,
    overwrite: bool = False,
    strict_groups: bool = False,
    reporter: Reporter | None = None,
    example: Any = None,
    dynamic_shapes: dict[str, Any] | None = None,
) -> CompileResult:
    """Compile a model to a quantized artifact.

    Args:
        model: a Hugging Face directory, a hub id, `reference`, or any `nn.Module` (with `example` inputs unless it is a
            `PreTrainedModel`).
        output: the directory to make; its parent must exist.
        recipe: name of a built-in one, a YAML file, a mapping, or a Recipe.
        target: `onnx` (our ops, function bodies inside), `onnx-stock` (ops of an unmodified ONNX Runtime), `torch`.
        text: calibration text; by default the documentation that comes with Python.
        calibration: calibration samples in place of text, all of them unless `samples` says how many: token ids of a model that
            takes text, of any other module what `example` is.
        samples, length, seed: calibration windows, tokens in each, and which windows; by default the recipe's, where that
            says nothing 4 windows of at most 256 tokens.
        memory: bytes of anonymous memory that calibration may take; beyond it activations go to a file beside the output.
        device: `cpu`, `cuda` or `cuda:N`: where samples run and solvers compute. Weights are fetched layer by layer, so the model
            need not fit there. The artifact is the same kind of artifact, its numbers equal up to rounding.
        resume: go on from what an earlier run with the same output has solved.
        reproducible: leave times and memory out of the artifact, so that equal inputs give equal bytes of every file.
        overwrite: replace an artifact that is already there.
        strict_groups: make a short last group an error.
        reporter: progress; silent by default.
        example: keyword arguments or a tuple that a plain module is called with.
        dynamic_shapes: which of their axes vary, as `torch.export` takes it.

    Raises:
        QCompilerError: with the exit code of the command line; nothing is left behind.
    """
    from qcompiler.emit import emit
    from qcompiler.runtime.device import find_device
    from qcompiler.sweep.store import SolvedStore

    start = time.perf_counter()
    reporter = reporter or Silent()
    chosen = _recipe(recipe, strict_groups)
    _check_target(target, chosen)
    find_device(device)
    source_dir = Path(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
    writer = ArtifactWriter(output, overwrite=overwrite, source_dir=source_dir)
    writer.check()
    if calibration is not None:
        from qcompiler.capture.given_samples import collected

        if not (text is length is seed is None):
            raise UsageError("calibration samples are given: text, length and seed choose windows of text")
        calibration = collected(calibration, samples)
        samples = len(calibration)
    chosen = _calibrated(chosen, samples, length, seed)
    loaded, prepared, quantizer = _prepare(model, chosen, text, reporter, example, dynamic_shapes, calibration)
    quantizer.trace_timings = not reproducible
    quantizer.fuse = target != "onnx-stock"
    with writer, Workspace(writer.target, resume) as workspace:
        quantizer.memory, quantizer.scratch, quantizer.device = memory, workspace.scratch, device
        quantizer.store = SolvedStore(workspace.solved)
        facts = emit(writer, prepared, quantizer, target, reporter)
        _write_records(writer, quantizer, facts["layers"], loaded)
        manifest = build_manifest(
            target=target,
            kind=prepared.kind,
            source=loaded.source_description if loaded is not None else type(model).__name__,
            model_type=prepared.description,
            parameters=sum(p.numel() for p in prepared.module.parameters()),
            recipe=chosen.name,
            fallbacks=[f for e in quantizer.trace.entries for f in e.record["fallbacks"]],
            allowed=recipes.to_dict(chosen)["allow"],
            tokens=_special_tokens(loaded.model if loaded is not None else model, prepared.kind),
            context=_context(loaded.model if loaded is not None else model).positions,
            **facts["manifest"],
        )
        writer.set_manifest(manifest)
    return CompileResult(writer.target, manifest, facts["layers"], time.perf_counter() - start, quantizer)


def plan(
    model: str | Path | torch.nn.Module,
    *,
    recipe: str | Path | dict | Recipe = "int4",
    target: Target = "onnx",
    strict_groups: bool = False,
    reporter: Reporter | None = None,
    example: Any = None,
    dynamic_shapes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `compile` would do, layer by layer, with sizes and the memory it would need; writes nothing.

    Returns:
        `target`; `layers`, `left_in_float` and `totals` as in layers.json, without measured errors. In `totals` also
        `float_bytes`, `peak_bytes` and `memory` (what the peak consists of). All but the layers' sizes are estimates.
    """
    from qcompiler import estimate
    from qcompiler.capture.capture import captured
    from qcompiler.graph.graph import Graph
    from qcompiler.ops.packing import packed_bytes_of
    from qcompiler.passes import pipeline
    from qcompiler.pipeline.accounting import layers_file, planned_totals
    from qcompiler.pipeline.context import Context
    from qcompiler.pipeline.manager import PassManager

    chosen = _recipe(recipe, strict_groups)
    _check_target(target, chosen)
    calibrated = _calibrated(chosen, 0, None, None)
    loaded, prepared, quantizer = _prepare(model, calibrated, None, reporter or Silent(), example, dynamic_shapes)
    graph: Graph = captured(prepared)
    quantizer.graph, quantizer.context = graph, Context(chosen, quantizer.reporter)
    before, _ = pipeline(chosen)
    decisions = [step for step in before if step.stage in ("normalise", "analyse")]
    PassManager(quantizer.trace).run(graph, quantizer.context, decisions)
    bytes_of: Callable[..., dict[str, int]] = packed_bytes_of
    if target == "onnx-stock":
        from qcompiler.lower.stock import planned_bytes as bytes_of
    _describe_plan(quantizer, bytes_of)
    packed = planned_totals(quantizer, bytes_of)
    result = {"target": target, **layers_file(quantizer, None, packed)}
    weights = estimate.float_bytes(prepared.module)
    # What comes from a checkpoint stays in its files.
    memory = estimate.peak_memory(quantizer, weights if loaded is None else 0, bool(prepared.stored))
    result["totals"] |= {
        "bytes": estimate.file_sizes(quantizer, prepared, packed, target),
        "float_bytes": weights,
        "peak_bytes": sum(memory.values()),
        "memory": memory,
    }
    return result


def _check_target(target: str, recipe: Recipe) -> None:
    """Refuse what the target cannot run before the model is read."""
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    if target == "onnx-stock":
        from qcompiler.lower.stock import check_recipe

        check_recipe(recipe)


def _describe_plan(quantizer: Quantizer, bytes_of: Callable[..., dict[str, int]]) -> None:
    """Fill in what a solve would add to the records: format and bytes."""
    assert quantizer.graph is not None and quantizer.context is not None
    layers = quantizer.trace.entries[-1].record["layers"]
    for site in quantizer.graph.sites:
        scheme = quantizer.context.schemes.get(site.name)
        if scheme is not None:
            size = site.experts * sum(bytes_of(*site.shape, scheme.weight_format).values())
            layers[site.name] = {
                "format": scheme.weight_format.label,
                "bytes": size,
                "bits_per_weight": round(8 * size / site.size, 4),
            }


def _recipe(recipe: str | Path | dict | Recipe, strict_groups: bool) -> Recipe:
    import dataclasses

    chosen = recipes.load(recipe)
    return dataclasses.replace(chosen, strict_groups=True) if strict_groups else chosen


def _calibrated(recipe: Recipe, samples: int | None, length: int | None, seed: int | None) -> Recipe:
    """The recipe with its calibration as it will be done: what the call asks for, else what the recipe says."""
    import dataclasses

    asked = {"samples": samples, "length": length, "seed": seed}
    try:
        calibration = dataclasses.replace(recipe.calibration, **{k: v for k, v in asked.items() if v is not None})
    except ValueError as error:  # pydantic's own is one
        messages = [e["msg"].removeprefix("Value error, ") for e in getattr(error, "errors", list)()]
        raise UsageError(f"calibration: {'; '.join(messages) or error}") from error
    if calibration.samples is None:
        calibration = dataclasses.replace(calibration, samples=DEFAULT_SAMPLES)
    return dataclasses.replace(recipe, calibration=calibration)


def _prepare(
    model: str | Path | torch.nn.Module, recipe: Recipe, text: Any, reporter: Reporter,
    example: Any, dynamic_shapes: dict[str, Any] | None, calibration: Collection[Any] | None = None,
) -> tuple[Loaded | None, Prepared, Quantizer]:  # fmt: skip
    from qcompiler.capture.checkpoint import load
    from qcompiler.capture.finite import check_finite
    from qcompiler.capture.prepare import prepare
    from qcompiler.capture.widened import in_float32
    from qcompiler.quantizer import Quantizer

    reporter.stage("load")
    if isinstance(model, (str, Path)):
        loaded = load(model, as_it_is_stored=True)
        module: torch.nn.Module = loaded.model
        stored, notes = loaded.stored, loaded.notes
    else:
        check_finite(model, type(model).__name__)
        loaded = None
        module, example, stored, notes = in_float32(model, example)
    for note in notes:
        reporter.note(note)
    reporter.stage("capture")
    with stored.lent(module):
        prepared = prepare(
            module, example, dynamic_shapes, text_only=recipe.allow.text_only, fixed_length=recipe.allow.fixed_length
        )
    prepared.stored = stored
    for note in prepared.notes:
        reporter.note(note)
    if calibration is not None:
        from qcompiler.capture.given_samples import given_samples

        feeds = given_samples(prepared, calibration, plain=example is not None)
    else:
        feeds = _samples(loaded, prepared, text, recipe, reporter)
    quantizer = Quantizer(recipe, reporter=reporter, samples=feeds, kind=prepared.kind)
    quantizer.captured = prepared.report()
    return loaded, prepared, quantizer


def _samples(
    loaded: Loaded | None, prepared: Prepared, text: Any, recipe: Recipe, reporter: Reporter
) -> Callable[[], Iterable[dict[str, Any]]]:
    """Calibration samples as arguments of the graph; the example alone where there is no tokenizer."""
    from qcompiler.capture.feeds import arguments, steps, takes_tokens

    wanted = recipe.calibration
    samples = wanted.samples or 0
    if samples < 1:
        return tuple
    if loaded is None or not loaded.tokenizer_files or not takes_tokens(prepared):
        reporter.note("no tokenizer: calibration and the layers' output SQNR see the inputs of the capture alone")
        return lambda: [arguments(prepared)]

    fixed = None if prepared.fixed is None else prepared.fixed.tokens
    if fixed is not None and wanted.length not in (None, fixed):
        raise UsageError(f"calibration: windows of {wanted.length} tokens, the graph takes {fixed}: leave the length away")
    context = _context(loaded.model)
    if wanted.length is not None and context.positions is not None and wanted.length > context.positions:
        raise UsageError(f"calibration: windows of {wanted.length} tokens, the model takes at most {context.positions}")

    told = False

    def read() -> Iterable[dict[str, Any]]:
        import torch

        from qcompiler.evaluate.calibration import calibration_batches

        nonlocal told
        length = fixed or wanted.length or min(context.default or DEFAULT_LENGTH, DEFAULT_LENGTH)
        longest = prepared.longest  # known since the graph was captured
        if longest is not None and longest < (wanted.length or 0) and not told:
            reporter.note(f"calibration: windows of {longest} tokens in place of {wanted.length}, the most that the graph takes")
            told = True
        windows = calibration_batches(
            loaded.directory,
            text=text,
            samples=samples,
            length=min(length, longest or length),
            seed=wanted.seed,
            reporter=reporter,
        )
        for window in windows:
            yield from steps(prepared, torch.as_tensor(window).reshape(1, -1))

    return read


def _context(model: Any) -> Context:
    """What the model's configuration says of its context; nothing of a plain module."""
    from transformers import PreTrainedModel

    from qcompiler.evaluate.windows import Context

    return Context.of_config(model.config) if isinstance(model, PreTrainedModel) else Context()


def _write_records(writer: ArtifactWriter, quantizer: Quantizer, layers: dict[str, Any], loaded: Loaded | None) -> None:
    from qcompiler.report.environment import environment

    writer.write_text("recipe.yaml", recipes.to_yaml(quantizer.recipe))
    writer.write_json("layers.json", layers)
    writer.write_json("report.json", {"schema": 1, "recipe": quantizer.recipe.name, "totals": layers["totals"]})
    quantizer.trace.write(writer)
    writer.write_json("trace/environment.json", environment())
    for file in [*loaded.tokenizer_files, *loaded.config_files] if loaded is not None else ():
        writer.add_file(file)


def _special_tokens(model: Any, kind: str) -> dict[str, Any] | None:
    """Ids that begin, end and pad a text; every id that ends one, and those that no text has. From generation settings and
    configuration.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    settings = [getattr(model, "generation_config", None), model.config.get_text_config()]

    def ids(name: str) -> list[int]:
        values = [getattr(s, name, None) for s in settings if s is not None]
        return sorted({int(i) for v in values if v is not None for i in (v if isinstance(v, (list, tuple)) else [v])})

    first = lambda name: next(iter(ids(name)), None)  # noqa: E731
    found: dict[str, Any] = {"bos": first("bos_token_id"), "eos": ids("eos_token_id"), "pad": first("pad_token_id")}
    if kind == "encoder-decoder":
        from qcompiler.capture.encoder_decoder import start_token

        begin = [start_token(model), first("forced_bos_token_id")]
        found["decoder_start"] = [token for token in begin if token is not None]
    # Of texts of several tokens that must not appear none is known here; of single ones all.
    words = [word for s in settings for word in getattr(s, "bad_words_ids", None) or []]
    if never := sorted({*ids("suppress_tokens"), *(word[0] for word in words if len(word) == 1)}):
        found["never"] = never
    return found
