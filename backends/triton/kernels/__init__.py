"""Triton code. Importing a module of this folder imports triton; nothing outside `graphrewrite.backends.triton` does."""
