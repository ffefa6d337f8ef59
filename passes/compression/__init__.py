"""Codecs for saved tensors, one file each, and the pass that applies them."""

REGISTRY = {
    "approx_bp": "graphrewrite.passes.compression.approx_bp:ApproxBP",
    "bf16": "graphrewrite.passes.compression.bf16:BFloat16",
    "cpu_offload": "graphrewrite.passes.compression.cpu_offload:CpuOffload",
    "fewbit": "graphrewrite.passes.compression.fewbit:FewBit",
    "fp16": "graphrewrite.passes.compression.fp16:Float16",
    "fp8": "graphrewrite.passes.compression.fp8:Float8",
    "hadamard": "graphrewrite.passes.compression.hadamard:Hadamard",
    "hot": "graphrewrite.passes.compression.hot:HadamardTraining",
    "int2": "graphrewrite.passes.compression.int2:Int2",
    "int4": "graphrewrite.passes.compression.int4:Int4",
    "int8": "graphrewrite.passes.compression.int8:Int8",
    "lloyd": "graphrewrite.passes.compression.lloyd:Lloyd",
    "lowrank": "graphrewrite.passes.compression.lowrank:LowRank",
    "mask": "graphrewrite.passes.compression.mask:Mask",
    "ms_norm": "graphrewrite.passes.compression.ms_norm:MemorySharingNorm",
    "none": "graphrewrite.passes.compression.none:Keep",
    "randomized_linear": "graphrewrite.passes.compression.randomized_linear:RandomizedLinear",
    "recompute": "graphrewrite.passes.compression.recompute:Recompute",
    "topk": "graphrewrite.passes.compression.topk:TopK",
    "velora": "graphrewrite.passes.compression.velora:VeLoRA",
}

PRESETS: dict[str, tuple[str, ...]] = {
    "compact": ("ms_norm", "mask", "recompute", "int8{symmetric=true,group=64}"),
}
"""Names for lists that `compile(compress=)` takes as if the list had been written in their place.

compact: no matrix product, convolution or attention runs twice. Norms share what they keep with the linear layers
    behind them, masks are bits, cheap operators are repeated where that leaves less to save, the rest is 8-bit
    integers: of groups of 64, which lie within a head of attention, without minima.
"""
