"""Facts about graphs: blocks, live bytes, cost, certificates."""
