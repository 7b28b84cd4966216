"""Attention over a cache, one op in ONNX Runtime: ours beside ONNX Runtime's own.

    ./tools/bench/attention --threads 1,2
    ./tools/bench/attention --cases 4000:1,0:1024 --heads 32 --kv-heads 8 --head-size 128

A case is `positions before : new ones`. Packed queries, keys and values, rotary positions, one buffer for past and present, as
in the models that the compiler writes. Caches of several layers take turns, as many as make up --megabytes, so that a long past
comes from memory as it does in a model. In a round the two ops and the read limit take turns in random order; ratios are
taken within a round, what is shown is the median over rounds with quartiles. GB/s: of the cache that is filled, keys and values.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from qcompiler.lower.own_attention import use_own_attention
from qcompiler.lower.share_cache import CacheResult
from qcompiler.runtime import library
from tools.bench.kernels_limit import Limits

CASES = "16:1,80:1,300:1,2000:1,0:256,256:256,0:512"
LEAST = 0.02  # seconds of a side in a round


def models(heads: int, kv_heads: int, size: int) -> dict[str, bytes]:
    """A model of one node: ONNX Runtime's op, and what the compiler makes of it."""
    names = ["query", "", "", "past_key", "past_value", "last", "total", "cos", "sin", "positions"]
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
    node = helper.make_node("GroupQueryAttention", names, ["y", "key", "value"], domain="com.microsoft", **attributes)
    value, width = helper.make_tensor_value_info, (heads + 2 * kv_heads) * size
    cache: list[int | str | None] = [1, kv_heads, "capacity", size]
    inputs = [
        value("query", TensorProto.FLOAT, [1, "new", width]), value("past_key", TensorProto.FLOAT, cache),
        value("past_value", TensorProto.FLOAT, cache),
        value("last", TensorProto.INT32, [1]), value("total", TensorProto.INT32, []),
        value("cos", TensorProto.FLOAT, ["most", size // 2]), value("sin", TensorProto.FLOAT, ["most", size // 2]),
        value("positions", TensorProto.INT64, [1, "new"]),
    ]  # fmt: skip
    outputs = [value("y", TensorProto.FLOAT, [1, "new", heads * size])]
    outputs += [value(name, TensorProto.FLOAT, cache) for name in ("key", "value")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    theirs = helper.make_model(helper.make_graph([node], "attention", inputs, outputs), opset_imports=opsets, ir_version=10)
    ours = ir.from_proto(theirs)
    if not use_own_attention(ours, CacheResult("shared", "past_length")).matched:
        raise RuntimeError("the op is not replaced")
    return {"ONNX Runtime": theirs.SerializeToString(), "ours": ir.to_proto(ours).SerializeToString()}


def open_side(
    model: bytes, own: bool, threads: int, shape: tuple[int, int, int], case: tuple[int, int], layers: int
) -> Callable[[], None]:
    """What runs the op once for every layer, each with caches of its own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if own:
        options.register_custom_ops_library(str(library.library_path()))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (heads, kv_heads, size), (past, new) = shape, case
    rng, tensor = np.random.default_rng(0), onnxruntime.OrtValue.ortvalue_from_numpy
    normal = lambda *shape: tensor(rng.standard_normal(shape, np.float32))  # noqa: E731
    angles = np.arange(past + new)[:, None] / 10000 ** (np.arange(size // 2) / (size // 2))
    shared = {
        "query": normal(1, new, (heads + 2 * kv_heads) * size), "last": tensor(np.array([past + new - 1], np.int32)),
        "total": tensor(np.array(past + new, np.int32)), "positions": tensor(np.arange(past, past + new)[None]),
        "cos": tensor(np.cos(angles).astype(np.float32)), "sin": tensor(np.sin(angles).astype(np.float32)),
    }  # fmt: skip
    y = tensor(np.empty((1, new, heads * size), np.float32))
    bindings = []
    for _ in range(layers):
        binding = session.io_binding()
        for name, given in shared.items():
            binding.bind_ortvalue_input(name, given)
        for kind in ("key", "value"):
            cache = normal(1, kv_heads, past + new, size)
            binding.bind_ortvalue_input(f"past_{kind}", cache)
            binding.bind_ortvalue_output(kind, cache)
        binding.bind_ortvalue_output("y", y)
        bindings.append(binding)

    def walk() -> None:
        for binding in bindings:
            session.run_with_iobinding(binding)

    walk()
    return walk


def seconds(walk: Callable[[], None]) -> float:
    """Of one walk, over as many as take LEAST seconds."""
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < LEAST:
        walk()
        count += 1
    return taken / count


def spread(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, (50, 25, 75))]


def measure(case: tuple[int, int], threads: int, chosen: argparse.Namespace) -> dict[str, Any]:
    shape = chosen.heads, chosen.kv_heads, chosen.head_size
    filled = 2 * 4 * chosen.kv_heads * chosen.head_size * sum(case)
    layers = max(1, min(chosen.megabytes * 10**6 // filled, 24))
    sides = {
        name: open_side(model, name == "ours", threads, shape, case, layers) for name, model in models(*shape).items()
    }
    memory = np.ones(max(layers * filled, 2**26), np.uint8)
    reads = list(Limits(memory.ctypes.data, memory.nbytes, threads).reads().values())
    samples: dict[str, list[float]] = {name: [] for name in [*sides, "read"]}
    order = random.Random(0)
    for turn in range(chosen.rounds + 1):  # the first does not count
        for name in order.sample(list(samples), len(samples)):
            time.sleep(0.02)
            if name == "read":
                found = min(seconds(read) for read in reads) / memory.nbytes * layers * filled
            else:
                found = seconds(sides[name])
            if turn:
                samples[name].append(found / layers)
    ratio = [b / a for a, b in zip(samples["ours"], samples["ONNX Runtime"], strict=True)]
    share = [a / b for a, b in zip(samples["read"], samples["ours"], strict=True)]
    return {
        "past": case[0], "new": case[1], "threads": threads, "layers": layers,
        "ratio": spread(ratio), "share_of_read": spread(share),
        "gigabytes_a_second": filled / float(np.median(samples["ours"])) / 1e9,
        "microseconds": {name: spread([1e6 * value for value in values]) for name, values in samples.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench/attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES, metavar="PAST:NEW,…", help=f"[{CASES}]")
    parser.add_argument("--threads", default="1,2", metavar="N,…", help="[1,2]")
    parser.add_argument("--heads", type=int, default=20, help="[20]")
    parser.add_argument("--kv-heads", type=int, default=4, help="[4]")
    parser.add_argument("--head-size", type=int, default=64, help="[64]")
    parser.add_argument("--megabytes", type=int, default=128, help="of caches that take turns, of at most 24 layers [128]")
    parser.add_argument("--rounds", type=int, default=7, help="[7]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    chosen = parser.parse_args()
    cases = [tuple(int(part) for part in case.split(":")) for case in chosen.cases.split(",")]
    found = []
    print("| threads | before | new | ONNX Runtime, µs | ours, µs | ratio | GB/s | % of read |\n" + "|---" * 8 + "|")
    for threads in [int(part) for part in chosen.threads.split(",")]:
        for case in cases:
            row = measure(case, threads, chosen)  # type: ignore[arg-type]
            found.append(row)
            theirs, ours = (row["microseconds"][name][0] for name in ("ONNX Runtime", "ours"))
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*row["ratio"])
            read = f"{row['gigabytes_a_second']:.1f} | {100 * row['share_of_read'][0]:.0f}" if row["new"] == 1 else "| "
            print(f"| {threads} | {case[0]} | {case[1]} | {theirs:.0f} | {ours:.0f} | {ratio} | {read} |", flush=True)
    if chosen.json:
        settings = {name: getattr(chosen, name) for name in ("heads", "kv_heads", "head_size", "megabytes", "rounds")}
        chosen.json.write_text(json.dumps({"schema": 1, "settings": settings, "cases": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
