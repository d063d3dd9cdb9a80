"""Methods by name: found, nested, built, saved ones read again.

A method is known once its class is registered: those of the package by their modules in
``promptkit.methods``, those of other packages by an entry point of the group
``promptkit.methods``, those of a notebook by ``@register``. Controls, of
``promptkit.controls``, are built and run by name too, but not listed.
"""

import json
import pkgutil
import re
import warnings
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import promptkit.controls
import promptkit.methods
from promptkit.clip import FrozenCLIP, load_clip
from promptkit.errors import InputError, expect, unknown
from promptkit.method import REGISTRY, Method, digest, digest_of_header
from promptkit.recipe import Host, Recipe, Setting, for_profile
from promptkit.weights import read_checkpoint, state_dict

ENTRY_POINTS = "promptkit.methods"


@cache
def _load() -> None:
    for package in (promptkit.methods, promptkit.controls):
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()  # a module or a class; loading it registers what it holds
        except Exception as error:  # somebody else's code must not stop everything
            warnings.warn(
                f"the entry point {entry.name!r} ({entry.value}) could not be loaded"
                f" ({type(error).__name__}: {error}): its methods are missing",
                stacklevel=2,
            )


def methods() -> dict[str, type[Method]]:
    """Every registered method by name, controls aside."""
    return {
        name: cls
        for name, cls in _known().items()
        if not cls.__module__.startswith(promptkit.controls.__name__)
    }


def _known() -> dict[str, type[Method]]:
    """Every method and control by name."""
    _load()
    return dict(sorted(REGISTRY.items()))


def defined_elsewhere() -> list[type[Method]]:
    """Methods that another process does not know by itself: those of a notebook or a
    script, which have no module to import.
    """
    return [cls for cls in methods().values() if cls.__module__ == "__main__"]


def specs() -> list[str]:
    """Every method as :func:`build` takes it, with plug-ins around each of the hosts of
    their papers; those that need a teacher are left out.
    """
    out = []
    for name, cls in methods().items():
        out += [name] if not cls.plugin or cls.default_host else []
        out += [f"{name}({host})" for host in cls.hosts] if cls.plugin else []
    known = methods()
    return [
        spec
        for spec in out
        if set(re.findall(r"\w+", spec)) <= set(known)
        and not any(name in cls.needs() for name, cls in objects(spec).items())
    ]


def parse(spec: str) -> tuple[str, str | None]:
    """``"dept(atprompt(maple))"`` -> ``("dept", "atprompt(maple)")``; ``"coop"`` ->
    ``("coop", None)``.

    Raises:
        InputError: unknown names, unbalanced brackets, a plug-in without a host or a
            host for what is no plug-in.
    """
    match = None
    if isinstance(spec, str):
        match = re.fullmatch(r"(\w+)(?:\((.*)\))?", spec.strip())
    if match is None:
        raise InputError(
            f"{spec!r} names no method; write a name such as 'coop', or 'plugin(host)'"
        )
    name, host = match.groups()
    known = _known()
    if name not in known:
        raise unknown("method", name, known)
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
    cls = _known()[name]
    if host is not None:
        return [cls, *nesting(host)]
    return [cls, cls.default_host[0]] if cls.default_host else [cls]


def objects(spec: str) -> dict[str, type[Method]]:
    """What a method, or plug-ins around one, may stand on beside its backbone and its
    hosts (a teacher, further backbones): names, and the outermost part that takes each.
    """
    found = {name: cls for cls in nesting(spec)[::-1] for name in cls.objects()}
    return {name: cls for name, cls in found.items() if name != "host"}


def supervision(spec: str) -> set[str]:
    """What teaches a method, its host included: "shots", "pool", "texts"; empty for one
    that learns nothing.
    """
    name, host = parse(spec)
    own = set(_known()[name].supervision.split("+")) - {"none"}
    return own | (supervision(host) if host else set())  # own speaks for a default host


def by_target(spec: str) -> bool:
    """Whether a transfer has a training for each target, on its images without labels:
    where a part of the method asks for it and none learns from labels or texts.
    """
    asked = any(cls.by_target for cls in nesting(spec))
    return asked and supervision(spec) == {"pool"}


def recipe(spec: str, setting: Setting) -> Recipe:
    """The recipe of a method, or of plug-ins around one, in a setting and its profile.

    Raises:
        InputError: unknown method, or one that states no recipe.
    """
    return for_profile(_paper(spec, setting), setting.profile)


def _paper(spec, setting):
    name, host = parse(spec)
    if host is not None:
        inner = replace(setting, hparams=setting.hparams.get("host", {}), host=None)
        names = tuple(cls.name for cls in nesting(host))
        setting = replace(setting, host=Host(host, names, _paper(host, inner)))
    return _known()[name].recipe(setting)


def build(
    spec: str, clip: FrozenCLIP, classnames: list[str], *, seed: int = 0, **hparams
) -> Method:
    """Make a method by name.

    Args:
        spec: a registered name, or plug-ins around one: ``"dept(atprompt(maple))"``.
        classnames: the C class names.
        seed: of the random initial values: those of the host, then the plug-in's, from
            one stream. Torch's global generators are left as they were.
        hparams: hyperparameters of the method, and its objects (a teacher), which may
            also be those of a plug-in's host; ``host={...}`` holds the hyperparameters
            of the host.

    Raises:
        InputError: the name or a hyperparameter is unknown or does not fit, or the
            class names are bad.
    """
    parse(spec)
    if not isinstance(clip, FrozenCLIP):
        raise InputError(
            "a method needs a FrozenCLIP, as load_clip() makes it, not a"
            f" {type(clip).__name__}"
        )
    cuda = [clip.device] if clip.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        return _build(spec, clip, classnames, hparams)


def _build(spec, clip, classnames, hparams):
    name, host = parse(spec)
    cls = _known()[name]
    if host is not None:
        theirs = set(objects(host)) - set(cls.objects())
        passed = {key: hparams[key] for key in hparams if key in theirs}
        own = {key: hparams[key] for key in hparams if key not in theirs}
        inner = hparams.get("host", {}) | passed
        hparams = own | {"host": _build(host, clip, classnames, inner)}
    return cls(clip, classnames, **hparams)


def from_official(
    spec: str,
    clip: FrozenCLIP,
    classnames: list[str],
    hyperparameters: dict,
    **objects,
) -> Method:
    """A method as its own repository would configure it.

    Args:
        spec: as :func:`build` takes it; the hyperparameters of a nesting stand in one
            dict, and each part takes those that it knows.
        hyperparameters: official names and values, such as ``{"N_CTX": 16}``. One that
            is None is not given, but for initial words, which are then none. Names may
            be in other capitals than the method's; PREC is ignored, as the backbone
            has a precision already.
        objects: a teacher, for the part that takes one.

    Raises:
        InputError: no part knows one of the names, or takes one of the objects; or a
            class-specific context, or a place of the class name but the end, is asked
            of what has neither.
    """
    parts = nesting(spec) if parse(spec)[1] else [_known()[parse(spec)[0]]]
    options = _by_part(spec, parts, hyperparameters)
    for name in objects:
        if not any(name in cls.objects() for cls in parts):
            raise InputError(f"{spec} takes no {name}: leave it out")
    method = None
    for cls, mine in zip(parts[::-1], options[::-1], strict=True):
        host = {} if method is None else {"host": method}
        taken = {key: objects[key] for key in objects if key in cls.objects()}
        method = cls.from_official(clip, classnames, mine, **host, **taken)
    return method


# Official options that say nothing where a method lacks them, and the one value of each
# that then fits.
_FIXED = {
    "csc": False,
    "class_specific_context": False,
    "class_token_position": "end",
}


def _by_part(spec, parts, hyperparameters):
    """What each part takes of official hyperparameters, by the names that it has."""
    known = {name for cls in parts for name in cls.official_hyperparameters}
    options = [{} for _ in parts]
    for name, value in hyperparameters.items():
        lower = name.lower()
        spelt = [_spelt(cls, name, exactly=name in known) for cls in parts]
        if not any(spelt) and lower != "prec" and lower not in _FIXED:
            raise unknown(f"official hyperparameter of {spec}", name, known)
        if value is None and not lower.startswith("ctx_init"):
            continue
        if not any(spelt) and lower in _FIXED:
            only = _FIXED[lower]
            expect(value == only, name, value, f"{only!r}, as {spec} has no other")
        for mine, own in zip(options, spelt, strict=True):
            if own == name:
                mine[own] = value
            elif own:
                mine.setdefault(own, value)
    return options


def _spelt(cls, name, exactly):
    """How a method writes an official name, in other capitals if it may; None if it
    has none, or several that differ in meaning.
    """
    names = cls.official_hyperparameters
    if exactly:
        return name if name in names else None
    alike = [own for own in names if own.lower() == name.lower()]
    meant = {names[own] or own for own in alike}
    return alike[0] if len(meant) == 1 else None


# --- saved methods --------------------------------------------------------------------


def at_test(spec: str) -> tuple[str, ...]:
    """The hyperparameters of a method that change its answers alone and nothing of its
    training: runs that differ in them share what they train. A class that extends
    another one says so for itself.

    Raises:
        InputError: the class lists something else than its hyperparameters.
    """
    cls = nesting(spec)[0]
    free = vars(cls).get("at_test", ())
    if not isinstance(free, tuple) or set(free) - set(cls.hyperparameters()):
        raise InputError(
            f"at_test of {cls.name} must be a tuple of its hyperparameters, not"
            f" {free!r}"
        )
    return free


def saved_spec(path) -> str:
    """The method that ``Method.save`` wrote into a file, as ``build`` takes it.

    Raises:
        InputError: the file is missing or damaged.
    """
    return _read(path)[0]["method"]


def load_method(
    path,
    clip: FrozenCLIP | None = None,
    *,
    pretrained: str | None = None,
    device=None,
    hparams: dict | None = None,
    **how,
) -> Method:
    """Read a method that ``Method.save`` wrote. Nothing is unpickled.

    Args:
        clip: the backbone that it was trained on; loaded as it was then if None,
        pretrained, device, how: from these weights instead of the recorded ones, onto
            this device, and how to read them (``like``, ``quickgelu``), as
            :func:`~promptkit.clip.load_clip` takes them.
        hparams: hyperparameters in place of stored ones, of those that training does
            not depend on (``at_test``, such as APEX's beta); None follows the dataset
            from the next ``aim`` on.

    Raises:
        InputError: the file is missing or damaged, or belongs to another backbone; a
            hyperparameter is unknown, or shaped the training.
    """
    about, state = _read(path)
    if hparams:
        free = at_test(about["method"])
        if shaping := set(hparams) - set(free):
            raise InputError(
                f"{path}: {', '.join(sorted(shaping))} of {about['method']} cannot be"
                f" changed after training; {', '.join(free) or 'nothing'} can"
            )
        about["hparams"] = about["hparams"] | hparams
    asked = {"pretrained": pretrained, **how}
    try:
        clip = clip or _backbone(about["clip"], device, asked)
        method = _restore(path, about, clip, device)
    except InputError as error:  # of a method or a hyperparameter that is no more
        told = str(path) in str(error)
        raise error if told else InputError(f"{path}: {error}") from None
    for key, value in state.items():  # what is sized by training data may have any size
        module, _, leaf = key.rpartition(".")
        owner = dict(method.named_modules()).get(module, method)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value.to(method.clip.device)
        elif owner._parameters.get(leaf, value).shape != value.shape:
            resized = torch.empty_like(value, device=method.clip.device)
            setattr(owner, leaf, torch.nn.Parameter(resized))
    try:
        method.load_state_dict(state)
    except RuntimeError as error:  # a headline, and a line for each key
        what = "; ".join(map(str.strip, str(error).splitlines()[1:])).rstrip(". ")
        raise InputError(
            f"{path} does not fit {about['method']} of this version: {what[:300]}"
        ) from None
    try:
        method.set_classes(about["classnames"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return method.eval()


def _restore(path, about, clip, device):
    """A method with initial values from what ``Method.describe`` said of it."""
    wanted = about["clip"]["fingerprint"]
    if clip.fingerprint != wanted:
        raise InputError(
            f"{path} was trained on the weights {wanted[:12]}"
            f" ({about['clip']['name']}, {about['clip'].get('precision', 'fp32')}),"
            f" this CLIP has {clip.fingerprint[:12]} ({clip.name}, {clip.precision})"
        )
    objects = {}
    for name, thing in about.get("objects", {}).items():
        many = thing if isinstance(thing, list) else [thing]
        made = [
            _restore(path, part, _other(part["clip"], clip, device), device)
            if "method" in part
            else _other(part, clip, device)
            for part in many
        ]
        objects[name] = made if isinstance(thing, list) else made[0]
    hparams = about["hparams"] | objects
    method = build(about["method"], clip, about["trained_on"], **hparams)
    for part, taken in zip(method.nest(), about.get("taken", ()), strict=False):
        part.taken.update({k: v for k, v in taken.items() if k in part.taken})
    method.set_classes(about["trained_on"])
    return method


def _other(about, clip, device):
    """Another CLIP from what it said of itself; the same one where it is the same."""
    same = about["fingerprint"] == clip.fingerprint
    return clip if same else _backbone(about, device)


def _backbone(about, device, asked=None):
    """A CLIP from what it said of itself, read as ``asked`` where that is given."""
    names = ("name", "pretrained", "precision")
    source = about.get("source") or {k: about[k] for k in names if k in about}
    asked = {k: value for k, value in (asked or {}).items() if value is not None}
    if "pretrained" in asked:  # how the old weights were read says nothing of these
        source = {k: source[k] for k in ("name", "precision") if k in source}
    return load_clip(**source | asked, device=device)


def load_official(
    path, spec: str, clip: FrozenCLIP, classnames: list[str], **hparams
) -> Method:
    """A method with what a checkpoint of its own repository holds; no code in the file
    is run.

    Args:
        path: such as ``model.pth.tar-50``.
        spec: as :func:`build` takes it, with its hyperparameters.
        classnames: those that it was trained on.

    Raises:
        InputError: the file is missing, damaged, or of another method.
    """
    checkpoint = read_checkpoint(path)
    method = build(spec, clip, classnames, **hparams)
    try:
        method.load_official(state_dict(checkpoint))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return method.eval()


def _read(path) -> tuple[dict, dict[str, Tensor]]:
    """What a saved method says of itself, and its state dict."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["promptkit"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["weights"] != digest(state):
            raise ValueError("its weights do not match their hash")
        if about.get("digest", digest_of_header(about)) != digest_of_header(about):
            raise ValueError("its header does not match its hash")
        _check_about(about)
        if bad := [k for k, v in state.items() if not v.double().isfinite().all()]:
            raise ValueError(f"{bad[0]} is not finite")
    except FileNotFoundError:
        raise InputError(f"there is no method file {path}") from None
    except IsADirectoryError:
        raise InputError(
            f"{path} is damaged or no file of a saved method (it is a folder)"
        ) from None
    except (
        OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError,
        RecursionError,
    ) as error:  # fmt: skip
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise InputError(
            f"{path} is damaged or no file of a saved method ({lacks}{error})"
        ) from None
    return about, state


def _check_about(about):
    """KeyError, TypeError or ValueError unless it has the form of what
    ``Method.describe`` says.
    """
    kinds = {"method": str, "hparams": dict, "trained_on": list, "classnames": list}
    for name, kind in kinds.items():
        if not isinstance(about[name], kind):
            raise TypeError(f"its {name} is {about[name]!r:.60}")
    taken, objects = about.get("taken", []), about.get("objects", {})
    if not all(isinstance(part, dict) for part in [*taken, objects]):
        raise TypeError("it says in no way that is known what it took")
    _check_clip(about["clip"])
    for thing in objects.values():
        for part in thing if isinstance(thing, list) else [thing]:
            (_check_about if "method" in part else _check_clip)(part)


def _check_clip(about):
    for name in ("name", "fingerprint"):
        if not isinstance(about[name], str):
            raise TypeError(f"the {name} of its backbone is {about[name]!r:.60}")
    source = about.get("source") or {"name": about["name"]}
    known = ("name", "pretrained", "precision", "like", "quickgelu")
    if "name" not in source or set(source) - set(known):
        raise ValueError(f"its backbone is loaded by {', '.join(map(repr, source))}")
