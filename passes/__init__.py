"""Everything that rewrites a graph: rules, compression, schedules, clean-up. Installed as `graphrewrite.passes`."""

REGISTRY = {
    "reinmax": "graphrewrite.passes.rules.reinmax:ReinMax",
    "straight_through": "graphrewrite.passes.rules.straight_through:StraightThrough",
}
"""Rules that are passes as well: they combine with any other rule."""
