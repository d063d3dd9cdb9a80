"""The command line: ``promptkit list | run | evaluate | predict | export | reproduce |
leaderboard | pages | data | pretrain``.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from promptkit.cli import book, data, predict, train  # noqa: F401  they register theirs
from promptkit.cli.commands import app, main

__all__ = ["app", "main"]
