"""Everything that rewrites a graph: rules, compression, schedules, clean-up. Installed as `graphrewrite.passes`."""

REGISTRY: dict[str, str] = {}
