"""Codecs for saved tensors, one file each, and the pass that applies them."""

REGISTRY = {
    "bf16": "graphrewrite.passes.compression.bf16:BFloat16",
    "fewbit": "graphrewrite.passes.compression.fewbit:FewBit",
}
