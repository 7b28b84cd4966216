"""The float model and its quantized twin on the same windows, the whole graph at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.utils import _pytree

from qcompiler.errors import CapacityError, InputError, UsageError
from qcompiler.numerics.tuned import MATRICES, Fixed, Tuned, TunedLinear, TunedLookup
from qcompiler.ops.formats import Activation
from qcompiler.sweep.backward_plan import recorded_bytes
from qcompiler.sweep.budget import MARGIN, copy_bytes
from qcompiler.sweep.ends import find_ends, tokens_that_count
from qcompiler.sweep.execute import Executor, Product
from qcompiler.sweep.order import ancestors
from qcompiler.sweep.place import moved
from qcompiler.sweep.product import product
from qcompiler.sweep.sizes import bindings, node_bytes
from qcompiler.sweep.values import Values

if TYPE_CHECKING:
    from qcompiler.graph.graph import Graph, Site
    from qcompiler.pipeline.context import Context

# Of each parameter: itself, its gradient, Adam's two moments, the best so far.
STATES = 5
# What the float model gives is computed anew for every step where all windows of it take more bytes than this.
STORED = 2**32


class Twins:
    """Runs both and takes gradients for the quantized one.

    Args:
        graph: after analysis.
        context: samples, solutions, budget.
        matrices: by site name: what is tuned.
        gains: by name of the constant: leaves that stand for it.
        step: who asks, for messages.

    Attributes:
        samples: the calibration windows.
        measure: what `divergence` gives.

    Raises:
        UsageError: there are no samples.
        CapacityError: the budget does not hold one window's gradients.
    """

    def __init__(
        self, graph: Graph, context: Context, matrices: dict[str, Tuned], gains: dict[str, torch.Tensor], step: str
    ):
        self.matrices, self.gains = matrices, gains
        self._graph, self._context, self._step = graph, context, step
        self._ends = find_ends(graph)
        self.measure = "KL (nats a token)" if self._ends.logits else "relative squared error"
        self.samples: list[dict[str, Any]] = list(context.samples())
        if not self.samples:
            raise UsageError(f"{step} needs calibration samples, and there are none; give text (--text) or samples")
        self._placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        needed = ancestors(self._ends.nodes)
        self._nodes = [node for node in graph.nodes if node in needed and node.op not in ("placeholder", "get_attr", "output")]
        self._check_budget()
        self._students = self._products()
        self._teacher: Values | None = None
        # Taken before anything is tuned, as the graph's own may be replaced.
        floats = {name: leaf.detach().clone() for name, leaf in gains.items()}
        self._float = self._executor({}, constants=floats)
        self._look = self._executor(self._students, constants=gains)
        self._run = self._executor(self._students, gradients=True, constants=gains)
        self._keep_teacher()

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for matrix in self.matrices.values() for p in matrix.parameters.values()] + list(self.gains.values())

    def backward(self, batch: Sequence[int]) -> float:
        """Add the gradients of a batch's mean loss to the parameters; returns the loss.

        Raises:
            InputError: it is not finite.
        """
        total = 0.0
        for sample in batch:
            values = self._run.run(self._start(sample))
            loss, count = self._distance(sample, [values[node] for node in self._ends.nodes])
            loss = loss / (count * len(batch))
            if not bool(torch.isfinite(loss)):
                raise InputError(f"{self._step}: the loss of window {sample} is {loss.item()}; choose smaller rates")
            loss.backward()
            total += loss.item()
        return total

    def moved(self) -> None:
        """The parameters have changed."""
        for student in self._students.values():
            if isinstance(student, TunedLinear):
                student.forget()

    def divergence(self, samples: Iterable[int], stored: bool = True) -> float:
        """Mean over the windows' tokens of what the loss sums.

        Args:
            samples: their numbers.
            stored: with the solutions and constants as they are in the context and the graph, by the real quantized products;
                else with the parameters.
        """
        run = self._stored() if stored else self._look
        total, count = 0.0, 0
        with torch.no_grad():
            for sample in samples:
                values = run.run(self._start(sample))
                loss, tokens = self._distance(sample, [values[node] for node in self._ends.nodes])
                total, count = total + float(loss), count + tokens
        return total / count

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.close()

    def _start(self, sample: int) -> dict[Node, Any]:
        leaves = moved(_pytree.tree_leaves(self.samples[sample]), self._context.device)
        return dict(zip(self._placeholders, leaves, strict=True))

    def _products(self) -> dict[Node, Product]:
        """What stands for each solved site while gradients flow; experts and sites with float columns are left in float."""
        made: dict[Node, Product] = {}
        for site in self._graph.sites:
            if site.name not in self._context.solutions or site.kind == "experts" or site.name in self._context.outliers:
                continue
            if site.kind != "embedding":
                solution = self._context.solutions[site.name]
                made[site.node] = self._linear(site, self.matrices.get(site.name) or Fixed(moved(solution, self._context.device)))
        for site in self._graph.sites:
            if site.kind == "embedding" and site.name in self._context.solutions:
                made[site.node] = self._lookup(site, made)
        return made

    def _lookup(self, site: Site, made: dict[Node, Product]) -> Product:
        """Rows as they are stored, or of the tuned matrix of a product that shares the storage."""
        for other in self._graph.sites:
            if other.name in self.matrices and site.tie_group is not None and other.tie_group == site.tie_group:
                linear = made[other.node]
                assert isinstance(linear, TunedLinear)
                return TunedLookup(linear)
        return product(self._graph, site, self._context)

    def _linear(self, site: Site, matrix: Tuned) -> TunedLinear:
        activation = self._context.schemes[site.name].activation
        static = self._context.static_ranges.get(site.name)
        if activation is Activation.INT8_STATIC and static is None:
            activation = Activation.FLOAT  # as the sweep computes it until its range is calibrated
        return TunedLinear(matrix, activation, static, keep=self._context.memory is None)

    def _stored(self) -> Executor:
        """The quantized model as it is: every solved site's real product."""
        sites = [site for site in self._graph.sites if site.name in self._context.solutions]
        products = {site.node: product(self._graph, site, self._context) for site in sites}
        return self._executor(products)

    def _executor(self, products: dict[Node, Product], **more: Any) -> Executor:
        return Executor(self._graph, self._nodes, self._ends.nodes, products, self._cache, device=self._context.device, **more)

    def _distance(self, sample: int, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Sum over the window's tokens of KL(float ‖ quantized), and how many they are; without logits the sum over outputs of
        ‖y − ỹ‖² / ‖y‖², and their number."""
        expected = self._expected(sample)
        if not self._ends.logits:
            pairs = zip(expected, values, strict=True)
            parts = [(y - own).square().sum() / y.square().sum().clamp(min=1e-20) for y, own in pairs]
            return torch.stack(parts).sum(), len(parts)
        mask = tokens_that_count(moved(self.samples[sample], self._context.device), *values[0].shape[:2])
        reference, own = expected[0][mask].log_softmax(-1), values[0][mask].log_softmax(-1)
        # A token that the reference rules out (-inf, for padded vocabularies) adds nothing.
        difference = (reference - own).masked_fill(reference == -torch.inf, 0)
        return (reference.exp() * difference).sum(), max(int(mask.sum()), 1)

    def _expected(self, sample: int) -> list[torch.Tensor]:
        if self._teacher is not None:
            held = moved(self._teacher[sample], self._context.device)
            return [held[node] for node in self._ends.nodes]
        values = self._float_values(sample)
        return [values[node] for node in self._ends.nodes]

    def _float_values(self, sample: int) -> Mapping[Node, Any]:
        return self._float.run(self._start(sample))

    def _keep_teacher(self) -> None:
        if len(self.samples) * self._end_bytes > STORED or (self._context.memory is not None and self._context.scratch is None):
            return
        self._teacher = Values(self._ends.nodes, self._context.scratch)
        for sample in range(len(self.samples)):
            self._teacher.append(self._float_values(sample))

    def _check_budget(self) -> None:
        leaves = [_pytree.tree_leaves(sample) for sample in self.samples]
        largest = max(leaves, key=lambda own: sum(x.numel() for x in own if isinstance(x, torch.Tensor)))
        bound = bindings(self._placeholders, largest)
        self._end_bytes = sum(node_bytes(node, bound) for node in self._ends.nodes)
        self._cache = 2**62
        budget = self._context.memory
        if budget is None:
            return
        solved = [site for site in self._graph.sites if site.name in self._context.solutions and site.kind == "linear"]
        dense = max(4 * MATRICES * site.size for site in solved)
        constants = {source for node in self._nodes for source in node.all_input_nodes if source.op == "get_attr"}
        widened = max((copy_bytes(self._graph, node, bound) for node in constants), default=0)
        states = 4 * STATES * sum(p.numel() for p in self.parameters)
        need = recorded_bytes(self._nodes, self._ends.nodes, bound) + self._end_bytes + dense + widened + states
        limit = int(budget * (1 - MARGIN))
        if need > limit:
            raise CapacityError(
                f"{self._step}: a memory budget of {budget:,} bytes is too small: gradients of one window through the whole "
                f"model take {int(need / (1 - MARGIN)) + 1:,}; give more memory or shorter windows (--length), or leave it out"
            )
        self._cache = 0
