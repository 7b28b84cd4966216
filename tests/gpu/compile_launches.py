"""Compiles, for a GPU that need not be there, what a sample of calls launches: `python -m tests.gpu.compile_launches 90 OP`.

The interpreter takes programs that the compiler refuses, and says nothing of registers. Here the host code runs on CPU tensors
with the launch replaced: Triton compiles what would have run, with ptxas, for the given compute capability, and nothing runs.
A line of JSON for each launch: kernel, registers, bytes of stack (what is spilled), instructions of the longest loop, bytes of
shared memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from qcompiler.gpu import device
from qcompiler.ops.formats import Activation
from qcompiler.ops.spec import Case

OPTIONS = ("num_warps", "num_stages")


@contextmanager
def compiling(capability: int, found: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within it a launch is compiled for this compute capability (90 for 9.0) and not run."""
    target, done = GPUTarget("cuda", capability, 32), set()

    def run(self, *args, grid, warmup, **given):
        options = {name: given.pop(name) for name in OPTIONS if name in given}
        names = [p.name for p in self.params]
        values = dict(zip(names, args, strict=False)) | given
        constants = {p.name for p in self.params if p.is_constexpr}
        constants |= {name for name in names if values[name] is None or values[name] is True}
        # As a launch specializes: 1 is a constant, multiples of 16 and tensors are known to be aligned.
        plain = {p.name for p in self.params if p.do_not_specialize}
        constants |= {n for n in names if n not in plain and isinstance(values[n], int) and values[n] == 1}
        signature = {n: "constexpr" if n in constants else mangle_type(values[n], None) for n in names}
        aligned = [n for n in names if n not in constants | plain and _aligned(values[n])]
        key = (self.fn.__name__, str(signature), str([values[n] for n in sorted(constants)]), str(aligned), str(options))
        if key in done:
            return
        done.add(key)
        source = ASTSource(
            fn=self, signature=signature, constexprs={(names.index(n),): values[n] for n in constants},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )  # fmt: skip
        compiled = triton.compile(source, target=target, options=options)
        found({"kernel": self.fn.__name__, **_resources(compiled), "shared": compiled.metadata.shared, **options})

    before = JITFunction.run, device.require
    JITFunction.run, device.require = run, lambda *_: None
    try:
        yield
    finally:
        JITFunction.run, device.require = before


def _aligned(value: Any) -> bool:
    return value % 16 == 0 if isinstance(value, int) else isinstance(value, torch.Tensor)


def _resources(compiled) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, and instructions of the longest loop, from the binary."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", "-hex", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {"registers": int(match[1]), "stack": int(match[2]), "loop": _longest_loop(code)}


def _longest_loop(code: str) -> int:
    """Instructions between a branch backward and its target, of the longest; 0 without a loop."""
    place, labels, longest = 0, {}, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = place
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s", line):
            place += 1
            if branch := re.search(r"\bBRA\b.*\(?(\.L\w+)", line):
                longest = max(longest, place - labels.get(branch[1], place))
    return longest


def calls(names: list[str], dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Label and call: a sample of the cases of each op, dtypes in turn, with the kernels that the shipped table has for them."""
    from qcompiler.gpu import implementation
    from qcompiler.gpu.linear_nbit import dtype_label
    from qcompiler.ops import SPECS
    from tests.gpu.parity import sample

    for name in names:
        spec = SPECS[name]
        for number, case in enumerate(sample(spec.cases())):
            tensors = [None if case.inputs.get(i.name) is None else torch.from_numpy(case.inputs[i.name]) for i in spec.inputs]
            dtype = dtypes[number % len(dtypes)] if spec.inputs[0].name == "x" else torch.float32
            if spec.inputs[0].name == "x":
                tensors[0] = tensors[0].to(dtype)
            for kernel, config in _configs(name, case, dtype_label(dtype)):
                call = partial(_forced, kernel, config, implementation(name), *tensors, *spec.values(case.attributes))
                yield f"{name} {kernel} {dtype} {case.label}", call


def _configs(op: str, case: Case, dtype: str) -> list[tuple[str, dict[str, int]]]:
    """Kernels of ours, and their configurations, that the shipped table has for a format, whatever the number of rows."""
    from qcompiler.gpu import dispatch

    format, activation = case.label.split(" ")[0], Activation(case.attributes.get("activation", 0)).label
    found: list[tuple[str, dict[str, int]]] = []
    for rows in (1, 3, 16, 64, 1 << 20):
        choice = dispatch.choose(
            op, format=format, activation=activation, dtype=dtype, rows=rows, outputs=4096, inputs=4096, device=dispatch.GENERIC
        )
        entry = (choice.kernel, dict(choice.config))
        if choice.kernel not in ("matmul", "int_mm") and entry not in found:
            found.append(entry)
    return found


def _forced(kernel: str, config: dict[str, int], call: Callable[..., Any], *given: Any) -> None:
    from qcompiler.gpu import dispatch

    with dispatch.forced(kernel, **config):
        call(*given)


def main(capability: int, names: list[str], every: int) -> None:
    dtypes = (torch.float16, torch.float32) if capability < 80 else (torch.float16, torch.bfloat16, torch.float32)
    with compiling(capability, lambda found: print(json.dumps(found), flush=True)):
        for label, call in islice(calls(names, dtypes), 0, None, every):
            print(json.dumps({"call": label}), flush=True)
            call()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, help="90 for 9.0")
    parser.add_argument("op", nargs="+")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N calls of the sample")
    given = parser.parse_args()
    main(given.capability, given.op, given.every)
