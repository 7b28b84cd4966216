"""What the kernels need of a machine, checked once per call; asked only when an op runs."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch

from qcompiler.errors import UnsupportedError

# Ampere: what Triton supports, and it is no formality: for 7.5 it finds no tensor cores and refuses int8 products.
OLDEST = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What fills a device that cannot be asked: kernels that are interpreted.
INTERPRETED_PROCESSORS = 2


def require_triton() -> None:
    """Raises UnsupportedError where Triton is not installed."""
    if find_spec("triton") is None:
        raise UnsupportedError(
            "the ops run on a GPU with kernels in Triton, which is not installed: pip install 'qcompiler[gpu]' (Linux only)"
        )


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU (environment variable TRITON_INTERPRET)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def name(device: torch.device) -> str:
    """Name of the device, as the dispatch table knows it; `interpreter` on the CPU."""
    return _name(_index(device)) if device.type == "cuda" else "interpreter"


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    return _processors(_index(device)) if device.type == "cuda" else INTERPRETED_PROCESSORS


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def require(device: torch.device, op: str, dtype: torch.dtype) -> None:
    """Check that an op runs on this device with activations of this dtype.

    Raises:
        UnsupportedError: no GPU, one that is too old, or a dtype that the kernels do not take.
    """
    if device.type != "cuda":
        if not interpreted():
            raise UnsupportedError(f"{op}: the GPU kernels got tensors on {device.type!r}, expected a CUDA device")
    elif not torch.cuda.is_available():
        raise UnsupportedError(f"{op}: no GPU was found (torch {torch.__version__}, built for CUDA {torch.version.cuda})")
    elif (found := capability(_index(device))) < OLDEST:
        raise UnsupportedError(
            f"{op}: {name(device)} has compute capability {_dotted(found)}, the kernels need {_dotted(OLDEST)} (Ampere) or later"
        )
    if dtype not in DTYPES:
        taken = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise UnsupportedError(f"{op}: x is {dtype}, the GPU kernels take {taken}")
    if dtype == torch.bfloat16 and device.type != "cuda":
        raise UnsupportedError(f"{op}: Triton's interpreter does not compute in bfloat16; run it in float16 or float32")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def on(device: torch.device) -> AbstractContextManager[None]:
    """Makes the device current: kernels start on the current device, whatever their tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
