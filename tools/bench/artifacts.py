"""Artifacts to measure: compiled in a process of their own, kept in the work directory."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TARGETS = ("onnx", "onnx-stock")  # ours, and its peer


def artifact(
    source: str, label: str, recipe: str, target: str, work: Path, again: bool = False, rounded: bool = False
) -> dict[str, Any]:
    """Compile `source`, unless `work` has the artifact already; `rounded`: to nearest, in place of the recipe's passes.

    Returns:
        `path`, and what compiling took: `seconds`, `processor_seconds` (of all threads), `peak_bytes`.
    """
    path = work / f"{label}-{recipe}-{target}"
    facts = path.with_name(f"{path.name}.json")
    if again or not facts.is_file() or not (path / "manifest.json").is_file():
        facts.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        # A fresh process: its peak is that of the compile alone, and none of its memory is left while measuring.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            facts.write_text(json.dumps(pool.submit(_compile, source, str(path), recipe, target, rounded).result()))
    return {"path": str(path), **json.loads(facts.read_text())}


def _compile(source: str, output: str, recipe: str, target: str, rounded: bool) -> dict[str, float]:
    import resource

    import qcompiler
    from qcompiler import recipe as recipes
    from qcompiler.runtime.bench import peak_rss_bytes

    chosen = recipes.to_dict(recipes.load(recipe))
    if rounded:
        chosen |= {"passes": [{"round_to_nearest": {"iterations": 1}}], "calibration": {"samples": 0}}
    result = qcompiler.compile(source, output=output, recipe=chosen, target=target)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": result.seconds,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": peak_rss_bytes() or 0,
    }


def read_a_token(path: Path) -> int:
    """Bytes of weights that one token reads: those of every product, each tensor once."""
    import onnx_ir as ir

    model = ir.load(path / "model.onnx")
    products = (n for n in model.graph.all_nodes() if n.op_type in ("LinearNBit", "LinearVQ", "MatMulNBits", "MatMul", "Gemm"))
    tensors = {v.name: v.const_value.nbytes for n in products for v in n.inputs if v is not None and v.const_value is not None}
    return sum(tensors.values())
