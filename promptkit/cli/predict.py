"""Trained methods at work: on photos, and in the form that other programs run."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from promptkit.cli import console, values
from promptkit.cli.commands import app
from promptkit.cli.console import (
    Device,
    Json,
    Like,
    Model,
    Pretrained,
    QuickGELU,
    at_least,
    examples,
    option,
    say,
    weights,
    whole,
)
from promptkit.errors import InputError
from promptkit.files import check_writable


@app.command(
    epilog=examples(
        "run coop --data pets --save pets.safetensors",
        "predict photo.jpg --checkpoint pets.safetensors",
        "predict photos/ --checkpoint pets.safetensors --classes 'red fox,otter'"
        " --top 2",
        "predict photo.jpg --classes cat,dog --model ViT-B-16 --pretrained openai",
    )
)
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, or folders of them; hidden files are passed over."
        ),
    ],
    checkpoint: option(
        Path | None,
        "A trained method, as run --save writes it; default: zero-shot CLIP.",
    ) = None,
    classes: option(
        str | None,
        "Class names, separated by commas; default: those it was trained on.",
    ) = None,
    classes_file: option(Path | None, "Class names from a file, one a line.") = None,
    top: option(int, "How many classes to print.", parser=whole, show_default=True) = 3,
    model: Model = None,
    pretrained: Pretrained = None,
    like: Like = None,
    quickgelu: QuickGELU = None,
    device: Device = None,
    as_json: Json = False,
):
    """Classify images, also by names that the checkpoint was not trained on.

    A file that cannot be read is named and the others are classified; exit code 1 then.
    """
    at_least(1, top=top)
    names = values.class_names(classes, classes_file)
    if checkpoint is None and not names:
        raise InputError(
            "name the classes (--classes cat,dog), or a --checkpoint that knows some"
        )
    if checkpoint is not None and model is not None:
        raise InputError(
            "the checkpoint says which model it belongs to: leave out --model"
        )
    with console.err.status("loading ..."):
        from promptkit.clip import load_clip
        from promptkit.data import transform
        from promptkit.registry import build, load_method
    paths = _images(images)
    more = weights(like, quickgelu)
    if checkpoint is None:
        clip = load_clip(model or "mini", pretrained, device, **more)
        method = build("clip", clip, names)
    else:
        method = load_method(checkpoint, pretrained=pretrained, device=device, **more)
        if names:
            method.set_classes(names)
    rows, unusable = [], 0
    for path in paths:
        try:
            image = _read(path)
        except (InputError, OSError) as error:
            unusable += 1
            where = "" if str(path) in str(error) else f"{path}: "
            say(f"Error: {where}{error}")
            continue
        p = method.logits(transform(method.clip, [image])).softmax(dim=-1)[0]
        best = p.topk(min(top, len(p)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found = {method.classnames[c]: round(value, 4) for c, value in pairs}
        rows.append({"image": str(path), "classes": found})
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        table = console.table(["image", "class", "probability"])
        for row in rows:
            for n, (name, value) in enumerate(row["classes"].items()):
                texts = ("" if n else row["image"], name, f"{value:.1%}")
                table.add_row(*map(Text, texts))  # a name may hold brackets
        console.out.print(table)
    if unusable:
        say(f"{unusable} of {len(paths)} files could not be classified")
        raise typer.Exit(1)


def _images(given) -> list[Path]:
    """The files that are named, and the images in the folders that are."""
    from promptkit.data.folders import images_in, left_out, unread

    if not any(path.exists() for path in given):
        raise InputError(f"there is no image {given[0]}")
    paths = []
    for path in given:
        inside = [path]
        if path.is_dir():
            inside, others = images_in(path), left_out(path)
            also = f"{unread(others)}: name them to have them tried" if others else ""
            if not inside:
                raise InputError(
                    f"the folder {path} holds no images; {also}".rstrip("; ")
                )
            if others:
                say(f"Warning: {path}: {also}")
        paths += inside
    return list(dict.fromkeys(paths))


def _read(path):
    """A photo as it stands upright."""
    from promptkit.data.images import read_image

    return read_image(path, turn=True)


@app.command(
    epilog=examples(
        "run coop --data pets --save pets.safetensors",
        "export pets.safetensors pets.onnx",
    )
)
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A trained method, as run --save writes it.")
    ],
    output: Annotated[
        Path,
        typer.Argument(help="The file to write: .onnx, or .pt2 for torch.export."),
    ],
    pretrained: Pretrained = None,
    like: Like = None,
    quickgelu: QuickGELU = None,
    device: Device = None,
):
    """Write a trained method as one network, which runs without promptkit."""
    check_writable(output.parent, "the file to write")
    with console.err.status("loading ..."):
        from promptkit.export import export_checkpoint
    how = weights(like, quickgelu) | {"pretrained": pretrained, "device": device}
    given = {name: value for name, value in how.items() if value is not None}
    export_checkpoint(checkpoint, output, **given)
    say(f"wrote {output}")
