"""What of a model its text path does not use: towers for other inputs."""

from __future__ import annotations

from typing import Any

import torch

from qcompiler.capture.prepared import Prepared
from qcompiler.capture.quiet import Quiet
from qcompiler.capture.unchanged import unchanged


def left_out(prepared: Prepared) -> dict[str, int]:
    """The largest modules with weights that tracing does not run: path -> bytes of their parameters, tied ones once.

    A parameter that a module outside of it has too is none of its own.
    """
    called: set[int] = set()

    def note(module: torch.nn.Module, *_: Any) -> None:
        called.add(id(module))

    handles = [module.register_forward_pre_hook(note) for module in prepared.module.modules()]
    try:
        with Quiet(), torch.no_grad(), unchanged(prepared.module):
            prepared.module(**prepared.arguments())
    finally:
        for handle in handles:
            handle.remove()
    called.add(id(prepared.module))  # its forward may be wrapped
    used = {
        id(parameter)
        for module in prepared.module.modules()
        if id(module) in called
        for parameter in module._parameters.values()
        if parameter is not None
    }
    found: dict[str, int] = {}
    for name, module in prepared.module.named_modules():
        if any(name.startswith(f"{other}.") for other in found) or any(id(inner) in called for inner in module.modules()):
            continue
        if size := sum(p.nbytes for p in module.parameters() if id(p) not in used):
            found[name] = size
    return found
