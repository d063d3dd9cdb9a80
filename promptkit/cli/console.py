"""What the commands share: their two consoles, their tables, and the options that mean
the same everywhere.
"""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from promptkit.errors import InputError

out, err = Console(), Console(stderr=True)


def say(text):
    """A line on stderr, as it is."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def examples(*lines):
    """The end of a help text."""
    return "[bold]Examples[/]\n\n" + "\n\n".join(
        f"  $ promptkit {line}" for line in lines
    )


def table(columns, **options):
    """A table that loses no text where the terminal is narrow."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", **options)
    for column in columns:
        grid.add_column(column, overflow="fold")
    return grid


def rows_table(rows):
    """Rows of measurements, see ``promptkit.results.COLUMNS``."""
    heads = {
        "method": "method",
        "dataset": "data",
        "target": "tested on",
        "split": "classes",
        "shots": "shots",
        "seed": "seed",
        "value": "accuracy",
        "seconds": "sec.",
        "hash": "run",
    }
    formats = {
        "value": "{:.2f} %".format,
        "seconds": "{:.1f}".format,
        "hash": lambda name: name[:8],
    }
    grid = table(heads.values())
    for row in rows[list(heads)].to_dict("records"):
        texts = (formats.get(key, str)(value) for key, value in row.items())
        grid.add_row(*map(Text, texts))  # a name may hold brackets
    return grid


# --- options --------------------------------------------------------------------------


def option(kind, text, *names, show_default=False, **more):
    """An option of a command, as typer reads it from an annotation."""
    return Annotated[
        kind, typer.Option(*names, help=text, show_default=show_default, **more)
    ]


def whole(text) -> int:
    """A whole number of an option; which ones fit, the command checks."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or abs(value) >= 10**18:
        shown = repr(text) if len(str(text)) < 60 else f"{str(text)[:57]!r}..."
        raise typer.BadParameter(f"{shown} is no whole number of up to 18 digits")
    return value


def number(text) -> float:
    """A finite number of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        comma = "; write a decimal point" if "," in str(text) else ""
        raise typer.BadParameter(f"{text!r} is no number{comma}")
    return value


def flag(text, *names):
    """An option that is given or not."""
    return option(bool, text, *names)


Json = flag("Print JSON.", "--json")
Results = option(
    Path | None,
    "Folder of stored runs; default: $PROMPTKIT_RESULTS, else results/ of the project"
    " that this folder is in, else ./results.",
)
Profile = option(
    str | None,
    "[bold]mini[/]: the embedded world; [bold]smoke[/]: a quick check; [bold]full[/]:"
    " the papers' recipes. Default: mini, and full for real data with real weights.",
)
Workers = option(
    int,
    "Processes at the same time, each with one thread.",
    parser=whole,
    show_default=True,
)
Scheduler = option(
    str | None, "Address of a Dask scheduler in place of --workers: tcp://host:8786."
)
Root = option(
    Path | None, "Folder of the real datasets; default: $PROMPTKIT_DATA, else ./data."
)
MaxSteps = option(int | None, "Stop each training after so many steps.", parser=whole)
Settings = option(
    list[str] | None,
    "A hyperparameter (n_ctx=4), one of a plug-in's host (host.n_ctx=4) or a field of"
    " the recipe (warmup_epochs=0); repeat it for more.",
    "--set",
    metavar="KEY=VALUE",
)
ClassNames = option(
    Path | None,
    "A file of names for the classes of your own images: a name a line, or"
    " 'folder,name'.",
)
Descriptions = option(
    Path | None,
    'A JSON file of sentences about the classes, {"heron": ["a grey bird"]}, for'
    " methods that read some; or a folder of such files, called like the datasets.",
)
Device = option(str | None, "cpu or cuda; default: a GPU if there is one.")
Precision = option(str, "fp32, bf16 or fp16.", show_default=True)
Model = option(
    str | None,
    "mini, mini-teacher, or a model of open_clip with a ViT or CLIP's ResNet; default:"
    " mini, for full ViT-B-16.",
)
Pretrained = option(
    str | None, "Weights of an open_clip model: a tag such as openai, or a file."
)
Like = option(
    str | None,
    "The tag that a weights file was fine-tuned from, such as openai: its activation,"
    " its means of the pixels and its resizing are taken.",
)
QuickGELU = option(
    bool | None,
    "Whether a weights file wants QuickGELU; default: as its tag or model says.",
    "--quickgelu/--no-quickgelu",
)


def weights(like=None, quickgelu=None) -> dict:
    """How a weights file is to be read, as ``load_clip`` takes it; what is not said is
    left out.
    """
    given = {"like": like, "quickgelu": quickgelu}
    return {name: value for name, value in given.items() if value is not None}


def at_least(least, most=None, **numbers):
    """Refuse numbers out of range, those that are given, by the names of their
    options.
    """
    for name, value in numbers.items():
        fits = value is None or (value >= least and (most is None or value <= most))
        if not fits:
            up_to = "" if most is None else f" to {most}"
            raise InputError(
                f"--{name.replace('_', '-')} must be a whole number from"
                f" {least}{up_to}, not {value}"
            )
