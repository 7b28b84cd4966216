"""What is installed: few dependencies, one wheel for every Python, the op library inside, two import names kept out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import qcompiler
from qcompiler.report import environment as versions

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPILE_ONLY = [
    "jinja2",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "pydantic",
    "rich",
    "safetensors",
    "torch",
    "transformers",
    "yaml",
]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def python(code: str, cwd: Path, executable: str | Path = sys.executable) -> str:
    run = subprocess.run([executable, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_an_artifact_runs_with_three_dependencies() -> None:
    assert names(PROJECT["dependencies"]) == {"numpy", "onnxruntime", "tokenizers"}


def test_every_dependency_is_pinned_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names([line for line in lines if line and not line.startswith("#")])
    wanted = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    assert names(wanted) <= pinned


def test_the_tested_ranges_are_those_of_the_project() -> None:
    """`qcompiler doctor` reports against the same ranges that pip installs."""

    def written(ranges: dict[str, tuple[str, str]]) -> set[str]:
        return {f"{name}>={oldest},<{untested}" for name, (oldest, untested) in ranges.items()}

    extras = PROJECT["optional-dependencies"]
    assert written(versions.RUN) == set(PROJECT["dependencies"])
    assert written(versions.COMPILE | versions.OPTIONAL) == set(extras["compile"])
    assert set(extras["chat"]) <= set(extras["compile"])


def test_one_version() -> None:
    assert PROJECT["version"] == qcompiler.__version__


def test_plain_passes_and_runtime_are_never_imported(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import qcompiler.passes, qcompiler.runtime.library
        print(sorted({{"passes", "runtime"}} & set(sys.modules)))
    """
    assert python(code, tmp_path) == "[]"


def test_the_command_line_and_the_runtime_need_no_compiler(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        for name in {COMPILE_ONLY!r}:
            sys.modules[name] = None  # an import of it fails
        import qcompiler.cli, qcompiler.runtime.library
        try:
            qcompiler.cli.main(["--version"])
        except SystemExit as end:
            assert not end.code, end.code
    """
    assert python(code, tmp_path).startswith("qcompiler ")


def test_the_two_folders_are_links_in_a_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    for name in ("passes", "runtime"):
        link = ROOT / "qcompiler" / name
        assert link.is_symlink() and link.readlink() == Path("..", name)


# ---- the real thing, with a network: minutes


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as git sees it, changes included, and nothing that a build left behind."""
    copy = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def environment(place: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place / "bin" / "python"


def pip(executable: Path, *arguments: str | Path, cwd: Path) -> None:
    constraints = ROOT / "constraints.txt"
    command = [executable, "-m", "pip", "--disable-pip-version-check", *arguments, "-q", "-c", constraints]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


INSTALLED = """
    import sys
    import onnxruntime
    import qcompiler.runtime.library as library
    assert not {"passes", "runtime", "torch"} & set(sys.modules)
    library.load()
    onnxruntime.SessionOptions().register_custom_ops_library(str(library.library_path()))
    print(library.library_path())
"""


@pytest.mark.slow
def test_sdist_to_wheel_to_a_clean_environment(sources: Path, tmp_path: Path) -> None:
    builder = environment(tmp_path / "builder")
    pip(builder, "install", "scikit-build-core", "ninja", cwd=tmp_path)
    made = python(
        f"from scikit_build_core.build import build_sdist as b; print(b({str(tmp_path)!r}))", sources, builder
    )
    sdist = tmp_path / made.splitlines()[-1]
    pip(builder, "wheel", "--no-deps", "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"qcompiler-[\d.]+-py3-none-\w+\.whl", wheel.name)

    inside = zipfile.ZipFile(wheel).namelist()
    assert (
        [name for name in inside if "libqcompiler_ops" in name]
        == [name for name in inside if name.startswith("qcompiler/runtime/lib/libqcompiler_ops.")]
        != []
    )
    assert "qcompiler/gpu/dispatch.json" in inside
    assert not [name for name in inside if name.endswith((".cpp", ".h", ".map", "CMakeLists.txt", "CMakePresets.json"))]
    assert not [name for name in inside if not name.startswith(("qcompiler/", "qcompiler-"))]

    clean = environment(tmp_path / "clean")
    pip(clean, "install", wheel, cwd=tmp_path)
    assert Path(python(INSTALLED, tmp_path, clean)).is_relative_to(tmp_path / "clean")
    command = subprocess.run([clean.parent / "qcompiler", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert command.returncode == 0 and PROJECT["version"] in command.stdout, command.stderr


@pytest.mark.slow
def test_an_editable_install_finds_the_library(sources: Path, tmp_path: Path) -> None:
    fresh = environment(tmp_path / "editable")
    pip(fresh, "install", "-e", sources, cwd=tmp_path)
    assert Path(python(INSTALLED, tmp_path, fresh)).is_relative_to(tmp_path / "editable")
    assert python("import qcompiler; print(qcompiler.__file__)", tmp_path, fresh) == str(
        sources / "qcompiler" / "__init__.py"
    )
    (sources / "runtime" / "added_later.py").write_text("")
    python("import qcompiler.runtime.added_later", tmp_path, fresh)
