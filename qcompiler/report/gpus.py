"""The GPUs that torch finds, and what our kernels need to run there. Asked for by `doctor` alone."""

from __future__ import annotations

from typing import Any

from qcompiler.errors import QCompilerError
from qcompiler.report import environment
from qcompiler.runtime.device import find_device


def gpus() -> dict[str, Any]:
    """What a GPU needs, and what was found.

    Returns:
        `torch_cuda`: the CUDA version that torch was built for, None without one or without torch; `triton`: its version or
        None; `devices`: `name`, `capability`, `memory_bytes` and `free_bytes` of each; `can_run`: whether artifacts of target
        torch run there; `reason`: why not, else None.
    """
    found: dict[str, Any] = {"torch_cuda": None, "triton": environment.installed("triton"), "devices": []}
    try:
        import torch

        found["torch_cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            found["devices"] = [_describe(torch, index) for index in range(torch.cuda.device_count())]
    except ImportError:
        pass
    except RuntimeError as error:  # a driver that does not answer
        return found | {"can_run": False, "reason": str(error)}
    try:
        find_device("cuda")
    except QCompilerError as error:
        return found | {"can_run": False, "reason": str(error)}
    return found | {"can_run": True, "reason": None}


def _describe(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": total,
        "free_bytes": free,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For the terminal."""
    text = [f"torch built for CUDA  {found['torch_cuda'] or 'no'}", f"triton                {found['triton'] or 'not installed'}"]
    for index, device in enumerate(found["devices"]):
        memory = f"{device['free_bytes'] / 2**30:.1f} of {device['memory_bytes'] / 2**30:.1f} GiB free"
        text.append(f"cuda:{index:<16} {device['name']}, compute capability {device['capability']}, {memory}")
    text.append("artifacts of target torch can run there" if found["can_run"] else f"not used: {found['reason']}")
    return text
