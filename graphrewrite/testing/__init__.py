"""Helpers for authors of rules, passes and codecs: models to test on, and checks to test with."""
