"""The machine's two limits for a matmul: bytes a second that it reads, int8 operations a second that it computes.

Loops of kernels_limit.cpp, compiled for this CPU with the system's compiler at first use and kept in the user's cache folder.
They run on the op library's thread pool, as the kernels do, and read the mapped bytes that the kernels read.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from qcompiler.errors import InputError
from qcompiler.report.doctor import cpu_model
from qcompiler.runtime import library

SOURCE = Path(__file__).with_name("kernels_limit.cpp")
PIECE = 2**20  # bytes that a thread claims where it does not have one contiguous share


def built() -> Path:
    """The loops as a shared object for this CPU; compiled when the cache has none of this source, compiler and CPU."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise InputError("no C++ compiler found for the loops that measure the limits: install g++ or clang++, or set CXX")
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]
    about = "\0".join([compiler, *flags, cpu_model(), *library.cpu_features()])
    key = hashlib.sha256(SOURCE.read_bytes() + about.encode()).hexdigest()[:16]
    target = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcompiler" / f"limit-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        run = subprocess.run([compiler, *flags, "-o", str(part), str(SOURCE)], capture_output=True, text=True)
        if run.returncode:
            raise InputError(f"{compiler} cannot compile {SOURCE.name}:\n{run.stderr}")
        part.replace(target)
    return target


class Limits:
    """The loops over `size` bytes at `address`, on `threads` threads of the op library's pool."""

    def __init__(self, address: int, size: int, threads: int) -> None:
        loops = ctypes.CDLL(str(built()))
        loops.limit_read.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        loops.limit_read.restype = None
        loops.limit_read_name.restype = loops.limit_dot_name.restype = ctypes.c_char_p
        loops.limit_dot.argtypes, loops.limit_dot.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int64
        ours = library.load()
        ours.qc_pool_set_threads(threads)
        self._loops = loops
        self._pool = ctypes.cast(ours.qc_pool_parallel_for, ctypes.c_void_p)
        self._address, self.size, self._threads = address, size, threads
        self.dot = loops.limit_dot_name().decode()

    def reads(self) -> dict[str, Callable[[], None]]:
        """Every read loop by its name, with a share for each thread and with pieces; each reads all bytes once."""
        found: dict[str, Callable[[], None]] = {}
        cuts = {"shares": self._threads, "pieces": max(self._threads, self.size // PIECE)}
        if self._threads == 1:
            del cuts["pieces"]
        for index in range(self._loops.limit_read_loops()):
            name = self._loops.limit_read_name(index).decode()
            for cut, pieces in cuts.items():
                found[f"{name}, {cut}"] = partial(self._loops.limit_read, self._pool, index, self._address, self.size, pieces)
        return found

    def compute(self, pieces: int = 64) -> int:
        """Does `pieces` of int8 dot products in registers; returns the operations done."""
        return self._loops.limit_dot(self._pool, pieces)
