"""Learning rules, one file each. A new rule adds its name here and changes nothing else."""

REGISTRY = {
    "bp": "graphrewrite.passes.rules.bp:Backpropagation",
    "brsf": "graphrewrite.passes.rules.brsf:BatchwiseSignFeedback",
    "dfa": "graphrewrite.passes.rules.dfa:DirectFeedbackAlignment",
    "fa": "graphrewrite.passes.rules.fa:FeedbackAlignment",
    "ff": "graphrewrite.passes.rules.ff:ForwardForward",
    "frsf": "graphrewrite.passes.rules.frsf:FixedSignFeedback",
    "kp": "graphrewrite.passes.rules.kp:KolenPollack",
    "pfa": "graphrewrite.passes.rules.pfa:ProductFeedbackAlignment",
    "usf": "graphrewrite.passes.rules.usf:UniformSignFeedback",
    "weight_mirror": "graphrewrite.passes.rules.weight_mirror:WeightMirror",
}
