"""The real datasets: listed, downloaded, checked."""

from typing import Annotated

import typer
from rich.text import Text

from promptkit.cli import console
from promptkit.cli.commands import app
from promptkit.cli.console import Root, examples, flag, option, say
from promptkit.errors import unknown

data_app = typer.Typer(
    name="data",
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="The real datasets: list, download and check them.",
    epilog=examples(
        "data list",
        "data download eurosat dtd --root ~/data",
        "data check --root ~/data",
    ),
)
app.add_typer(data_app)


@data_app.command("list", epilog=examples("data list"))
def list_data():
    """List the datasets: of the package, of the benchmark, shifts of ImageNet."""
    from promptkit import data
    from promptkit.data.benchmark import TABLE
    from promptkit.data.download import ORIGINS

    table = console.table(["name", "title", "classes", "train", "val", "test", "from"])
    for name in data.list_datasets():
        if name in TABLE:
            entry = TABLE[name]
            origin = (
                "your own copy"
                if name == "imagenet"
                else "hub, origin"
                if name in ORIGINS
                else "hub"
            )
            table.add_row(name, entry.title, *(f"{n:,}" for n in entry.counts), origin)
        else:
            dataset = data.load_dataset(name)
            sizes = (
                len(part)
                for part in (
                    dataset.classnames,
                    dataset.train,
                    dataset.val,
                    dataset.test,
                )
            )
            table.add_row(
                name, dataset.title, *(f"{n:,}" for n in sizes), "the package"
            )
    console.out.print(table)


@data_app.command(
    epilog=examples(
        "data download eurosat dtd --root ~/data",
        "data download all",
        "data download dtd --source origin",
    )
)
def download(
    names: Annotated[
        list[str],
        typer.Argument(help="Real datasets, or all (ImageNet is yours to bring)."),
    ],
    root: Root = None,
    source: option(
        str,
        "[bold]hub[/]: with the published splits; [bold]origin[/]: the makers' pages.",
        show_default=True,
    ) = "hub",
    force: flag("Download again what is there.", "--force") = False,
):
    """Download real datasets; an interrupted download goes on where it stopped."""
    from promptkit.data.benchmark import TABLE
    from promptkit.data.check import check
    from promptkit.data.download import download as fetch

    wanted = (
        [name for name in TABLE if name != "imagenet"] if names == ["all"] else names
    )
    for name in wanted:
        if name not in TABLE:
            raise unknown("real dataset", name, TABLE)
    for name in wanted:
        report = check(name, root)
        if force or report.state not in ("ready", "differs"):
            fetch(name, root, source)
            report = check(name, root)
        say(
            f"{name}: {report.state}, in {report.folder}"
            + (f" ({report.note})" if report.note else "")
        )


@data_app.command(
    "check",
    epilog=examples("data check", "data check dtd eurosat --root ~/data --images"),
)
def check_data(
    names: Annotated[
        list[str] | None, typer.Argument(help="Real datasets; default: all.")
    ] = None,
    root: Root = None,
    images: flag("Decode every image too.", "--images") = False,
):
    """Say what is there, missing or damaged, and what to do.

    Exit code 1 if something is damaged.
    """
    from promptkit.data.benchmark import TABLE, data_root
    from promptkit.data.check import check

    for name in names or ():
        if name not in TABLE:
            raise unknown("real dataset", name, TABLE)
    table = console.table(
        ["name", "state", "classes", "train", "val", "test", "what to do"],
        title=f"{data_root(root).resolve()}: found / in the benchmark",
    )
    reports = [check(name, root, images) for name in names or TABLE]
    for report in reports:
        found = (
            "-" if report.counts is None else f"{n:,}"
            for n in report.counts or range(4)
        )
        counts = (
            f"{n} / {whole:,}"
            for n, whole in zip(found, TABLE[report.name].counts, strict=True)
        )
        colour = {"ready": "green", "damaged": "red"}.get(report.state, "yellow")
        table.add_row(
            report.name, Text(report.state, colour), *counts, Text(report.note)
        )
    console.out.print(table)
    if any(report.state == "damaged" for report in reports):
        raise typer.Exit(1)
