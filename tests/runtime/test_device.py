"""Devices: what is refused and how, before anything is loaded or moved; and what `doctor` says of GPUs."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.cli.main import main
from qcompiler.errors import CapacityError, QCompilerError, UnsupportedError, UsageError
from qcompiler.report.gpus import gpus, lines
from qcompiler.runtime import device
from qcompiler.runtime.device import Placement, check_fits, device_name, find_device, tensor_bytes
from qcompiler.runtime.relocate import relocate
from qcompiler.runtime.session import Session
from tests.runtime.fake_gpu import fake_gpus


def compiled(tmp_path_factory: pytest.TempPathFactory, target: str) -> Path:
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("device") / target
    module = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    return qcompiler.compile(module, output=output, example=(torch.randn(3, 64),), recipe="int4", target=target).path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory, "torch")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory, "onnx-stock")


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:17"])
def test_names(name: str) -> None:
    assert device_name(name) == name


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:01", "cuda:0 ", "mps", "meta", "cpu:0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
        device_name(name)


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")


# what the machine lacks -> what the error says of it
LACKING = {
    "torch without CUDA": (dict(cuda=None), "cuda:0", "built without CUDA"),
    "no GPU": (dict(count=0), "cuda:0", "torch finds no GPU"),
    "an index beyond the last": (dict(count=2), "cuda:2", r"has 2 GPUs \(cuda:0 to cuda:1\)"),
    "an index beyond the only one": (dict(count=1), "cuda:1", r"has 1 GPU \(cuda:0\)"),
    "a GPU that is young enough": (dict(capability=(7, 0)), "cuda:0", "Fake GPU has compute capability 7.0, the kernels need"),
    "no Triton": (dict(triton=False), "cuda", r"Triton, which is not installed: pip install 'qcompiler\[gpu\]'"),
}


@pytest.mark.parametrize("lack", LACKING)
def test_what_the_machine_lacks_is_said(lack: str, monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    machine, name, message = LACKING[lack]
    fake_gpus(monkeypatch, **machine)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=message) as caught:
        find_device(name)
    assert caught.value.exit_code == 4 and str(caught.value).startswith(f"device {name}")
    with pytest.raises(UnsupportedError, match=message):
        Session(artifact, device=name)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **more: object) -> object:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"needs torch, which is not installed: pip install 'qcompiler\[compile\]'"):
        find_device("cuda")


def test_what_is_there_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=2)
    assert find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_convolutions_of_float32_are_exact_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As products are: by torch's default they are TF32 there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    find_device("cpu")
    assert torch.backends.cudnn.allow_tf32
    fake_gpus(monkeypatch)
    find_device("cuda")
    assert not torch.backends.cudnn.allow_tf32


def test_triton_is_asked_for_by_our_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, triton=False)
    assert find_device("cuda", kernels=False) == torch.device("cuda", 0)


def test_a_program_that_does_not_fit_says_by_how_much(monkeypatch: pytest.MonkeyPatch, artifact: Path) -> None:
    fake_gpus(monkeypatch, free=1000)
    moved: list[object] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, **k: moved.append(self))
    with pytest.raises(CapacityError) as caught:
        Session(artifact, device="cuda")
    assert caught.value.exit_code == 6 and moved == []
    size = tensor_bytes(Session(artifact)._program.module)  # type: ignore[union-attr]
    assert size > 1000
    assert str(artifact) in str(caught.value) and "too little" in str(caught.value)
    assert f"{(size - 1000) / 2**20:.1f} MiB too little" in str(caught.value)


def test_the_free_memory_is_counted_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device("cuda", 0)
    fake_gpus(monkeypatch, free=5 * 2**30)
    check_fits(place, {"weights": 3 * 2**30, "cache": 2 * 2**30}, "it", "do less")
    with pytest.raises(CapacityError, match=r"it needs 5.00 GiB on cuda:0 \(weights 3.00 GiB, cache 2.00 GiB\), of whose"):
        check_fits(place, {"weights": 3 * 2**30, "cache": 2 * 2**30 + 1, "nothing": 0}, "it", "do less")
    # What this process has reserved and does not use is free as well.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 200)
    check_fits(place, {"weights": 5 * 2**30 + 100}, "it", "do less")
    with pytest.raises(CapacityError):
        check_fits(place, {"weights": 5 * 2**30 + 101}, "it", "do less")
    check_fits(torch.device("cpu"), {"weights": 2**60}, "it", "do less")


def test_artifacts_of_onnx_runtime_are_refused_with_what_to_do(stock: Path) -> None:
    with pytest.raises(UnsupportedError, match="compile the model with the same recipe and --target torch") as caught:
        Session(stock, device="cuda")
    assert caught.value.exit_code == 4
    assert Session(stock, device="cpu").artifact.target == "onnx-stock"


def test_the_cpu_kernels_take_float32_alone() -> None:
    assert Placement("cuda", "bfloat16").dtype == "bfloat16"
    with pytest.raises(UnsupportedError, match="its kernels take float32 activations"):
        Placement("cpu", "float16")
    with pytest.raises(UsageError, match="expected one of float32, float16, bfloat16"):
        Placement("cuda", "float64")  # type: ignore[arg-type]


def test_an_artifact_of_onnx_runtime_ends_with_the_errors_code(stock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(stock), "hi", "--device", "cuda"]) == 4
    assert "--target torch" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "bench", "eval"])
def test_a_name_that_is_none_ends_every_command(command: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(artifact), "--device", "gpu"]) == 2
    assert "expected cpu, cuda or cuda:N" in capsys.readouterr().err


def test_run_on_a_machine_without_a_gpu(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, count=0)
    assert main(["run", str(artifact), "hi", "--device", "cuda"]) == 4
    assert "torch finds no GPU" in capsys.readouterr().err


def test_evaluating_a_checkpoint_asks_for_the_device_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpus(monkeypatch, cuda=None)
    assert main(["eval", "reference", "--max-windows", "1", "--device", "cuda"]) == 4
    assert "built without CUDA" in capsys.readouterr().err


def test_relocate_moves_every_tensor_and_every_device_in_the_graph() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("scale", torch.ones(3))
            self.constant = torch.ones(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(x.shape[0], device=x.device).float()
            return x * self.weight + positions.to(torch.device("cpu"), torch.float32)[:, None] * self.scale + self.constant

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Module(), (torch.ones(4, 3),), dynamic_shapes={"x": {0: rows}})
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule) and "device(type='cpu')" in module.code
    relocate(module, torch.device("meta"))
    assert "cpu" not in module.code and "_assert_tensor_metadata" not in module.code
    result = module(torch.ones(5, 3, device="meta"))
    assert result.is_meta and result.shape == (5, 3)


def test_tensors_of_one_storage_are_counted_once() -> None:
    module = nn.Module()
    module.register_buffer("one", torch.zeros(8))
    module.register_buffer("same", module.one[:4])
    module.constant = torch.zeros(2, dtype=torch.int8)
    assert tensor_bytes(module) == 34


def test_doctor_says_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, cuda=None, count=0)
    found = gpus()
    assert found["devices"] == [] and found["torch_cuda"] is None and found["can_run"] is False
    assert "built without CUDA" in found["reason"] and "not used" in lines(found)[-1]


def test_doctor_lists_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, count=2, free=2**34)
    found = gpus()
    described = {"name": "Fake GPU", "capability": "9.0", "memory_bytes": 2**41, "free_bytes": 2**34}
    assert found["devices"] == [described, described] and found["torch_cuda"] == "12.8"
    assert found["can_run"] is True and found["reason"] is None
    assert "cuda:1" in lines(found)[3] and "16.0 of 2048.0 GiB free" in lines(found)[3]


def test_no_device_is_asked_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a device was asked for")

    for name in ("is_available", "device_count", "mem_get_info", "get_device_properties", "init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    # Beside the one that is imported, which others hold.
    spec = importlib.util.spec_from_file_location("device_again", device.__file__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again.Placement("cuda").device == "cuda"
    assert issubclass(UnsupportedError, QCompilerError)
