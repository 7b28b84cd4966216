"""Which kernel runs a call, and with what configuration: read from data, never measured on a request.

A table is a list of rules for each device; the first rule that fits a call is taken, those of the device before those of
`generic`. Tables are looked at in this order: `override(...)`, the file named in QCOMPILER_GPU_DISPATCH, `dispatch.json` beside
this module. docs/gpu.md has the format of the file.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError

VARIABLE = "QCOMPILER_GPU_DISPATCH"
SCHEMA = 1
GENERIC = "generic"
SHIPPED = Path(__file__).with_name("dispatch.json")
FILL = 0  # a `split` of 0: as many as fill the device

# What a configuration may hold: name -> (smallest, largest, whether a power of 2).
LIMITS: dict[str, tuple[int, int, bool]] = {
    "block_m": (16, 256, True),
    "block_n": (16, 512, True),
    "block_k": (32, 512, True),
    "split": (FILL, 256, False),
    "warps": (1, 16, True),
    "stages": (1, 8, False),
    "chunk": (0, 1 << 31, False),
}
# Kernel -> the names that its configuration has, all of them.
KERNELS: dict[str, tuple[str, ...]] = {
    "gemv": ("block_n", "block_k", "split", "warps", "stages"),
    "gemv_gather": ("block_n", "block_k", "split", "warps", "stages"),
    "dot": ("block_m", "block_n", "block_k", "split", "warps", "stages"),
    "dot_gather": ("block_m", "block_n", "block_k", "split", "warps", "stages"),
    "dot_narrow": ("block_m", "block_n", "block_k", "split", "warps", "stages"),
    "matmul": ("chunk",),
    "int_mm": ("chunk",),
    "rows": ("block_k", "warps"),
}
CONDITIONS = ("op", "format", "activation", "dtype")
RANGES = ("rows", "outputs", "inputs")


@dataclass(frozen=True)
class Rule:
    """One line of a table: conditions, all of which must hold, and what is taken then.

    Attributes:
        patterns: condition -> shell patterns, one of which must match (`op`, `format`, `activation`, `dtype`).
        ranges: condition -> (least, most or None), both included (`rows` of x, `outputs` n, `inputs` k).
        kernel: one of `KERNELS`.
        config: its configuration.
        place: file and position, for messages.
    """

    patterns: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, tuple[int, int | None]]
    kernel: str
    config: Mapping[str, int]
    place: str = field(compare=False, default="")

    def fits(self, names: Mapping[str, str], sizes: Mapping[str, int]) -> bool:
        return all(any(fnmatchcase(names[key], p) for p in patterns) for key, patterns in self.patterns.items()) and all(
            low <= sizes[key] and (high is None or sizes[key] <= high) for key, (low, high) in self.ranges.items()
        )


@dataclass(frozen=True)
class Choice:
    """A kernel and its configuration for one call; `place` says which rule it came from."""

    kernel: str
    config: Mapping[str, int]
    place: str


Table = Mapping[str, tuple[Rule, ...]]


def _error(place: str, text: str) -> InputError:
    return InputError(f"GPU dispatch table, {place}: {text}")


def _rule(entry: Any, place: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise _error(place, f"a rule is an object, found {entry!r}")
    known = (*CONDITIONS, *RANGES, "kernel", "config")
    for name in entry:
        if name not in known:
            raise _error(place, f"unknown key {name!r}; known: {', '.join(known)}")
    patterns: dict[str, tuple[str, ...]] = {}
    for name in CONDITIONS:
        if name in entry:
            value = [entry[name]] if isinstance(entry[name], str) else entry[name]
            if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
                raise _error(place, f"{name} is {entry[name]!r}, expected a pattern or a list of patterns")
            patterns[name] = tuple(value)
    ranges: dict[str, tuple[int, int | None]] = {}
    for name in RANGES:
        if name in entry:
            ranges[name] = _range(entry[name], name, place)
    kernel = entry.get("kernel")
    if kernel not in KERNELS:
        raise _error(place, f"kernel is {kernel!r}, expected one of {', '.join(KERNELS)}")
    return Rule(patterns, ranges, kernel, _config(entry.get("config", {}), kernel, place), place)


def _range(value: Any, name: str, place: str) -> tuple[int, int | None]:
    fine = isinstance(value, list) and len(value) == 2 and _whole(value[0]) and (value[1] is None or _whole(value[1]))
    if not fine or (value[1] is not None and value[1] < value[0]):
        raise _error(place, f"{name} is {value!r}, expected [least, most], most null for any")
    return value[0], value[1]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _config(config: Any, kernel: str, place: str) -> Mapping[str, int]:
    if not isinstance(config, Mapping):
        raise _error(place, f"config is {config!r}, expected an object")
    wanted = KERNELS[kernel]
    if unknown := [name for name in config if name not in wanted]:
        raise _error(place, f"kernel {kernel!r} has no {unknown[0]!r} in its config; it has {', '.join(wanted)}")
    for name in wanted:
        if name not in config:
            raise _error(place, f"kernel {kernel!r} needs {name!r} in its config")
        value, (low, high, power) = config[name], LIMITS[name]
        if not _whole(value) or not low <= value <= high or (power and value & (value - 1)):
            kind = "a power of 2" if power else "a whole number"
            raise _error(place, f"{name} is {value!r}, expected {kind} from {low} to {high}")
    return dict(config)


def parse(document: Any, source: str) -> Table:
    """A table from a decoded JSON document.

    Raises:
        InputError: it is none; says where and what was expected.
    """
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, Mapping) else document
        raise _error(source, f"schema is {found!r}, expected {SCHEMA}")
    devices = document.get("devices")
    if not isinstance(devices, Mapping) or not all(isinstance(rules, list) for rules in devices.values()):
        raise _error(source, "devices is missing or no object of lists of rules")
    return {
        device: tuple(_rule(entry, f"{source}: devices.{device}[{i}]") for i, entry in enumerate(rules))
        for device, rules in devices.items()
    }


def load(path: str | os.PathLike[str]) -> Table:
    """The table of a file.

    Raises:
        InputError: it cannot be read, is no JSON or no table.
    """
    try:
        return parse(json.loads(Path(path).read_text()), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise _error(str(path), f"cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise _error(str(path), f"is no JSON: {error}") from error


@functools.cache
def _loaded(path: str) -> Table:
    return load(path)


# A number of its own for each override, so that what was chosen under one is not taken for another's.
_numbers = itertools.count(1)
_override: ContextVar[tuple[int, Table]] = ContextVar("qcompiler_gpu_dispatch", default=(0, {}))


@contextmanager
def override(table: Table | Mapping[str, Any] | str | os.PathLike[str]) -> Iterator[None]:
    """Within it calls are looked up in this table first: a path, a document of the file's form, or a parsed table.

    Raises:
        InputError: as `load`.
    """
    if isinstance(table, (str, os.PathLike)):
        table = load(table)
    elif "schema" in table:
        table = parse(table, "given in the call")
    token = _override.set((next(_numbers), table))
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def forced(kernel: str, **config: int) -> Iterator[None]:
    """Within it every call takes this kernel and configuration."""
    rule = {"kernel": kernel, "config": config}
    with override({"schema": SCHEMA, "devices": {GENERIC: [rule]}}):
        yield


def tables() -> list[Table]:
    """The tables in the order in which they are looked at."""
    named = os.environ.get(VARIABLE)
    return [_override.get()[1], *([_loaded(named)] if named else []), _loaded(str(SHIPPED))]


def choose(
    op: str, *, format: str, activation: str, dtype: str, rows: int, outputs: int, inputs: int, device: str
) -> Choice:
    """The kernel of a call.

    Args:
        op: for instance `linear_nbit`.
        format: label of the weight's format, for instance `int4-g128-sym`.
        activation: label of an `Activation`; `float` for an embedding.
        dtype: of x, for instance `float16`.
        rows, outputs, inputs: of the product.
        device: its name, as `device.name` has it.

    Raises:
        InputError: no rule fits, or a table is none.
    """
    return _choose(op, format, activation, dtype, rows, outputs, inputs, device, os.environ.get(VARIABLE), _override.get()[0])


@functools.lru_cache(maxsize=4096)
def _choose(op, format, activation, dtype, rows, outputs, inputs, device, variable, number) -> Choice:
    names = {"op": op, "format": format, "activation": activation, "dtype": dtype}
    sizes = {"rows": rows, "outputs": outputs, "inputs": inputs}
    for table in tables():
        for rule in (*table.get(device, ()), *table.get(GENERIC, ())):
            if rule.fits(names, sizes):
                return Choice(rule.kernel, rule.config, rule.place)
    raise InputError(
        f"no rule of the GPU dispatch tables fits {op} {format} {activation} {dtype} with {rows} rows, {outputs} outputs and "
        f"{inputs} inputs on {device!r}: give {GENERIC!r} a rule without conditions"
    )


def splits(wanted: int, programs: int, steps: int, processors: int) -> int:
    """Parts of K that run side by side; the same for the same shape and device, so that sums are too.

    Args:
        wanted: the configuration's `split`, `FILL` for as many as give every processor four programs.
        programs: there are without a split.
        steps: of the loop over K, which a split cannot exceed.
        processors: of the device.
    """
    count = -(-4 * processors // max(programs, 1)) if wanted == FILL else wanted
    return max(1, min(count, steps, 64 if wanted == FILL else steps))
