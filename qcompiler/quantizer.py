"""The pipeline as transformers' exporters see it: `OnnxConfig(quantizer=qcompiler.Quantizer(recipe))`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.exporters.configs import ExportFormat
from transformers.exporters.quantizers.base import ExportQuantizer
from transformers.exporters.quantizers.utils import traced_inputs

from qcompiler import recipe as recipes
from qcompiler.errors import GateError, InputError
from qcompiler.graph.graph import Graph, Kind
from qcompiler.ops.onnx_ops import register
from qcompiler.passes import pipeline
from qcompiler.pipeline.context import Context
from qcompiler.pipeline.manager import PassManager
from qcompiler.pipeline.passes import Report
from qcompiler.pipeline.probe import output_sqnr
from qcompiler.pipeline.trace import Trace
from qcompiler.recipe.schema import Recipe
from qcompiler.report.progress import Reporter, Silent
from qcompiler.sweep.store import SolvedStore

# The layers' output errors are measured on the first of the calibration samples; more change a figure's third digit.
MEASURED_SAMPLES = 4


class Quantizer(ExportQuantizer):
    """Runs a recipe's passes on the graph that an exporter captured.

    Args:
        recipe: name, YAML file, mapping or Recipe.
        reporter: progress; silent by default.
        samples: yields keyword arguments of the graph for calibration and for the layers' output SQNR; defaults to
            `calibration_dataset`, else to the inputs that the graph was captured with.
        calibration_dataset: keyword arguments of the exported module's `forward`, in any order; keys that the graph
            does not take are left out.
        verify_each: verify the graph after every pass (tests).

    After `quantize`: `trace`, `graph` and `context` hold what happened; a second `quantize` begins them anew.
    """

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.ONNX, ExportFormat.DYNAMO)
    required_packages = ("torch", "onnx", "onnxscript")

    def __init__(
        self,
        recipe: str | Path | dict | Recipe = "int4",
        *,
        reporter: Reporter | None = None,
        samples: Callable[[], Iterable[dict[str, Any]]] | None = None,
        calibration_dataset: Iterable[dict[str, Any]] | None = None,
        kind: Kind | None = None,
        verify_each: bool = False,
    ):
        super().__init__(calibration_dataset)
        register()
        self.recipe = recipes.load(recipe)
        self.reporter = reporter or Silent()
        self.samples = samples
        self.kind = kind
        self.verify_each = verify_each
        self.scratch: Path | None = None  # a folder for solutions and packed weights; None keeps them in memory
        self.memory: int | None = None  # bytes that calibration may take; None for no bound
        self.store: SolvedStore | None = None  # solved sites, for resuming
        self.device = "cpu"  # where samples run and solvers compute
        self.trace_timings = True
        self.fuse = True  # False for a target whose ops are one for every layer
        self.captured: Report | None = None  # what capture had to decide, for the record
        self.trace = Trace()
        self.graph: Graph | None = None
        self.context: Context | None = None

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat) -> torch.fx.GraphModule:
        """Rewrite the captured graph by the recipe.

        Raises:
            GateError: a pass matched nothing, fell back, or coverage is below what the recipe asks for.
        """
        kind = self.kind or ("decoder" if any("past" in name for name in sample_inputs) else "encoder")
        graph = self.graph = Graph(model, kind, sample_inputs)
        # One quantizer serves every component of a model, and a copy of it (`with_calibration`) shares its attributes.
        self.trace = Trace(timings=self.trace_timings)
        context = self.context = Context(
            self.recipe,
            self.reporter,
            samples=self.samples or self._calibration(sample_inputs),
            memory=self.memory,
            scratch=self.scratch,
            store=self.store,
            device=self.device,
        )
        context.solutions.folder = self.scratch
        manager = PassManager(self.trace, self.verify_each)
        manager.capture(graph, self.captured, context)
        before, after = pipeline(self.recipe, self.fuse)
        manager.run(graph, context, before)
        self._check_coverage()
        self._probe(graph, context, manager)
        manager.run(graph, context, after)
        graph.materialise(self.scratch)
        return graph.module

    def _calibration(self, sample_inputs: dict[str, Any]) -> Callable[[], Iterable[dict[str, Any]]]:
        """The calibration set as arguments of the graph, in its order; the capture's own inputs where there is none."""
        given = self.calibration_dataset
        if given is None:
            return lambda: [sample_inputs]
        # Read once a pass: what can be read only once is kept.
        dataset = list(given) if iter(given) is given else given

        def read() -> Iterator[dict[str, Any]]:
            for index, sample in enumerate(dataset):
                try:
                    yield traced_inputs(sample, list(sample_inputs))
                except ValueError as error:
                    raise InputError(f"calibration sample {index}: {error}") from error

        return read

    def _probe(self, graph: Graph, context: Context, manager: PassManager) -> None:
        self.reporter.stage("measure_outputs")
        samples = list(itertools.islice(context.samples(), MEASURED_SAMPLES))
        with manager.watched(graph) as timing:
            layers = {name: {"output_sqnr_db": value} for name, value in output_sqnr(graph, context, samples).items()}
        for name, values in layers.items():
            if values["output_sqnr_db"] != values["output_sqnr_db"]:
                raise InputError(f"layer {name}: its output is not finite on the calibration samples")
        self.trace.add_numbers("measure_outputs", "solve", layers, {"samples": len(samples)}, timing)

    def _check_coverage(self) -> None:
        coverage, left = self.coverage()
        if coverage < self.recipe.allow.min_coverage:
            listed = "".join(f"\n  {name}: {size} bytes: {reason}" for name, (size, reason) in left.items())
            asked = self.recipe.allow.min_coverage
            raise GateError(
                f"{coverage:.1%} of the bytes of constant matmul weights would be quantized, {asked:.0%} are asked for; "
                f"left in float:{listed}\n"
                f"Allow it with the recipe's allow: {{min_coverage: {max(0.0, coverage - 0.005):.2f}}}"
            )

    def coverage(self) -> tuple[float, dict[str, tuple[int, str]]]:
        """Share of the bytes of all constant matmul weights that are quantized; what is left: name -> (bytes, why)."""
        assert self.graph is not None and self.context is not None, "call quantize first"
        left = dict(self.graph.leftovers)
        done, seen = 0, set()
        for site in self.graph.sites:
            if site.tie_group is not None and site.tie_group in seen:
                continue
            seen.add(site.tie_group)
            size = 4 * site.size
            if site.name in self.context.schemes:
                done += size
            elif site.kind != "embedding":
                left[site.name] = (size, self.context.left_in_float.get(site.name, "not solved"))
        total = done + sum(size for size, _ in left.values())
        return (done / total if total else 0.0), left
