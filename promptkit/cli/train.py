"""Methods: listed, trained and tested, measured again from their files, and the mini
CLIP that they stand on.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from promptkit.cli import console, values
from promptkit.cli.commands import app
from promptkit.cli.console import (
    ClassNames,
    Descriptions,
    Device,
    Json,
    Like,
    MaxSteps,
    Model,
    Precision,
    Pretrained,
    Profile,
    QuickGELU,
    Results,
    Root,
    Scheduler,
    Settings,
    Workers,
    at_least,
    examples,
    flag,
    number,
    option,
    say,
    weights,
    whole,
)
from promptkit.errors import InputError
from promptkit.files import check_writable
from promptkit.parameters import whole_numbers


@app.command("list", epilog=examples("list", "list --json"))
def list_methods(as_json: Json = False):
    """List the methods: name, title, year, kind, image tower, paper, parameters."""
    from promptkit.registry import methods

    rows = [
        _describe(cls)
        for cls in sorted(methods().values(), key=lambda cls: (cls.year, cls.name))
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    heads = ["name", "title", "year", "kind", "image tower", "arXiv"]
    heads.append("parameters (default)")
    table = console.table(heads)
    for row in rows:
        parameters = ", ".join(
            f"{key}={value!r}" for key, value in row["parameters"].items()
        )
        table.add_row(
            f"[bold]{row['name']}[/]",
            *(str(row[key]) for key in ("title", "year", "kind", "tower", "paper")),
            parameters,
        )
    console.out.print(table)


def _describe(cls):
    facts = {
        key: getattr(cls, key)
        for key in ("name", "title", "year", "kind", "paper", "plugin")
    }
    return facts | {
        "tower": "ViT" if cls.needs_vit({}) else "any",
        "parameters": {
            name: default for name, (_, default) in cls.hyperparameters().items()
        },
    }


@app.command(
    epilog=examples(
        "run coop --data pets",
        "run coop --data pets,flowers --shots 1,4,16 --seeds 1-3 --workers 2",
        "run coop --data all --protocol base-to-new --seeds 1,2,3",
        "run clip --data pets --set template='a drawing of a {}.'",
        "run coop --data pets --set n_ctx=4 --set init='a photo of a' --epochs 20"
        " --save pets.safetensors",
        "run 'dept(coop)' --data pets --set lam=0.5 --set host.n_ctx=4",
        "run coop --protocol cross-dataset --data mini --targets pets,cars",
        "run coop --data my_photos --classnames names.txt",
        "run coop --data eurosat --model ViT-B-16 --pretrained openai --root ~/data",
    )
)
def run(
    method: Annotated[
        str,
        typer.Argument(
            help="A name of 'promptkit list'; a plug-in takes its host in brackets."
        ),
    ],
    data: option(
        str,
        "Datasets to train on, separated by commas, or all; a path names your own"
        " images.",
        show_default=True,
    ) = "mini",
    protocol: option(
        str,
        "few-shot, base-to-new, cross-dataset or domain-generalization.",
        show_default=True,
    ) = "few-shot",
    shots: option(
        str, "Training images a class: 16, or several: 1,4,16.", show_default=True
    ) = "16",
    seeds: option(
        str, "One seed, or several: 1,2,3 or 1-3.", "--seeds", "--seed",
        show_default=True,
    ) = "1",
    targets: option(
        str | None,
        "Datasets that cross-dataset tests on; default: all but the source.",
    ) = None,
    classnames: ClassNames = None,
    descriptions: Descriptions = None,
    profile: Profile = None,
    model: Model = None,
    pretrained: Pretrained = None,
    like: Like = None,
    quickgelu: QuickGELU = None,
    precision: Precision = "fp32",
    settings: Settings = None,
    lr: option(
        float | None, "Learning rate; default: the recipe's.", parser=number
    ) = None,
    epochs: option(
        int | None, "Epochs; default: the recipe's.", parser=whole
    ) = None,
    batch_size: option(
        int | None, "Images a step; default: the recipe's.", parser=whole
    ) = None,
    max_steps: MaxSteps = None,
    save: option(
        Path | None,
        "Write the trained method to this .safetensors file; for one run only.",
    ) = None,
    results: Results = None,
    force: flag("Run again what is stored.", "--force") = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
    root: Root = None,
    device: Device = None,
):  # fmt: skip
    """Train and test one method; a run that is stored is not run again."""
    seeds = whole_numbers("--seeds", seeds)
    shots = whole_numbers("--shots", shots, 1)
    at_least(1, epochs=epochs, batch_size=batch_size, max_steps=max_steps)
    at_least(1, 512, workers=workers)
    if targets is not None and protocol != "cross-dataset":
        raise InputError(f"--targets is of --protocol cross-dataset, not of {protocol}")
    if save and (scheduler or workers > 1):
        raise InputError("--save makes one run here: leave out --workers, --scheduler")
    if save and save.suffix != ".safetensors":
        raise InputError(f"--save takes the name of a .safetensors file, not {save}")
    if save and save.is_dir():
        raise InputError(f"--save takes the name of a file, and {save} is a folder")
    if save:
        check_writable(save.parent, "--save")
    with console.err.status("loading ..."):
        from promptkit.grids import SweepError, execute_all, grid
        from promptkit.recipe import Setting
        from promptkit.results import results_dir
        from promptkit.runs import backbone, execute, reads_descriptions
        from promptkit.workers import sweep_results, sweep_temporaries
    profile = values.choose_profile(profile, data, model)
    Setting(
        protocol, profile=profile
    )  # refuses unknown names before anything is loaded
    for name in ("", protocol, "trained", "checkpoints"):
        check_writable(results_dir(results) / name, "--results")
    overrides = values.settings(
        method, settings, lr=lr, epochs=epochs, batch_size=batch_size
    )
    model, pretrained = backbone(profile, model, pretrained)
    names = values.datasets(data, profile)
    tested = []
    if protocol == "cross-dataset":
        tested = values.datasets(targets or "all", profile, "--targets")
        if targets is None:
            tested = [name for name in tested if name not in names]
    plans = grid(
        protocol,
        method,
        names,
        seeds,
        shots,
        clip=model,
        targets=tuple(tested),
        pretrained=pretrained,
        precision=precision,
        profile=profile,
        max_steps=max_steps,
        root=None if root is None else str(root),
        device=device,
        overrides=overrides,
        **values.naming(classnames, descriptions),
        **weights(like, quickgelu),
    )
    _refuse_idle(plans[0], overrides | {"max_steps": max_steps})
    if descriptions and not any(map(reads_descriptions, plans)):
        raise InputError(
            f"{method} takes no sentences about the classes here, so --descriptions has"
            " no effect: leave it out"
        )
    if save and len(plans) > 1:
        raise InputError(
            "--save keeps one trained method: give one dataset, one number of shots and"
            " one seed"
        )
    announce(plans)
    sweep_results(results_dir(results))
    try:
        if save:
            sweep_temporaries(save.parent)
            rows = execute(plans[0], results, force, save=save)
        else:
            rows = execute_all(
                plans,
                workers,
                scheduler,
                results=results,
                force=force,
                shipped=False,
            )
    except SweepError as error:
        say(f"Error: {error}")
        raise typer.Exit(1) from None
    console.out.print(console.rows_table(rows))
    say(
        f"stored in {results_dir(results).resolve()}"
        + (f"; trained method in {save}" if save else "")
    )


def _refuse_idle(plan, given):
    """An override that a run has dropped has no effect on it."""
    told = plan.config["overrides"]
    for name, value in given.items():
        if value is not None and name not in told:
            raise InputError(
                f"{plan.run.method} is not trained here, so {name} has no effect: leave"
                " it out"
            )


def announce(plans):
    """Say what is about to be run, and with real models how long it takes."""
    from promptkit.runs import estimate

    facts = plans[0].describe()
    if plans[0].run.profile == "full":
        first = next((plan for plan in plans if plan.recipe.epochs), plans[0])
        facts |= estimate(first, plans)
    if len(plans) > 1:
        facts["runs"] = f"{len(plans)}, this is the first"
    for key, value in facts.items():
        console.err.print(f"[bold]{key:>10}[/]  ", end="")
        say(value)


@app.command(
    epilog=examples(
        "run coop --data pets --save pets.safetensors",
        "evaluate pets.safetensors --data pets,cars",
        "evaluate model.pth.tar-50 --method coop --set n_ctx=16 --data eurosat --model"
        " ViT-B-16 --pretrained openai --root ~/data",
    )
)
def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A trained method, as run --save writes it, or with --method one of"
            " the method's own repository."
        ),
    ],
    data: option(
        str, "Datasets to test on, separated by commas, or all.", show_default=True
    ) = "all",
    protocol: option(
        str,
        "few-shot: all classes; base-to-new: base and new classes, each among its own.",
        show_default=True,
    ) = "few-shot",
    method: option(
        str | None,
        "Which method a checkpoint of its own repository is of; its hyperparameters are"
        " given by --set, as are a saved method's that change its answers alone.",
    ) = None,
    classnames: ClassNames = None,
    descriptions: Descriptions = None,
    settings: Settings = None,
    model: Model = None,
    pretrained: Pretrained = None,
    like: Like = None,
    quickgelu: QuickGELU = None,
    precision: option(
        str | None, "fp32, bf16 or fp16; default: as it was trained."
    ) = None,
    root: Root = None,
    device: Device = None,
    as_json: Json = False,
):
    """Test a trained method on all classes of datasets; nothing is stored."""
    if method is None and model:
        raise InputError(
            "the checkpoint says its model: leave out --model, or name the --method"
            " that it is of"
        )
    with console.err.status("loading ..."):
        from promptkit.registry import saved_spec
        from promptkit.runs import evaluate as measure
    profile = values.choose_profile(None, None if data == "all" else data, model)
    given = None
    if method or settings:
        given = values.settings(method or saved_spec(checkpoint), settings)
    rows = measure(
        checkpoint,
        values.datasets(data, profile),
        protocol=protocol,
        method=method,
        hparams=given,
        model=model,
        pretrained=pretrained,
        precision=precision,
        root=None if root is None else str(root),
        device=device,
        **values.naming(classnames, descriptions),
        **weights(like, quickgelu),
    )
    if as_json:
        print(rows.to_json(orient="records", indent=1))
    else:
        console.out.print(console.rows_table(rows))


@app.command(
    epilog=examples(
        "pretrain",
        "pretrain --model mini-teacher --device cuda",
        "pretrain --no-resume",
    )
)
def pretrain(
    model: option(str, "mini or mini-teacher.", show_default=True) = "mini",
    output: option(
        Path | None, "Folder for the weights; default: the package's own."
    ) = None,
    samples: option(
        int | None,
        "Image-caption pairs to see; default: the recipe's.",
        parser=whole,
    ) = None,
    images: option(
        int | None, "Images to draw; default: the recipe's.", parser=whole
    ) = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the checkpoint of an interrupted run.")
    ] = True,
    device: Device = None,
):
    """Pre-train a mini CLIP on the mini world.

    That takes under two hours on two cores, and minutes on a GPU.
    """
    at_least(1, samples=samples, images=images)
    with console.err.status("loading ..."):
        from promptkit.pretrain import pretrain as start
    path = start(model, output, samples, device, resume, images=images)
    say(f"weights in {path}")
