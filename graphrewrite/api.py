"""`compile`: the one entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from graphrewrite.analysis.blocks import Blocks
from graphrewrite.compiler import Options, Verification
from graphrewrite.errors import GraphRewriteError
from graphrewrite.objective import default_loss as default_loss
from graphrewrite.passes.compression.compress_saved import split_compress
from graphrewrite.passes.schedule.split_backward import SplitBackward
from graphrewrite.pipeline import Pass, build_pass
from graphrewrite.registry import find
from graphrewrite.rule import RuleMap, RuleSpec
from graphrewrite.runtime.chunked import check_options
from graphrewrite.runtime.module import CompiledModule


def compile(
    model: nn.Module,
    rule: RuleSpec | Mapping[str, RuleSpec] = "bp",
    *,
    example_inputs: Any = None,
    example_targets: Any = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    blocks: Blocks = "auto",
    compress: Any = None,
    memory_budget: float | None = None,
    backend: str = "eager",
    fallback: Literal["eager"] | None = None,
    passes: Sequence[Pass | str] = (),
    split_backward: bool | str | SplitBackward = False,
    chunk: int | None = None,
    chunk_loss: Literal["joint", "mean"] = "joint",
    dynamic: Any = "auto",
    verify: Verification = "structure",
    seed: int = 0,
) -> CompiledModule:
    """Compile a model to learn by another rule.

    Args:
        model: Any exportable module, on any device; it is never modified.
        rule: A name (`"dfa"`), a text form (`"dfa{shared=true}"`), a `Rule` object, or `{module glob: any of these}`.
        example_inputs: Positional inputs as a tuple, or what `loss` takes as `x`; None: captured at the first call.
        example_targets: What `loss` will receive as targets.
        loss: `loss(outputs, targets) -> scalar`; default: `default_loss`.
        blocks: `"auto"`, `"layers"`, or a list of module-path globs.
        compress: How saved values are stored: a codec's name (`"int4"`), text form (`"int4{group=64}"`) or object, a
            list of them (the first that accepts a value wins), or `{module glob: any of these}`.
        memory_budget: Choose per saved value among the codecs of `compress` (default: exact ones, bf16 and integers): a
            float in (0, 1] is a fraction of backpropagation's saved bytes, an int is bytes.
        backend: `"eager"`, `"inductor"` (compiled once for all sizes), `"triton"` (our kernels where their checker
            accepts, eager elsewhere), or a registered name. `report().coverage` says what runs each node.
        fallback: `"eager"`: what runs a graph that the backend cannot; None: that is a `BackendError`.
        passes: Extra passes; each declares `level`.
        split_backward: Two-stage backward: `.backward()` computes the inputs' gradients and what cannot wait,
            `backward_weight()` the weight gradients. With options: a text form
            (`"split_backward{budget=0.6,codec=int8}"`) or a `SplitBackward` object.
        chunk: Run every training step in this many parts of the batch, with the memory of one part and the gradient of
            the whole. Samples must not see each other in the model.
        chunk_loss: `"joint"`: any loss of all outputs; each part's forward runs twice. `"mean"`: the loss is a mean
            over samples; once.
        dynamic: `"auto"`: every dimension may change; None: static; or the `dynamic_shapes` of `torch.export`.
        verify: `"off"`, `"structure"`, or `"numeric"` (passes that promise it are held to bitwise equality).
        seed: Seed of rule state and of the rules' random operators.

    Returns:
        An `nn.Module` that trains with any `torch.optim` optimizer.
    """
    if not isinstance(model, nn.Module):
        raise GraphRewriteError(f"compile takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, CompiledModule):
        raise GraphRewriteError("the model is compiled already", remedy="compile compiled.module")
    if verify not in ("off", "structure", "numeric"):
        raise GraphRewriteError(f"verify={verify!r} is unknown", remedy="use 'off', 'structure' or 'numeric'")
    find("backend", backend)
    if fallback not in (None, "eager"):
        raise GraphRewriteError(f"fallback={fallback!r} is unknown", remedy="use 'eager' or None")
    approximations, codecs = split_compress(compress, memory_budget)
    options = Options(
        rules=RuleMap.of(rule),
        loss=loss or default_loss,
        blocks=blocks if isinstance(blocks, str) else tuple(blocks),
        backend=backend,
        fallback=fallback,
        passes=(*approximations, *(build_pass(p) for p in passes)),
        compress=codecs,
        dynamic=dynamic,
        verify=verify,
        seed=seed,
        split_backward=_split(split_backward),
        chunk=chunk,
        chunk_loss=chunk_loss,
    )
    check_options(options)
    compiled = CompiledModule(model, options)
    if example_inputs is not None:
        compiled.materialize(example_inputs, example_targets)
    return compiled


def _split(what: bool | str | SplitBackward) -> SplitBackward | None:
    if isinstance(what, bool) or what is None:
        return SplitBackward() if what else None
    built = build_pass(what)
    if not isinstance(built, SplitBackward):
        raise GraphRewriteError(
            f"split_backward={what!r}", remedy='use True or a text form such as "split_backward{budget=0.6}"'
        )
    return built
