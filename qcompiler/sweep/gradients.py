"""What the end loss cares about: the gradient of every linear site's output in the float model, reduced as it comes.

s[i, k] = mean over the outputs j of group k of (∂l/∂z_ij)², i a calibration token (GuidedQuant, arXiv 2505.07004)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from qcompiler.errors import UsageError
from qcompiler.graph.graph import Graph, Site
from qcompiler.sweep.backward import Backward
from qcompiler.sweep.losses import Labels, end_loss

if TYPE_CHECKING:
    from qcompiler.pipeline.context import Context

# Of the loss while its gradients flow; a power of two, so that it rounds nothing. Squares of what is left stay normal numbers.
SCALE = 2.0**10
# Bytes of s: float32 while it gathers, float64 as it is given out.
GATHERED, GIVEN = 4, 8


def row_groups(n: int, groups: int) -> list[slice]:
    """`groups` consecutive parts of n outputs, the first ones longer by one where n cannot be divided (as `tensor_split`);
    fewer where there are fewer outputs."""
    groups = min(groups, n)
    size, more = divmod(n, groups)
    edges = [index * size + min(index, more) for index in range(groups + 1)]
    return [slice(start, end) for start, end in zip(edges, edges[1:], strict=False)]


def output_gradients(
    graph: Graph, context: Context, sites: Sequence[Site], *, groups: int = 4, labels: Labels = "text", seed: int = 0
) -> Iterator[tuple[Site, torch.Tensor | None]]:
    """Take the gradients of all sites, the last segment's first.

    Args:
        graph: after analysis; it is run in float, whatever is solved already.
        context: its samples and its budget.
        sites: linear sites.
        groups: g, consecutive parts of a site's outputs: see `row_groups`.
        labels: `text`: each token's next one; `sampled`: drawn from the model's own distribution, which gives the Fisher
            information. A model without logits has no labels: its outputs are projected on normal noise.
        seed: of labels that are drawn, and of the noise.

    Returns:
        (site, s float64 `[tokens of all samples in their order, g]`), or None in place of s where no sample's loss depends on
        the site's output. Tokens that no loss depends on have 0.

    Raises:
        UsageError: no samples, no labels, or labels that the model does not have.
        InputError: a loss or a gradient that is not finite.
        CapacityError: the budget does not hold one segment.
    """
    loss = end_loss(graph, labels, seed)
    gathered = _Gathered(groups)
    run = Backward(graph, context, sites, loss, lambda rows: (GATHERED + GIVEN) * groups * rows, SCALE)
    for done in run.run(gathered.take):
        if not loss.labelled:
            raise UsageError(
                f"no token of the {len(run.samples)} calibration samples has a label (labels: {labels}); "
                "give samples of at least 2 tokens that are not padding, or use labels: sampled"
            )
        for site in done:
            yield site, gathered.result(site, run)


class _Gathered:
    """s of the sites of one segment."""

    def __init__(self, groups: int):
        self._groups = groups
        self._parts: dict[str, dict[int, torch.Tensor]] = {}

    def take(self, site: Site, sample: int, gradient: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        means = [rows[:, part].square().mean(dim=1) for part in row_groups(rows.shape[1], self._groups)]
        self._parts.setdefault(site.name, {})[sample] = torch.stack(means, dim=1).cpu()

    def result(self, site: Site, run: Backward) -> torch.Tensor | None:
        parts = self._parts.pop(site.name, None)
        if parts is None:
            return None
        groups = len(row_groups(site.shape[0], self._groups))
        missing = {i: torch.zeros(run.rows(site, i), groups, device="cpu") for i in range(len(run.samples)) if i not in parts}
        return torch.cat([part for _, part in sorted((parts | missing).items())]).double() / SCALE**2
