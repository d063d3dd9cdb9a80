"""The command line: ``promptkit list | run | evaluate | predict | export | reproduce |
leaderboard | pages | evidence | data | pretrain``.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from promptkit.cli import (  # noqa: F401  they register theirs
    book,
    data,
    evidence,
    predict,
    train,
)
from promptkit.cli.commands import app, main

__all__ = ["app", "main"]
