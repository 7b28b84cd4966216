"""The tests of cases take in every op, every case of it and every kernel of each format."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import torch

from qcompiler.gpu import MODULES
from qcompiler.ops import SPECS
from tests.gpu import every_case
from tests.gpu.every_case import Part
from tests.gpu.parity import DTYPES

# Ops of an OpSpec that a GPU does not run, and why. There are none.
WITHOUT_A_KERNEL: dict[str, str] = {}


def taken() -> list[Part]:
    modules = sorted(path.stem for path in Path(__file__).parent.glob("test_every_case_*.py"))
    return [part for name in modules for part in importlib.import_module(f"tests.gpu.{name}").PARTS]


def test_every_op_with_cases_is_tested() -> None:
    with_cases = {name for name, spec in SPECS.items() if any(True for _ in spec.cases())}
    assert with_cases == set(SPECS), "an op without cases"
    assert with_cases == {part.op for part in taken()} | set(WITHOUT_A_KERNEL)
    assert set(MODULES) == set(SPECS) - set(WITHOUT_A_KERNEL)


def test_every_part_is_tested_once() -> None:
    wanted = every_case.parts(*(set(SPECS) - set(WITHOUT_A_KERNEL)))
    assert Counter(taken()) == Counter(wanted)


def test_every_case_runs_in_each_dtype_as_shipped() -> None:
    assert {torch.float32, torch.float16} <= set(DTYPES)
    for op, spec in SPECS.items():
        runs = Counter((id(run.case), run.dtype) for part in every_case.parts(op) for run in every_case.as_shipped(part))
        dtypes = DTYPES if spec.inputs[0].name == "x" else DTYPES[:1]
        assert runs == Counter((id(case), dtype) for case in every_case.cases(op) for dtype in dtypes)
        assert len(every_case.cases(op)) == len(list(spec.cases()))


def test_every_kernel_meets_every_format_and_kind_of_activations() -> None:
    for op in SPECS:
        wanted, found, dtypes = set(), set(), {}
        for part in every_case.parts(op):
            for run in every_case.on_kernels(part, everything=True):
                wanted.add((part.format, run.case.attributes.get("activation"), run.kernel))
            for run in every_case.on_kernels(part, everything=False):
                found.add((part.format, run.case.attributes.get("activation"), run.kernel))
                dtypes.setdefault(run.kernel, set()).add(run.dtype)
        assert found == wanted
        assert all(len(met) > 1 for met in dtypes.values()) or op.startswith("embedding_")
    met = {run.kernel for part in taken() for run in every_case.on_kernels(part, everything=False)}
    assert met == set(every_case.CONFIGS)


def test_every_kernel_of_the_dispatch_table_has_a_configuration_here() -> None:
    from qcompiler.gpu.dispatch import KERNELS

    assert {kernel: {*config} for kernel, config in every_case.CONFIGS.items()} == {k: {*names} for k, names in KERNELS.items()}
