"""Everything that rewrites a graph: rules, compression, schedules, clean-up. Installed as `graphrewrite.passes`."""

REGISTRY = {
    "compress_saved": "graphrewrite.passes.compression.compress_saved:CompressSaved",
    "plan_memory": "graphrewrite.passes.compression.plan_memory:PlanMemory",
    "reinmax": "graphrewrite.passes.rules.reinmax:ReinMax",
    "straight_through": "graphrewrite.passes.rules.straight_through:StraightThrough",
}
"""Passes of no family: that of the codecs, and rules that are passes as well, which combine with any other rule."""
