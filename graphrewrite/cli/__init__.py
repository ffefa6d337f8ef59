"""The `graphrewrite` command: look at rewritten graphs, and train under several rules side by side.

One module per command; the heavy imports are inside the commands, so that `--help` never imports torch.
"""

from graphrewrite.cli.app import main

__all__ = ["main"]
