"""Learning rules, one file each. A new rule adds its name here and changes nothing else."""

REGISTRY = {
    "bp": "graphrewrite.passes.rules.bp:Backpropagation",
    "brsf": "graphrewrite.passes.rules.brsf:BatchwiseSignFeedback",
    "counter_current": "graphrewrite.passes.rules.counter_current:CounterCurrent",
    "dfa": "graphrewrite.passes.rules.dfa:DirectFeedbackAlignment",
    "drtp": "graphrewrite.passes.rules.drtp:DirectRandomTargetProjection",
    "dual_propagation": "graphrewrite.passes.rules.dual_propagation:DualPropagation",
    "fa": "graphrewrite.passes.rules.fa:FeedbackAlignment",
    "ff": "graphrewrite.passes.rules.ff:ForwardForward",
    "forward_gnn": "graphrewrite.passes.rules.forward_gnn:ForwardGNN",
    "frsf": "graphrewrite.passes.rules.frsf:FixedSignFeedback",
    "highway": "graphrewrite.passes.rules.highway:Highway",
    "kp": "graphrewrite.passes.rules.kp:KolenPollack",
    "lls": "graphrewrite.passes.rules.lls:LocalLearningPeriodic",
    "local_loss": "graphrewrite.passes.rules.local_loss:LocalLoss",
    "mono_forward": "graphrewrite.passes.rules.mono_forward:MonoForward",
    "pfa": "graphrewrite.passes.rules.pfa:ProductFeedbackAlignment",
    "reinmax": "graphrewrite.passes.rules.reinmax:ReinMax",
    "straight_through": "graphrewrite.passes.rules.straight_through:StraightThrough",
    "usf": "graphrewrite.passes.rules.usf:UniformSignFeedback",
    "weight_mirror": "graphrewrite.passes.rules.weight_mirror:WeightMirror",
}
