"""Learning rules, one file each. A new rule adds its name here and changes nothing else."""

REGISTRY = {
    "bp": "graphrewrite.passes.rules.bp:Backpropagation",
    "dfa": "graphrewrite.passes.rules.dfa:DirectFeedbackAlignment",
    "ff": "graphrewrite.passes.rules.ff:ForwardForward",
    "lls": "graphrewrite.passes.rules.lls:LocalLearningPeriodic",
    "local_loss": "graphrewrite.passes.rules.local_loss:LocalLoss",
    "mono_forward": "graphrewrite.passes.rules.mono_forward:MonoForward",
}
