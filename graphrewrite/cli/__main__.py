"""`python -m graphrewrite.cli`: the command without its script."""

from graphrewrite.cli.app import main

main()
