"""Which layers can least afford few bits: KL(float ‖ model with only that layer quantized), layer by layer.

Every weight is rounded to nearest by itself (activations stay float), and what the model then predicts is compared with what it
predicts in float. The values before a layer do not depend on it: all windows are advanced through the float graph side by
side, and from each layer on the rest is run again for every width. Held at once are, a window, the values that are alive at one
point of the graph; the float logits lie in a temporary file.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx import Node

from qcompiler import recipe as recipes
from qcompiler.errors import GateError, InputError, UnsupportedError, UsageError
from qcompiler.evaluate.metrics import Mean, token_divergence
from qcompiler.graph.partial import PartialRun
from qcompiler.numerics import affine
from qcompiler.ops.formats import BITS, GROUPS, AffineFormat
from qcompiler.recipe.keep import candidates, keep_recipe
from qcompiler.recipe.schema import Recipe, Scheme
from qcompiler.report.progress import Reporter, Silent
from qcompiler.runtime.device import find_device
from qcompiler.sweep.place import CPU, working_on

if TYPE_CHECKING:
    from qcompiler.capture.checkpoint import Loaded
    from qcompiler.capture.prepared import Prepared
    from qcompiler.graph.graph import Graph, Site

SCHEMA = 1
DEFAULT_SAMPLES, DEFAULT_LENGTH, DEFAULT_GROUP = 8, 256, 32


def sensitivity(
    model: str | Path,
    *,
    bits: Sequence[int] = BITS,
    group: int = DEFAULT_GROUP,
    text: Sequence[str | Path] | None = None,
    samples: int = DEFAULT_SAMPLES,
    length: int | None = None,
    threads: int | None = None,
    device: str = CPU,
    base: str | Path | dict | Recipe | None = None,
    keep: int | None = None,
    keep_bits: int = 8,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure how much each linear layer of a language model (and each mixture of experts) matters at each width.

    Args:
        model: a checkpoint directory, a hub id or `reference`; a decoder language model.
        bits: widths to try.
        group: columns that share a scale; 0 for the whole row.
        text: files; by default the calibration text, so that the evaluation text stays unseen by what is chosen from this.
        samples, length: windows and tokens in each; the length defaults to the model's own window, at most 256.
        threads: of torch; None leaves it as it is.
        device: `cpu`, `cuda` or `cuda:N`: where windows run and weights are rounded; weights are fetched one by one.
        base: a recipe; what its `allow` says of the graph (`fixed_length`, `text_only`) holds for the one that is measured.
        keep, keep_bits: also make a recipe: `base` (default `int4`) with its `keep` most sensitive layers at
            `keep_bits`. See `recipe.keep.keep_recipe`.

    Returns:
        A dict for JSON: `schema`, `model`, `text`, `samples`, `length`, `tokens`, `bits`, `group`, `layers` (in graph order:
        `name`, `role`, `shape` of the weight, `weights`, `tied`, and `kld`: by bits `mean` in nats and `se` over windows),
        `ranking` (by bits the names, the most sensitive first), `seconds`, and `recipe` (a mapping, or None).

    Raises:
        UsageError: an argument is out of range, or `base` has fewer layers that `keep_bits` would widen.
        UnsupportedError: the model does not predict tokens.
        InputError: the model or the text cannot be read.
        GateError: the model's predictions are not finite.
    """
    reporter, start = reporter or Silent(), time.perf_counter()
    widths = _check(bits, group, samples, threads)
    # Before the model is read: a misspelt recipe should not cost minutes.
    given = recipes.load("int4" if base is None else base)
    chosen = given if keep is not None else None
    find_device(device, kernels=False)
    from qcompiler.capture.checkpoint import load
    from qcompiler.capture.prepare import prepare

    reporter.stage("load")
    loaded = load(model)
    size = _length(loaded, length)
    reporter.stage("capture")
    prepared = prepare(loaded.model, text_only=given.allow.text_only, fixed_length=given.allow.fixed_length)
    if prepared.kind != "decoder":
        raise UnsupportedError(
            f"{loaded.source_description} ({prepared.description}) does not predict the next token, so there is no divergence of "
            "predictions to rank its layers by; expected a decoder language model"
        )
    if prepared.fixed is not None:
        if length not in (None, prepared.fixed.tokens):
            raise UsageError(f"length is {length}, but the graph takes {prepared.fixed.tokens} tokens: leave it away")
        size = prepared.fixed.tokens
    windows, description = _windows(loaded, text, samples, min(size, prepared.longest or size), reporter)
    graph = _analysed(prepared, reporter)
    sites = [site for site in graph.sites if site.kind != "embedding"]
    layers = [_described(site, graph) for site in sites]
    if chosen is not None:
        candidates(chosen, layers, keep or 0, keep_bits, widths)  # refuse now what would be refused in the end
    with _threads(threads), torch.inference_mode(), working_on(device):
        _measure(graph, prepared, sites, layers, windows, widths, group, reporter, device)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "model": loaded.source_description,
        "text": description,
        "samples": len(windows),
        "length": len(windows[0]),
        "tokens": sum(map(len, windows)),
        "bits": widths,
        "group": group,
        "layers": layers,
        "ranking": {str(b): _ranked(layers, b) for b in widths},
        "seconds": round(time.perf_counter() - start, 3),
        "recipe": None,
    }
    if chosen is not None:
        result["recipe"] = recipes.to_dict(keep_recipe(chosen, layers, keep or 0, keep_bits))
    return result


def _ranked(layers: Sequence[dict[str, Any]], bits: int) -> list[str]:
    return [layer["name"] for layer in sorted(layers, key=lambda layer: -layer["kld"][str(bits)]["mean"])]


def _check(bits: Sequence[int], group: int, samples: int, threads: int | None) -> list[int]:
    """The widths without repetition, the widest first."""
    if not bits or any(b not in BITS for b in bits):
        raise UsageError(f"bits are {', '.join(map(str, bits)) or 'none'}, expected some of {', '.join(map(str, BITS))}")
    if group not in GROUPS:
        raise UsageError(f"group is {group}, expected one of {', '.join(map(str, GROUPS))} (0: the whole row)")
    if samples < 1:
        raise UsageError(f"samples is {samples}, expected at least 1")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}, expected at least 1")
    return sorted(set(bits), reverse=True)


def _analysed(prepared: Prepared, reporter: Reporter) -> Graph:
    """The captured graph with its sites and roles, as every compile finds them."""
    from qcompiler.capture.capture import captured
    from qcompiler.passes import pipeline
    from qcompiler.pipeline.context import Context
    from qcompiler.pipeline.manager import PassManager
    from qcompiler.pipeline.trace import Trace

    graph = captured(prepared)
    recipe = Recipe(name="sensitivity", linear=Scheme(bits=8), head=Scheme(bits=8))
    steps = [step for step in pipeline(recipe)[0] if step.stage in ("normalise", "analyse")]
    PassManager(Trace()).run(graph, Context(recipe, reporter), steps)
    return graph


def _described(site: Site, graph: Graph) -> dict[str, Any]:
    tied = [s.name for s in graph.sites if s is not site and site.tie_group is not None and s.tie_group == site.tie_group]
    shape = list(site.weight_shape)
    return {"name": site.name, "role": site.role, "shape": shape, "weights": site.size, "tied": tied, "kld": {}}


def _length(loaded: Loaded, length: int | None) -> int:
    """Tokens in a window."""
    from qcompiler.evaluate.windows import Context

    if not loaded.tokenizer_files:
        raise InputError(f"{loaded.source_description} comes without a tokenizer: there are no tokens to measure on")
    known = Context.of_config(loaded.model.config)
    if length is not None and known.positions is not None and length > known.positions:
        raise UsageError(f"length is {length}, but the model takes at most {known.positions} tokens")
    return length or min(known.default or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _windows(
    loaded: Loaded, text: Sequence[str | Path] | None, samples: int, length: int, reporter: Reporter
) -> tuple[list[np.ndarray], str]:
    """Token windows, int64 `[length]` each, and the description of the text."""
    from qcompiler.evaluate.calibration import calibration_batches
    from qcompiler.evaluate.text import as_text, calibration_text

    source = as_text(text, calibration_text)
    return calibration_batches(loaded.directory, source, samples=samples, length=length, reporter=reporter), source.description


def _measure(
    graph: Graph, prepared: Prepared, sites: list[Site], layers: list[dict[str, Any]], windows: list[np.ndarray],
    widths: list[int], group: int, reporter: Reporter, device: str = CPU,
) -> None:  # fmt: skip
    """Fill `kld` of every layer."""
    from qcompiler.capture.feeds import feed

    run = PartialRun(graph, device)
    envs = [run.begin(feed(prepared, torch.from_numpy(window)[None])) for window in windows]
    with tempfile.TemporaryFile(prefix="qcompiler-logits-") as file:
        expected = _float_logits(run, envs, file, reporter)
        reporter.stage("sensitivity")
        order = sorted(range(len(sites)), key=lambda i: run.position.get(sites[i].node, len(run.nodes)))
        at = 0
        for done, index in enumerate(order, 1):
            site, kld = sites[index], layers[index]["kld"]
            reporter.layer(done, len(sites), site.name)
            position = run.position.get(site.node)
            if position is None:  # nothing of it reaches the logits
                kld |= {str(bits): {"mean": 0.0, "se": 0.0} for bits in widths}
                continue
            for env in envs:
                run.run(env, at, position)
            at = position
            for bits in widths:
                try:
                    kld[str(bits)] = _divergence(run, envs, expected, position, _rounded(graph, site, bits, group, device))
                except ValueError as error:
                    raise InputError(f"layer {site.name} at {bits} bits: {error}") from error
            reporter.layer(done, len(sites), site.name, f"KL {kld[str(widths[-1])]['mean']:.2g} at {widths[-1]} bits")


def _rounded(graph: Graph, site: Site, bits: int, group: int, device: str = CPU) -> dict[int, torch.Tensor]:
    """The site's weight, rounded to nearest and back in float, by its position among the arguments of the site's node."""
    format = AffineFormat(bits, group)
    parts = [affine.fit(weight.to(device), format, "mse").dequantize() for _, weight in graph.matrices(site)]
    inputs = [isinstance(a, Node) and a.op == "get_attr" and str(a.target) == site.weight for a in site.node.args]
    return {inputs.index(True): torch.stack(parts) if site.kind == "experts" else parts[0]}


def _divergence(
    run: PartialRun, envs: list[dict[Node, Any]], expected: np.ndarray, position: int, weight: dict[int, torch.Tensor]
) -> dict[str, float | None]:
    """Mean divergence, with its standard error, of the rest of the graph from `position` on with another weight there."""
    mean = Mean()
    for env, reference in zip(envs, expected, strict=True):
        branch = run.branch(env)
        run.run(branch, position, None, weight)
        values, _ = token_divergence(reference, branch[run.output][0].float().cpu().numpy())
        if not np.isfinite(values).all():
            raise ValueError("the predictions of the model with only this layer rounded are not finite")
        mean.add(values)
    return {"mean": mean.mean, "se": mean.se}


def _float_logits(run: PartialRun, envs: list[dict[Node, Any]], file: Any, reporter: Reporter) -> np.ndarray:
    """The float model's logits, float32 `[windows, length, vocabulary]`, mapped from `file`."""
    reporter.stage("float")
    expected: np.ndarray | None = None
    for i, env in enumerate(envs):
        reporter.layer(i + 1, len(envs), f"window {i + 1}")
        branch = run.branch(env)
        run.run(branch, 0, None)
        logits = branch[run.output][0].float().cpu().numpy()
        if np.isnan(logits).any() or (logits == np.inf).any():
            raise GateError(f"the float model's logits are not finite in window {i}")
        if expected is None:
            expected = np.memmap(file, np.float32, "w+", shape=(len(envs), *logits.shape))
        expected[i] = logits
    assert expected is not None
    return expected


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
