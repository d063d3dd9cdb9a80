"""The book and its numbers: chapters executed, the whole benchmark, what runs add up
to, and the pages made of them.
"""

import os
from pathlib import Path

import typer
from rich.text import Text

from promptkit.cli import console, values
from promptkit.cli.commands import app
from promptkit.cli.console import (
    Device,
    Like,
    MaxSteps,
    Model,
    Pretrained,
    Profile,
    QuickGELU,
    Results,
    Root,
    Scheduler,
    Workers,
    at_least,
    examples,
    flag,
    number,
    option,
    say,
    weights,
)
from promptkit.cli.train import announce
from promptkit.errors import InputError, unknown
from promptkit.parameters import names as names_of
from promptkit.parameters import whole_numbers


@app.command(
    epilog=examples(
        "reproduce",
        "reproduce --chapters 03 --profile smoke --output /tmp/book",
        "reproduce --chapters coop --data pets,cars --seeds 1,2,3 --output out"
        " --fan-out --workers 4",
        "reproduce --benchmark --methods coop,kgcoop --protocols base-to-new",
        "reproduce --profile full --data all --root ~/data --scheduler tcp://host:8786",
        "reproduce --profile full --chapters 04 --root ~/data",
    )
)
def reproduce(
    chapters: option(
        str | None, "Numbers, ranges or names, such as 03, 01-03, coop; default: all."
    ) = None,
    profile: Profile = None,
    benchmark: flag(
        "Run every method on every dataset in every protocol, and print the table, in"
        " place of the chapters; "
        "[bold]--profile full[/] does so unless chapters are named.",
        "--benchmark",
    ) = False,
    methods: option(
        str | None, "Methods of the benchmark, separated by commas; default: all."
    ) = None,
    protocols: option(
        str | None, "Its protocols, separated by commas; default: all."
    ) = None,
    data: option(
        str | None, "Datasets, or all; default: all, and for chapters their own."
    ) = None,
    shots: option(
        str | None,
        "Training images a class: 16, or several: 1,4,16; default: 16, and for chapters"
        " their own.",
    ) = None,
    seeds: option(
        str | None, "Seeds: 1,2,3 or 1-3; default: 1-3, and for chapters their own."
    ) = None,
    model: Model = None,
    pretrained: Pretrained = None,
    like: Like = None,
    quickgelu: QuickGELU = None,
    output: option(
        Path | None,
        "Folder for executed notebooks; default: mini refreshes them in place, others"
        " go to reproduced/.",
    ) = None,
    folder: option(
        Path, "Folder of the chapters.", "--notebooks", show_default=True
    ) = Path("notebooks"),
    fan_out: flag(
        "First one execution a dataset and seed, to spread a long run.", "--fan-out"
    ) = False,
    fresh: flag(
        "Make every run of the chapters anew, in results/fresh, and compare with those"
        " that ship with the package.",
        "--fresh",
    ) = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    results: Results = None,
    root: Root = None,
    max_steps: MaxSteps = None,
    device: Device = None,
):
    """Execute the chapters of the book, or run the whole benchmark.

    Exit code 1 if one fails, or if fresh runs differ from those that ship.
    """
    numbers = None if seeds is None else whole_numbers("--seeds", seeds)
    drawn = None if shots is None else whole_numbers("--shots", shots, 1)
    at_least(1, max_steps=max_steps)
    at_least(1, 512, workers=workers)
    with console.err.status("loading ..."):
        from promptkit import reproduce as reproduction
        from promptkit.results import results_dir
    profile = values.choose_profile(profile, data, model)
    whole = benchmark or (profile == "full" and chapters is None)
    idle = {"--methods": methods, "--protocols": protocols}
    if whole:
        idle = {"--chapters": chapters, "--output": output, "--fan-out": fan_out}
        idle["--fresh"] = fresh
    for name, value in idle.items():
        if value:
            what = "the whole benchmark" if whole else "the chapters; add --benchmark"
            raise InputError(f"{name} has no effect on {what}")
    if results is not None:
        os.environ["PROMPTKIT_RESULTS"] = str(results.resolve())
    options = {
        "root": None if root is None else str(root.resolve()),
        "max_steps": max_steps,
        "device": device,
        "model": model,
        "pretrained": pretrained,
        **weights(like, quickgelu),
    }
    if whole:
        grid = methods, protocols, data, drawn or [16], numbers or [1, 2, 3]
        return _benchmark(profile, *grid, workers, scheduler, **options)
    if fresh and profile != "mini":
        raise InputError(
            "--fresh compares with what ships, which is of the profile mini, not"
            f" {profile}"
        )
    apart = results_dir() / "fresh" if fresh else None
    names = data if data in (None, "all") else values.datasets(data, profile)
    reports = reproduction.reproduce(
        chapters,
        profile,
        names,
        numbers,
        output,
        workers,
        scheduler,
        folder,
        fan_out,
        fresh=apart,
        shots=drawn,
        **options,
    )
    table = console.table(["chapter", "seconds", "result"], title=f"profile {profile}")
    for report in reports:
        result = f"failed: {report.error}" if report.error else "done"
        table.add_row(report.name, f"{report.seconds:.0f}", Text(result))
    console.out.print(table)
    failed = any(report.error for report in reports)
    if fresh:
        failed |= _differ(apart)
    if failed:
        raise typer.Exit(1)


def _differ(folder) -> bool:
    """Whether the runs of a folder differ from those that ship; says how far."""
    from promptkit.audit import TOLERANCE, compared

    found = compared(folder)
    wrong = [one for one in found if one.apart > TOLERANCE]
    for one in wrong:
        say(f"{one.method}, {one.what}: {one.apart:.2f} points from the shipped run")
    furthest = max((one.apart for one in found), default=0.0)
    say(
        f"{len(found)} fresh runs have a shipped one; {len(found) - len(wrong)} agree"
        f" within {TOLERANCE:g} points, the furthest is {furthest:.2f} away"
    )
    return bool(wrong)


def _benchmark(
    profile, methods, protocols, data, shots, seeds, workers, scheduler, model,
    pretrained, **options,
):  # fmt: skip
    from promptkit import costs
    from promptkit.grids import SweepError, execute_all
    from promptkit.grids import benchmark as plan
    from promptkit.recipe import PROTOCOLS
    from promptkit.results import load_results, results_dir, summarise
    from promptkit.runs import backbone
    from promptkit.workers import sweep_results

    model, pretrained = backbone(profile, model, pretrained)
    chosen = None if methods in (None, "all") else names_of("--methods", methods)
    kinds = list(PROTOCOLS)
    if protocols not in (None, "all"):
        kinds = names_of("--protocols", protocols)
    names = values.datasets(data or "all", profile)
    options |= {"profile": profile, "clip": model, "pretrained": pretrained}
    with console.err.status("planning ..."):
        plans = plan(chosen, names, kinds, seeds, shots, **options)
    announce(plans)
    if profile == "full":
        say(costs.told(plans, plans[0].clip.device))
    sweep_results(results_dir())
    failed = None
    try:
        rows = execute_all(plans, workers, scheduler, shipped=False)
    except SweepError as error:
        failed, rows = error, load_results()
    _boards(summarise(rows), 0.95)
    say(f"stored in {results_dir().resolve()}")
    if failed:
        say(f"Error: {failed}")
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "leaderboard",
        "leaderboard --protocol base-to-new --data pets",
        "leaderboard --csv > all.csv",
    )
)
def leaderboard(
    results: Results = None,
    protocol: option(
        str | None, "One protocol; default: all that have results."
    ) = None,
    data: option(str | None, "Datasets to show beside the averages, or all.") = None,
    level: option(
        float,
        "Level of the confidence intervals over seeds.",
        parser=number,
        show_default=True,
    ) = 0.95,
    as_csv: flag("Print means and intervals as CSV.", "--csv") = False,
    as_json: flag("Print means and intervals as JSON.", "--json") = False,
):
    """Show what the stored runs add up to.

    Means over seeds with intervals, and averages over datasets.
    """
    from promptkit.results import TRANSFER, load_results, results_dir, summarise

    runs = load_results(results)
    if not len(runs):
        raise InputError(
            f"no runs are stored in {results_dir(results)}; make some with 'promptkit"
            " run'"
        )
    if protocol is not None:
        _stored("protocol", protocol, runs["protocol"])
        runs = runs[runs["protocol"] == protocol]
    summary = summarise(runs, level)
    if as_csv and as_json:
        raise InputError("print either --csv or --json")
    names = [] if data is None else names_of("--data", data)
    if "all" not in names:
        for name in names:
            _stored("dataset", name, [*summary["dataset"], *summary["target"]])
        average = (summary["target"] == "average") | summary["protocol"].isin(
            [] if names else TRANSFER
        )
        shown = summary[
            average | summary["dataset"].isin(names) | summary["target"].isin(names)
        ]
        summary = summary if (as_csv or as_json) and not names else shown
    if as_csv or as_json:
        print(
            summary.to_csv(index=False)
            if as_csv
            else summary.to_json(orient="records", indent=1)
        )
        return
    _boards(summary, level)


def _boards(summary, level):
    for (name, profile, model), cells in summary.groupby(
        ["protocol", "profile", "model"], sort=False
    ):
        console.out.print(_board(f"{name}, {profile}, {model}", name, cells, level))


@app.command(epilog=examples("pages", "pages --results results --book book"))
def pages(
    results: option(
        Path | None, "Folder with the chapters' claims; default: as for runs."
    ) = None,
    book: option(Path, "Folder of the book's pages.", show_default=True) = Path("book"),
):
    """Write the book's leaderboard and what the methods cost from the evidence, and its
    claims page from what the chapters found.
    """
    from promptkit import pages
    from promptkit.grids import known

    runs = known(pages.asked())
    say(f"wrote {pages.leaderboard(book, runs)}")
    say(f"wrote {pages.costs(book, runs)}")
    say(f"wrote {pages.claims(book, results)}")


def _stored(kind, name, choices):
    if name not in set(choices):
        raise unknown(f"{kind} among the stored runs", name, sorted(set(choices)))


def _board(title, protocol, cells, level):
    """A row a method; a column a split for base-to-new, a number of shots for few-shot,
    else a target.
    """
    from promptkit.results import label

    splits = {"hm": "HM", "hm_of_tasks": "mean of HMs"}
    columns = {
        "few-shot": cells["shots"].map(lambda n: f"{n} shot{'s' * (n != 1)}"),
        "base-to-new": cells["split"].replace(splits),
    }
    cells = cells.assign(
        label=label(cells), column=columns.get(protocol, cells["target"])
    )
    keys = (
        ["dataset", "label"]
        if protocol == "few-shot"
        else ["dataset", "label", "shots"]
    )
    cells = (
        cells.sort_values("shots", kind="stable") if protocol == "few-shot" else cells
    )
    names = list(dict.fromkeys(cells["column"]))
    counts = cells.loc[cells["target"] == "average", "datasets"]
    least, most = counts.min(), counts.max()
    several = f"{most}" if least == most else f"{least} to {most}"
    title = (
        f"{title}: accuracy in % ± {level:.0%} interval over seeds; average of"
        f" {several} datasets"
    )
    table = console.table(["data", "method", *keys[2:], *names, "seeds"], title=title)
    rows = cells.assign(first=cells["dataset"] != "average").groupby(["first", *keys])
    for (_, *key), group in rows:
        texts = {
            column: _number(part.iloc[0]) for column, part in group.groupby("column")
        }
        table.add_row(
            *(Text(str(part)) for part in key),
            *(texts.get(name, "") for name in names),
            str(group["seeds"].max()),
        )
    return table


def _number(cell):
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.2f}" + (
        "" if half != half else f" ± {half:.2f}"
    )  # NaN: one seed has no interval
