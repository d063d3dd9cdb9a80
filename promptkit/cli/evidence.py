"""The evidence that ships with the package: its state, filled, audited."""

from pathlib import Path

import typer

from promptkit.cli import console
from promptkit.cli.commands import app
from promptkit.cli.console import (
    Scheduler,
    Workers,
    at_least,
    examples,
    flag,
    number,
    option,
    say,
    whole,
)
from promptkit.errors import InputError
from promptkit.parameters import names

evidence_app = typer.Typer(
    name="evidence",
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="The runs that ship with the package, which the book's tables are made of.",
    epilog=examples(
        "evidence status",
        "evidence fill --workers 2 --minutes 60",
        "evidence audit --sample 20",
    ),
)
app.add_typer(evidence_app)

Chapters = option(
    str | None,
    "Chapters by number, range or name, or [bold]leaderboard[/]; default: all.",
)
Folder = option(Path, "Folder of the chapters.", "--notebooks", show_default=True)


@evidence_app.command(
    epilog=examples("evidence status", "evidence status --chapters 03-06")
)
def status(chapters: Chapters = None, folder: Folder = Path("notebooks")):
    """Say what each chapter and page asks for, what of it ships, and how long the rest
    would take.

    Chapters are executed for that, on made-up numbers; what they ask for is remembered
    until they or the package change.
    """
    from promptkit.audit import status as state
    from promptkit.evidence import stamped, stamps

    with console.err.status("asking the chapters ..."):
        found = state(chapters, folder)
    heads = ["chapter or page", "asked", "there", "other code", "missing", "minutes"]
    table = console.table(heads, title="Runs; minutes of one core for what is open")
    for one in found:
        counts = (one.asked, one.there, one.loose, one.missing)
        table.add_row(one.name, *(f"{n:,}" for n in counts), f"{one.minutes:,.1f}")
    console.out.print(table)
    if loose := [spec for spec in stamps() if not stamped(spec)]:
        say(
            f"measured with other code than this: {', '.join(loose)}; 'promptkit"
            " evidence audit' finds out whether the numbers are the same"
        )


@evidence_app.command(
    epilog=examples(
        "evidence fill --workers 2",
        "evidence fill --chapters 03,leaderboard --minutes 30",
        "evidence fill --stale coop,kgcoop",
        "evidence fill --scheduler tcp://host:8786",
    )
)
def fill(
    chapters: Chapters = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    minutes: option(float | None, "Stop after so many minutes.", parser=number) = None,
    stale: option(
        str | None, "Methods whose shipped runs are made anew by this code."
    ) = None,
    prune: flag("Drop runs that nothing asks for any more.", "--prune") = False,
    folder: Folder = Path("notebooks"),
):
    """Make the runs that the book asks for and that do not ship, and ship them.

    Each is stored when it is made: stop this at any time, and the next one goes on.
    """
    from promptkit.audit import fill as fill_up

    at_least(1, 512, workers=workers)
    if prune and chapters:
        raise InputError("--prune looks at the whole book: leave out --chapters")
    stale = [] if stale is None else names("--stale", stale)
    made, missing = fill_up(chapters, folder, workers, scheduler, minutes, stale, prune)
    say(f"{made} runs added; {missing} still missing")


@evidence_app.command(
    epilog=examples("evidence audit", "evidence audit --methods coop --sample 5")
)
def audit(
    sample: option(
        int,
        "Runs to repeat, beside one of every method and protocol.",
        parser=whole,
        show_default=True,
    ) = 20,
    seed: option(int, "Of the draw.", parser=whole, show_default=True) = 0,
    methods: option(str | None, "Methods to look at; default: all.") = None,
    tolerance: option(
        float, "Points that a number may be away.", parser=number, show_default=True
    ) = 2.0,
    minutes: option(
        float | None, "Stop after so many; the quickest runs come first.", parser=number
    ) = None,
    workers: Workers = 1,
    scheduler: Scheduler = None,
):
    """Repeat some of the shipped runs and compare; exit code 1 if any differs.

    A method whose runs all agree is stamped: its shipped runs speak for its code as it
    is now.
    """
    from promptkit import audit as auditing

    at_least(1, 512, workers=workers)
    chosen = None if methods is None else names("--methods", methods)
    found = auditing.audit(sample, seed, chosen, tolerance, workers, scheduler, minutes)
    heads = ["method", "runs", "points apart", "verdict"]
    table = console.table(
        heads,
        title=f"Audit of {len(found)} runs; up to {tolerance:g} points are rounding",
    )
    for row in auditing.table(found, tolerance).itertuples():
        verdict = "agrees" if row.agrees else "[bold]differs[/]"
        table.add_row(row.method, str(row.runs), f"{row.apart:.2f}", verdict)
    console.out.print(table)
    wrong = [one for one in found if one.apart > tolerance]
    for one in wrong:
        say(f"{one.method}, {one.what}: {one.apart:.2f} points away")
    if wrong:
        named = ",".join(sorted({one.method for one in wrong}))
        say(f"if that is meant: promptkit evidence fill --stale {named}")
        raise typer.Exit(1)
