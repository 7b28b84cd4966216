"""A machine with GPUs, as far as torch can be asked about them: for tests of what is refused before anything is moved."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch


def fake_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int = 1, cuda: str | None = "12.8", triton: bool = True, free: int = 2**40,
    capability: tuple[int, int] = (9, 0),
) -> None:
    """Let torch say that there are `count` GPUs with `free` bytes each."""
    real = importlib.util.find_spec
    if triton:
        if real("triton") is None:
            pytest.skip("Triton is not installed")
        monkeypatch.setattr("qcompiler.gpu.device.capability", lambda index: capability)
        monkeypatch.setattr("qcompiler.gpu.device._name", lambda index: "Fake GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2**41))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
    described = SimpleNamespace(name="Fake GPU", major=9, minor=0, total_memory=2**41)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: described)
    found = SimpleNamespace(name="triton") if triton else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: found if name == "triton" else real(name, *a))
