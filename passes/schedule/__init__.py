"""Passes that decide when things are computed, not what."""

REGISTRY = {
    "early_local_backward": "graphrewrite.passes.schedule.early_local_backward:EarlyLocalBackward",
    "encode_held": "graphrewrite.passes.schedule.encode_held:EncodeHeld",
    "recompute_regions": "graphrewrite.passes.schedule.recompute_regions:RecomputeRegions",
    "split_backward": "graphrewrite.passes.schedule.split_backward:SplitBackward",
}
