"""qcompiler: a graph-level quantizing compiler on torch.fx and ONNX.

    import qcompiler
    qcompiler.compile("reference", output="small", recipe="int4")
    with_kernels = qcompiler.Session("small")

Names are resolved on first use: importing this package needs nothing beyond the standard library, and what runs an artifact
(`Session`, `generate`, `session_options`, `library_path`) never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "compile": "qcompiler.compiler",
    "plan": "qcompiler.compiler",
    "CompileResult": "qcompiler.compiler",
    "Quantizer": "qcompiler.quantizer",
    "Recipe": "qcompiler.recipe",
    "Scheme": "qcompiler.recipe",
    "VqScheme": "qcompiler.recipe",
    "Select": "qcompiler.recipe",
    "Override": "qcompiler.recipe",
    "Allow": "qcompiler.recipe",
    "load_recipe": "qcompiler.recipe.load:load",
    "evaluate": "qcompiler.evaluate.evaluation",
    "Session": "qcompiler.runtime.session",
    "generate": "qcompiler.runtime.generate",
    "session_options": "qcompiler.runtime.options",
    "library_path": "qcompiler.runtime.library",
    "open_artifact": "qcompiler.runtime.artifact",
    "QCompilerError": "qcompiler.errors",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from qcompiler.compiler import CompileResult, compile, plan
    from qcompiler.errors import QCompilerError
    from qcompiler.evaluate.evaluation import evaluate
    from qcompiler.quantizer import Quantizer
    from qcompiler.recipe import Allow, Override, Recipe, Scheme, Select, VqScheme
    from qcompiler.recipe.load import load as load_recipe
    from qcompiler.runtime.artifact import open_artifact
    from qcompiler.runtime.generate import generate
    from qcompiler.runtime.library import library_path
    from qcompiler.runtime.options import session_options
    from qcompiler.runtime.session import Session


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
