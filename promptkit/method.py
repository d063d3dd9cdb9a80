"""The one interface of every method: what it reads, scores and learns.

A method is a plain ``nn.Module`` around a frozen CLIP. It overrides the few hooks below
that its paper changes and nothing else; :func:`promptkit.train.fit` is a loop over
these hooks, and a method works without it. Names, nesting and files of methods are in
:mod:`promptkit.registry`.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from promptkit import hyperparameters
from promptkit.clip import FrozenCLIP, check_classnames, zero_shot_features
from promptkit.errors import InputError, unknown
from promptkit.files import write_atomically
from promptkit.picture import Picture
from promptkit.prompts import Context
from promptkit.recipe import Recipe, Setting
from promptkit.towers import Edit, Prompt

READS = ("features", "images", "tokens", "views", "texts")
SUPERVISION = ("none", "shots", "pool", "texts")


@dataclass
class Batch:
    """What a method may read about B examples; the trainer fills what the method's
    ``reads`` asks for.
    """

    labels: Tensor | None = None  # (B,) long; -1 where a label is not for the method
    images: Tensor | None = None  # (B, 3, H, W), normalised
    features: Tensor | None = None  # (B, E) of the frozen tower, before normalisation
    tokens: Tensor | None = None  # (B, N, E) its local tokens
    attention: Tensor | None = None  # (B, N), of the class token to them
    views: Tensor | None = None  # (B, V, 3, H, W), normalised, by Method.views
    texts: list[str] | None = None  # B sentences, for methods that train on text
    indices: Tensor | None = None  # (B,) positions in the split it was drawn from
    generator: torch.Generator | None = None  # the run's randomness, on the CPU

    def __len__(self) -> int:
        parts = "labels images features tokens views texts indices".split()
        filled = (getattr(self, name) for name in parts)
        found = next((len(x) for x in filled if x is not None), None)
        if found is None:
            raise InputError(f"the batch is empty: give it {', '.join(parts)}, or some")
        return found

    def to(self, device) -> "Batch":
        """The same batch with its tensors on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: x.to(device) for k, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


class MethodType(type):
    """Checks hyperparameters before any constructor runs; aims the finished method at
    its classes.
    """

    def __call__(cls, clip, classnames, **arguments):
        if not isinstance(clip, FrozenCLIP):
            raise InputError(
                "a method needs a FrozenCLIP, as load_clip() makes it, not a"
                f" {type(clip).__name__}"
            )
        alone = cls.default_host and not isinstance(arguments.get("host"), Method)
        if alone:
            host, defaults = cls.default_host
            given = defaults | (arguments.get("host") or {})
            made = host(clip, classnames, **given)
            arguments["host"] = made.requires_grad_(cls.default_host_learns)
        arguments = cls.check(arguments)
        objects = {name: arguments[name] for name in cls.objects()}
        method = cls.__new__(cls)
        method.__dict__["hparams"] = {
            name: value for name, value in arguments.items() if name not in objects
        }
        method.__dict__["taken"] = {
            name: take(None)
            for name, take in cls.from_dataset.items()
            if method.hparams[name] is None
        }
        if cls.needs_vit(method.hparams):
            cls._check_vit(clip)
        method.__init__(clip, classnames, **arguments)
        if _reads_tokens(method):  # which a plug-in's instance knows alone
            cls._check_vit(clip)
        for name, thing in objects.items():
            if name != "host" and isinstance(thing, Method):
                thing.requires_grad_(False).eval()
        if cls.plugin:
            method.hparams["host"] = method.host.hparams
            method.alone = bool(alone)
        method.trained_on = method.classnames
        method.set_classes(method.classnames)
        return method.to(clip.device)


class Method(nn.Module, metaclass=MethodType):
    """A frozen CLIP and what a method adds to it.

    A subclass declares its hyperparameters as keyword-only, annotated arguments of
    ``__init__`` (checked by their annotations, kept in ``self.hparams`` as they were
    asked for) and creates its learnables there. Of the hooks below it overrides what
    its paper changes. A learned :class:`~promptkit.prompts.Context` called
    ``self.context`` is a prompt without a further word, and follows the class names.

    Everything else that is made from class names is made in :meth:`set_classes`, or is
    a ``cached_property``, which is forgotten whenever the classes change.

    Args:
        clip: the frozen backbone. It stays out of the module tree: ``parameters()`` and
            ``state_dict()`` hold what the method itself learns or remembers.
        classnames: the C class names.

    Attributes:
        hparams: the hyperparameters as they were asked for, with their defaults.
        taken: for those of them that are None and follow the dataset
            (``from_dataset``), what it was last told by one. See :meth:`option`.
        trained_on: the class names that it was trained on, or made with.

    Raises:
        InputError: a hyperparameter is unknown or does not fit; there are no class
            names, or one is empty. Two equal names are a warning: ImageNet has two such
            pairs.
    """

    name: ClassVar[str] = ""  # registry name
    title: ClassVar[str] = ""
    year: ClassVar[int] = 0
    paper: ClassVar[str] = ""  # arXiv id, or a DOI or URL where there is none
    kind: ClassVar[str] = ""  # "prompt", "adapter", "test-time", ..., for tables
    # What it does to the two towers, for promptkit.diagram; a plug-in says what it adds
    # to its host's.
    picture: ClassVar[Picture | None] = None
    # The run that its paper published, by protocol, see promptkit.published.
    published: ClassVar[dict[str, Any]] = {}
    # What it reads of a training image, of READS, joined by "+". "features": what the
    # frozen tower makes of it suffices, and may come from the cache. "images": its own
    # tower runs. "images+features": both. "tokens": local tokens beside either.
    # "views": made by its own views(). "texts": no image at all (ProText).
    reads: str = "features"
    reads_at_test: str = ""  # the same for a test image; empty: as in training
    conditional: bool = False  # whether text_features depends on the image
    # What teaches it, of SUPERVISION, joined by "+": "shots", a few labelled images;
    # "pool", all training images without labels (UPL, PromptKD, CasPL's first stage);
    # "texts" (ProText); "none".
    supervision: ClassVar[str] = "shots"
    # Whether it reads sentences about the classes that it is tested on (ArGue, KAPT).
    reads_sentences: ClassVar[bool] = False
    # In a transfer it learns on each target's own images, without labels (PromptKD).
    by_target: ClassVar[bool] = False
    seeded: ClassVar[bool] = True  # whether anything in it is random
    # Hyperparameters that change its answers alone and nothing of its training: runs
    # that differ in them are trained once. A class that extends another has its own.
    at_test: ClassVar[tuple[str, ...]] = ()
    plugin: ClassVar[bool] = False  # whether it takes a host=
    # What a plug-in extends if no host is named: a class with its hyperparameters, and
    # whether such a host learns along (TCP's context) or stays as it is (TPT's words).
    default_host: ClassVar[tuple[type["Method"], dict] | None] = None
    default_host_learns: ClassVar[bool] = False
    # Hyperparameters that follow the dataset where they are None: name -> what a
    # Dataset says, or None (no dataset yet). A method's texts are its own: the
    # function finds them by the dataset's name.
    from_dataset: ClassVar[dict[str, Callable[[Any], Any]]] = {}
    # Official name: ours, or None (of no effect).
    official_hyperparameters: ClassVar[dict[str, str | None]] = {}
    # Parts of official parameter names that begin so are ignored: they follow from the
    # class names, or are never learned.
    official_dropped: tuple[str, ...] = ("token_prefix", "token_suffix")

    hparams: dict[str, Any]
    taken: dict[str, Any]

    def __init__(self, clip: FrozenCLIP, classnames: list[str]):
        super().__init__()
        self.__dict__["clip"] = clip
        self.classnames = check_classnames(classnames, allow_duplicates=True)
        # What fit must keep between epochs beside the learnables.
        self.training_state: dict[str, Tensor] = {}
        self._remembered = None  # (what the features were made from, text features)

    # --- its classes ------------------------------------------------------------------

    def set_classes(self, classnames: list[str]) -> None:
        """Re-aim at other classes: keep what is learned, rebuild what names make.

        The context, a teacher and every ``cached_property`` follow. What training alone
        needs of the names, such as the features of a hand-written prompt, is best a
        ``cached_property``: it is forgotten here and computed again when asked for.

        Raises:
            InputError: bad class names, or classes that this method cannot serve.
        """
        self.classnames = check_classnames(classnames, allow_duplicates=True)
        self._remembered = None
        own = inspect.getmembers_static(
            type(self), lambda member: isinstance(member, cached_property)
        )
        for name, _ in own:
            vars(self).pop(name, None)
        for part in self.children():
            if isinstance(part, Method | Context):
                part.set_classes(self.classnames)

    def aim(self, dataset) -> None:
        """Re-aim at a dataset: its classes, and the texts and descriptions that the
        method takes from one (``from_dataset``) unless they were asked for.
        """
        for part in self.children():
            if isinstance(part, Method):
                part.aim(dataset)
        for name in self.taken:
            self.taken[name] = self.from_dataset[name](dataset)
        self.set_classes(dataset.classnames)

    def option(self, name: str):
        """A hyperparameter as it stands: what was asked for, else what the dataset
        says (CLIP's template, KAPT's descriptions).
        """
        return self.taken[name] if name in self.taken else self.hparams[name]

    # --- the text side ----------------------------------------------------------------

    def vectors(self, image_features: Tensor | None = None) -> Tensor:
        """The learned tokens of the context: (M, D) or (C, M, D), or (B, 1 or C, M, D)
        for (B, E) image features if the method is ``conditional`` (CoCoOp).
        """
        return self.context.vectors

    def text_prompt(self, image_features: Tensor | None = None) -> Prompt | None:
        """What enters the text tower, of one group or of a group an image; None: the
        class names in "a photo of a {}." (ATPrompt and CasPL extend it).
        """
        if getattr(self, "context", None) is None:
            return None
        return self.context.prompt(self.vectors(image_features))

    def text_edit(self) -> Edit | None:
        """What happens between the blocks of the text tower (MaPLe, TCP, CasPL)."""
        return None

    def text_features(self, image_features: Tensor | None = None) -> Tensor:
        """Class features before normalisation, of :meth:`text_prompt` under
        :meth:`text_edit`.

        Returns:
            (C, E), or (B, C, E) for (B, E) image features if the method is
            ``conditional``; or whatever else its own :meth:`score` reads (WaffleCLIP's
            and AWT's sets of sentences).
        """
        if self.conditional and image_features is None:
            raise InputError(
                f"the class features of {self.spec} depend on the image: pass"
                " image_features, (B, E)"
            )
        prompt = self.text_prompt(image_features)
        if prompt is None:
            return zero_shot_features(self.clip, self.classnames, "a photo of a {}.")
        features = self.clip.text(prompt, self.text_edit())  # (G, C, E)
        return features if self.conditional else features[0]

    def class_features(self):
        """The text features; without gradients they are remembered until something that
        they are made from changes.
        """
        if torch.is_grad_enabled():
            return self.text_features()
        state = [self.training, *chain(self.parameters(), self.buffers())]
        if self._remembered is None or not _equal(self._remembered[0], state):
            copies = [x.clone() if isinstance(x, Tensor) else x for x in state]
            self._remembered = copies, self.text_features()
        return self._remembered[1]

    # --- the image side ---------------------------------------------------------------

    def image_prompt(self) -> Tensor | None:
        """Tokens (n, Dv) behind the patches at the input of the image tower (MaPLe)."""
        return None

    def image_edit(self) -> Edit | None:
        """What happens between the blocks of the image tower (MaPLe, MMA, ArGue)."""
        return None

    def image_features(self, images: Tensor, local: bool = False):
        """Image features (B, E) before normalisation of images (B, 3, H, W), from the
        tower with :meth:`image_prompt` and :meth:`image_edit`.

        Args:
            local: also return the local tokens (B, N, E) and the class token's
                attention to them, (B, N), from the same pass (TextRefiner, KAPT).
        """
        prompt, edit = self.image_prompt(), self.image_edit()
        if prompt is None and edit is None and not local:
            return self.clip.encode_image(images)
        return self.clip.image(images, prompt, edit, tokens=local, attention=local)

    def adapt(self, features: Tensor) -> Tensor:
        """What a trained head makes of image features, (B, E) -> (B, E'); the identity
        by default (CLIP-Adapter, CoPrompt, PromptKD's projector). Cached and fresh
        features both go through it.
        """
        return features

    def encode(self, batch: Batch) -> Tensor:
        """Image features (B, E) of a batch, before normalisation: those it carries if
        frozen ones suffice, else of its images. Leaves local tokens in the batch if the
        method reads them.
        """
        reads = self._reading()
        if batch.features is not None and "images" not in reads:
            if "tokens" not in reads or batch.tokens is not None:
                return self.adapt(batch.features)
        if batch.images is None:
            raise InputError(f"{self.spec} reads images, and the batch holds none")
        if "tokens" not in reads:
            return self.adapt(self.image_features(batch.images))
        image, batch.tokens, batch.attention = self.image_features(batch.images, True)
        return self.adapt(image)

    def _reading(self) -> list[str]:
        reads = self.reads if self.training else self.reads_at_test or self.reads
        return reads.split("+")

    # --- what the two are compared to -------------------------------------------------

    def features(self, batch: Batch):
        """Image features (B, E) and class features, (C, E) or (B, C, E), of a batch,
        before normalisation.
        """
        image = self.encode(batch)
        text = self.text_features(image) if self.conditional else self.class_features()
        return image, text

    def score(self, image: Tensor, text) -> Tensor:
        """Logits (B, C) of features (B, E) and (C, E) or (B, C, E): cosine times CLIP's
        logit scale.
        """
        image = F.normalize(image.float(), dim=-1)
        text = F.normalize(text.float(), dim=-1)
        if text.dim() == 2:
            cosine = image @ text.T
        else:
            cosine = (text @ image[:, :, None]).squeeze(-1)
        return self.clip.logit_scale.float() * cosine

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) of a batch, with gradients where they are enabled."""
        return self.score(*self.features(batch))

    def __call__(self, batch: Batch | Tensor, *args, **kwargs):
        """As :meth:`forward`; images (B, 3, H, W) will do."""
        batch = Batch(images=batch) if isinstance(batch, Tensor) else batch
        return super().__call__(batch, *args, **kwargs)

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

    # --- what a training run asks for -------------------------------------------------

    @classmethod
    def recipe(cls, setting: Setting) -> Recipe:
        """The paper's hyperparameters and optimisation in a setting.

        Raises:
            InputError: the method states none.
        """
        raise InputError(
            f"{cls.name or cls.__name__} states no recipe: add a classmethod"
            " recipe(cls, setting) that returns a Recipe, or give one to fit()"
        )

    def prepare(self, dataset, recipe: Recipe, generator: torch.Generator, stage: int):
        """Called before each stage of training; returns the dataset to train on in it,
        say, with labels of its own making (UPL) or texts in place of images (ProText).

        Methods that only remember training data (Tip-Adapter's cache) do so here. The
        dataset has no test split, and no labels that ``supervision`` does not name.

        Args:
            dataset: what the method may learn from: ``train``, ``val``, and all
                training images without labels as ``unlabelled``.
            recipe: of this stage.
            generator: of all that is random.
            stage: 0, 1, ...; freeze and thaw parameters by it.
        """
        return dataset

    def param_groups(self, recipe: Recipe) -> list[dict]:
        """Optimizer groups; a group may set its own peak ``lr`` and ``weight_decay``
        (DePT's head, ArGue's norms).
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def views(self, images, generator: torch.Generator) -> Tensor:
        """Views (B, V, 3, S, S), normalised, of B images (3, H, W) uint8, for methods
        that read "views" (TPT, AWT, CoPrompt's two); ``self.training`` tells which.
        """
        raise InputError(f"{self.spec} reads views and does not say how to make them")

    def criterion(
        self, batch: Batch, image: Tensor, text, score: Callable | None = None
    ) -> Tensor:
        """The main term of the loss, (): the cross-entropy of the scores by default
        (PromptKD's divergence, LoGoPrompt's selection).

        Args:
            batch, image, text: as in :meth:`regularizer`.
            score: of the outermost plug-in around this method; None: its own.
        """
        return F.cross_entropy((score or self.score)(image, text), batch.labels)

    def regularizer(self, batch: Batch, image: Tensor, text) -> Tensor | float:
        """What the loss adds to the criterion, (); nothing by default (KgCoOp).

        Args:
            batch: B images.
            image: (B, E), their features, before normalisation.
            text: (C, E) or (B, C, E), the class features, before normalisation.
        """
        return 0.0

    def loss(self, batch: Batch) -> Tensor:
        """Training loss of a batch, (): :meth:`criterion` plus :meth:`regularizer`."""
        image, text = self.features(batch)
        return self.criterion(batch, image, text) + self.regularizer(batch, image, text)

    def backward(self, batch: Batch, outer: "Method | None" = None) -> Tensor:
        """Leave in ``.grad`` what the optimizer shall follow; returns the loss to
        report, () (ProGrad's projection, the stages of CasPL).

        Args:
            outer: the outermost plug-in around this method, whose loss it is.
        """
        loss = (outer or self).loss(batch)
        loss.backward()
        return loss.detach()

    def end_epoch(
        self, epoch: int, recipe: Recipe, outer: "Method | None" = None
    ) -> None:
        """Called after each whole epoch (0-based) of a stage. What a method accumulates
        here belongs in ``training_state`` (PromptSRC's average).

        Args:
            outer: the outermost plug-in around this method, whose parameters are
                trained together with its own.
        """

    def finish(self, dataset, recipe: Recipe, generator: torch.Generator) -> None:
        """Called once after the last stage, also when ``max_steps`` cut it or nothing
        is trained: choose what remains on ``dataset.val`` (Tip-Adapter).
        """

    def begin(self, classnames: list[str]) -> None:
        """Called first by training: these are the classes that it learns from now on.

        Raises:
            InputError: what it learns belongs to other classes.
        """
        self.trained_on = list(classnames)
        self.set_classes(self.classnames)  # what follows from trained_on is forgotten

    # --- what every method is ---------------------------------------------------------

    @property
    def taught(self) -> set[str]:
        """What teaches it and its hosts; empty if it learns nothing."""
        kinds = {kind for part in self.nest() for kind in part.supervision.split("+")}
        return kinds - {"none"}

    @property
    def n_parameters(self) -> int:
        """How many numbers it learns."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def spec(self) -> str:
        """The name that ``build`` makes it from, such as ``"dept(maple)"``."""
        return self.name

    def train(self, mode: bool = True):
        """Training mode; a teacher stays in evaluation mode."""
        super().train(mode)
        for name in self.objects():
            if name != "host" and isinstance(getattr(self, name, None), Method):
                getattr(self, name).eval()
        return self

    def _apply(self, fn, recurse=True):
        """Move it, and its CLIP along."""
        probe = fn(torch.zeros(1, device=self.clip.device))
        if probe.dtype != torch.float32:
            raise InputError(
                f"what {self.spec} learns is float32, so it cannot become"
                f" {str(probe.dtype).removeprefix('torch.')}: load its CLIP with"
                " precision='bf16' or 'fp16' instead"
            )
        if probe.device != self.clip.device:
            self.clip.to(probe.device)
        self._remembered = None
        return super()._apply(fn, recurse)

    # --- hyperparameters --------------------------------------------------------------

    @classmethod
    def hyperparameters(cls) -> dict[str, tuple[Any, Any]]:
        """``{name: (annotation, default)}``, from the constructors of the class and of
        those it extends; objects are left out.
        """
        known = hyperparameters.arguments(cls, Method)
        objects = cls.objects()
        return {name: known[name] for name in known if name not in objects}

    @classmethod
    def needs_vit(cls, hparams: dict) -> bool:
        """Whether it works inside the image tower, on tokens and blocks that CLIP's
        ResNet has not; by default if it overrides a hook there, or reads local tokens.
        """
        passed = ("promptkit.method", "promptkit.plugin")  # what a plug-in passes on
        for hook in ("image_prompt", "image_edit"):
            owner = next(base for base in cls.__mro__ if hook in vars(base))
            if owner.__module__ not in passed:
                return True
        return _reads_tokens(cls)

    @classmethod
    def _check_vit(cls, clip):
        if not clip.vit:
            raise InputError(
                f"{cls.name} works on the tokens inside a ViT, and the image tower of"
                f" {clip.name!r} is a ResNet: take a CLIP with a ViT, such as ViT-B-16,"
                " or a method that 'promptkit list' shows with any image tower"
            )

    @classmethod
    def objects(cls) -> dict[str, tuple[Any, Any]]:
        """The arguments that are methods or backbones, likewise: a plug-in's host, a
        teacher (PromptKD, CasPL), further backbones (UPL*). They are no
        hyperparameters: a saved method keeps what a teacher learned, and which
        weights it stands on.
        """
        known = hyperparameters.arguments(cls, Method)
        kinds = (Method, FrozenCLIP)
        return {n: known[n] for n in known if hyperparameters.holds(known[n][0], kinds)}

    @classmethod
    def needs(cls) -> list[str]:
        """Those of its :meth:`objects` that it cannot be made without."""
        empty = inspect.Parameter.empty
        return [n for n, (_, default) in cls.objects().items() if default is empty]

    @classmethod
    def check(cls, given: dict) -> dict:
        """The arguments of its constructor with their defaults filled in.

        Raises:
            InputError: one is unknown (with the nearest name), is not what its
                annotation asks for, or is missing.
        """
        if cls.plugin and not isinstance(given.get("host"), Method):
            raise InputError(
                f"{cls.name} needs host=, a method; by name:"
                f" build('{cls.name}(coop)', ...)"
            )
        known = hyperparameters.arguments(cls, Method)
        return hyperparameters.check(cls.name or cls.__name__, known, given)

    # --- the names of the method's own repository -------------------------------------

    def official_names(self) -> dict[str, str]:
        """``{parameter name in its own repository: name in our state_dict}``."""
        return {}

    def official_state(self, state: dict) -> dict:
        """The state dict of the method's own repository by the names and shapes of
        :meth:`official_names`: renamed, reshaped, unused entries dropped.
        """
        return state

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
        state = self.official_state(dict(state.get("state_dict", state)))
        names, ours = self.official_names(), self.state_dict()
        frozen = {f"text_encoder.{key}" for key in self.clip.model.state_dict()}
        frozen |= {"logit_scale"}
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
        bad = [key for key, value in values.items() if not value.isfinite().all()]
        if bad:
            raise InputError(f"the numbers of {bad[0]} are not finite")
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
        """The method as its own repository would configure it; by name and with hosts,
        see :func:`promptkit.registry.from_official`.

        Args:
            clip: the frozen backbone.
            classnames: the C class names.
            hyperparameters: official names and values, such as
                ``{"N_CTX": 16, "CSC": False}``.
            objects: a host, a teacher.
        """
        return cls(clip, classnames, **cls.official_hparams(hyperparameters), **objects)

    # --- files ------------------------------------------------------------------------

    def describe(self) -> dict:
        """What makes it from its weights, JSON-able: method, hyperparameters, what it
        took from a dataset, classes, backbone, and the same of its teacher.
        """
        about = {
            "method": self.spec,
            "hparams": self.hparams,
            "taken": [part.taken for part in self.nest()],
            "trained_on": self.trained_on,
            "classnames": self.classnames,
            "clip": self.clip.describe(),
        }
        objects = {}
        named = [(part, name) for part in self.nest() for name in part.objects()]
        for part, name in named:
            thing = getattr(part, name, None)
            if name == "host" or name in objects:
                continue
            if isinstance(thing, Method | FrozenCLIP):
                objects[name] = thing.describe()
            elif isinstance(thing, list | tuple):
                objects[name] = [each.describe() for each in thing]
        return about | ({"objects": objects} if objects else {})

    def nest(self) -> list["Method"]:
        """This method, its host, and so on inwards."""
        return [self]

    def save(self, path) -> Path:
        """Write one safetensors file, whole or not at all, whose header holds
        :meth:`describe` as JSON, the hash of the weights, and the versions of the
        libraries. :func:`promptkit.registry.load_method` reads it.
        """
        state = {
            name: t.detach().cpu().contiguous().clone()
            for name, t in self.state_dict().items()
        }
        packages = ("promptkit", "torch", "open_clip_torch")
        config = {"format": 2} | self.describe()
        config |= {"weights": digest(state)}
        config |= {"versions": {package: _version(package) for package in packages}}
        config |= {"digest": digest_of_header(config)}
        data = safetensors_bytes(state, metadata={"promptkit": json.dumps(config)})
        return write_atomically(path, lambda file: file.write(data))


def _reads_tokens(method) -> bool:
    return "tokens" in f"{method.reads}+{method.reads_at_test}".split("+")


def _equal(before: list, now: list) -> bool:
    """Whether two states hold the same numbers; compared by content, since a write to
    ``.data`` leaves no other trace.
    """
    return len(before) == len(now) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, now, strict=True)
    )


# --- registration ---------------------------------------------------------------------

REGISTRY: dict[str, type[Method]] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its ``name``.

    A class may take the place of its earlier self (a notebook's cell that is run
    again), and of no other.

    Raises:
        InputError: the name is missing or taken, or what the class declares is not
            known.
    """
    name = cls.name
    if not (isinstance(name, str) and name.isidentifier()):
        raise InputError(
            f"{cls.__name__} needs name = ..., one word for build() and files, not"
            f" {name!r}"
        )
    taken = REGISTRY.get(name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise InputError(
            f"the name {name!r} is taken by {taken.__module__}.{taken.__qualname__}:"
            f" give {cls.__qualname__} another one"
        )
    for what, choices in (
        ("reads", READS),
        ("reads_at_test", READS),
        ("supervision", SUPERVISION),
    ):
        value = getattr(cls, what)
        for word in value.split("+") if value else ():
            if word not in choices:
                raise unknown(f"{what} of {name}", word, choices)
    unknown_names = set(cls.from_dataset) - set(cls.hyperparameters())
    if unknown_names:
        raise InputError(
            f"{name}: from_dataset names {min(unknown_names)!r}, which is no"
            " hyperparameter"
        )
    REGISTRY[name] = cls
    return cls


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and bytes of a state dict."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_header(about: dict) -> str:
    """SHA-256 over what a saved method says of itself."""
    rest = {key: value for key, value in about.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return None
