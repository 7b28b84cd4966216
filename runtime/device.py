"""Where a program of target `torch` or a compile runs: the device's name, whether the machine has it, whether things fit.

torch is imported when a device is asked for, and a GPU is looked for only where one was named.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from qcompiler.errors import CapacityError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

    from qcompiler.runtime.artifact import Artifact

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
CPU = "cpu"
_DEVICE = re.compile(r"cpu|cuda(?::(?P<index>0|[1-9]\d*))?")


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N`, as it was given; needs no torch.

    Raises:
        UsageError: it is none of them.
    """
    if _DEVICE.fullmatch(text) is None:
        raise UsageError(f"device is {text!r}, expected cpu, cuda or cuda:N, such as cuda:0")
    return text


@dataclass(frozen=True)
class Placement:
    """Where a program runs, and the type of its float activations, caches and float weights.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: norms, softmax, scales and codebooks stay float32 or as their ops declare them, whatever it says.

    Raises:
        UsageError: a name that is not known.
        UnsupportedError: a type that the CPU kernels do not take.
    """

    device: str = CPU
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        device_name(self.device)
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.device == CPU and self.dtype != "float32":
            raise UnsupportedError(
                f"dtype {self.dtype} on the CPU: its kernels take float32 activations; leave dtype away, or run on a GPU "
                "(device cuda)"
            )

    @property
    def is_default(self) -> bool:
        """Whether a program runs here as it was saved."""
        return self == Placement()


def check_target(artifact: Artifact, place: Placement) -> None:
    """Refuse what is not made for a GPU before anything is loaded.

    Raises:
        UnsupportedError: a GPU, or another type of activations, for a target of ONNX Runtime.
    """
    if artifact.target != "torch" and not place.is_default:
        raise UnsupportedError(
            f"{artifact.path} was compiled for {artifact.target}, whose graph and kernels are ONNX Runtime's on the CPU: device "
            f"{place.device} runs artifacts of target torch; compile the model with the same recipe and --target torch, whose "
            "packed weights are the same bytes and which runs on the CPU and on a GPU"
        )


def find_device(name: str, kernels: bool = True, dtype: Dtype = "float32") -> torch.device:
    """The device of that name, once it is known that this machine has it and that our kernels can run there.

    Args:
        name: see `device_name`.
        kernels: whether our own kernels are to run there; torch's alone ask for less.
        dtype: of the activations that they are to take.

    Raises:
        UsageError: no such name.
        UnsupportedError: torch is missing or built without CUDA, there is no GPU or none of that number, Triton is missing,
            or the GPU is too old for them or for `dtype`.
    """
    match = cast(re.Match[str], _DEVICE.fullmatch(device_name(name)))
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(f"device {name} needs torch, which is not installed: pip install 'qcompiler[compile]'") from error
    if name == CPU:
        return torch.device(CPU)
    if torch.version.cuda is None:
        raise UnsupportedError(
            f"device {name}: torch {torch.__version__} is built without CUDA; install a build with it (pytorch.org), or use cpu"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device {name}: torch finds no GPU (torch.cuda.is_available() is False); check the driver with nvidia-smi, and "
            "CUDA_VISIBLE_DEVICES, or use cpu"
        )
    count = torch.cuda.device_count()
    index = int(match["index"]) if match["index"] else torch.cuda.current_device()
    if index >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UnsupportedError(f"device {name}: this machine has {count} GPU{'s' * (count > 1)} ({known})")
    if kernels and importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            f"device {name}: our GPU kernels need Triton, which is not installed: pip install 'qcompiler[gpu]'"
        )
    found = torch.device("cuda", index)
    if kernels:
        from qcompiler.gpu.device import require

        require(found, f"device {name}", getattr(torch, dtype))
    # By default torch multiplies matrices of float32 exactly, but lets convolutions round them to the 10 bits of TF32.
    torch.backends.cudnn.allow_tf32 = False
    return found


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU that this process can have; None of a CPU, of which nothing is asked."""
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    # What the allocator of this process holds and nothing uses is free as well.
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_fits(device: torch.device, needed: dict[str, int], what: str, advice: str, share: float = 1.0) -> None:
    """Compare bytes by purpose with the device's free memory, before anything is moved. Nothing is asked of a CPU.

    Args:
        share: of the free memory that counts: the rest is for what the bytes do not say.

    Raises:
        CapacityError: it does not fit; says by how much, and what it consists of.
    """
    found = free_bytes(device)
    if found is None:
        return
    import torch

    total, free = torch.cuda.mem_get_info(device)[1], int(found * share)
    wanted = sum(needed.values())
    if wanted > free:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in needed.items() if size)
        raise CapacityError(
            f"{what} needs {_gib(wanted)} on {device} ({parts}), of whose {_gib(total)} only {_gib(free)} are free: "
            f"{_gib(wanted - free)} too little; {advice}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def tensor_bytes(module: torch.nn.Module) -> int:
    """Bytes of the tensors that a program keeps; one storage counts once."""
    import torch

    held = [*module.parameters(), *module.buffers()]
    held += [value for owner in module.modules() for value in vars(owner).values() if isinstance(value, torch.Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())
