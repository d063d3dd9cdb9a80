"""A trained method as one network from images to logits, for other programs:
`torch.export`, ONNX, `torch.jit.trace`.

Once its classes are set, the text side of most methods is a fixed matrix. What is left
is the image tower and a matrix product, in plain operations, for batches of any size.
What depends on the image on the text side too (CoCoOp), or adapts to it (TPT), is no
such network and is refused.

The network reads what `promptkit.data.transform` makes, and who calls it has to make
the same of an image: turn it to RGB; resize its shorter side to S pixels by PIL's
bicubic filter and cut out the middle S x S (or as `resize_mode` and `interpolation`
say); divide by 255; subtract `mean` and divide by `std` channel by channel; order the
axes (B, 3, S, S). All these values are in the exported file, beside the class names. A
softmax of the logits gives the probabilities.
"""

import copy
import json
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.method import Batch, Method
from promptkit.registry import load_method

__all__ = ["Deployed", "describe", "export_checkpoint", "export_onnx", "export_program"]


class Deployed(nn.Module):
    """Logits of normalised images by a trained method; always in evaluation mode,
    without gradients.

    It is a copy: aiming the method at other classes, or training it on, changes nothing
    here. The frozen weights are shared.

    Args:
        method (Method): with its classes set.

    Attributes:
        classnames (list[str]): C names, in the order of the logits.

    Raises:
        InputError: if the class features depend on the image.
    """

    def __init__(self, method: Method):
        super().__init__()
        if not isinstance(method, Method):
            raise InputError(f"only a method can be exported, not {method!r}")
        method = copy.deepcopy(method).eval().requires_grad_(False)
        adapts = any(type(part).forward is not Method.forward for part in method.nest())
        several = "views" in (method.reads_at_test or method.reads).split("+")
        if method.conditional or adapts or several:
            why = "each image has its own" if method.conditional else ""
            why = "it adapts to each image" if adapts else why
            why = why or "it reads random views of each image"
            raise InputError(
                f"{method.spec} cannot be exported: the class features must be fixed"
                f" once the classes are known, and {why}"
            )
        with torch.no_grad():
            text = method.class_features()  # (C, E), or what its own score() reads
            sets = isinstance(text, list | tuple)
            text = [part.detach().clone() for part in (text if sets else [text])]
            # What it makes when first asked, it has now.
            size, device = method.clip.image_size, method.clip.device
            image = method.encode(
                Batch(images=torch.zeros(1, 3, size, size).to(device))
            )
            method.score(image, text if sets else text[0])
        self.classnames = list(method.classnames)
        self.method = method
        # A method holds its CLIP outside of the module tree; these are what images meet
        # of it.
        self.visual = method.clip.model.visual
        self.logit_scale = method.clip.model.logit_scale
        self._sets = len(text) if sets else None
        for n, part in enumerate(text):
            self.register_buffer(f"text_{n}" if sets else "text", part)
        super().train(False)

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .half() come to
        probe = fn(self.text.new_empty(0))
        if (probe.dtype, probe.device) != (self.text.dtype, self.text.device):
            raise InputError(
                "a deployed method shares its weights with its CLIP: load the CLIP on"
                " that device and in that precision, and deploy the method anew"
            )
        return self

    def train(self, mode: bool = True):
        """Nothing here is trained."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of normalised images (B, 3, S, S)."""
        image = self.method.encode(Batch(images=images))  # (B, E)
        if self._sets is None:
            return self.method.score(image, self.text)
        parts = [getattr(self, f"text_{n}") for n in range(self._sets)]
        return self.method.score(image, parts)


def describe(method: Method) -> dict:
    """What whoever runs an exported method must know, as JSON can hold it.

    Returns:
        dict: class names; image size S, mean, std, interpolation and resize mode; the
            method, its hyperparameters and its CLIP; versions.
    """
    clip = method.clip
    facts = ("image_size", "mean", "std", "interpolation", "resize_mode")
    return {
        "classnames": list(method.classnames),
        **{fact: getattr(clip, fact) for fact in facts},
        "method": method.spec,
        "hparams": method.hparams,
        "trained_on": method.trained_on,
        "clip": clip.source or {"name": clip.name, "pretrained": clip.pretrained},
        "fingerprint": clip.fingerprint,
        "versions": {
            package: version(package) for package in ("torch", "open_clip_torch")
        },
    }


def export_program(method: Method) -> torch.export.ExportedProgram:
    """The method as `torch.export` traces it, for batches of any size.

    Raises:
        InputError: if the class features depend on the image.
    """
    network, images = _traceable(method)
    sizes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(network, (images,), dynamic_shapes=sizes)


def export_onnx(method: Method, path) -> Path:
    """Write the method as ONNX, input "images" (batch, 3, S, S), output "logits"
    (batch, C), both float32.

    The file's metadata hold, each as JSON, what `describe` says: "classnames", "mean",
    "std", "image_size" and so on. Weights of more than 2 GB stand beside it in a file
    of the same name with ".data" added.

    Args:
        method (Method): with its classes set, on a CLIP in float32.
        path (str | os.PathLike): of the file; written whole or not at all.

    Raises:
        InputError: if the class features depend on the image, the CLIP is in half
            precision, or the packages onnx and onnxscript are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"to write ONNX the package {error.name} is needed; install it with: pip"
            " install 'promptkit[export]'"
        ) from None
    if method.clip.precision != "fp32":
        raise InputError(
            f"ONNX is written in float32, and this CLIP is in {method.clip.precision}:"
            " export the method as .pt2, or train it on a CLIP in fp32"
        )
    network, images = _traceable(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about torch
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes={"images": {0: "batch"}},
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    for key, value in describe(method).items():
        program.model.metadata_props[key] = json.dumps(value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder:
        program.save(Path(folder) / path.name)
        # The weights first: a file of ONNX names those beside it.
        for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, path.parent / file.name)
    return path


def export_checkpoint(
    checkpoint, output, classnames: list[str] | None = None, **how
) -> Path:
    """Write a saved method as ONNX or as a program of `torch.export`.

    Args:
        checkpoint (str | os.PathLike): as `Method.save` writes it.
        output (str | os.PathLike): the file to write, ".onnx", or ".pt2" for
            `torch.export.load`; the latter holds what `describe` says in the extra file
            "promptkit.json".
        classnames (list[str] | None): C names; by default those of the checkpoint.

        how: how its weights are read, as `load_method` takes it.

    Raises:
        InputError: for another suffix, a file that is no saved method, or a method that
            cannot be exported.
    """
    output = Path(output)
    if output.suffix not in (".onnx", ".pt2"):
        raise InputError(
            f"the name of an exported method ends in .onnx or .pt2, not {output.name!r}"
        )
    method = load_method(checkpoint, **{"device": "cpu"} | how)
    if classnames is not None:
        method.set_classes(classnames)
    if output.suffix == ".onnx":
        return export_onnx(method, output)
    program, facts = export_program(method), json.dumps(describe(method), indent=1)
    extra = {"promptkit.json": facts}
    return write_atomically(
        output, lambda file: torch.export.save(program, file, extra_files=extra)
    )


def _traceable(method: Method) -> tuple[Deployed, Tensor]:
    """The network, and images to trace it with: one would be taken for a constant."""
    size = method.clip.image_size
    return Deployed(method), torch.zeros(2, 3, size, size, device=method.clip.device)
