"""The only file that imports private torch modules.

Everything here exists with the same meaning in torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import io
import keyword
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.fx.graph as fx_graph
import torch.fx.traceback as fx_traceback
import torch.utils.checkpoint as torch_checkpoint
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import function as autograd_function
from torch.export import exported_program
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    SYMPY_INTERP,
    GuardOnDataDependentSymNode,
    PropagateUnbackedSymInts,
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.fx.graph import _BoxedCodeGen

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "ShapeEnv",
    "annotate",
    "below_autograd",
    "boxed",
    "compile_guards",
    "composites_of",
    "cpp_compiler",
    "custom_schedule",
    "eager_branches",
    "enable_python_dispatcher",
    "forward_schedule",
    "free_unbacked_symbols",
    "functorch_wrapped",
    "inductor_code",
    "inductor_decompositions",
    "keep_random",
    "keyword_attributes",
    "known_sizes",
    "load_checkpoint",
    "make_fx",
    "native_kernels",
    "patched_checkpoint",
    "patched_custom_functions",
    "pipeline_actions",
    "preserve_annotations",
    "quiet_export",
    "recurrent_decompositions",
    "reduces_gradients",
    "register_dynamo_backend",
    "release_saved",
    "rerun",
    "set_grad_wrapper",
    "statically_known_true",
    "symbolic_forms",
    "traced_graph",
    "will_execute",
]

CustomApply = Callable[..., Any]


def set_grad_wrapper() -> Any:
    """The higher-order operator that export uses for `torch.no_grad()` and `torch.enable_grad()` regions."""
    return torch.ops.higher_order.wrap_with_set_grad_enabled


def known_sizes(env: ShapeEnv) -> dict[Any, int]:
    """Symbols of sizes -> the example's: those of inputs, and those that depend on data and were observed."""
    backed = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return {**backed, **env.var_to_hint_override}


def recurrent_decompositions() -> dict[Any, Any]:
    """Decompositions of LSTM and GRU; the fused CPU operators have no derivative that can be traced."""
    return dict(get_decompositions([torch.ops.aten.lstm.input, torch.ops.aten.gru.input]))


@contextlib.contextmanager
def composites_of(program: torch.export.ExportedProgram, table: dict[Any, Any]) -> Iterator[None]:
    """Let `run_decompositions` keep the composite operators whole that a program has.

    It replaces the kernels of all 500 that torch knows, which for a small model is a third of the time of a capture.
    Where one of `table`, the decompositions of recurrent operators, is used, which brings in others, all are kept.
    """
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    present = {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
    module: Any = exported_program
    every = module._collect_all_valid_cia_ops
    if present & table.keys():
        yield
        return
    # what autocast brings in
    present |= {torch.ops.aten.to.dtype, *table}
    module._collect_all_valid_cia_ops = lambda: every() & present
    try:
        yield
    finally:
        module._collect_all_valid_cia_ops = every


def traced_graph() -> torch.fx.Graph | None:
    """The graph that the innermost `make_fx` is writing, or None outside of one."""
    mode = get_proxy_mode()
    tracer = getattr(mode, "tracer", None)
    return getattr(tracer, "graph", None)


def functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to a `torch.func` transform that is running."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def annotate(values: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Mark every node traced inside with `node.meta["custom"]` entries."""
    return fx_traceback.annotate(values)


def preserve_annotations() -> contextlib.AbstractContextManager[Any]:
    """Keep `annotate` marks on the nodes that are traced inside."""
    return fx_traceback.preserve_node_meta()


def below_autograd() -> contextlib.AbstractContextManager[Any]:
    """Dispatch straight to the kernels: no autograd bookkeeping, for code that records no gradient anyway."""
    return torch._C._AutoDispatchBelowAutograd()


def boxed(module: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A graph module as a function that takes its inputs as one list and empties it, so that they can be freed."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    graph.set_codegen(_BoxedCodeGen())
    return torch.fx.GraphModule(module, graph).forward


def release_saved(ctx: Any) -> None:
    """Let go of a custom function's saved tensors inside its backward, unless the graph is retained."""
    ctx.maybe_clear_saved_tensors()


def will_execute(node: Any) -> bool:
    """Whether the backward that is running will execute a node of the autograd graph."""
    return bool(torch._C._will_engine_execute_node(node))


def reduces_gradients() -> bool:
    """Whether the call runs inside the forward of a DistributedDataParallel that will reduce its gradients."""
    active: Any = torch.nn.parallel.DistributedDataParallel._active_ddp_module
    return active is not None and bool(active.require_backward_grad_sync)


def pipeline_actions(
    schedule: str, ranks: int, micro_batches: int, stages_per_rank: int | None = None
) -> list[list[tuple[int, str, int, bool]]]:
    """Compute actions of one of torch's pipeline schedules, per process: (stage, "F", "I", "W" or "B", micro-batch).

    The engine keeps them in `pipeline_order`; actions that it overlaps are listed one after the other, as its runtime
    runs them. The last element tells those from behind which it sends nothing until the next one is over, too.
    """
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    def flat(action: Any) -> list[tuple[int, str, int, bool]]:
        if action.sub_actions is not None:
            *before, last = [one for sub in action.sub_actions for one in flat(sub)]
            return [*((stage, kind, mb, True) for stage, kind, mb, _ in before), last]
        return [(action.stage_index, action.computation_type.value, action.microbatch_index, False)]

    found = get_schedule_ops(schedule, ranks, micro_batches, stages_per_rank)
    listed = [[one for action in rank if action is not None for one in flat(action)] for rank in found]
    computed = [[one for one in rank if one[1] in ("F", "I", "W", "B")] for rank in listed]
    if schedule == "1F1B":
        # what torch lists for the last process begins with micro-batch 1; what it runs begins with 0
        for own in computed:
            numbers = iter(range(micro_batches))
            own[:] = [(at, kind, next(numbers) if kind == "F" else mb, joined) for at, kind, mb, joined in own]
    return computed


def custom_schedule(
    stages: list[Any],
    micro_batches: int,
    loss: Callable[..., torch.Tensor],
    actions: Sequence[Sequence[tuple[int, str, int]]],
) -> Any:
    """A schedule of the engine's runtime that executes given compute actions: (stage, kind, micro-batch)."""
    from torch.distributed.pipelining import schedules

    made = schedules._PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    kinds = schedules._ComputationType
    order = {
        rank: [schedules._Action(stage, kinds(kind), mb) for stage, kind, mb in own] for rank, own in enumerate(actions)
    }
    made._prepare_schedule_with_comms(order)  # type: ignore[arg-type]
    return made


def forward_schedule(stage: Any, micro_batches: int, learn: Callable[[int], None]) -> Any:
    """A schedule of the engine's runtime that sends activations only, and lets a stage learn behind what it has sent.

    Args:
        stage: This process's; stage k runs on process k of its group.
        micro_batches: How many; each is a forward, then a W action, which communicates nothing.
        learn: Called with the number of a micro-batch as the W action.
    """
    from torch.distributed.pipelining import schedules

    made = schedules._PipelineScheduleRuntime([stage], micro_batches, scale_grads=False)
    made.register_custom_function(schedules.BACKWARD_WEIGHT, lambda action, _context: learn(action.microbatch_index))
    order = {
        rank: [
            schedules._Action(rank, kind, mb)
            for mb in range(micro_batches)
            for kind in (schedules.FORWARD, schedules.BACKWARD_WEIGHT)
        ]
        for rank in range(stage.num_stages)
    }
    made.pipeline_order_with_comms = schedules._add_send_recv(order, lambda k: k, stage.num_stages)
    return made


def load_checkpoint(path: Any, keys: set[str], group: Any) -> dict[str, Any]:
    """What a checkpoint of `torch.distributed.checkpoint` holds under some keys, as nested dicts, in new tensors."""
    from torch.distributed.checkpoint import state_dict_loader

    return state_dict_loader._load_state_dict_from_keys(keys, checkpoint_id=path, process_group=group)


@contextlib.contextmanager
def patched_custom_functions(apply: Callable[..., Any]) -> Iterator[CustomApply]:
    """Route every `torch.autograd.Function.apply` to `apply(cls, original, args)`.

    `Function.apply` ends in `super().apply`, looked up at call time: patching that base also reaches an `apply`
    that the user bound to a name before capture (`ste = STE.apply`). Other threads, which may be training, get
    theirs.
    """
    base: Any = autograd_function._SingleLevelFunction
    thread = threading.get_ident()

    def original(cls: type, *args: Any) -> Any:
        return super(base, cls).apply(*args)

    def routed(cls: type, *args: Any) -> Any:
        return apply(cls, original, args) if threading.get_ident() == thread else original(cls, *args)

    base.apply = classmethod(routed)
    try:
        yield original
    finally:
        del base.apply


@contextlib.contextmanager
def patched_checkpoint(region: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
    """Run this thread's `torch.utils.checkpoint` regions plainly, inside the context that `region()` gives."""
    thread = threading.get_ident()
    generator = torch_checkpoint._checkpoint_without_reentrant_generator
    function: Any = torch_checkpoint.CheckpointFunction
    apply = function.apply

    def plain_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        if threading.get_ident() != thread:
            yield from generator(*args, **kwargs)
            return
        with region():
            yield

    def plain_apply(run_function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if threading.get_ident() != thread:
            return apply(run_function, preserve, *args)
        with region():
            return run_function(*args)

    torch_checkpoint._checkpoint_without_reentrant_generator = plain_generator
    function.apply = plain_apply
    try:
        yield
    finally:
        torch_checkpoint._checkpoint_without_reentrant_generator = generator
        del function.apply


_DECOMPOSED_WHEN_TRACED = re.compile(r"dropout|hardshrink|softshrink|multi_margin_loss|multilabel_margin")
_KEYS = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)


@functools.cache
def _python_decompositions() -> list[tuple[Any, dict[Any, Any]]]:
    """Operators whose kernel is another one while they are traced, with those kernels."""
    found: list[tuple[Any, dict[Any, Any]]] = []
    for packet in [getattr(torch.ops.aten, n) for n in dir(torch.ops.aten) if _DECOMPOSED_WHEN_TRACED.match(n)]:
        for overload in [getattr(packet, name) for name in packet.overloads()]:
            kernels = {key: overload.py_kernels[key] for key in _KEYS if key in overload.py_kernels}
            if kernels:
                found.append((overload, kernels))
    return found


@contextlib.contextmanager
def symbolic_forms() -> Iterator[None]:
    """What operators give at sizes that are symbols, where torch has it wrong or not at all.

    `cross_entropy(reduction="none")`: torch takes the shape of `nll_loss` from a Python form of it that has other
    arguments in the operator's places, and finds a scalar. The backward of `softshrink` and `multi_margin_loss` has no
    Python form; only shape and dtype are read of the ones here.
    """
    aten = torch.ops.aten
    ours: dict[Any, Any] = {
        aten.nll_loss.default: None,
        aten.softshrink_backward.default: lambda grad, x, lambd: torch.empty_like(grad),
        aten.multi_margin_loss_backward.default: lambda grad, x, *rest: torch.empty_like(x),
    }
    table: dict[Any, Any] = torch._decomp.decomposition_table
    theirs = {op: table.pop(op, None) for op in ours}
    table.update({op: form for op, form in ours.items() if form is not None})
    try:
        yield
    finally:
        for op, form in theirs.items():
            table.pop(op, None)
            if form is not None:
                table[op] = form


class native_kernels(contextlib.ContextDecorator):  # noqa: N801 - used as a function
    """Let traced operators be those that eager mode runs.

    Under the Python dispatcher torch replaces some (dropout on the CPU) by formulas of its own, which round
    differently. Interpolation stays replaced: its own operators have no form with symbolic sizes.
    """

    _depth = 0

    def __enter__(self) -> None:
        if native_kernels._depth == 0:
            for overload, kernels in _python_decompositions():
                for key in kernels:
                    del overload.py_kernels[key]
                overload._dispatch_cache.clear()
        native_kernels._depth += 1

    def __exit__(self, *_: object) -> None:
        native_kernels._depth -= 1
        if native_kernels._depth == 0:
            for overload, kernels in _python_decompositions():
                overload.py_kernels.update(kernels)
                overload._dispatch_cache.clear()


def keep_random() -> contextlib.AbstractContextManager[Any]:
    """Let export keep random operators whose results nothing reads: eager mode draws them."""
    from torch._inductor import config

    patched: contextlib.AbstractContextManager[Any] = config.patch(fallback_random=True)
    return patched


def rerun(module: torch.fx.GraphModule, values: Sequence[Any]) -> Any:
    """Run a graph module node by node on fake values; sizes that depend on data stay the symbols they are in it."""
    return PropagateUnbackedSymInts(module).run(*values)


def inductor_decompositions(settings: dict[str, Any]) -> dict[Any, Any]:
    """The operators that Inductor wants decomposed under these settings; random ones stay what they are in eager."""
    import torch._inductor.lowering  # some decompositions look into it
    from torch._inductor import config, decomposition

    with config.patch(settings):
        table = decomposition.select_decomp_table()
    seeded = torch.Tag.nondeterministic_seeded
    return {op: formula for op, formula in table.items() if seeded not in getattr(op, "tags", ())}


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor uses for the CPU; None if it finds none."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return None


def inductor_code(
    module: torch.fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any], *, is_backward: bool
) -> Callable[[list[Any]], Any]:
    """Compile a functional graph of decomposed ATen calls with Inductor, for the symbolic sizes of its inputs.

    Args:
        module: Returns a tuple; its results get the strides that they have in the graph.
        inputs: Fake tensors and sizes, one per placeholder.
        settings: Of `torch._inductor.config`.
        is_backward: Which of the two heuristics of Inductor's scheduler to use.

    Returns:
        A function of one list, which it empties.
    """
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import compile_fx, config

    (output,) = module.graph.find_nodes(op="output")
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    with torch.no_grad(), config.patch(settings), whole_loops(), tracing(TracingContext(detect_fake_mode(inputs))):
        module = compile_fx._recursive_joint_graph_passes(module)
        code: Callable[[list[Any]], Any] = compile_fx.compile_fx_inner(
            module, inputs, static_input_idxs=(), is_backward=is_backward
        )
    return code


_whole_loops: ContextVar[bool] = ContextVar("_whole_loops", default=False)


@contextlib.contextmanager
def whole_loops() -> Iterator[None]:
    """Keep Inductor's C++ code from splitting a loop whose length is no multiple of what it is split by.

    Where an index is divided by a constant, as that of a group's scale is, the loop over n is made two, over n // d and
    d. What is left over (torch 2.11 to 2.13) is never computed: the memory stays as it was allocated. Code that is
    compiled outside of this context, in other threads too, stays as it is.
    """
    from torch._inductor.codegen.cpp import CppScheduling

    if not hasattr(CppScheduling.try_loop_split, "leaves_nothing_over"):
        CppScheduling.try_loop_split = _checked(CppScheduling.try_loop_split)  # type: ignore[method-assign]
    token = _whole_loops.set(True)
    try:
        yield
    finally:
        _whole_loops.reset(token)


def _checked(original: Callable[..., Any]) -> Callable[..., Any]:
    def try_loop_split(self: Any, nodes: Any) -> Any:
        return nodes if _whole_loops.get() and not all(map(_splits_evenly, nodes)) else original(self, nodes)

    try_loop_split.leaves_nothing_over = True  # type: ignore[attr-defined]
    return try_loop_split


def _splits_evenly(node: Any) -> bool:
    from torch._inductor.virtualized import V
    from torch.utils._sympy.functions import FloorDiv

    (sizes, _), body, (variables, _) = node.node.get_default_sizes_body()
    divisions = {d for e in body.indexing_exprs.values() if hasattr(e, "find") for d in e.find(FloorDiv)}
    return all(
        V.graph.sizevars.statically_known_multiple_of(sizes[variables.index(dividend)], divisor)
        for dividend, divisor in (division.args for division in divisions)
        if dividend in variables
    )


def register_dynamo_backend(name: str, compiler: Callable[..., Any]) -> None:
    """Let `torch.compile(backend=name)` call a function; nothing happens if the name is taken by it already."""
    from torch._dynamo.backends import registry

    if registry._COMPILER_FNS.get(name) is not compiler:
        registry._COMPILER_FNS.pop(name, None)
        registry.register_backend(compiler, name=name)


@contextlib.contextmanager
def eager_branches() -> Iterator[None]:
    """Let `torch.compiler.is_exporting()` say no, so that models take the branch they take in eager mode."""
    original = torch.compiler.is_exporting
    torch.compiler.is_exporting = lambda: False
    try:
        yield
    finally:
        torch.compiler.is_exporting = original


@contextlib.contextmanager
def keyword_attributes() -> Iterator[None]:
    """Let modules and parameters be named as Python keywords (`ModuleDict({"in": ...})`): torch writes `self.in`."""
    original = fx_graph._format_target

    def formatted(base: str, target: str) -> str:
        for part in target.split("."):
            plain = part.isidentifier() and not keyword.iskeyword(part)
            base = f"{base}.{part}" if plain else f"getattr({base}, {part!r})"
        return base

    fx_graph._format_target = formatted
    try:
        yield
    finally:
        fx_graph._format_target = original


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Silence torch.export's own logging; what matters of it becomes an error or a guard of ours.

    Text that is written to stderr inside is shown if all goes well: a failing export dumps its graph there.
    """
    loggers = [
        logging.getLogger(name)
        for name in (
            "torch._export.non_strict_utils",
            "torch.fx.experimental.symbolic_shapes",
            "torch._subclasses.fake_tensor",
            "torch.export",
            "torch._dynamo",
        )
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as written:
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
            yield
        sys.stderr.write(written.getvalue())
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def compile_guards(
    shape_env: ShapeEnv, placeholders: Sequence[FakeTensor], names: Sequence[str], *, strides: bool
) -> tuple[str, Callable[[Sequence[torch.Tensor]], bool]]:
    """The shape guards of a traced graph as readable text and as a fast predicate over its tensor inputs.

    Args:
        shape_env: What the sizes of the graph are symbols of.
        placeholders: Fake values of the inputs.
        names: What the text calls them.
        strides: Whether the inputs must lie in memory as those did that the graph was traced with.
    """
    from torch._dynamo.source import LocalSource

    sources = [LocalSource(f"t{i}") for i in range(len(placeholders))]
    found = shape_env.produce_guards(list(placeholders), sources, ignore_static=True)
    kept = [text for text in found if strides or not re.search(r"\.(stride|storage_offset)\(\)", text)]
    if not kept:
        return "", lambda _tensors: True
    code = " and ".join(kept)
    # the text is written by torch from symbolic shapes, never by a user or a file
    predicate = eval(f"lambda L: {code}", dict(SYMPY_INTERP))
    used = sorted({int(index) for index in re.findall(r"L\['t(\d+)'\]", code)})
    readable = re.sub(r"L\['t(\d+)'\]", lambda match: names[int(match[1])], code)
    readable = re.sub(r"\.size\(\)\[(\d+)\]", r".shape[\1]", readable)

    def holds(tensors: Sequence[torch.Tensor]) -> bool:
        try:
            return bool(predicate({f"t{i}": tensors[i] for i in used}))
        except ZeroDivisionError:
            return False  # a guard about a quotient of sizes, at sizes where there is none

    return readable, holds
