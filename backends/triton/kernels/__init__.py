"""Triton code. Importing a module of this folder imports triton; only a launch does."""
