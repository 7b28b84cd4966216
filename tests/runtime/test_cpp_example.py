"""tools/examples/run_artifact.cpp: compiled and run against the ONNX Runtime that pip installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from qcompiler.runtime.library import library_path
from tests.runtime import kernel_oracle as oracle
from tests.runtime.ort_header import find_header
from tests.runtime.ort_models import save_linear

EXAMPLE = Path(__file__).resolve().parents[2] / "tools" / "examples" / "run_artifact.cpp"


def test_the_example_runs_a_model(tmp_path: Path) -> None:
    include = find_header("onnxruntime_cxx_api.h").parent
    shared = list((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not shared or not shutil.which("g++"):
        pytest.skip("needs g++ and the shared library of the onnxruntime package")
    # The package's file carries its version behind the name, so -lonnxruntime would not find it.
    (tmp_path / "libonnxruntime.so.1").symlink_to(shared[0])
    program = tmp_path / "run_artifact"
    command = ["g++", "-std=c++17", EXAMPLE, f"-I{include}", tmp_path / "libonnxruntime.so.1", "-o", program]
    subprocess.run([*command, f"-Wl,-rpath,{tmp_path}"], check=True)

    bias = np.arange(5, 25, dtype=np.float32)
    model = save_linear(
        tmp_path / "m.onnx", oracle.make_weight(np.random.default_rng(0), 20, 64, 4, 32, False), bias=bias
    )
    run = subprocess.run([program, model, library_path()], capture_output=True, text=True, check=True)
    assert run.stdout == "y: 20 values, the first 5\n"
