"""Learning rules, one file each. A new rule adds its name here and changes nothing else."""

REGISTRY = {
    "bp": "graphrewrite.passes.rules.bp:Backpropagation",
    "dfa": "graphrewrite.passes.rules.dfa:DirectFeedbackAlignment",
    "drtp": "graphrewrite.passes.rules.drtp:DirectRandomTargetProjection",
    "reinmax": "graphrewrite.passes.rules.reinmax:ReinMax",
    "straight_through": "graphrewrite.passes.rules.straight_through:StraightThrough",
    "dual_propagation": "graphrewrite.passes.rules.dual_propagation:DualPropagation",
    "highway": "graphrewrite.passes.rules.highway:Highway",
    "ff": "graphrewrite.passes.rules.ff:ForwardForward",
}
