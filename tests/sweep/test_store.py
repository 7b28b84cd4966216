"""Solved sites on disk: found again for the same inputs only, whole or not there."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.artifact.interrupt import sigterm_postponed
from qcompiler.errors import InputError, Stopped
from qcompiler.numerics import affine
from qcompiler.passes.solve.gptq import Gptq
from qcompiler.passes.solve.round_to_nearest import RoundToNearest
from qcompiler.sweep.order import Group
from qcompiler.sweep.solve import solve_sites
from qcompiler.sweep.store import SolvedStore, fingerprint
from qcompiler.sweep.sweep import Sweep
from tests.captures import analysed
from tests.sweep.prepared_context import context_of, linear_sites


def test_what_is_put_comes_back(tmp_path: Path):
    store = SolvedStore(tmp_path)
    tensors = {"codes": torch.arange(12, dtype=torch.uint8).reshape(3, 4), "scales": torch.rand(3, 1).half()}
    store.put("a" * 64, tensors, {"format": "int4-row-sym", "n": 1.5})
    found = store.get("a" * 64)
    assert found is not None and found[1] == {"format": "int4-row-sym", "n": 1.5}
    assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert store.get("b" * 64) is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_a_damaged_file_is_no_solution(damage: str, tmp_path: Path):
    store = SolvedStore(tmp_path)
    store.put("a" * 64, {"codes": torch.ones(1000, dtype=torch.uint8)}, {})
    path = next(tmp_path.iterdir())
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-10], "empty": b"", "garbage": os.urandom(500)}[damage])
    assert store.get("a" * 64) is None
    assert not path.exists()


def test_an_unfinished_file_is_never_read(tmp_path: Path):
    (tmp_path / f"{'a' * 64}.partial").write_bytes(b"half")
    assert SolvedStore(tmp_path).get("a" * 64) is None


def test_every_input_decides_the_fingerprint():
    model = analysed("llama")
    context = context_of(model)
    same = fingerprint(model.graph, context)
    assert same == fingerprint(model.graph, context_of(model))
    assert same != fingerprint(model.graph, context_of(model, samples=4))
    assert same != fingerprint(model.graph, context_of(model, {"bits": 3, "group": 64}))
    name = next(site.weight for site in model.graph.sites if site.role == "mlp.down")
    weight = model.graph.stored(name)
    kept = weight.data[5, 7].clone()
    try:
        weight.data[5, 7] += 1e-3
        assert same != fingerprint(model.graph, context)
    finally:
        weight.data[5, 7] = kept
    assert same == fingerprint(model.graph, context)


def _solve(model: Any, context: Any) -> Any:
    return Gptq().run(model.graph, context)


class _Dies(RuntimeError):
    pass


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_resumed_run_gives_the_same_solutions(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = analysed("llama")
    whole = context_of(model)
    expected = _solve(model, whole)
    killed = dataclasses.replace(context_of(model), store=SolvedStore(tmp_path))
    put, count = SolvedStore.put, 0

    def dying(self: SolvedStore, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise _Dies
        return put(self, *arguments)

    monkeypatch.setattr(SolvedStore, "put", dying)
    with pytest.raises(_Dies):
        _solve(model, killed)
    monkeypatch.setattr(SolvedStore, "put", put)
    resumed = dataclasses.replace(context_of(model), store=SolvedStore(tmp_path))
    report = _solve(model, resumed)
    assert resumed.store is not None and resumed.store.found == after
    assert report.layers == expected.layers
    for name, solution in whole.solutions.items():
        assert torch.equal(solution.codes, resumed.solutions[name].codes), name
        assert torch.equal(solution.scales, resumed.solutions[name].scales), name


def test_sigterm_stops_behind_the_site_at_work(tmp_path: Path):
    model = analysed("llama")
    context = dataclasses.replace(context_of(model), store=SolvedStore(tmp_path))
    lines: list[str] = []

    class Reporter:
        def solved(self, i: int, n: int, name: str, message: str) -> None:
            lines.append(name)
            if i == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    context.reporter = Reporter()  # type: ignore[assignment]
    with pytest.raises(Stopped, match=rf"stopped behind layer .*: 3 of {len(linear_sites(model))} layers") as stopped:
        _solve(model, context)
    assert stopped.value.exit_code == 75
    assert len(lines) == 3 and len(list(tmp_path.glob("*.safetensors"))) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_is_left_alone_where_nothing_can_be_resumed():
    with sigterm_postponed(False):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class _Counting:
    """Counts what it is asked for; rounds to nearest."""

    def __init__(self, model: Any, context: Any, fail: str | None = None):
        self.model, self.context, self.fail = model, context, fail
        self.groups: list[Group] = []
        self.solved: list[str] = []

    def statistics(self, group: Group) -> Any:
        self.groups.append(group)
        tokens: list[int] = []
        return type("Tokens", (), {"update": lambda self, x: tokens.append(x.shape[0])})()

    def solve(self, site: Any, statistics: Any) -> Any:
        if site.name == self.fail:
            raise ValueError("the Hessian holds NaN")
        self.solved.append(site.name)
        weight = self.model.graph.constant(site.weight)
        return affine.fit(weight, self.context.schemes[site.name].weight_format), {}, None


def test_sites_of_one_input_share_statistics_and_tied_sites_are_solved_once():
    model = analysed("llama")
    context = context_of(model)
    sites = linear_sites(model)
    method = _Counting(model, context)
    report = solve_sites(Gptq(), model.graph, context, sites, Sweep(model.graph, context, sites), method)
    assert len(method.groups) == len({site.input_group for site in sites}) < len(sites)
    assert report.changed == len(sites) == len(set(method.solved))


def test_a_tied_head_takes_the_solution_of_its_twin():
    model = analysed("gpt2")
    head = next(site for site in model.graph.sites if site.role == "head")
    assert head.tie_group is not None
    scheme = {"bits": 8, "activations": "float"}
    context = context_of(model, head=scheme, embed=scheme)
    RoundToNearest().run(model.graph, context)
    twin = next(s for s in model.graph.sites if s.tie_group == head.tie_group and s is not head)
    context.solutions.pop(head.name)
    method = _Counting(model, context)
    solve_sites(Gptq(), model.graph, context, [head], Sweep(model.graph, context, [head]), method)
    assert method.solved == []
    assert context.solutions[head.name] is context.solutions[twin.name]


def test_a_solver_s_complaint_names_the_layer():
    model = analysed("llama")
    context = context_of(model)
    sites = linear_sites(model)
    method = _Counting(model, context, fail=sites[2].name)
    with pytest.raises(InputError, match=f"layer {sites[2].name}: the Hessian holds NaN"):
        solve_sites(Gptq(), model.graph, context, sites, Sweep(model.graph, context, sites), method)
