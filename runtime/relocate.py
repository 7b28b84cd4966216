"""Move a loaded program to a device: its tensors, and the places in its graph where a device is written.

    before   arange(n, device=cpu)   _assert_tensor_metadata(x, …, device=cpu)   to.device(x, cpu, float32)
    after    arange(n, device=cuda:0)                                            to.device(x, cuda:0, float32)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def relocate(module: torch.fx.GraphModule, device: torch.device) -> None:
    """Move `module` to `device`, once; what it makes while it runs is made there as well.

    Assertions of a tensor's type and device are what the trace saw and nothing that a result needs: they are dropped.
    """
    import torch
    from torch.fx.node import map_aggregate

    asserted = torch.ops.aten._assert_tensor_metadata.default
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is asserted:
            module.graph.erase_node(node)
            continue
        there = lambda value: device if isinstance(value, torch.device) else value  # noqa: E731
        node.args = map_aggregate(node.args, there)
        node.kwargs = map_aggregate(node.kwargs, there)
    module.recompile()
    module.to(device)
    for owner in module.modules():
        # Constants that the trace lifted are plain attributes, which `Module.to` does not know.
        for name, value in list(vars(owner).items()):
            if isinstance(value, torch.Tensor):
                setattr(owner, name, value.to(device))
