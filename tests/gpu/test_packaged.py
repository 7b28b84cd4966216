"""What is installed has all of `qcompiler.gpu`, and importing qcompiler needs no Triton and asks no device."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from tests.runtime.test_packaging import ROOT, sources  # noqa: F401

FILES = {path.name for path in (ROOT / "qcompiler" / "gpu").iterdir() if path.suffix in (".py", ".json")}


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """An sdist, and a wheel without the library, which is all that takes a compiler."""
    place = tmp_path_factory.mktemp("built")
    code = (
        "import sys; from scikit_build_core.build import build_sdist, build_wheel\n"
        "build_sdist(sys.argv[1]); build_wheel(sys.argv[1], {'wheel.cmake': 'false'})"
    )
    run = subprocess.run([sys.executable, "-c", code, place], cwd=sources, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return place


def in_package(names: list[str], root: str) -> set[str]:
    return {name.removeprefix(root) for name in names if name.startswith(root) and not name.endswith("/")}


def test_a_wheel_has_the_dispatch_table_and_every_kernel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert in_package(names, "qcompiler/gpu/") == FILES and "dispatch.json" in FILES and len(FILES) > 15
    assert zipfile.ZipFile(wheel).read("qcompiler/gpu/dispatch.json") == (ROOT / "qcompiler/gpu/dispatch.json").read_bytes()


def test_an_sdist_has_them_too(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    assert in_package(tarfile.open(sdist).getnames(), sdist.name.removesuffix(".tar.gz") + "/qcompiler/gpu/") == FILES


# ---- imports

ASKING = """
    import importlib, pkgutil, sys
    import torch

    def asked(*_, **__):
        raise AssertionError("a device was asked for")

    for name in ("is_available", "device_count", "current_device", "get_device_name", "get_device_capability",
                 "get_device_properties", "mem_get_info", "init", "_lazy_init", "is_bf16_supported", "synchronize"):
        assert callable(getattr(torch.cuda, name)), name
        setattr(torch.cuda, name, asked)
    if hasattr(torch._C, "_cuda_getDeviceCount"):  # what they stand on, where torch is built for CUDA
        torch._C._cuda_getDeviceCount = asked

    def modules(name, folder):
        yield name
        for found in pkgutil.iter_modules([folder]):
            if found.ispkg:
                yield from modules(f"{name}.{found.name}", f"{folder}/{found.name}")
            else:
                yield f"{name}.{found.name}"
"""


def python(code: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_no_module_but_the_kernels_imports_triton_or_asks_for_a_device() -> None:
    code = ASKING + """
    sys.modules["triton"] = None  # an import of it fails
    sys.modules["qcompiler.gpu"] = None  # so does one of the kernels
    skipped = ("qcompiler.gpu", "qcompiler.__main__")
    found = [name for name in modules("qcompiler", "qcompiler") if not name.startswith(skipped)]
    for name in found:
        importlib.import_module(name)
    print(*found)
    """
    found = python(code)
    assert {"qcompiler.runtime.session", "qcompiler.ops.torch_ops", "qcompiler.compiler"} <= set(found) and len(found) > 100


def test_the_kernels_are_imported_without_asking_for_a_device() -> None:
    code = ASKING + """
    found = list(modules("qcompiler.gpu", "qcompiler/gpu"))
    for name in found:
        importlib.import_module(name)
    print(*found)
    """
    names = {"qcompiler.gpu" + (f".{name.removesuffix('.py')}" if name != "__init__.py" else "") for name in FILES}
    assert set(python(code)) == names - {"qcompiler.gpu.dispatch.json"}
