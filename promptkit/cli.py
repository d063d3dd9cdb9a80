"""The command line: ``promptkit list | run | predict | reproduce | leaderboard | pages
| data | pretrain``.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

import ast
import json
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from promptkit.errors import InputError, unknown

out, err = Console(), Console(stderr=True)


class Commands(TyperGroup):
    """Turns errors that a reader can act on into one sentence and an exit code."""

    def invoke(self, ctx):
        """Run the command: exit code 2 for bad input, 1 for what failed under way, 130
        for Ctrl-C.
        """
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: _say(f"Warning: {message}")
                return super().invoke(ctx)
        except InputError as error:
            _say(f"Error: {error}")
            raise typer.Exit(2) from None
        except OSError as error:  # a full disk, a folder that cannot be written
            _say(f"Error: {error}")
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            _say(
                f"Error: the package {error.name} is missing; install it with: pip"
                " install 'promptkit[all]'"
            )
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _say(
                "Interrupted; what was finished is stored, and the same command goes on"
                " from there."
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Commands,
    name="promptkit",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help=(
        "Prompt learning for vision-language models: train, test, reproduce the papers."
    ),
    epilog=(
        "Begin with [bold]promptkit run coop --data pets[/]: CoOp on the embedded"
        " benchmark, in seconds."
    ),
)


def main():
    """Entry point of the console script."""
    app()


def _say(text):
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _examples(*lines):
    return "[bold]Examples[/]\n\n" + "\n\n".join(
        f"  $ promptkit {line}" for line in lines
    )


def _grid(columns, **options):
    """A table that loses no text where the terminal is narrow."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", **options)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _option(kind, text, *names, **more):
    return Annotated[
        kind,
        typer.Option(
            *names, help=text, show_default=more.pop("show_default", False), **more
        ),
    ]


Results = _option(
    Path | None, "Folder of stored runs; default: $PROMPTKIT_RESULTS, else ./results."
)
Profile = _option(
    str,
    "[bold]mini[/]: the embedded world; [bold]smoke[/]: a quick check; [bold]full[/]:"
    " the papers' recipes.",
    show_default=True,
)
Workers = _option(
    int, "Processes at the same time, each with one thread.", min=1, show_default=True
)
Scheduler = _option(
    str | None, "Address of a Dask scheduler in place of --workers: tcp://host:8786."
)
Root = _option(
    Path | None, "Folder of the real datasets; default: $PROMPTKIT_DATA, else ./data."
)
MaxSteps = _option(int | None, "Stop each training after so many steps.", min=1)
Device = _option(str | None, "cpu or cuda; default: a GPU if there is one.")


@app.command("list", epilog=_examples("list", "list --json"))
def list_methods(as_json: _option(bool, "Print JSON.", "--json") = False):
    """List the methods: name, title, year, kind, paper, parameters."""
    from promptkit.registry import methods

    rows = [
        _describe(cls)
        for cls in sorted(methods().values(), key=lambda cls: (cls.year, cls.name))
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = _grid(["name", "title", "year", "kind", "arXiv", "parameters (default)"])
    for row in rows:
        parameters = ", ".join(
            f"{key}={value!r}" for key, value in row["parameters"].items()
        )
        table.add_row(
            f"[bold]{row['name']}[/]",
            *(str(row[key]) for key in ("title", "year", "kind", "paper")),
            parameters,
        )
    out.print(table)


def _describe(cls):
    facts = {
        key: getattr(cls, key)
        for key in ("name", "title", "year", "kind", "paper", "plugin")
    }
    return facts | {
        "parameters": {
            name: default for name, (_, default) in cls.hyperparameters().items()
        }
    }


@app.command(
    epilog=_examples(
        "run coop --data pets",
        "run coop --data pets,flowers --shots 1,4,16 --seeds 1,2,3 --workers 2",
        "run coop --data all --protocol base-to-new --seeds 1,2,3",
        "run clip --data pets --set template='a drawing of a {}.'",
        "run coop --data pets --set n_ctx=4 --set init='a photo of a' --epochs 20"
        " --save pets.safetensors",
        "run coop --protocol cross-dataset --data mini --targets pets,cars",
        "run coop --data eurosat --profile full --model ViT-B-16 --pretrained openai"
        " --root ~/data",
    )
)
def run(
    method: Annotated[
        str,
        typer.Argument(
            help="A name of 'promptkit list'; a plug-in takes its host in brackets."
        ),
    ],
    data: _option(
        str,
        "Datasets to train on, separated by commas, or all; a path names your own"
        " images.",
        show_default=True,
    ) = "mini",
    protocol: _option(
        str,
        "few-shot, base-to-new, cross-dataset or domain-generalization.",
        show_default=True,
    ) = "few-shot",
    shots: _option(
        str, "Training images a class, one number or several.", show_default=True
    ) = "16",
    seeds: _option(
        str, "One seed or several.", "--seeds", "--seed", show_default=True
    ) = "1",
    targets: _option(
        str, "Datasets that cross-dataset tests on; default: all but the source."
    ) = "all",
    profile: Profile = "mini",
    model: _option(
        str | None,
        "mini, mini-teacher or any ViT of open_clip; default: mini, for full ViT-B-16.",
    ) = None,
    pretrained: _option(
        str | None, "Weights of an open_clip model: a tag such as openai, or a file."
    ) = None,
    precision: _option(str, "fp32, bf16 or fp16.", show_default=True) = "fp32",
    settings: _option(
        list[str] | None,
        "A hyperparameter or a field of the recipe; repeat it for more.",
        "--set",
        metavar="KEY=VALUE",
    ) = None,
    lr: _option(float | None, "Learning rate; default: the recipe's.") = None,
    epochs: _option(int | None, "Epochs; default: the recipe's.") = None,
    batch_size: _option(int | None, "Images a step; default: the recipe's.") = None,
    max_steps: MaxSteps = None,
    save: _option(
        Path | None,
        "Write the trained method to this .safetensors file; for one run only.",
    ) = None,
    results: Results = None,
    force: _option(bool, "Run again what is stored.", "--force") = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    root: Root = None,
    device: Device = None,
):
    """Train and test one method; a run that is stored is not run again."""
    with err.status("loading ..."):
        from promptkit.grids import SweepError, execute_all, grid
        from promptkit.recipe import Setting
        from promptkit.results import results_dir
        from promptkit.runs import backbone, execute
    Setting(
        protocol, profile=profile
    )  # refuses unknown names before anything is loaded
    overrides = dict(_setting(text) for text in settings or [])
    overrides |= {
        k: v
        for k, v in dict(lr=lr, epochs=epochs, batch_size=batch_size).items()
        if v is not None
    }
    model, pretrained = backbone(profile, model, pretrained)
    names = _datasets(data, profile)
    tested = (
        [t for t in _datasets(targets, profile) if t not in names]
        if protocol == "cross-dataset"
        else []
    )
    plans = grid(
        protocol, method, names, _numbers("seeds", seeds), _numbers("shots", shots), clip=model,
        targets=tuple(tested), pretrained=pretrained, precision=precision, profile=profile,
        max_steps=max_steps, root=None if root is None else str(root), device=device, overrides=overrides,
    )  # fmt: skip
    if save and len(plans) > 1:
        raise InputError(
            "--save keeps one trained method: give one dataset, one number of shots and"
            " one seed"
        )
    _announce(plans)
    try:
        if save:
            rows = execute(plans[0], results, force, save=save)
        else:
            rows = execute_all(plans, workers, scheduler, results=results, force=force)
    except SweepError as error:
        _say(f"Error: {error}")
        raise typer.Exit(1) from None
    out.print(_table(rows))
    _say(
        f"stored in {results_dir(results)}"
        + (f"; trained method in {save}" if save else "")
    )


@app.command(
    epilog=_examples(
        "run coop --data pets --save pets.safetensors",
        "predict photo.jpg --checkpoint pets.safetensors",
        "predict photos/ --checkpoint pets.safetensors --classes 'red fox,otter'"
        " --top 2",
        "predict photo.jpg --classes cat,dog --model ViT-B-16 --pretrained openai",
    )
)
def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, or folders of them.")
    ],
    checkpoint: _option(
        Path | None,
        "A trained method, as run --save writes it; default: zero-shot CLIP.",
    ) = None,
    classes: _option(
        str | None,
        "Class names, separated by commas; default: those it was trained on.",
    ) = None,
    classes_file: _option(Path | None, "Class names from a file, one a line.") = None,
    top: _option(int, "How many classes to print.", min=1, show_default=True) = 3,
    model: _option(
        str | None, "Without a checkpoint: mini or any ViT of open_clip; default: mini."
    ) = None,
    pretrained: _option(
        str | None, "Weights of an open_clip model: a tag such as openai, or a file."
    ) = None,
    device: Device = None,
    as_json: _option(bool, "Print JSON.", "--json") = False,
):
    """Classify images, also by names that the checkpoint was not trained on."""
    with err.status("loading ..."):
        from promptkit.clip import load_clip
        from promptkit.data import transform
        from promptkit.data.images import SUFFIXES, read_image
        from promptkit.registry import build, load_method
    names = (
        None
        if classes is None
        else [name.strip() for name in classes.split(",") if name.strip()]
    )
    if classes_file is not None:
        if names is not None:
            raise InputError(
                "give the class names once: by --classes or by --classes-file"
            )
        names = [
            line.strip()
            for line in classes_file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    if checkpoint is None and not names:
        raise InputError(
            "name the classes (--classes cat,dog), or a --checkpoint that knows some"
        )
    if checkpoint is not None and model is not None:
        raise InputError(
            "the checkpoint says which model it belongs to: leave out --model"
        )
    paths = []
    for path in images:
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise InputError(f"the folder {path} holds no images")
        paths += inside
    if checkpoint is None:
        method = build("clip", load_clip(model or "mini", pretrained, device), names)
    else:
        method = load_method(checkpoint, pretrained=pretrained, device=device)
        if names:
            method.set_classes(names)
    rows = []
    for path in paths:
        p = method.logits(transform(method.clip, [read_image(path)])).softmax(dim=-1)[0]
        best = p.topk(min(top, len(p)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = {method.classnames[c]: round(value, 4) for c, value in pairs}
        rows.append({"image": str(path), "classes": found})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = _grid(["image", "class", "probability"])
    for row in rows:
        for n, (name, value) in enumerate(row["classes"].items()):
            table.add_row("" if n else row["image"], name, f"{value:.1%}")
    out.print(table)


def _announce(plans):
    from promptkit.runs import estimate

    facts = plans[0].describe()
    if plans[0].run.profile == "full":
        first = next((plan for plan in plans if plan.recipe.epochs), plans[0])
        facts |= estimate(first)
    if len(plans) > 1:
        facts["runs"] = f"{len(plans)}, this is the first"
    for key, value in facts.items():
        err.print(f"[bold]{key:>10}[/]  ", end="")
        _say(value)


def _setting(text):
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise InputError(f"--set takes KEY=VALUE, such as n_ctx=4, not {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return key, words[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a text needs no quotes
        return key, value


def _numbers(name, text):
    try:
        return [int(word) for word in text.replace(",", " ").split()] or [int(text)]
    except ValueError:
        raise InputError(
            f"--{name} takes whole numbers separated by commas, not {text!r}"
        ) from None


def _datasets(text, profile):
    from promptkit import data
    from promptkit.data.own import is_path

    if text == "all":
        return list(data.DATASETS if profile == "full" else data.MINI_TASKS)
    known = data.list_datasets()
    names = (
        [text]
        if text not in known and Path(text).exists()
        else text.replace(",", " ").split()
    )
    if not names:
        raise InputError("no dataset is named")
    for name in names:
        if name not in known and not is_path(name):
            raise unknown("dataset", name, known)
    return names


def _table(rows):
    heads = {
        "method": "method",
        "dataset": "data",
        "target": "tested on",
        "split": "classes",
        "shots": "shots",
    }
    heads |= {"seed": "seed", "value": "accuracy", "seconds": "sec.", "hash": "run"}
    table = _grid(heads.values())
    formats = {
        "value": "{:.2f} %".format,
        "seconds": "{:.1f}".format,
        "hash": lambda name: name[:8],
    }
    rows = rows.assign(
        **{column: rows[column].map(show) for column, show in formats.items()}
    )
    for row in rows[list(heads)].itertuples(index=False):
        table.add_row(*map(str, row))
    return table


@app.command(
    epilog=_examples(
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
    chapters: _option(
        str | None, "Numbers, ranges or names, such as 03, 01-03, coop; default: all."
    ) = None,
    profile: Profile = "mini",
    benchmark: _option(
        bool,
        "Run every method on every dataset in every protocol, and print the table, in"
        " place of the chapters; "
        "[bold]--profile full[/] does so unless chapters are named.",
        "--benchmark",
    ) = False,
    methods: _option(
        str, "Methods of the benchmark, separated by commas.", show_default=True
    ) = "all",
    protocols: _option(
        str, "Its protocols, separated by commas.", show_default=True
    ) = "all",
    data: _option(
        str | None, "Datasets, or all; default: all, and for chapters their own."
    ) = None,
    shots: _option(
        str, "Its training images a class, one number or several.", show_default=True
    ) = "16",
    seeds: _option(
        str | None, "Seeds; default: 1,2,3, and for chapters their own."
    ) = None,
    model: _option(
        str | None,
        "mini, mini-teacher or any ViT of open_clip; default: mini, for full ViT-B-16.",
    ) = None,
    pretrained: _option(
        str | None, "Weights of an open_clip model: a tag such as openai, or a file."
    ) = None,
    output: _option(
        Path | None,
        "Folder for executed notebooks; default: mini refreshes them in place, others"
        " go to reproduced/.",
    ) = None,
    folder: _option(
        Path, "Folder of the chapters.", "--notebooks", show_default=True
    ) = Path("notebooks"),
    fan_out: _option(
        bool,
        "First one execution a dataset and seed, to spread a long run.",
        "--fan-out",
    ) = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    results: Results = None,
    root: Root = None,
    max_steps: MaxSteps = None,
    device: Device = None,
):
    """Execute the chapters of the book through papermill, or run the whole benchmark;
    exit code 1 if one fails.
    """
    with err.status("loading ..."):
        from promptkit import reproduce as reproduction
    if results is not None:
        os.environ["PROMPTKIT_RESULTS"] = str(results.resolve())
    root = None if root is None else str(root.resolve())
    if benchmark or (profile == "full" and chapters is None):
        options = {
            "root": root,
            "max_steps": max_steps,
            "device": device,
            "model": model,
            "pretrained": pretrained,
        }
        return _benchmark(
            profile,
            methods,
            protocols,
            data,
            shots,
            seeds,
            workers,
            scheduler,
            **options,
        )
    names = data if data in (None, "all") else _datasets(data, profile)
    reports = reproduction.reproduce(
        chapters, profile, names, None if seeds is None else _numbers("seeds", seeds), output, workers,
        scheduler, folder, fan_out, root=root, max_steps=max_steps, device=device, model=model, pretrained=pretrained,
    )  # fmt: skip
    table = _grid(["chapter", "seconds", "result"], title=f"profile {profile}")
    for report in reports:
        result = f"failed: {report.error}" if report.error else "done"
        table.add_row(report.name, f"{report.seconds:.0f}", Text(result))
    out.print(table)
    if any(report.error for report in reports):
        raise typer.Exit(1)


def _benchmark(
    profile,
    methods,
    protocols,
    data,
    shots,
    seeds,
    workers,
    scheduler,
    model,
    pretrained,
    **options,
):
    from promptkit.grids import SweepError, execute_all
    from promptkit.grids import benchmark as plan
    from promptkit.recipe import PROTOCOLS
    from promptkit.results import load_results, results_dir, summarise
    from promptkit.runs import backbone

    model, pretrained = backbone(profile, model, pretrained)
    kinds = (
        list(PROTOCOLS) if protocols == "all" else protocols.replace(",", " ").split()
    )
    chosen = None if methods == "all" else methods.replace(",", " ").split()
    names, numbers = (
        _datasets(data or "all", profile),
        _numbers("seeds", seeds or "1,2,3"),
    )
    options |= {"profile": profile, "clip": model, "pretrained": pretrained}
    with err.status("planning ..."):
        plans = plan(chosen, names, kinds, numbers, _numbers("shots", shots), **options)
    _announce(plans)
    failed = None
    try:
        rows = execute_all(plans, workers, scheduler)
    except SweepError as error:
        failed, rows = error, load_results()
    _boards(summarise(rows), 0.95)
    _say(f"stored in {results_dir()}")
    if failed:
        _say(f"Error: {failed}")
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "leaderboard",
        "leaderboard --protocol base-to-new --data pets",
        "leaderboard --csv > all.csv",
    )
)
def leaderboard(
    results: Results = None,
    protocol: _option(
        str | None, "One protocol; default: all that have results."
    ) = None,
    data: _option(str | None, "Datasets to show beside the averages, or all.") = None,
    level: _option(
        float, "Level of the confidence intervals over seeds.", show_default=True
    ) = 0.95,
    as_csv: _option(bool, "Print means and intervals as CSV.", "--csv") = False,
    as_json: _option(bool, "Print means and intervals as JSON.", "--json") = False,
):
    """Show what the stored runs add up to: means over seeds with intervals, and
    averages over datasets.
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
    names = [] if data is None else data.replace(",", " ").split()
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
        out.print(_board(f"{name}, {profile}, {model}", name, cells, level))


@app.command(epilog=_examples("pages", "pages --results results --book book"))
def pages(
    results: Results = None,
    book: _option(Path, "Folder of the book's pages.", show_default=True) = Path(
        "book"
    ),
):
    """Write the book's leaderboard and claims pages from the stored runs of the mini
    profile.
    """
    from promptkit import pages

    table = (
        Path("promptkit") / "assets" / "mini_runs.csv"
    )  # of the checkout whose book this is
    _say(
        "wrote"
        f" {pages.leaderboard(book, results, table=table if table.parent.is_dir() else None)}"
    )
    _say(f"wrote {pages.claims(book, results)}")


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
    average = cells.loc[cells["target"] == "average", "datasets"].max()
    title = (
        f"{title}: accuracy in % ± {level:.0%} interval over seeds; average of"
        f" {average} datasets"
    )
    table = _grid(["data", "method", *keys[2:], *names, "seeds"], title=title)
    rows = cells.assign(first=cells["dataset"] != "average").groupby(["first", *keys])
    for (_, *key), group in rows:
        texts = {
            column: _number(part.iloc[0]) for column, part in group.groupby("column")
        }
        table.add_row(
            *map(str, key),
            *(texts.get(name, "") for name in names),
            str(group["seeds"].max()),
        )
    return table


def _number(cell):
    half = (cell["high"] - cell["low"]) / 2
    return f"{cell['mean']:.2f}" + (
        "" if half != half else f" ± {half:.2f}"
    )  # NaN: one seed has no interval


data_app = typer.Typer(
    name="data",
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="The real datasets: list, download and check them.",
    epilog=_examples(
        "data list",
        "data download eurosat dtd --root ~/data",
        "data check --root ~/data",
    ),
)
app.add_typer(data_app)


@data_app.command("list", epilog=_examples("data list"))
def list_data():
    """List the datasets: those that come with the package, the benchmark's, the shifts
    of ImageNet.
    """
    from promptkit import data
    from promptkit.data.benchmark import TABLE
    from promptkit.data.download import ORIGINS

    table = _grid(["name", "title", "classes", "train", "val", "test", "from"])
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
    out.print(table)


@data_app.command(
    epilog=_examples(
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
    source: _option(
        str,
        "[bold]hub[/]: with the published splits; [bold]origin[/]: the makers' pages.",
        show_default=True,
    ) = "hub",
    force: _option(bool, "Download again what is there.", "--force") = False,
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
        _say(
            f"{name}: {report.state}, in {report.folder}"
            + (f" ({report.note})" if report.note else "")
        )


@data_app.command(
    "check",
    epilog=_examples("data check", "data check dtd eurosat --root ~/data --images"),
)
def check_data(
    names: Annotated[
        list[str] | None, typer.Argument(help="Real datasets; default: all.")
    ] = None,
    root: Root = None,
    images: _option(bool, "Decode every image too.", "--images") = False,
):
    """Say what is there, missing or damaged, and what to do; exit code 1 if something
    is damaged.
    """
    from promptkit.data.benchmark import TABLE, data_root
    from promptkit.data.check import check

    for name in names or ():
        if name not in TABLE:
            raise unknown("real dataset", name, TABLE)
    table = _grid(
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
    out.print(table)
    if any(report.state == "damaged" for report in reports):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "pretrain",
        "pretrain --model mini-teacher --device cuda",
        "pretrain --no-resume",
    )
)
def pretrain(
    model: _option(str, "mini or mini-teacher.", show_default=True) = "mini",
    output: _option(
        Path | None, "Folder for the weights; default: the package's own."
    ) = None,
    samples: _option(
        int | None, "Image-caption pairs to see; default: the recipe's."
    ) = None,
    images: _option(int | None, "Images to draw; default: the recipe's.") = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the checkpoint of an interrupted run.")
    ] = True,
    device: Device = None,
):
    """Pre-train a mini CLIP on the mini world: about an hour on two cores, minutes on a
    GPU.
    """
    with err.status("loading ..."):
        from promptkit.pretrain import pretrain as start
    path = start(model, output, samples, device, resume, images=images)
    _say(f"weights in {path}")
