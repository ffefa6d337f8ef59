"""Codecs for saved tensors, one file each, and the pass that applies them."""

REGISTRY = {
    "bf16": "graphrewrite.passes.compression.bf16:BFloat16",
    "approx_bp": "graphrewrite.passes.compression.approx_bp:ApproxBP",
    "fewbit": "graphrewrite.passes.compression.fewbit:FewBit",
    "hot": "graphrewrite.passes.compression.hot:HadamardTraining",
    "ms_norm": "graphrewrite.passes.compression.ms_norm:MemorySharingNorm",
    "randomized_linear": "graphrewrite.passes.compression.randomized_linear:RandomizedLinear",
}
