"""What authors of rules, passes and codecs test with; `docs/first_rule.md` uses it.

`zoo.make("resnet")` gives a small model of a family with batches; the helpers compare a rule with an oracle, check
identities, locality, memory and golden graphs.
"""

from graphrewrite.testing import zoo
from graphrewrite.testing.compare import assert_same, assert_trains_like_eager, gradients
from graphrewrite.testing.rules import (
    Memory,
    assert_golden,
    assert_is_backpropagation,
    assert_locality_is_certified,
    assert_matches_oracle,
    compile_copy,
    downstream_reads,
    eager_gradients,
    measure_memory,
    numeric_gradients,
    rule_gradients,
)

__all__ = [
    "Memory",
    "assert_golden",
    "assert_is_backpropagation",
    "assert_locality_is_certified",
    "assert_matches_oracle",
    "assert_same",
    "assert_trains_like_eager",
    "compile_copy",
    "downstream_reads",
    "eager_gradients",
    "gradients",
    "measure_memory",
    "numeric_gradients",
    "rule_gradients",
    "zoo",
]
