"""The one interface of every method: what it reads, scores and learns; its registry,
its files, its names.

A method is a plain ``nn.Module`` around a frozen CLIP. It overrides the few hooks below
that its paper changes and nothing else; ``promptkit.train.fit`` is a loop over these
hooks, and a method works without it.
"""

import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from promptkit.clip import FrozenCLIP, check_classnames, load_clip, zero_shot_features
from promptkit.errors import InputError, unknown
from promptkit.files import write_atomically


@dataclass
class Batch:
    """What a method may read about B images; the trainer fills what the method's
    ``reads`` asks for.
    """

    labels: Tensor | None = None  # (B,) long
    images: Tensor | None = None  # (B, 3, H, W), normalised
    features: Tensor | None = (
        None  # (B, E) of the frozen image tower, before normalisation
    )
    tokens: Tensor | None = None  # (B, N, E) its local tokens
    views: Tensor | None = (
        None  # (B, V, 3, H, W), normalised; view 0 is the plain image
    )
    texts: list[str] | None = None  # B sentences, for methods that train on text
    indices: Tensor | None = (
        None  # (B,) positions in the split that the batch was drawn from
    )
    generator: torch.Generator | None = (
        None  # the run's source of randomness, on the CPU
    )

    def __len__(self) -> int:
        filled = (self.labels, self.images, self.features, self.views, self.texts)
        return next(len(x) for x in filled if x is not None)

    def to(self, device) -> "Batch":
        """The same batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{
                name: x.to(device)
                for name, x in values.items()
                if isinstance(x, Tensor)
            },
        )


class MethodType(type):
    """Checks hyperparameters before any constructor runs; aims the finished method at
    its classes.
    """

    def __call__(cls, clip, classnames, **hparams):
        _check_clip(clip)
        alone = (
            cls.plugin
            and cls.default_host
            and not isinstance(hparams.get("host"), Method)
        )
        if alone:
            spec, defaults = cls.default_host
            host = build(spec, clip, classnames, **defaults | hparams.get("host", {}))
            hparams["host"] = host.requires_grad_(False)
        hparams = cls.check(hparams)
        method = super().__call__(clip, classnames, **hparams)
        if cls.plugin:
            hparams["host"] = method.host.hparams
            method.alone = bool(alone)
        method.hparams = hparams
        method.trained_on = method.classnames
        method.set_classes(method.classnames)
        return method.to(clip.device)


class Method(nn.Module, metaclass=MethodType):
    """A frozen CLIP and what a method adds to it.

    A subclass declares its hyperparameters as keyword-only, annotated arguments of
    ``__init__`` (checked by their annotations, kept in ``self.hparams``), creates its
    learnables there, and builds everything that is made from class names in
    :meth:`set_classes`, which runs once after ``__init__`` and again whenever the
    method is re-aimed.

    Args:
        clip: the frozen backbone. It stays out of the module tree: ``parameters()`` and
            ``state_dict()`` hold what the method itself learns or remembers.
        classnames: the C class names.

    Raises:
        InputError: a hyperparameter is unknown or does not fit; there are no class
            names, or one is empty. Two equal names are a warning: ImageNet has two such
            pairs.
    """

    name: ClassVar[str] = ""  # registry name, the name of its module
    title: ClassVar[str] = ""
    year: ClassVar[int] = 0
    paper: ClassVar[str] = ""  # arXiv id
    kind: ClassVar[str] = (
        ""  # "zero-shot", "prompt", "adapter", "test-time", "training-free", ...
    )
    # "features" (frozen image features suffice), "images", "images+features" (features
    # only where they can be cached) or "views" (made by the method's own views(pixels,
    # generator))
    reads: ClassVar[str] = "features"
    conditional: ClassVar[bool] = False  # whether text_features depends on the image
    plugin: ClassVar[bool] = False  # whether it takes a host=
    official_hyperparameters: ClassVar[
        dict[str, str | None]
    ] = {}  # official name: ours, or None (no effect)
    # Parts of official parameter names that begin so are ignored: they follow from the
    # class names, or never learned.
    official_dropped: ClassVar[tuple[str, ...]] = ("token_prefix", "token_suffix")

    hparams: dict[str, Any]

    def __init__(self, clip: FrozenCLIP, classnames: list[str]):
        super().__init__()
        self.__dict__["clip"] = clip
        self.classnames = check_classnames(classnames, allow_duplicates=True)
        self.training_state: dict[
            str, Tensor
        ] = {}  # what fit must keep between epochs beside the learnables
        self._remembered = None  # (key, text features)

    # --- what a paper changes ---------------------------------------------------------

    def set_classes(self, classnames: list[str]) -> None:
        """Re-aim at other classes: keep what is learned, rebuild what is made from
        names.

        What training alone needs of them, such as the features of a hand-written
        prompt, a method makes a ``cached_property``: it is forgotten here and computed
        again when it is asked for.

        Raises:
            InputError: bad class names, or classes that this method cannot serve.
        """
        self.classnames = check_classnames(classnames, allow_duplicates=True)
        self._remembered = None
        for name, _ in inspect.getmembers_static(
            type(self), lambda member: isinstance(member, cached_property)
        ):
            vars(self).pop(name, None)

    def aim(self, dataset) -> None:
        """Re-aim at a dataset: its classes and, if the method uses them, its template
        or descriptions.
        """
        self.set_classes(dataset.classnames)

    def text_features(self, image_features: Tensor | None = None) -> Tensor:
        """Class features before normalisation; CLIP's own for "a photo of a {}." by
        default.

        Returns:
            (C, E), or (B, C, E) for (B, E) image features if the method is
            ``conditional``.
        """
        return zero_shot_features(self.clip, self.classnames, "a photo of a {}.")

    def image_features(self, images: Tensor) -> Tensor:
        """Image features (B, E) before normalisation of images (B, 3, H, W); CLIP's own
        by default.
        """
        return self.clip.encode_image(images)

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits (B, C) of features (B, E) and (C, E) or (B, C, E): cosine times CLIP's
        logit scale.
        """
        image, text = (
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
        )
        cosine = (
            image @ text.T
            if text.dim() == 2
            else (text @ image[:, :, None]).squeeze(-1)
        )
        return self.clip.logit_scale.float() * cosine

    def regularizer(self, batch: Batch, image: Tensor, text: Tensor) -> Tensor | float:
        """What the loss adds to the cross-entropy, (); nothing by default.

        Args:
            batch: B images.
            image: (B, E), their features, before normalisation.
            text: (C, E) or (B, C, E), the class features, before normalisation.
        """
        return 0.0

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) of a batch, with gradients where they are enabled."""
        return self.score(*self.features(batch))

    def loss(self, batch: Batch) -> Tensor:
        """Training loss of a batch, (): by default the cross-entropy of its logits and
        the :meth:`regularizer`.
        """
        image, text = self.features(batch)
        return F.cross_entropy(
            self.score(image, text), batch.labels
        ) + self.regularizer(batch, image, text)

    # --- what a training run asks for -------------------------------------------------

    def prepare(self, dataset, recipe, generator: torch.Generator):
        """Called once before training; returns the dataset to train on, say, with
        labels of its own making.

        Methods that only remember training data (a cache of features) do so here and
        learn nothing.
        """
        return dataset

    def param_groups(self, recipe) -> list[dict]:
        """Optimizer groups; a group may set its own peak ``lr`` and
        ``weight_decay``.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def backward(self, batch: Batch) -> Tensor:
        """Leave in ``.grad`` what the optimizer shall follow; returns the loss to
        report, ().
        """
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    def end_epoch(self, epoch: int, recipe) -> None:
        """Called after each epoch (0-based). What a method accumulates here belongs in
        ``training_state``.
        """

    # --- what every method can do -----------------------------------------------------

    def encode(self, batch: Batch) -> Tensor:
        """Image features (B, E) of a batch: those it carries if frozen ones suffice,
        else of its images.
        """
        if batch.features is not None and self.reads == "features":
            return batch.features
        return self.image_features(batch.images)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image features (B, E) and class features, (C, E) or (B, C, E), of a batch,
        before normalisation.
        """
        image = self.encode(batch)
        return image, (
            self.text_features(image) if self.conditional else self.class_features()
        )

    def class_features(self) -> Tensor:
        """The text features (C, E); without gradients they are remembered until
        something changes them.
        """
        if torch.is_grad_enabled():
            return self.text_features()
        state = chain(self.parameters(), self.buffers())
        key = (self.training, *((t.data_ptr(), t._version) for t in state))
        if self._remembered is None or self._remembered[0] != key:
            self._remembered = key, self.text_features()
        return self._remembered[1]

    @torch.no_grad()
    def logits(self, batch: Batch | Tensor) -> Tensor:
        """Logits (B, C) in evaluation mode, without gradients, of a batch or of images
        (B, 3, H, W).
        """
        batch = Batch(images=batch) if isinstance(batch, Tensor) else batch
        training = self.training
        try:
            return self.eval()(batch.to(self.clip.device))
        finally:
            self.train(training)

    def predict(self, images: Tensor) -> Tensor:
        """Labels (B,) of (B, 3, H, W) normalised images."""
        return self.logits(images).argmax(dim=-1)

    @property
    def n_parameters(self) -> int:
        """How many numbers it learns."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def spec(self) -> str:
        """The name that :func:`build` makes it from, such as ``"dept(maple)"``."""
        return self.name

    # --- hyperparameters --------------------------------------------------------------

    @classmethod
    def hyperparameters(cls) -> dict[str, tuple[Any, Any]]:
        """``{name: (annotation, default)}``, from the constructors of the class and of
        those it extends.
        """
        found = {}
        for base in cls.__mro__:
            if base is Method:
                break
            if "__init__" not in vars(base):
                continue
            hints = typing.get_type_hints(base.__init__)
            parameters = inspect.signature(base.__init__).parameters.values()
            for p in parameters:
                if p.kind is p.KEYWORD_ONLY and p.name != "host":
                    found.setdefault(p.name, (hints[p.name], p.default))
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
        return found

    @classmethod
    def check(cls, hparams: dict) -> dict:
        """The hyperparameters with their defaults filled in.

        Raises:
            InputError: one is unknown (with the nearest name), or is not what its
                annotation asks for.
        """
        known, host = cls.hyperparameters(), {}
        if cls.plugin and isinstance(hparams.get("host"), Method):
            host = {"host": hparams["host"]}
        elif cls.plugin:
            raise InputError(
                f"{cls.name} needs host=, a method; by name: build('{cls.name}(coop)',"
                " ...)"
            )
        for name, value in hparams.items():
            if name in host:
                continue
            if name not in known:
                raise unknown(f"hyperparameter of {cls.name}", name, list(known))
            if not _fits(value, known[name][0]):
                raise InputError(
                    f"{cls.name}: {name} must be {_describe(known[name][0])}, got"
                    f" {value!r}"
                )
        return {
            name: hparams.get(name, default) for name, (_, default) in known.items()
        } | host

    # --- the names of the method's own repository -------------------------------------

    def official_names(self) -> dict[str, str]:
        """``{parameter name in the method's own repository: name in our
        state_dict}``.
        """
        return {}

    def load_official(self, state: dict) -> None:
        """Take over a checkpoint of the method's own repository.

        Args:
            state: its state dict, or the checkpoint that holds one under "state_dict".
                What is made from class names (token_prefix, token_suffix) and CLIP's
                own frozen weights are dropped; a learner that was saved alone may lack
                "prompt_learner.".

        Raises:
            InputError: parameters are unknown, missing or of another shape; the text
                names them.
        """
        state, names, ours = (
            state.get("state_dict", state),
            self.official_names(),
            self.state_dict(),
        )
        frozen = {f"text_encoder.{key}" for key in self.clip.model.state_dict()} | {
            "logit_scale"
        }
        frozen |= {
            key.replace("text_encoder.visual", "image_encoder") for key in frozen
        }
        values, strange = {}, []
        for key, value in state.items():
            official = key if key in names else f"prompt_learner.{key}"
            dropped = key in frozen or any(
                part.startswith(self.official_dropped) for part in key.split(".")
            )
            if official in names:
                values[official] = value
            elif not dropped:
                strange.append(key)
        shapes = [
            f"{key} is {tuple(value.shape)} and not {tuple(ours[names[key]].shape)}"
            for key, value in values.items()
            if value.shape != ours[names[key]].shape
        ]
        problems = {
            "unknown": strange,
            "missing": [key for key in names if key not in values],
            "wrong shape": shapes,
        }
        problems = [
            f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys
        ]
        if problems:
            what = f"{self.spec} for {len(self.classnames)} classes"
            raise InputError(
                f"this state dict is not one of {what}; {'; '.join(problems)}"
            )
        with torch.no_grad():
            for key, value in values.items():
                ours[names[key]].copy_(value)

    @classmethod
    def official_hparams(cls, hyperparameters: dict) -> dict:
        """Our hyperparameters from the official names and values.

        Raises:
            InputError: a name is unknown.
        """
        names = cls.official_hyperparameters
        for name in hyperparameters:
            if name not in names:
                raise unknown(
                    f"official hyperparameter of {cls.name}", name, list(names)
                )
        return {
            names[name]: value
            for name, value in hyperparameters.items()
            if names[name] is not None
        }

    @classmethod
    def from_official(
        cls, clip: FrozenCLIP, classnames: list[str], hyperparameters: dict, **objects
    ):
        """The method as its own repository would configure it.

        Args:
            clip: the frozen backbone.
            classnames: the C class names.
            hyperparameters: official names and values, such as ``{"N_CTX": 16, "CSC":
                False}``.
            objects: arguments that are no hyperparameters (``host="coop"`` for a
                plug-in, a teacher).
        """
        return cls(clip, classnames, **cls.official_hparams(hyperparameters), **objects)

    # --- files ------------------------------------------------------------------------

    def save(self, path) -> Path:
        """Write one safetensors file, whole or not at all, whose header holds the
        configuration as JSON.

        The configuration is the method's name and hyperparameters, the classes it was
        trained on and those it aims at, the backbone's name and the hash of its
        weights, and the versions of the libraries.
        """
        state = {
            name: t.detach().cpu().contiguous().clone()
            for name, t in self.state_dict().items()
        }
        config = {
            "format": 1,
            "method": self.spec,
            "hparams": self.hparams,
            "trained_on": self.trained_on,
            "classnames": self.classnames,
            "clip": {
                k: getattr(self.clip, k) for k in ("name", "pretrained", "fingerprint")
            },
            "weights": _digest(state),
            "versions": {
                package: _version(package)
                for package in ("promptkit", "torch", "open_clip_torch")
            },
        }
        data = safetensors_bytes(state, metadata={"promptkit": json.dumps(config)})
        return write_atomically(path, lambda file: file.write(data))


class Plugin(Method):
    """A method that extends another one: it passes on to its host what it does not
    change itself.

    Args:
        host: the method to extend. ``self.host`` holds it, its learnables included.
    """

    plugin = True
    hosts: ClassVar[tuple[str, ...]] = ("coop",)  # those of its paper
    # What it extends if no host is named, with its hyperparameters; such a host does
    # not learn.
    default_host: ClassVar[tuple[str, dict] | None] = None

    def __init__(self, clip, classnames, *, host: Method):
        super().__init__(clip, classnames)
        self.host = host

    official_dropped = property(lambda self: self.host.official_dropped)
    reads = property(lambda self: self.host.reads)
    conditional = property(lambda self: self.host.conditional)
    spec = property(
        lambda self: self.name if self.alone else f"{self.name}({self.host.spec})"
    )

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.host.set_classes(classnames)

    def aim(self, dataset):
        self.host.aim(dataset)
        super().aim(dataset)

    def text_features(self, image_features=None):
        return self.host.text_features(image_features)

    def image_features(self, images):
        return self.host.image_features(images)

    def encode(self, batch):
        return self.host.encode(batch)

    def score(self, image, text):
        return self.host.score(image, text)

    def regularizer(self, batch, image, text):
        return self.host.regularizer(batch, image, text)

    def prepare(self, dataset, recipe, generator):
        return self.host.prepare(dataset, recipe, generator)

    def end_epoch(self, epoch, recipe):
        self.host.end_epoch(epoch, recipe)

    def official_names(self):
        return {
            official: f"host.{ours}"
            for official, ours in self.host.official_names().items()
        }

    @classmethod
    def official_hparams(cls, hyperparameters):
        own = {
            k: v
            for k, v in hyperparameters.items()
            if k in cls.official_hyperparameters
        }
        return super().official_hparams(own)

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, *, host: str, **objects):
        """As :meth:`Method.from_official`; names that are not the plug-in's own are the
        host's.
        """
        theirs = {
            k: v
            for k, v in hyperparameters.items()
            if k not in cls.official_hyperparameters
        }
        name, inner = parse(host)
        inner = {"host": inner} if inner else {}
        host = methods()[name].from_official(clip, classnames, theirs, **inner)
        return super().from_official(
            clip, classnames, hyperparameters, host=host, **objects
        )

    @classmethod
    def recipe(cls, setting, host: str):
        """The host's own recipe, unless the plug-in's paper says otherwise."""
        name, inner = parse(host)
        theirs = methods()[name].recipe(setting, inner)
        return replace(theirs, hparams={"host": theirs.hparams})


# --- registry -------------------------------------------------------------------------

_REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its ``name``."""
    _REGISTRY[cls.name] = cls
    return cls


def methods() -> dict[str, type[Method]]:
    """Every registered method by name; each module of ``promptkit.methods`` registers
    its own.
    """
    package = importlib.import_module("promptkit.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"promptkit.methods.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def specs() -> list[str]:
    """Every method as :func:`build` takes it, with plug-ins around each of the hosts of
    their papers.
    """
    out = []
    for name, cls in methods().items():
        out += [name] if not cls.plugin or cls.default_host else []
        out += [f"{name}({host})" for host in cls.hosts] if cls.plugin else []
    return out


def parse(spec: str) -> tuple[str, str | None]:
    """``"dept(atprompt(maple))"`` -> ``("dept", "atprompt(maple)")``; ``"coop"`` ->
    ``("coop", None)``.

    Raises:
        InputError: unknown names, unbalanced brackets, a plug-in without a host or a
            host for what is no plug-in.
    """
    match = (
        re.fullmatch(r"(\w+)(?:\((.*)\))?", spec.strip())
        if isinstance(spec, str)
        else None
    )
    if match is None:
        raise InputError(
            f"{spec!r} names no method; write a name such as 'coop', or 'plugin(host)'"
        )
    name, host = match.groups()
    known = methods()
    if name not in known:
        raise unknown("method", name, list(known))
    if known[name].plugin and not host and not known[name].default_host:
        raise InputError(
            f"{name} extends another method: name its host, as in '{name}(coop)'"
        )
    if host is not None:
        if not known[name].plugin:
            raise InputError(f"{name} takes no host, so {spec!r} cannot be built")
        parse(host)
    return name, host


def nesting(spec: str) -> list[type[Method]]:
    """The classes of a spec, outermost first: a plug-in, its host (its default one if
    none is named), and so on.
    """
    name, host = parse(spec)
    cls = methods()[name]
    host = cls.default_host[0] if cls.plugin and host is None else host
    return [cls] if host is None else [cls, *nesting(host)]


def build(
    spec: str, clip: FrozenCLIP, classnames: list[str], *, seed: int = 0, **hparams
) -> Method:
    """Make a method by name.

    Args:
        spec: a registered name, or plug-ins around one: ``"dept(atprompt(maple))"``.
        classnames: the C class names.
        seed: of the random initial values. Torch's global generators are left as they
            were.
        hparams: hyperparameters of the method; ``host={...}`` holds those of a
            plug-in's host.

    Raises:
        InputError: the name or a hyperparameter is unknown or does not fit, or the
            class names are bad.
    """
    name, host = parse(spec)
    _check_clip(clip)
    cuda = [clip.device] if torch.device(clip.device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        if host is not None:
            hparams["host"] = build(
                host, clip, classnames, seed=seed, **hparams.get("host", {})
            )
        return methods()[name](clip, classnames, **hparams)


def load_method(
    path, clip: FrozenCLIP | None = None, *, pretrained: str | None = None, device=None
) -> Method:
    """Read a method that :meth:`Method.save` wrote. Nothing is unpickled.

    Args:
        clip: the backbone that it was trained on; loaded by its recorded name if None,
        pretrained, device: from these weights instead of the recorded ones, and onto
            this device.

    Raises:
        InputError: the file is missing or damaged, or belongs to another backbone.
    """
    config, state = _read(path)
    backbone = config["clip"]
    clip = clip or load_clip(
        backbone["name"], pretrained or backbone["pretrained"], device
    )
    if clip.fingerprint != backbone["fingerprint"]:
        raise InputError(
            f"{path} was trained on the weights {backbone['fingerprint'][:12]}"
            f" ({backbone['name']}), this CLIP has {clip.fingerprint[:12]}"
            f" ({clip.name})"
        )
    method = build(config["method"], clip, config["trained_on"], **config["hparams"])
    for (
        key,
        value,
    ) in (
        state.items()
    ):  # what a method remembers of its training data may have any size
        module, _, leaf = key.rpartition(".")
        buffers = dict(method.named_modules()).get(module, method)._buffers
        if leaf in buffers:
            buffers[leaf] = value.to(clip.device)
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit {config['method']} of this version: {error}"
        ) from None
    if config["classnames"] != config["trained_on"]:
        method.set_classes(config["classnames"])
    return method


def _read(path) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and state dict of a saved method."""
    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["promptkit"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if config["weights"] != _digest(state):
            raise ValueError("its weights do not match their hash")
        config["clip"]["name"], config["clip"]["pretrained"]
    except FileNotFoundError:
        raise InputError(f"there is no method file {path}") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is damaged or no file of a saved method ({error})"
        ) from None
    return config, state


def expect(holds: bool, name: str, value, expected: str) -> None:
    """Raise InputError "NAME must be EXPECTED, got VALUE" unless ``holds``; for ranges,
    in constructors.
    """
    if not holds:
        raise InputError(f"{name} must be {expected}, got {value!r}")


def _check_clip(clip) -> None:
    if not isinstance(clip, FrozenCLIP):
        raise InputError(
            "a method needs a FrozenCLIP, as load_clip() makes it, not a"
            f" {type(clip).__name__}"
        )


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    str: ("a text", lambda v: isinstance(v, str)),
    dict: ("a dictionary", lambda v: isinstance(v, dict)),
    types.NoneType: ("None", lambda v: v is None),
}


def _fits(value, hint) -> bool:
    """Whether ``value`` is what a hyperparameter's annotation asks for."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(
            _fits(item, args[0]) for item in value
        )
    return _KINDS[origin][1](value) if origin in _KINDS else isinstance(value, origin)


def _describe(hint) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin in (list, tuple):
        return f"a list, each item {_describe(args[0])}"
    return _KINDS[origin][0] if origin in _KINDS else f"a {origin.__name__}"


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None
