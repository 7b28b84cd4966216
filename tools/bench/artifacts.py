"""What is measured: artifacts and peers' model files, made in a process of their own and kept in the work directory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TARGETS = ("onnx", "onnx-stock")  # ours, and what a stock ONNX Runtime runs

Facts = dict[str, Any]


def kept(path: Path, key: dict[str, Any], make: Callable[..., Facts], *arguments: Any, again: bool = False) -> Facts:
    """What `make(path, *arguments)` wrote at `path`: now, or in an earlier run of the same `key`.

    Returns:
        `path`, what `make` returned, and what it took: `seconds`, `processor_seconds` (of all threads), `peak_bytes`,
        and the `commit` that made it.
    """
    note = path.with_name(f"{path.name}.json")
    key = json.loads(json.dumps(key))
    if not again and note.is_file() and path.exists():
        facts = json.loads(note.read_text())
        if facts.pop("key", None) == key:
            return {"path": str(path), **facts}
    note.unlink(missing_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    print(f"making {path}", file=sys.stderr, flush=True)
    # A fresh process: its peak is that of the work alone, and none of its memory is left while measuring.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        facts = pool.submit(_measured, make, path, arguments).result()
    note.write_text(json.dumps({"key": key, **facts}))
    return {"path": str(path), **facts}


def _measured(make: Callable[..., Facts], path: Path, arguments: tuple) -> Facts:
    import resource

    from qcompiler.runtime.bench import peak_rss_bytes

    start = time.perf_counter()
    facts = make(path, *arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": peak_rss_bytes() or 0,
        "commit": git("rev-parse", "HEAD"),
        **facts,
    }


def source_key(source: str) -> str:
    """Tells one checkpoint from another of the same name: a digest of its configuration and its files' sizes."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def artifact(
    source: str, label: str, recipe: str, target: str, work: Path, again: bool = False, rounded: bool = False
) -> Facts:
    """`source` compiled; `rounded`: to nearest, in place of the recipe's passes. See `kept` for what is returned."""
    from qcompiler import recipe as recipes
    from qcompiler.runtime.library import LAYOUT_VERSION

    chosen = recipes.to_dict(recipes.load(recipe))
    if rounded:
        chosen |= {"passes": [{"round_to_nearest": {"iterations": 1}}], "calibration": {"samples": 0}}
    key = {"source": source_key(source), "recipe": chosen, "target": target, "layout": LAYOUT_VERSION}
    return kept(work / f"{label}-{recipe}-{target}", key, compiled, source, chosen, target, again=again)


def compiled(path: Path, source: str, recipe: dict[str, Any], target: str) -> Facts:
    """The artifact of `source` at `path`."""
    import qcompiler

    qcompiler.compile(source, output=str(path), recipe=recipe, target=target)  # type: ignore[arg-type]
    return {"bytes_a_token": read_a_token(path), "data": "model.onnx.data", "file_bytes": _size(path)}


def read_a_token(path: Path) -> int:
    """Bytes of weights that one token reads: those of every product, each tensor once."""
    import onnx_ir as ir

    model = ir.load(path / "model.onnx")
    products = (n for n in model.graph.all_nodes() if n.op_type in ("LinearNBit", "LinearVQ", "MatMulNBits", "MatMul", "Gemm"))
    tensors = {v.name: v.const_value.nbytes for n in products for v in n.inputs if v is not None and v.const_value is not None}
    return sum(tensors.values())


def _size(path: Path) -> int:
    return sum((path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def git(*arguments: str) -> str:
    """What git prints in this repository, nothing where there is no repository or no git."""
    try:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
