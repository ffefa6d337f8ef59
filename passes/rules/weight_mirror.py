"""Weight mirror: between steps, noise through each layer teaches the feedback weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphrewrite.passes.rules._feedback import Distribution
from graphrewrite.passes.rules._feedback_weights import (
    Fans,
    FeedbackRule,
    Scheme,
    WeightRead,
    deviation,
    factors,
    fill_weights,
    is_linear_in_parameters,
    parameters_behind,
    same_on_all_ranks,
)
from torch import fx
from torch.utils import _pytree as pytree

from graphrewrite import random
from graphrewrite.errors import RuleError
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import flat_inputs, hint, value
from graphrewrite.graph.ops import call_operator

aten = torch.ops.aten

ACTIVATIONS = (
    aten.relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.gelu.default,
    aten.silu.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.softplus.default,
)


@dataclass(frozen=True)
class WeightMirror(FeedbackRule):
    """Feedback alignment whose B learns in a mirror phase of its own, from noise sent through every layer.

    In the phase each operator with a weight gets independent noise x = a (U[0, 1) - 1/2) and answers y; then
    B <- (1 - decay) B + rate * C, C being the correlation of x and y that the operator's own weight gradient
    computes at (x, y). Its mean is W. No layer sees another one's weights or noise.

    The phase runs at the start of every `every`-th training call, before the step reads B, and whenever
    `compiled.feedback_phase(x, times=n)` is called; a first pass over the data before training is such calls. The
    noise has the sizes of the activations that the phase was captured with.

    Args:
        only: Globs on module paths; weights of other modules keep their exact input cotangent.
        skip: Globs on module paths whose weights keep it.
        every: Training calls from one automatic mirror phase to the next; 0: only explicit ones.
        rate: Learning rate of the mirror.
        decay: Decay of B in each phase. With `decay=rate` B tends to W; without, it grows as W does.
        amplitude: a.
        normalise: C is divided by the noise's variance and by how many samples and positions meet in each element,
            so that its mean is W for layers of every kind and size; False: the plain sum x y^T of the paper.
        activation: y = phi(W x + b), with the non-linearity that the model applies behind the operator; False:
            y = W x, each unit in the middle of its linear range. Units whose bias outweighs the noise are mirrored by
            the latter only.
        init: Standard deviation of B at first: `"xavier"` or `"kaiming"`, see `fa`.
        distribution: `"uniform"` or `"normal"`.
        scale: Factor on B at first.
    """

    every: int = 1
    rate: float = 0.01
    decay: float = 0.01
    amplitude: float = 0.1
    normalise: bool = True
    activation: bool = False
    init: Scheme = "xavier"
    distribution: Distribution = "uniform"
    scale: float = 1.0

    name = "weight_mirror"
    summary = "weight mirror: feedback weights learn from noise sent through the layers"
    formula = "x ~ a(U[0,1) − ½), y = σ(Wx + b):  B ← B + η x yᵀ"
    paper = "Akrout et al., Deep Learning without Weight Transport, 2019"
    trains_feedback = True

    @property
    def feedback_interval(self) -> int:
        """Training calls between mirror phases."""
        return self.every

    def requires(self, graph: JointGraph) -> None:
        """Options in range."""
        if self.every < 0 or self.every != int(self.every):
            raise RuleError(f"every={self.every!r} must be a whole number", remedy="0 turns the schedule off")
        if self.amplitude <= 0:
            raise RuleError(f"amplitude={self.amplitude!r} must be positive", remedy="the paper uses 0.1")

    def counterpart(self, graph: JointGraph, weight: fx.Node, read: WeightRead) -> fx.Node:
        """A B that the mirror phase writes."""
        std = self.scale * deviation(self.init, Fans.of(weight, read))
        return self.weight_state(graph, weight, fill_weights(self.distribution, std))

    # --- the mirror phase ------------------------------------------------------------------------------------------

    def rewrite_feedback(self, graph: JointGraph) -> None:
        """Replace the forward by the mirror phase: one update of every B."""
        self.requires(graph)
        by_weight: dict[fx.Node, list[WeightRead]] = {}
        for read in self.reads(graph):
            if not is_linear_in_parameters(read.operand):
                raise RuleError(
                    "the mirror of a weight that is a non-linear function of parameters is not defined",
                    node=read.op.name,
                    module=read.module,
                    remedy=f"skip it: weight_mirror{{skip=[{read.module!r}]}}",
                )
            for weight in parameters_behind(read.operand):
                by_weight.setdefault(weight, []).append(read)
        for weight, reads in by_weight.items():
            self.counterpart(graph, weight, reads[0])
            probes = [_Probe(read, weight, graph, self) for read in reads]
            sources = list(dict.fromkeys(source for probe in probes for source in probe.sources))
            inputs = [graph.counter(), *sources]
            gain = self.rate
            if self.normalise:
                met = sum(probe.count() for probe in probes).clamp_min(1.0)  # type: ignore[union-attr]
                gain /= probes[0].variance
                if bool((met == met.flatten()[0]).all()):
                    gain /= float(met.flatten()[0])
                else:
                    name = f"{self.feedback_name(weight)}.met"
                    inputs.append(graph.constant(met.to(value(weight).dtype).to(value(weight).device), name))
            graph.update_state(self.feedback_name(weight), self._update(probes, sources, gain), inputs)

    def _update(self, probes: Sequence[_Probe], sources: Sequence[fx.Node], gain: float) -> Callable[..., torch.Tensor]:
        def update(b: torch.Tensor, counter: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            held: dict[fx.Node, Any] = dict(zip(sources, values, strict=False))
            shared = same_on_all_ranks(counter)
            delta = probes[0].correlation(held, shared)
            for probe in probes[1:]:
                delta = delta + probe.correlation(held, shared)
            if len(values) > len(sources):
                delta = delta / values[-1]
            return (1.0 - self.decay) * b + gain * delta

        return update


class _Probe:
    """Noise through one operator, and its correlation with the answer, in the layout of a parameter."""

    def __init__(self, read: WeightRead, weight: fx.Node, graph: JointGraph, rule: WeightMirror) -> None:
        self._op, self._weight, self._amplitude = read.op, weight, rule.amplitude
        inputs = flat_inputs(read.op)
        held = {p for p, node in enumerate(inputs) if graph.table.is_weightlike(node)}
        self._noisy = {p: graph.stream() for p in factors(read.op) if p not in held}
        self._read = {p for p in held if rule.activation or p in factors(read.op)}
        self._phi = next((u for u in read.op.users if u.target in ACTIVATIONS), None) if rule.activation else None
        self.sources = list(dict.fromkeys(leaf for p in sorted(self._read) for leaf in _leaves(inputs[p])))
        self.variance = (rule.amplitude**2 / 12.0) ** len(self._noisy)

    def correlation(self, held: Mapping[fx.Node, Any], counter: torch.Tensor) -> torch.Tensor:
        """The operator's weight gradient at noise, with its answer as cotangent."""

        def noise(position: int, size: list[int], dtype: torch.dtype) -> torch.Tensor:
            return (random.uniform(counter, self._noisy[position], size, dtype) - 0.5) * self._amplitude

        def behind(answer: torch.Tensor) -> torch.Tensor:
            return answer if self._phi is None else _apply(self._phi, [answer])

        return self._pull(held, noise, behind, held[self._weight].device)

    def count(self) -> torch.Tensor:
        """How many samples and positions meet in each element: the weight gradient at ones, with ones as cotangent.

        The operator is linear in the weight, so this does not hang on its value; it is computed at once.
        """
        zeros = {n: torch.zeros([hint(s) for s in value(n).shape], dtype=value(n).dtype) for n in self.sources}

        def ones(_position: int, size: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.ones(size, dtype=dtype)

        return self._pull(zeros, ones, torch.ones_like, torch.device("cpu"))

    def _pull(
        self,
        held: Mapping[fx.Node, Any],
        make: Callable[[int, list[int], torch.dtype], torch.Tensor],
        signal: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> torch.Tensor:
        leaf = held[self._weight].detach().requires_grad_()
        known: dict[fx.Node, Any] = {**held, self._weight: leaf}
        given: list[Any] = []
        with torch.enable_grad():
            for position, node in enumerate(flat_inputs(self._op)):
                if position in self._read:
                    given.append(_evaluate(node, known))
                elif isinstance(value(node), torch.SymInt):
                    given.append(hint(value(node)))
                else:
                    size, dtype = [hint(s) for s in value(node).shape], value(node).dtype
                    rest = torch.zeros(size, dtype=dtype, device=device)
                    given.append(make(position, size, dtype) if position in self._noisy else rest)
            answer = _apply(self._op, given)
            found: torch.Tensor = torch.autograd.grad(answer, leaf, signal(answer).detach())[0]
        return found


def _leaves(node: fx.Node) -> list[fx.Node]:
    """The inputs of the graph that a value is computed from; sizes are none."""
    if isinstance(value(node), torch.SymInt):
        return []
    if node.op != "call_function":
        return [node]
    return list(dict.fromkeys(leaf for source in node.all_input_nodes for leaf in _leaves(source)))


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if isinstance(value(node), torch.SymInt):
        return hint(value(node))
    if node not in known:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, known))
        known[node] = call_operator(node.target, args, kwargs)  # type: ignore[arg-type]
    return known[node]


def _apply(op: fx.Node, inputs: Sequence[Any]) -> torch.Tensor:
    """Run an operator on other tensor inputs."""
    leaves, spec = pytree.tree_flatten((op.args, op.kwargs))
    given = iter(inputs)
    args, kwargs = pytree.tree_unflatten([next(given) if isinstance(n, fx.Node) else n for n in leaves], spec)
    answer: torch.Tensor = call_operator(op.target, args, kwargs)  # type: ignore[arg-type]
    return answer
