"""The one pass that stores saved values in another form: `gr.compile(compress=...)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from graphrewrite.passes.compression import PRESETS
from torch import fx

from graphrewrite import textform
from graphrewrite.analysis.demands import Demand, SavedValue, saved_values
from graphrewrite.errors import RuleError
from graphrewrite.graph.codec import Codec, Declined, SavedCodec, Treatment, inside
from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import hint, info, nbytes, producer, value
from graphrewrite.graph.text import Names, operator_name
from graphrewrite.pipeline import Pass, PassResult

CodecSpec = str | Codec | type


@dataclass(frozen=True)
class CompressSaved(Pass):
    """Offer every saved value to the codecs in order; the first that accepts it wins.

    Left alone: results of the call, inputs and parameters (they are referenced, not stored), integer indices, and what
    an operator of the backward needs exactly. Where an operator only compares the value with a constant, it gets its
    own exact mask, so that no sign ever flips. A value is encoded once, however many operators read it; its views
    are taken of the decoded value.

    Args:
        codecs: `(module glob, codecs)` pairs; the first glob that matches the module of a value counts.
    """

    codecs: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    name = "compress_saved"
    level = "aten"
    summary = "store what the backward reads in the form that codecs give it"

    def requires(self, graph: JointGraph) -> None:
        """Every glob matches a module."""
        modules = {info(n).module for n in graph.forward_nodes()}
        for glob, _ in self.codecs:
            if not any(inside(module, glob) for module in modules):
                known = ", ".join(sorted(m for m in modules if m)[:12])
                raise RuleError(f"the glob {glob!r} of compress= matches no module", remedy=f"modules: {known}")

    def run(self, graph: JointGraph) -> PassResult:
        """Recompute first, then encode what is saved after that."""
        offers = [(glob, tuple(build_codec(one) for one in codecs)) for glob, codecs in self.codecs]
        done: list[Treatment] = []
        again = self._recompute(graph, offers, done)
        encoded = 0
        names = Names(graph)
        for saved in saved_values(graph):
            codec, why = self._choose(saved, offers)
            after = saved.nbytes
            if codec is not None and getattr(codec, "how", "encode") == "encode":
                after = self.encode(graph, saved, codec)
                encoded += 1
            elif codec is None:
                self.fail(graph, why, saved.node)
            done.append(treatment(saved, names, "keep" if codec is None else textform.to_text(codec), after, why))
        if encoded:
            graph.prune(backward_only=True)
        graph.treatments = done
        return PassResult(graph, bool(encoded or again))

    def _choose(self, saved: SavedValue, offers: Sequence[tuple[str, tuple[Codec, ...]]]) -> tuple[Any, str]:
        """The codec for a value, or None, and the reason."""
        if saved.closed:
            return None, saved.closed
        for glob, codecs in offers:
            if not inside(saved.module, glob):
                continue
            reasons = []
            for codec in codecs:
                chosen = fit(codec, saved)
                if not isinstance(chosen, Declined):
                    return chosen, f"the first codec that takes it{f' under {glob}' if glob != '*' else ''}"
                reasons.append(f"{textform.to_text(codec)}: {chosen.reason}")
            return None, "; ".join(reasons)
        return None, f"module {saved.module or '(root)'} is under no glob of compress="

    @staticmethod
    def encode(graph: JointGraph, saved: SavedValue, codec: Codec, *, held: bool = False) -> int:
        """Splice the codec in, with a mask of its own for operators that compare; returns the bytes saved."""
        signs = _separate_signs(saved, codec)
        residuals = []
        if signs is not None:
            readers = {one.reader for one in signs[0].readings}
            residuals += graph.encode_saved(saved.node, signs[1], readers, held=held, prune=False)
        residuals += graph.encode_saved(saved.node, codec, held=held, prune=False)
        return sum(nbytes(value(n)) for n in residuals)

    @staticmethod
    def _recompute(graph: JointGraph, offers: Sequence[tuple[str, tuple[Codec, ...]]], done: list[Treatment]) -> int:
        """Repeat what the `recompute` codecs among the offers choose and no codec before them takes."""
        recomputing = [(glob, i, codecs) for glob, codecs in offers for i, c in enumerate(codecs) if _recomputes(c)]
        if not recomputing:
            return 0
        before = saved_values(graph)
        chosen: dict[fx.Node, Codec] = {}
        for glob, place, codecs in recomputing:
            taken = {v.node for v in before if any(not isinstance(fit(c, v), Declined) for c in codecs[:place])}
            nodes = codecs[place].nodes(graph, _price(codecs[place + 1 :]))  # type: ignore[attr-defined]
            for node in nodes - taken:
                first = next((g for g, _ in offers if inside(info(node).module, g)), None)
                if first == glob:
                    chosen.setdefault(node, codecs[place])
        names = Names(graph)
        lines = {v.node: treatment(v, names, "", 0, "") for v in before}
        repeated = graph.recompute(chosen)
        left = {v.node for v in saved_values(graph)}
        for node, line in lines.items():
            if node not in left:
                codec = textform.to_text(chosen[node]) if node in chosen else "unread"
                why = (
                    "computed again in the backward" if node in chosen else "what read it is computed from other values"
                )
                done.append(replace(line, codec=codec, why=why))
        return repeated


def _recomputes(codec: Codec) -> bool:
    return getattr(codec, "how", "encode") == "recompute"


def _price(codecs: Sequence[Codec]) -> Callable[[fx.Node], float]:
    """Bytes of a value under the smallest of the codecs that may store it."""

    def price(node: fx.Node) -> float:
        val = value(node)
        bits = [8.0 * val.element_size()]
        for codec in codecs:
            if (
                isinstance(codec, SavedCodec)
                and val.dtype in codec.dtypes
                and val.is_floating_point()
                and codec.how == "encode"
            ):
                bits.append(codec.bits_per_element(val.dtype) if not codec.exact else bits[0])
        return float(hint(val.numel()) * min(bits) / 8)

    return price


def fit(codec: Codec, saved: SavedValue) -> Codec | Declined:
    """The form of a codec that suits a value, or why there is none; a codec that stores no less is none."""
    if isinstance(codec, SavedCodec):
        reason = codec.selects(saved)
        if reason:
            return Declined(reason)
        chosen: Codec | Declined = codec.fit(saved)
    else:
        # a codec without a declaration: floating-point values that may be approximate
        chosen = codec
        if not saved.dtype.is_floating_point:
            chosen = Declined(f"it does not store {str(saved.dtype).removeprefix('torch.')}")
        elif saved.needed_exactly:
            chosen = Declined(f"{saved.needed_exactly} needs it exactly")
    if (
        isinstance(chosen, Declined)
        or getattr(chosen, "how", "encode") != "encode"
        or getattr(chosen, "on_host", False)
    ):
        return chosen
    signs = _separate_signs(saved, chosen)
    if signs is not None and not saved.demanding(Demand.VALUE, Demand.EXACT).readings:
        # nothing but comparisons: the exact mask is smaller as well
        return signs[1]
    if signs is None and not getattr(chosen, "exact", False) and any(r.demand is Demand.SIGN for r in saved.readings):
        return Declined("operators compare it with different constants")
    size = saved_with_signs(saved, chosen)
    if size >= saved.nbytes:
        return Declined(f"encoded it would take {size:,} bytes, as it is {saved.nbytes:,}")
    return chosen


def _separate_signs(saved: SavedValue, codec: Codec) -> tuple[SavedValue, SavedCodec] | None:
    """The readers that only compare, and their mask, where the codec is not exact by itself."""
    if getattr(codec, "exact", False):
        return None
    signs = saved.demanding(Demand.SIGN)
    if not signs.readings:
        return None
    mask = build_codec("mask").fit(signs)  # type: ignore[attr-defined]
    return None if isinstance(mask, Declined) else (signs, mask)


def saved_with_signs(saved: SavedValue, codec: Codec) -> int:
    """Bytes of a value's encoding, and of the mask for operators that compare it."""
    signs = _separate_signs(saved, codec)
    return stored_bytes(saved, codec) + (stored_bytes(saved, signs[1]) if signs else 0)


def stored_bytes(saved: SavedValue, codec: Codec) -> int:
    """Bytes of a value's encoding at the example's sizes."""
    return stored_size(codec, value(saved.node))


def stored_size(codec: Codec, val: torch.Tensor) -> int:
    """Bytes of the encoding of a (fake) tensor."""
    sizes = tuple(hint(value(of).shape[dim]) for of, dim in getattr(codec, "sizes", ()))
    shape = tuple(hint(s) for s in val.shape)
    # codecs without a declaration need not be hashable
    size = _encoded_size if isinstance(codec, SavedCodec) else _encoded_size.__wrapped__
    return size(codec, shape, val.dtype, sizes)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _encoded_size(codec: Any, shape: tuple[int, ...], dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    encode: Callable[..., Any] = codec.encode
    draw = {"draw": lambda size: torch.empty(size, device="meta")} if getattr(codec, "random", False) else {}
    made = encode(torch.empty(shape, dtype=dtype, device="meta"), *sizes, **draw)
    return sum(t.numel() * t.element_size() for t in ([made] if isinstance(made, torch.Tensor) else made))


def treatment(
    saved: SavedValue, names: Names, codec: str, after: int, why: str, error: float | None = None
) -> Treatment:
    """One line of the plan table."""
    own = info(saved.node)
    return Treatment(
        names[saved.node],
        own.module,
        own.block,
        operator_name(producer(saved.node)),
        names.type(value(saved.node)),
        saved.nbytes,
        after,
        codec,
        why,
        error,
    )


def build_codec(what: Any) -> Codec:
    """A codec from its name, text form, class or object."""
    codec = textform.build("codec", what)
    if not isinstance(codec, Codec):
        raise RuleError(
            f"{what!r} is no codec", remedy="pass a registered name, a text form or an object with encode and decode"
        )
    return codec


def split_compress(compress: Any, memory_budget: Any = None) -> tuple[list[Pass], Pass | None]:
    """What `compile(compress=, memory_budget=)` accepts: passes at operators, and the pass of the codecs.

    Some entries of the codec registry are passes (an approximate derivative stores other residuals from the start).
    Under a module glob, such a pass gets the glob as its `only`, and the globs before it, which win, as its `skip`.
    """
    if memory_budget is not None:
        from graphrewrite.passes.compression.plan_memory import PlanMemory, check_budget

        check_budget(memory_budget)
        if isinstance(compress, Mapping):
            raise RuleError(
                "a memory budget chooses the codecs by itself", remedy="give compress= as a list to choose from"
            )
        approximations, menu = split_compress(compress)
        if isinstance(menu, CompressSaved):
            return approximations, PlanMemory(memory_budget, menu.codecs[0][1])
        return approximations, PlanMemory(memory_budget)
    if compress is None:
        return [], None
    given = compress if isinstance(compress, Mapping) else {"*": compress}
    passes: list[Pass] = []
    entries = []
    for glob, held in given.items():
        codecs = []
        for one in _spelled_out(held):
            built = textform.build("codec", one)
            if isinstance(built, Pass):
                passes.append(_restricted(built, glob, tuple(given)[: list(given).index(glob)]))
            else:
                codecs.append(build_codec(built))
        if codecs:
            entries.append((glob, tuple(codecs)))
    return passes, CompressSaved(tuple(entries)) if entries else None


def _spelled_out(held: Any) -> list[Any]:
    """What is given for one glob as a list, with the presets in it written out."""
    named = list(held) if isinstance(held, (list, tuple)) else [held]
    return [one for name in named for one in (PRESETS.get(name, (name,)) if isinstance(name, str) else (name,))]


def _restricted(one: Pass, glob: str, earlier: tuple[str, ...]) -> Pass:
    if glob == "*" and not earlier:
        return one
    if not hasattr(one, "only"):
        raise RuleError(f"{one} works on the whole model", remedy=f"give it outside of the map, not under {glob!r}")
    only = one.only if glob == "*" else (glob,)
    return replace(one, only=only, skip=(*one.skip, *earlier))  # type: ignore[call-arg,attr-defined]
