"""Survey of the model types of transformers: which its exporter can trace, which are captured, which compile and compute
the same.

For every text model type that has a class for causal language models, an encoder class that takes token ids, or an
encoder-decoder class, a small model is made (`tiny_configurations.py`), and in a process of its own, with a time limit:

  exporter   the unmodified exporter of transformers traces the decode step of its own decomposition (decoders) or the
             forward pass (others); measured on its own where the capture fails, else it was traced within the capture
  captured   `prepare` and the exporter give a graph that computes what the model computes: for decoders in pieces of
             1, 6, 1, 5 and 1 tokens, without a cache at the lengths 1, 2, 7, 14, 40 and 63, for encoders at other batches and
             lengths than it was traced with, for encoder-decoders at other lengths of both texts; of models that take more
             than text the text path alone; where the model's own code holds the length or the batch, a graph of fixed sizes
  compiled   `qcompiler compile` with recipe int4 (nothing is required to be covered), and a session computes what the
             fake-quantized torch graph computes: within 1e-4 of the largest output with float activations
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from transformers.exporters.configs import ExportFormat  # noqa: E402
from transformers.exporters.quantizers.base import ExportQuantizer  # noqa: E402

PARITY, LOWERED = 1e-4, 1e-4  # relative to the largest output
PIECES = (1, 6, 1, 5, 1)
LENGTHS = (1, 2, 7, 14, 40, 63)  # of whole texts
FIXED = 32  # tokens, where the length is held
PAIRS = ((1, 1), (2, 9), (5, 2), (14, 33), (40, 5), (63, 63))  # of an encoder's and a decoder's text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: all of them)")
    parser.add_argument("-o", "--output", type=Path, default=Path("architectures.json"), help="results, kept up to date")
    parser.add_argument("--limit", type=float, default=180, help="seconds for one type (default: 180)")
    parser.add_argument("--no-compile", action="store_true", help="stop after the capture")
    parser.add_argument("--resume", action="store_true", help="skip the types that the output file has already")
    parser.add_argument("--markdown", action="store_true", help="print the table of an existing output file, run nothing")
    options = parser.parse_args()
    from survey_table import markdown

    if options.markdown:
        print(markdown(json.loads(options.output.read_text())["types"]))
        return 0
    warnings.simplefilter("ignore")
    from tiny_configurations import classes

    known = classes()
    if unknown := sorted(set(options.types) - set(known)):
        parser.error(f"unknown types: {', '.join(unknown)}")
    results: dict[str, dict] = {}
    if options.output.is_file() and (options.resume or options.types):
        results = json.loads(options.output.read_text())["types"]
    wanted = [name for name in options.types or known if not (options.resume and name in results)]
    _import_everything()
    for at, name in enumerate(wanted, 1):
        results[name] = _in_a_process(name, *known[name], options.limit, not options.no_compile)
        _save(options.output, results)
        print(f"[{at}/{len(wanted)}] {_line(name, results[name])}", file=sys.stderr, flush=True)
    print(markdown(results))
    return 0


def _save(path: Path, results: dict[str, dict]) -> None:
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({"versions": versions, "types": dict(sorted(results.items()))}, indent=1) + "\n")
    aside.replace(path)


def _line(name: str, result: dict) -> str:
    words = " ".join(f"{key}={result.get(key)}" for key in ("built", "exporter", "captured", "compiled"))
    return f"{name} {words} {result['seconds']} s {result.get('reason', '')[:200]}"


# ---- one type, in a process of its own


def _import_everything() -> None:
    """Once, before the forks: it takes longer than most types."""
    import onnxruntime  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.exporters.exporter_onnx  # noqa: F401

    import qcompiler.compiler  # noqa: F401
    import qcompiler.lower.onnx  # noqa: F401
    import tests.pipeline.test_architectures  # noqa: F401

    transformers.logging.set_verbosity_error()


def _in_a_process(name: str, class_name: str, form: str, limit: float, compiles: bool) -> dict[str, Any]:
    """Survey one type in a fork; what was written before the time ran out counts."""
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        # Exporters speak a lot; what a type's own code prints is of no interest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        with os.fdopen(writer, "w") as out:
            _survey(name, class_name, form, compiles, lambda **found: print(json.dumps(found), file=out, flush=True))
        os._exit(0)
    os.close(writer)
    os.set_blocking(reader, False)
    result: dict[str, Any] = {"class": class_name, "form": form}
    text = b""
    while True:
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
        late = time.monotonic() - start > limit
        if late and not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        try:
            while piece := os.read(reader, 1 << 16):
                text += piece
        except BlockingIOError:
            pass
        if ended or late:
            break
        time.sleep(0.05)
    os.close(reader)
    for line in text.decode().splitlines():
        result |= json.loads(line)
    if late and not ended:
        result.setdefault("reason", f"not done within {limit:g} s")
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def _survey(name: str, class_name: str, form: str, compiles: bool, tell: Any) -> None:
    import resource
    import tempfile

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    stage = "built"
    try:
        import transformers
        from tiny_configurations import tiny_model

        model = tiny_model(getattr(transformers, class_name), name)
        tell(built=True, text=_takes_text(model))
        stage = "captured"
        made = _capture(model, form)
        tell(captured=True, exporter=True, step=_step(made), **_how(made.prepared))
        if not compiles:
            return
        stage = "compiled"
        with tempfile.TemporaryDirectory() as folder:
            tell(compiled=True, **_compile(made, Path(folder), form))
    except BaseException as error:
        tell(**{stage: False}, stage=stage, reason=_reason(error), trace=traceback.format_exc()[-1500:])
        if stage == "captured":
            tell(exporter=False)
            try:
                tell(exporter=_exporter(model, form))
            except BaseException as failure:
                tell(exporter_reason=_reason(failure))


def _takes_text(model: Any) -> bool:
    import inspect

    return "input_ids" in inspect.signature(model.forward).parameters


def _step(made: Any) -> str:
    step = made.prepared.step
    return "any number" if step is None else f"{step} tokens" if step > 1 else "one token"


def _how(prepared: Any) -> dict[str, Any]:
    """The form, where it is not what the kind of model says."""
    found = {"captured_as": prepared.kind, "whole_text": prepared.whole, "left_out": sorted(prepared.left_out)}
    found |= {"longest": prepared.longest, "shortest": prepared.shortest if prepared.shortest > 1 else None}
    found |= {"fixed": None if prepared.fixed is None else asdict(prepared.fixed)}
    found |= {"fallbacks": [fallback.node for fallback in prepared.fallbacks]}
    found |= {"one_row": prepared.kind == "encoder" and "batch" not in prepared.axes["input_ids"].values()}
    return {key: value for key, value in found.items() if value}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None and not hasattr(error, "exit_code"):
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def _exporter(model: Any, form: str) -> str | bool:
    """How the exporter by itself traces it: `many tokens`, `one token`, or `forward` for what does not generate."""
    import torch
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.arange(3, 8)[None]
    request = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    failure: BaseException | None = None
    for many in (True, False):
        try:
            if form == "encoder":
                part, inputs = model, {"input_ids": torch.arange(3, 13).reshape(2, 5)}
            elif form == "encoder-decoder":
                part, inputs = model, {**request, "decoder_input_ids": torch.arange(7, 14)[None]}
            else:
                part, inputs = decompose_for_generation(model, request, multi_token_decode=many)["decode"]
            DynamoExporter().export(part, inputs, DynamoConfig(dynamic=True))
            return "forward" if form.startswith("encoder") else "many tokens" if many else "one token"
        except Exception as error:
            failure = failure or error
            if form.startswith("encoder"):
                break
    assert failure is not None
    raise failure


def _capture(model: Any, form: str) -> Any:
    """The captured and analysed graph, compared with the model; of fixed sizes, where its code holds them."""
    from qcompiler.capture.dimensions import FixedAxis
    from qcompiler.capture.prepare import prepare

    try:
        return _compared(model, prepare(model, text_only=True))
    except FixedAxis:
        return _compared(model, prepare(model, text_only=True, fixed_length=FIXED))


def _compared(model: Any, prepared: Any) -> Any:
    import torch

    from qcompiler.capture.capture import captured
    from qcompiler.capture.dimensions import program_ports
    from tests.captures import ANALYSE, NORMALISE, Analysed, Stepper, relative_error, run

    graph = captured(prepared)
    reports = run(graph, NORMALISE) | run(graph, ANALYSE)
    generator = torch.Generator().manual_seed(2)
    if prepared.kind == "encoder-decoder" or prepared.whole is not None:
        prepared.export_torch(_Nothing())  # finds out which lengths it is right for, refuses those that the model's code fixes
        for lengths in PAIRS if prepared.kind == "encoder-decoder" else [(n,) for n in LENGTHS]:
            _compare_texts(model, graph, prepared, lengths, generator)
        return Analysed(model, prepared, graph, reports, {})
    if prepared.kind == "decoder":
        tokens = torch.randint(3, _vocabulary(model), (1, sum(PIECES)), generator=generator)
        with torch.no_grad():
            expected = _reference(model, tokens)
        step = Stepper(graph.module, prepared)
        # Where scores are equal, a model may pick others step by step than it does in a whole text: then its own count.
        own = Stepper(lambda **given: prepared.module(**given, **prepared.switches), prepared)
        for new in _pieces(prepared):
            start = step.past
            piece = tokens[:, start : start + new]
            found, alternative = step(piece), own(piece)
            errors = [relative_error(found, other) for other in (expected[:, start : start + new], alternative)]
            if not min(errors) <= PARITY:
                raise AssertionError(f"{new} tokens after {start}: differs from the model by {min(errors):.2g}")
        return Analysed(model, prepared, graph, reports, {})
    program_ports(prepared.export_torch(), prepared)  # refuses axes that the model's own code fixes
    rows = 3 if "batch" in prepared.axes["input_ids"].values() else 1
    for batch, length in ((1, 5), (rows, 17)):
        feed = {"input_ids": torch.randint(3, _vocabulary(model), (batch, length), generator=generator)}
        for name in set(prepared.inputs) - {"input_ids"}:
            feed[name] = (torch.ones_like if "mask" in name else torch.zeros_like)(feed["input_ids"])
        if length > 9 and "attention_mask" in feed:
            feed["attention_mask"][-1, 9:] = 0
        filled = _filled(prepared, feed)
        # Where filling a text up changes it, the graph must compute what the model computes of it filled up.
        given = feed if prepared.fixed is None or prepared.fixed.exact else filled
        with torch.no_grad():
            expected, found = prepared.module(**given, **prepared.switches), graph.module(**filled)
        error = relative_error(_cut(prepared, found, length), _cut(prepared, expected, length))
        if not error <= PARITY:
            raise AssertionError(f"batch {batch}, length {length}: differs from the model by {error:.2g}")
    return Analysed(model, prepared, graph, reports, {})


def _filled(prepared: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """Texts at the one length that the graph has."""
    from torch.nn.functional import pad

    if prepared.fixed is None:
        return feed
    behind = {"input_ids": prepared.fixed.filler}
    missing = prepared.fixed.tokens - feed["input_ids"].shape[1]
    return {name: pad(tensor, (0, missing), value=behind.get(name, 0)) for name, tensor in feed.items()}


def _cut(prepared: Any, outputs: Any, length: int) -> Any:
    """Outputs without what comes of the filling."""
    axes = {} if prepared.fixed is None else prepared.fixed.outputs
    return {
        name: tensor.narrow(axes[name], 0, length) if name in axes else tensor for name, tensor in _leaves(outputs).items()
    }


class _Nothing(ExportQuantizer):
    """Changes nothing: what an exporter asks of a graph before it is quantized is asked."""

    quantizes_fx_graph = True
    supported_formats = (ExportFormat.ONNX, ExportFormat.DYNAMO)

    def quantize(self, model: Any, sample_inputs: dict[str, Any], export_format: Any) -> Any:
        return model


def _compare_texts(model: Any, graph: Any, prepared: Any, lengths: tuple[int, ...], generator: Any) -> None:
    """Whole texts of these lengths through the graph and the model; what is shorter than the graph takes is filled up."""
    import torch

    from tests.captures import relative_error

    if max(lengths) > (prepared.longest or max(lengths)):
        return
    names = [name for name in prepared.inputs if "mask" not in name]
    given, filled = {}, {}
    for name, length in zip(names, lengths, strict=True):
        given[name] = torch.randint(3, _vocabulary(model), (1, length), generator=generator)
        missing = max(prepared.shortest - length, 0)
        filled[name] = torch.nn.functional.pad(given[name], (0, missing))
        if name == "input_ids" and "attention_mask" in prepared.inputs:
            given["attention_mask"] = torch.ones_like(given[name])
            if length > 9:
                given["attention_mask"][:, 9:] = 0
            filled["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (0, missing))
    with torch.no_grad():
        found = graph.module(**{name: filled[name] for name in prepared.inputs})
        expected = prepared.module(**given, **prepared.switches)
    kept = lengths[-1]
    name = "logits" if "logits" in expected else "last_hidden_state"
    error = relative_error({"x": found[name][:, :kept]}, {"x": expected[name]})
    if not error <= PARITY:
        raise AssertionError(f"texts of {lengths} tokens: differs from the model by {error:.2g}")


def _pieces(prepared: Any) -> tuple[int, ...]:
    """`PIECES`, each in steps of the size that the graph takes."""
    size = prepared.step or max(PIECES)
    return tuple(min(size, piece - at) for piece in PIECES for at in range(0, piece, size))


def _vocabulary(model: Any) -> int:
    return min(getattr(model.config.get_text_config(), "vocab_size", None) or 128, 128)


def _reference(model: Any, tokens: Any) -> Any:
    """The model's own logits of a whole text."""
    return model(input_ids=tokens).logits


def _compile(made: Any, folder: Path, form: str) -> dict[str, Any]:
    """Compile to int4 and compare with the same numbers in torch."""
    from dataclasses import replace

    import numpy as np
    import torch
    from torch.utils import _pytree

    import qcompiler
    from qcompiler import recipe as recipes
    from qcompiler.capture.feeds import arguments
    from qcompiler.capture.feeds import feed as feeds
    from qcompiler.recipe import Allow
    from qcompiler.runtime.session import Session
    from tests.captures import Stepper, relative_error
    from tests.pipeline.rewire import float_artifact
    from tests.pipeline.test_architectures import FakeQuantized

    prepared = made.prepared
    held = prepared.fixed is not None or _how(prepared).get("one_row", False)
    allow = Allow(min_coverage=0, fallbacks=2, text_only=True, fixed_length=FIXED if held else False)
    recipe = replace(recipes.load("int4"), allow=allow)
    result = qcompiler.compile(made.model, output=folder / "out", recipe=recipe, samples=0)
    fake = FakeQuantized(made, result.quantizer.context.solutions, result.quantizer.context.schemes, True)
    session = Session(float_artifact(folder / "out", folder / "float"), threads=1)
    tokens = np.random.default_rng(0).integers(3, _vocabulary(made.model), sum(PIECES))
    facts = {
        "cache": (result.manifest["cache"] or {}).get("kind"),
        "coverage": result.layers["totals"]["coverage"],
        "unfused": len(result.manifest["unfused"]),
    }
    spec = made.graph.module._in_spec if hasattr(made.graph.module, "_in_spec") else None

    def module(**feed: Any) -> Any:
        leaves = _pytree.tree_leaves(((), feed))
        found = fake.run(*leaves)
        return _pytree.tree_unflatten(_pytree.tree_leaves(found), made.graph.module._out_spec) if spec else found

    generates = any(info.role == "logits" for info in session.artifact.outputs)
    if (prepared.kind == "encoder-decoder" and generates) or prepared.whole is not None:
        ids = torch.from_numpy(tokens[None])
        given = feeds(prepared, _filled(prepared, {"input_ids": ids})["input_ids"])
        with torch.no_grad():
            expected = next(iter(_leaves(module(**given)).values()))[0].numpy()[: len(tokens)]
        if "decoder_input_ids" in given:
            session.read(tokens)
        found = session.logits(given.get("decoder_input_ids", ids)[0].numpy())
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
    elif made.prepared.kind == "decoder":
        step = Stepper(module, made.prepared)
        expected = []
        for new in _pieces(made.prepared):
            expected.append(step(torch.from_numpy(tokens[None, step.past : step.past + new]))[0, -1].numpy())
        found = []
        at = 0
        for new in _pieces(made.prepared):
            found.append(session.prefill(tokens[at : at + new]))
            at += new
        error = float(np.abs(np.stack(found) - np.stack(expected)).max() / np.abs(np.stack(expected)).max())
    else:
        feed = {"input_ids": torch.from_numpy(tokens[None])}
        for name in set(arguments(prepared)) - {"input_ids"}:
            feed[name] = (torch.ones_like if "mask" in name else torch.zeros_like)(feed["input_ids"])
        filled = _filled(prepared, feed)
        expected = _cut(prepared, module(**{name: filled[name] for name in arguments(prepared)}), len(tokens))
        run = session.run(**{name: value.numpy() for name, value in feed.items()})
        wanted = {info: value for info, value in _leaves(expected).items()}
        error = max(relative_error(torch.from_numpy(run[name]), wanted[name]) for name in run)
    if not error <= LOWERED:
        raise AssertionError(f"differs from its fake-quantized torch graph by {error:.2g}")
    return facts | {"error": error}


def _leaves(output: Any) -> dict[str, Any]:
    from transformers.exporters.utils import get_leaf_tensors

    return get_leaf_tensors(output)


if __name__ == "__main__":
    sys.exit(main())
