"""The kernels of vector-quantized weights compile for real GPUs, though none is there: what `compile_launches` does for others.

`python -m tests.gpu.test_vq_compiled 90` writes what it found: a line of JSON for each kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.gpu.test_compiled import ROOT

# What is compiled for a capability is what the shipped table has for this device.
DEVICES = {90: "NVIDIA H200"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_named_format_compiles_without_spilling(capability: int) -> None:
    """With what the shipped table names, from one row to a prefill."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", __name__, str(capability)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {"dot", "dequantize", "embed"} <= {line["kernel"] for line in found}
    assert not [line for line in found if line["stack"] > 16]  # ptxas gives up a register or two to stay at 128
    assert max(line["shared"] for line in found) <= 99 << 10  # what a block may have on 8.6 and 8.9


def main(capability: int) -> None:
    """A line for every kernel that was compiled."""
    import torch

    from qcompiler.gpu import device, implementation
    from qcompiler.ops.formats import VqFormat
    from qcompiler.ops.linear_vq import WEIGHT_ATTRIBUTES, WEIGHT_INPUTS, random_weight
    from qcompiler.recipe.schema import VQ_FORMATS
    from tests.gpu.compile_launches import compiling

    device.name = lambda _: DEVICES.get(capability, "some GPU")
    linear, embedding = implementation("linear_vq"), implementation("embedding_vq")
    with compiling(capability, lambda found: print(json.dumps(found))):
        for label in dict.fromkeys(VQ_FORMATS.values()):
            packed, attributes = random_weight(np.random.default_rng(0), 256, 512, VqFormat.parse(label))
            tensors = [torch.from_numpy(packed[i.name]) for i in WEIGHT_INPUTS]
            sizes = [attributes[name] for name in WEIGHT_ATTRIBUTES]
            embedding(torch.zeros(2, dtype=torch.int64), *tensors, *sizes, 1)
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for rows in (1, 64, 512):
                    for activation in (0, 2):
                        linear(torch.zeros(rows, 512, dtype=dtype), *tensors, None, None, None, *sizes, activation, 1, 0, 0.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
