"""`CompiledModule`, the autograd glue, input signatures, rule state."""
