"""``python -m promptkit``: the command line."""

from promptkit.cli import main

main()
