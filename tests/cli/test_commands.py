"""The commands that need no model: inspect, diff, verify, repack, library, doctor; and what compile and eval refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qcompiler.cli import main
from qcompiler.errors import GateError
from qcompiler.report import environment
from qcompiler.runtime import library
from tests.cli.process import COMPILE_ONLY, qcompiler
from tests.report import fake

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return fake.write(tmp_path / "out")


@pytest.fixture
def lone_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the op library, where only its copying matters."""
    path = tmp_path / "source" / library.LIBRARY_NAME
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF")
    monkeypatch.setenv("QCOMPILER_LIBRARY", str(path))
    return path


def test_inspect(artifact: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "inspect", artifact)
    assert (code, err) == (0, "") and "int4-g32-sym" in out and "\x1b" not in out
    code, out, _ = call(capsys, "inspect", artifact, "--json")
    assert code == 0 and json.loads(out)["report"] == "inspect"
    code, out, _ = call(capsys, "inspect", artifact, "--pass", "2")
    assert (code, out) == (0, fake.SOLVED)
    code, out, _ = call(capsys, "inspect", artifact, "--pass", "2", "--json")
    assert json.loads(out) == {"schema": 1, "report": "graph", "pass": "2", "text": fake.SOLVED}
    code, out, _ = call(capsys, "inspect", artifact, "--layer", "*q_proj")
    assert code == 0 and "k_proj" not in out


def test_inspect_refusals(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    assert call(capsys, "inspect", tmp_path / "no")[0] == 3
    assert call(capsys, "inspect", tmp_path)[0] == 3
    assert call(capsys, "inspect", artifact, "--pass", "gptq")[0] == 2
    assert call(capsys, "inspect", artifact, "--layer", "no such")[0] == 3
    assert call(capsys, "inspect", artifact / "recipe.yaml", "--layer", "x")[0] == 2
    assert call(capsys, "inspect", artifact / "recipe.yaml")[0] == 3
    (artifact / "layers.json").write_text("{}")
    assert call(capsys, "inspect", artifact)[0] == 5


def test_diff(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    other = fake.write(tmp_path / "other", recipe="int3")
    code, out, _ = call(capsys, "diff", artifact, other)
    assert code == 0 and out.split() == ["artifact", "A", "B", "recipe", "int4", "int3"]
    code, out, _ = call(capsys, "diff", artifact, other, "--json")
    assert json.loads(out)["header"] == {"recipe": {"before": "int4", "after": "int3"}}
    code, out, _ = call(capsys, "diff", artifact, "--passes", "capture..")
    assert code == 0 and "+ w_q_codes" in out


def test_verify(artifact: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "verify", artifact)
    assert (code, err) == (0, "") and "all as they were written" in out
    code, out, _ = call(capsys, "verify", artifact, "--json")
    assert json.loads(out)["ok"] is True
    data = artifact / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[777] ^= 1
    data.write_bytes(content)
    code, out, err = call(capsys, "verify", artifact)
    assert (code, out) == (5, "") and "model.onnx.data is damaged" in err


def test_verify_in_the_minimal_install(artifact: Path) -> None:
    result = qcompiler("verify", artifact, without=COMPILE_ONLY)
    assert result.returncode == 0, result.stderr


def test_repack_copies_and_says_so(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "repack", artifact, "-o", tmp_path / "copy")
    assert code == 0 and out == f"{tmp_path / 'copy'}\n" and "copied unchanged" in err
    assert fake.snapshot(tmp_path / "copy") == fake.snapshot(artifact)


def test_repack_refuses(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    assert call(capsys, "repack", artifact, "-o", artifact / "in")[0] == 3
    assert call(capsys, "repack", artifact, "-o", artifact, "--overwrite")[0] == 3
    (artifact / "model.onnx").write_bytes(b"changed")
    assert call(capsys, "repack", artifact, "-o", tmp_path / "copy")[0] == 5
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_library(lone_library: Path, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "lib"
    code, out, _ = call(capsys, "library", "-o", target)
    assert code == 0 and Path(out.strip()).read_bytes() == lone_library.read_bytes()
    code, _, err = call(capsys, "library", "-o", target)
    assert code == 3 and "--overwrite" in err
    assert call(capsys, "library", "-o", target, "--overwrite")[0] == 0
    assert call(capsys, "library", "-o", lone_library)[0] == 3


def test_library_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("QCOMPILER_LIBRARY", str(tmp_path / "no.so"))
    code, _, err = call(capsys, "library", "-o", tmp_path / "lib")
    assert code == 3 and "no.so" in err and not (tmp_path / "lib").exists()


def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that loads, whatever this checkout has built."""
    monkeypatch.setattr(library, "library_path", lambda: Path("/lib/libqcompiler_ops.so"))
    for name, value in (("cpu_features", ("avx2",)), ("isas", ("avx2", "generic")), ("isa", "avx2")):
        monkeypatch.setattr(library, name, lambda value=value: value)


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    kernels(monkeypatch)
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "") and "artifacts can run here" in out and "available  avx2, generic" in out
    data = json.loads(call(capsys, "doctor", "--json")[1])
    assert list(data) == ["schema", "report", "machine", "kernels", "gpu", "packages", "can_run", "can_compile", "problems"]
    assert list(data["gpu"]) == ["torch_cuda", "triton", "devices", "can_run", "reason"]
    assert list(data["kernels"]) == ["library", "interface", "layout", "features", "available", "chosen"]
    assert {"package", "version", "tested", "for", "state"} == set(data["packages"][0])
    assert data["can_run"] is True


def test_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    kernels(monkeypatch)
    found: dict[str, Any] = {"onnxruntime": "1.20.1", "torch": None, "numpy": "9.0"}
    real = environment.installed
    monkeypatch.setattr(
        environment, "installed", lambda name: found.get(name, real(name)) if name in found else real(name)
    )
    code, out, _ = call(capsys, "doctor", "--json")
    data = json.loads(out)
    states = {entry["package"]: entry["state"] for entry in data["packages"]}
    assert code == 4 and data["can_run"] is False
    assert (states["onnxruntime"], states["torch"], states["numpy"]) == ("too old", "missing", "newer than tested")
    assert data["problems"] == ["onnxruntime is 1.20.1, expected >=1.21,<2"]


def test_doctor_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    monkeypatch.setenv("QCOMPILER_LIBRARY", str(tmp_path / "no.so"))
    code, out, _ = call(capsys, "doctor")
    assert code == 3 and "cannot run" in out and "no.so" in out


def test_doctor_in_the_minimal_install() -> None:
    result = qcompiler("doctor", "--json", without=COMPILE_ONLY)
    data = json.loads(result.stdout)
    assert result.returncode == (0 if data["can_run"] else 3)
    assert data["machine"]["cores"] >= 1


@pytest.mark.parametrize("command", ["compile", "compile --dry-run"])
def test_compile_in_the_minimal_install_says_what_is_missing(command: str, tmp_path: Path) -> None:
    result = qcompiler(*command.split(), "model", "-o", tmp_path / "out", without=COMPILE_ONLY)
    assert result.returncode == 4
    assert "pip install 'qcompiler[compile]'" in result.stderr and os.listdir(tmp_path) == []


def test_compile_refuses_early(artifact: Path, tmp_path: Path, capsys: Capture) -> None:
    """Before anything heavy is imported, and without a trace."""
    model = tmp_path / "model"
    model.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    before = fake.snapshot(tmp_path)
    for arguments, code, message in (
        (["./no/such/model", "-o", tmp_path / "x"], 3, "no such directory"),
        ([tmp_path / "gone", "-o", tmp_path / "x"], 3, "no such directory"),
        ([model, "-o", model / "inside"], 3, "inside the model"),
        ([model, "-o", tmp_path], 3, "inside the output"),
        ([model, "-o", other], 3, "not a qcompiler artifact"),
        ([model, "-o", artifact], 3, "--overwrite"),
        ([model, "-o", tmp_path / "no" / "parent"], 3, "there is no directory"),
        ([model, "-o", tmp_path / "x", "--text", tmp_path / "no.txt"], 3, "no such file"),
        ([model, "-o", tmp_path / "x", "--recipe", "int5"], 2, "int4"),
        ([model, "-o", tmp_path / "x", "--recipe", tmp_path / "no.yaml"], 3, "no.yaml"),
    ):
        found = call(capsys, "compile", *arguments)
        assert found[0] == code and message in found[2], found
        assert found[1] == ""
    (tmp_path / "bad.yaml").write_text("linear: {bitz: 4}")
    code, _, err = call(capsys, "compile", model, "-o", tmp_path / "x", "--recipe", tmp_path / "bad.yaml")
    assert code == 2 and "bitz" in err
    (tmp_path / "bad.yaml").unlink()
    assert fake.snapshot(tmp_path) == before


def test_compile_passes_the_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import sys
    from types import ModuleType, SimpleNamespace

    seen: dict[str, Any] = {}
    compiler = ModuleType("qcompiler.compiler")

    def compile(model: str, *, output: Path, reporter: object, **options: Any) -> object:
        seen.update(options, model=model)
        reporter.stage("solve")  # type: ignore[attr-defined]
        reporter.layer(1, 1, "q_proj", "21.4 dB")  # type: ignore[attr-defined]
        return SimpleNamespace(path=fake.write(output), seconds=1.5)

    compiler.compile = compile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qcompiler.compiler", compiler)
    text = tmp_path / "t.txt"
    text.write_text("x")
    code, out, err = call(
        capsys, "compile", "model", "-o", tmp_path / "a", "--text", text, text, "--samples", "3", "--target", "torch"
    )
    assert code == 0 and err.splitlines() == ["solve", "solve              1/1  q_proj  21.4 dB"]
    assert out.splitlines()[0].startswith(f"{tmp_path / 'a'}: ") and "1× int4-g32-sym" in out
    assert seen["model"] == "model" and seen["text"] == [text, text] and seen["samples"] == 3
    assert seen["target"] == "torch" and "length" not in seen and seen["recipe"].name == "int4"
    assert "strict_groups" not in seen
    code, out, err = call(capsys, "compile", "model", "-o", tmp_path / "b", "--json", "--quiet", "--strict-groups")
    assert seen["strict_groups"] is True
    data = json.loads(out)
    assert (code, err) == (0, "") and list(data) == [
        "schema", "report", "output", "target", "kind", "recipe", "bytes", "formats", "totals", "left_in_float",
        "unfused", "fallbacks", "seconds",
    ]  # fmt: skip
    assert data["formats"] == {"float32": 1, "int4-g32-sym": 1} and data["left_in_float"] == [fake.K, "rope.table"]


def test_dry_run_prints_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import sys
    from types import ModuleType

    plan = {
        "schema": 1,
        "layers": [fake.layer(fake.Q, weight_sqnr_db=None, output_sqnr_db=None)],
        "left_in_float": [],
        "totals": {
            "bytes": {"codes": 32768, "scales": 4096, "float": 0, "graph": 2048, "total": 38912},
            "bits_per_weight": 4.5,
            "coverage": 1.0,
            "peak_bytes": 2**20,
            "float_bytes": 262144,
            "memory": {"process": 2**19, "float_weights": 2**19},
        },
    }
    seen: dict[str, Any] = {}
    compiler = ModuleType("qcompiler.compiler")
    compiler.plan = lambda model, **options: seen.update(options) or plan  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qcompiler.compiler", compiler)
    code, out, _ = call(capsys, "compile", "model", "--dry-run", "-o", tmp_path / "x")
    assert (
        code == 0
        and "peak memory  1.0 MiB (estimate: process" in out
        and "36,864 bytes (float: 262,144)" in out
        and fake.Q in out
    )
    assert "nothing was done" in out and os.listdir(tmp_path) == []
    assert "model files  38.0 KiB (estimate: codes 32.0 KiB" in out
    assert (seen["target"], "strict_groups" in seen) == ("onnx", False)
    data = json.loads(
        call(capsys, "compile", "model", "--dry-run", "--json", "--target", "torch", "--strict-groups")[1]
    )
    assert (data["schema"], data["report"]) == (1, "plan") and data["totals"] == plan["totals"]
    assert (seen["target"], seen["strict_groups"]) == ("torch", True)


def test_eval_of_outputs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import qcompiler.evaluate

    measures = {"cosine": 0.99, "cosine_se": 0.001, "sqnr_db": None, "max_error": 0.5}
    result = {"schema": 1, "kind": "outputs", "target": "a", "tokens": 10, "outputs": {"hidden": measures}}
    monkeypatch.setattr(qcompiler.evaluate, "evaluate", lambda target, **options: result, raising=False)
    out = call(capsys, "eval", "a", "--against", "b")[1]
    assert [line.split() for line in out.splitlines()][3:] == [
        ["output", "hidden"], ["measure", "value", "±", "se"], ["cosine", "0.99", "0.001"], ["SQNR", "dB", "-", "-"],
        ["maximum", "error", "0.5", "-"],
    ]  # fmt: skip


def test_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import qcompiler.evaluate

    seen: dict[str, Any] = {}

    def evaluate(target: str, **options: Any) -> dict[str, Any]:
        seen.update(options, target=target)
        if target == "damaged":
            raise GateError("damaged")
        return {"perplexity": 12.5, "perplexity_se": 0.25, "tokens": 4096, "kld_mean": 0.01, "kld_mean_se": 0.001}

    monkeypatch.setattr(qcompiler.evaluate, "evaluate", evaluate, raising=False)
    code, out, _ = call(capsys, "eval", "out", "--against", "model", "--context", "256", "--stride", "128", "--json")
    assert code == 0 and json.loads(out) == {
        "schema": 1, "report": "eval", "perplexity": 12.5, "perplexity_se": 0.25, "tokens": 4096, "kld_mean": 0.01,
        "kld_mean_se": 0.001,
    }  # fmt: skip
    assert (seen["target"], seen["against"], seen["context"], seen["stride"]) == ("out", "model", 256, 128)
    code, out, _ = call(capsys, "eval", "out")
    assert [line.split() for line in out.splitlines()] == [
        ["tokens", "4,096"], [], ["measure", "value", "±", "se"], ["perplexity", "12.5", "0.25"],
        ["mean", "KLD", "(nats)", "0.01", "0.001"],
    ]  # fmt: skip
    assert call(capsys, "eval", "damaged")[0] == 5
    assert call(capsys, "eval", "out", "--text", tmp_path / "no.txt")[0] == 3
