"""Learning rules, one file each. A new rule adds its name here and changes nothing else."""

REGISTRY = {
    "bp": "graphrewrite.passes.rules.bp:Backpropagation",
    "counter_current": "graphrewrite.passes.rules.counter_current:CounterCurrent",
    "dfa": "graphrewrite.passes.rules.dfa:DirectFeedbackAlignment",
    "ff": "graphrewrite.passes.rules.ff:ForwardForward",
    "forward_gnn": "graphrewrite.passes.rules.forward_gnn:ForwardGNN",
}
