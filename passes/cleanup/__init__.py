"""Passes that change no number: they make the graph smaller and its text readable."""

REGISTRY = {
    "eliminate_dead_code": "graphrewrite.passes.cleanup.dead_code:EliminateDeadCode",
    "eliminate_common_subexpressions": (
        "graphrewrite.passes.cleanup.common_subexpressions:EliminateCommonSubexpressions"
    ),
    "fold_views": "graphrewrite.passes.cleanup.views:FoldViews",
    "merge_convolution_backward": "graphrewrite.passes.cleanup.convolutions:MergeConvolutionBackward",
    "drop_unread_statistics": "graphrewrite.passes.cleanup.statistics:DropUnreadStatistics",
}
