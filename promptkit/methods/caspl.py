"""CasPL: prompts for the domain first, distilled without labels from a larger CLIP;
then, beside them and frozen, any method's prompts for the labels.

Cascade Prompt Learning for Vision-Language Model Adaptation; Wu et al., ECCV 2024;
arXiv 2409.17805.

Alone, ``caspl`` is the first stage: CLIP and its boosting prompts. Over a host it is
both. The boosting prompts of a task are made once, whatever the host, the seed and the
shots: they are kept in the cache folder under everything that they follow from, and
found there again.

Deviations: everything is float32 by default, where the paper's runs keep CLIP's weights
and the contexts in half precision. Where the two sets of prompts have different depths,
each is replaced in its own blocks and passes through the others, as in the published
code for MaPLe; its code for PromptSRC leaves out boosting prompts there, or draws some
at random. As in that code, initial words of which fewer tokens learn stay behind these
in the first stage, and not beside a host's. Its CoOp script gives 8 tokens four words,
so that class names are overwritten; here words set the length. Prompts in the image
tower have no positions, so their order is nothing to it: here the boosting prompts come
last.
"""

import json
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256

import torch
import torch.nn.functional as F

from promptkit.boosting import Boosting
from promptkit.clip import FrozenCLIP, check_classnames, zero_shot_features
from promptkit.data.features import frozen_features
from promptkit.errors import InputError, expect
from promptkit.files import cache_folder
from promptkit.identity import of_code
from promptkit.method import Method, register
from promptkit.methods.kgcoop import PLAIN, TEMPLATES
from promptkit.picture import Picture, Target, learned
from promptkit.plugin import Plugin
from promptkit.prompts import deep_prompts
from promptkit.published import Published, transfer
from promptkit.recipe import Recipe
from promptkit.towers import Edits

SEED = 1  # of the first stage, whose result all seeds of the second share
TAUGHT = TEMPLATES | {"dtd": "{} texture."}  # the teacher's, by dataset


def template_of(dataset) -> str:
    """The teacher's prompt on a dataset; in the mini world the dataset's own."""
    if dataset is not None and dataset.world == "mini":
        return dataset.template
    return TAUGHT.get(dataset.name, PLAIN) if dataset else PLAIN


class Bare(Method):
    """CLIP without prompts of its own: what boosting prompts extend where no host is
    named.
    """

    name, title, seeded = "bare", "CLIP", False
    context = None
    picture = Picture(text=("SOS", "[class]", ".", "EOT"))


@register
class CasPL(Plugin):
    r"""Boosting prompts b, then a host's adapting prompts a beside them.

    The first stage trains b alone, on all images of the task without labels and with
    the names of all its classes, against a larger CLIP with a hand-written prompt:

    .. math:: L_1 = T^2\,\frac1B \sum_{i,c} q_{ic} (\log q_{ic} - \log p_{ic}), \\
       p = \mathrm{softmax}(z / T),\; q = \mathrm{softmax}(z^{teacher} / T)

    with the student's logit scale in both. The second stage freezes b and trains the
    host with its own loss; text block i < J and the image tower's read

    .. math:: [\mathrm{SOS}]\,[a_i]\,[b_i]\,[\mathrm{class}_c]\,[.]\,[\mathrm{EOT}], \\
       [\mathrm{CLS}]\,[\mathrm{patches}]\,[\tilde a_i]\,[\tilde b_i].

    What a host compares itself with (PromptSRC's frozen features) stays the plain CLIP.

    The first stage of the recipe is this one, the others are the host's. With 0 epochs
    in it the boosting prompts stay as they are.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        host: the method to extend. None: boosting prompts alone.
        teacher: a CLIP of the same image size; only the first stage asks for it, and a
            saved method leaves it out.
        n_text, n_vision: n and n', boosting tokens a block in each tower.
        depth: J, blocks with boosting prompts; None: all.
        init: words that start those of the first text block. None: "a photo of a" where
            n_text is at most 4; empty: normal, std 0.02.
        temperature: T.
        weight: of L_1.
        template: the teacher's prompt, with "{}" for the class name. None: the
            published one of the dataset it is aimed at.
        freeze: False is the ablation, which trains b in the second stage too.

    Raises:
        InputError: a hyperparameter or a class name does not fit, the host's class
            name does not end its prompt, or the whole is too long for the text tower.
    """

    name = "caspl"
    title = "CasPL"
    year = 2024
    paper = "2409.17805"
    kind = "plug-in"
    seeded = False
    supervision = "pool"
    hosts = ("coop", "cocoop", "maple", "promptsrc")
    default_host = (Bare, {})
    replaces = ("loss",)
    picture = Picture(
        text=("SOS", learned("host's $a$"), learned("$b$"), "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", learned(r"any of host, $\tilde{b}$")),
        targets=(Target("larger CLIP, no labels", "divergence"),),
        note="b is learned first, then frozen",
    )
    from_dataset = {"template": template_of}
    official_hyperparameters = {
        "n_boost_text": "n_text",
        "n_boost_vision": "n_vision",
        "depth": "depth",
        "depth_boost": "depth",
        "depth_adapt": None,
        "ctx_init": "init",
        "temperature": "temperature",
        "kd_weight": "weight",
        "teacher_template": "template",
        "host": None,
        "n_adapt": None,  # these make the host, see from_official
        "n_adapt_text": None,
        "n_adapt_vision": None,
    }
    published = {
        "base-to-new": Published(
            ("ViT-B-16",),
            (16,),
            "CasPL: its runs over each host",
            "8 + 8 tokens in all 12 blocks; a ViT-L/14 teaches.",
        ),
        "few-shot": Published(
            ("ViT-B-16",),
            (1, 2, 4, 8, 16),
            "CasPL: its few-shot runs of PromptSRC",
            "As base-to-new, PromptSRC with 50 epochs; no other host was run.",
        ),
        **transfer(
            Published(
                ("ViT-B-16",),
                (16,),
                "CasPL: its domain generalization",
                "4 boosting tokens in the first block. Transfer to other datasets was"
                " not published.",
            ),
            shifts_alone=True,
        ),
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        host: Method,
        teacher: FrozenCLIP | None = None,
        n_text: int = 8,
        n_vision: int = 8,
        depth: int | None = None,
        init: str | None = None,
        temperature: float = 1.0,
        weight: float = 1.0,
        template: str | None = None,
        freeze: bool = True,
    ):
        super().__init__(clip, classnames, host=host)
        if depth is None:
            depth = min(len(clip.text_tower.blocks), len(clip.image_tower.blocks))
        depth = deep_prompts(clip, depth, least=1)
        for name, n in {"n_text": n_text, "n_vision": n_vision}.items():
            expect(n >= 1, name, n, "at least 1")
        for name, x in {"temperature": temperature, "weight": weight}.items():
            expect(x > 0, name, x, "above 0")
        fine = template is None or "{}" in template
        expect(fine, "template", template, "a sentence with {} for the class name")
        words = "a photo of a" if init is None else init.replace("_", " ")
        words = words if n_text <= 4 else ""
        fits = not words or len(clip.encode(words)) >= n_text
        expect(fits, "init", init, f"at least the {n_text} tokens that learn")
        self.boosting = Boosting(clip, n_text, n_vision, depth, words)
        self.temperature, self.weight, self.freeze = temperature, weight, freeze
        self.__dict__["teacher"] = teacher
        context = getattr(host.nest()[-1], "context", None)
        self.bare = context is None
        if not self.bare:
            expect(context.position == "end", "position", context.position, "'end'")
            self.boosting.enter(context)
        self.single = isinstance(host, Bare)  # the first stage is all there is
        self._second()

    # --- the towers -------------------------------------------------------------------

    def text_prompt(self, image_features=None):
        if self.bare:
            return self.boosting.prompt(self.classnames)
        return super().text_prompt(image_features)

    def text_edit(self):
        start = 1 if self.bare else self.context.template.starts[-1]
        return Edits(super().text_edit(), self.boosting.edit("text", start))

    def image_prompt(self):
        theirs, ours = super().image_prompt(), self.boosting.vision[0]
        if theirs is None:
            return ours
        ours = ours.expand(*theirs.shape[:-2], -1, -1)
        return torch.cat([theirs, ours], dim=-2)

    def image_edit(self):
        before = self.image_prompt().shape[-2] - len(self.boosting.vision[0])
        behind = self.clip.image_tower.length + before
        return Edits(super().image_edit(), self.boosting.edit("vision", behind))

    # --- the first stage --------------------------------------------------------------

    def loss(self, batch):
        return self.divergence(batch) if self.first else super().loss(batch)

    def divergence(self, batch):
        """L_1, ()."""
        T, names = self.temperature, self.pool_names or self.classnames
        pairs = (
            self.boosting.features(batch.images, names),
            (self.taught_image(batch), self.taught_text),
        )
        ours, theirs = (
            (Method.score(self, *pair) / T).log_softmax(dim=-1) for pair in pairs
        )
        divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.weight * T**2 * divergence

    @torch.no_grad()
    def taught_image(self, batch):
        """The teacher's image features, (B, E')."""
        if self.taught_images is not None:
            return self.taught_images[batch.indices.to(self.taught_images.device)]
        teacher, images = self._teacher(), batch.images
        if (teacher.mean, teacher.std) != (self.clip.mean, self.clip.std):
            images = teacher.normalize(self.clip.denormalize(images))
        patches = (images.shape[-1] // teacher.model.visual.conv1.stride[0]) ** 2
        if patches + 1 != teacher.image_tower.length:
            raise InputError(
                f"the teacher {teacher.name!r} reads images of {teacher.image_size}"
                f" pixels and {self.clip.name!r} of {self.clip.image_size}: take a"
                " teacher of the same size"
            )
        return teacher.image_tower(images)  # what exceeds its patches goes unread

    @cached_property
    def taught_text(self):
        """The teacher's class features, (C, E')."""
        names = self.pool_names or self.classnames
        return zero_shot_features(self._teacher(), names, self.option("template"))

    def _teacher(self):
        if self.teacher is None:
            raise InputError(
                f"{self.spec} learns its boosting prompts from a teacher, a larger"
                " CLIP: give it one by teacher=, in a run by teacher=@MODEL"
            )
        return self.teacher.to(self.clip.device)

    # --- stages -----------------------------------------------------------------------

    def prepare(self, dataset, recipe, generator, stage):
        if stage == 0:
            return self._first(dataset, recipe, generator)
        self._second()
        if "generator" in self.training_state:
            generator.set_state(self.training_state["generator"].cpu())
        return self.host.prepare(dataset, recipe, generator, stage - 1)

    def _first(self, dataset, recipe, generator):
        """Aim at the pool: its images, and the names of all classes."""
        pool, names = dataset.unlabelled, dataset.pool_classnames or dataset.classnames
        self.training_state["generator"] = generator.get_state()
        given = replace(dataset, train=pool)
        self.first, self.reads = True, "images"
        self.pool_names = check_classnames(names, allow_duplicates=True)
        vars(self).pop("taught_text", None)
        self.kept, self.found = None, recipe.epochs == 0
        if self.found:
            return given
        generator.manual_seed(SEED)
        self.boosting.requires_grad_(True).draw(generator)
        self.kept = self._artefact(pool, recipe)
        self.found = self.boosting.read(self.kept)
        teacher = self._teacher()
        same_size = teacher.image_size == self.clip.image_size
        if not (self.found or recipe.augment) and same_size:
            self.taught_images = frozen_features(teacher, pool)
        return given

    def _second(self):
        """Aim at the host's own training; boosting prompts alone have none."""
        host = self.host
        self.first, self.found, self.kept = self.single, False, None
        self.pool_names = self.taught_images = None
        vars(self).pop("taught_text", None)
        self.boosting.requires_grad_(self.single or not self.freeze)
        self.reads, self.reads_at_test = (
            reads if "images" in reads else reads.replace("features", "images")
            for reads in (host.reads, host.reads_at_test or host.reads)
        )

    def _artefact(self, pool, recipe):
        """Where boosting prompts are kept that follow from the same: backbones, images,
        names, hyperparameters, recipe and code.
        """
        own = ("n_text", "n_vision", "init", "temperature", "weight")
        clips = self.clip, self._teacher()
        about = {name: self.hparams[name] for name in own} | {
            "depth": len(self.boosting.text),
            "template": self.option("template"),
            "clips": [(clip.fingerprint, clip.precision) for clip in clips],
            "pool": pool.identity,
            "names": self.pool_names,
            "recipe": asdict(replace(recipe, hparams={}, objects={}, stages=())),
            "seed": SEED,
            "code": of_code("caspl"),
        }
        key = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        return cache_folder("boosting") / f"{key}.safetensors"

    def param_groups(self, recipe):
        if self.first:
            return [{"params": [] if self.found else list(self.boosting.parameters())}]
        return super().param_groups(recipe)

    def backward(self, batch, outer=None):
        if self.first:  # whatever stands around it, this stage is its own
            return Method.backward(self, batch)
        return super().backward(batch, outer)

    @torch.no_grad()
    def end_epoch(self, epoch, recipe, outer=None):
        if not self.first:
            kept = [p.clone() for p in self.boosting.parameters()]
            super().end_epoch(epoch, recipe, outer)
            if self.freeze:  # an average over epochs gives them back but for rounding
                for p, value in zip(self.boosting.parameters(), kept, strict=True):
                    p.copy_(value)
        elif epoch == recipe.epochs - 1 and self.kept is not None:
            self.boosting.write(self.kept)

    def finish(self, dataset, recipe, generator):
        self._second()
        super().finish(dataset, recipe, generator)

    def describe(self):
        """As for any method, without the teacher, whom only training asks."""
        about = super().describe()
        about.pop("objects", None)
        return about

    # --- the published code -----------------------------------------------------------

    def official_names(self):
        names = super().official_names()
        for i in range(len(self.boosting.text)):
            deep = f"transformer.resblocks.{i}.VPT_shallow_FIRST"
            text = f"text_encoder.{deep}" if i else "prompt_learner_teacher.ctx"
            names[text] = f"boosting.text.{i}"
            image = f"image_encoder.{deep if i else 'VPT_FIRST'}"
            names[image] = f"boosting.vision.{i}"
        return names

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method; the lengths and the depth of the adapting prompts, and the
        words, are those of the host, which is made anew with them.
        """
        host = objects.get("host")
        if host is not None and not host.plugin:
            options = host.hparams | _adapting(type(host), hyperparameters)
            objects["host"] = type(host)(clip, classnames, **options)
        if host is not None:
            hyperparameters = {
                name: value for name, value in hyperparameters.items()
                if name != "ctx_init"
            }  # fmt: skip
        return super().from_official(clip, classnames, hyperparameters, **objects)

    @classmethod
    def needs(cls):
        """The first stage, with which a run begins, asks for the teacher."""
        return [*super().needs(), "teacher"]

    @classmethod
    def recipe(cls, setting):
        """The published code's: the first stage, then the host's own training."""
        name = setting.host.names[-1] if setting.host else None
        depth = 3 if name == "cocoop" else 1
        own = {"n_text": 4, "n_vision": 4, "depth": depth} if setting.transfer else {}
        larger = "@ViT-L-14/openai" if setting.profile == "full" else "@mini-teacher"
        objects, size = {"teacher": larger}, 128 if setting.dataset == "imagenet" else 4
        first = Recipe(own, epochs=20, batch_size=size, lr=0.0025, objects=objects)
        if setting.host is None:
            return first
        host = setting.host.recipe
        if len(setting.host.names) == 1:
            host = _beside(name, host, setting)
        second = replace(host, hparams={}, stages=())
        hparams = own | {"host": host.hparams}
        return replace(first, hparams=hparams, stages=(second, *host.stages))


def _adapting(host, given) -> dict:
    """Hyperparameters of a host from the published names of the adapting prompts."""
    known, words = host.hyperparameters(), given.get("ctx_init")
    n, depth = given.get("n_adapt"), given.get("depth_adapt", given.get("depth"))
    ours = {"n_ctx": given.get("n_adapt_text", n), "depth": depth}
    ours |= {"n_ctx_vision": given.get("n_adapt_vision", n), "depth_vision": depth}
    ours = {k: v for k, v in ours.items() if k in known and v is not None}
    if "depth" not in known:
        return ours | {"init": words or ""} | ({"n_ctx": None} if words else {})
    if words is not None:  # deep prompts take words only where they are short
        ours["init"] = words if ours.get("n_ctx", 1) <= 4 else ""
    return ours


def _beside(name, host, setting):
    """A host's recipe as the published code changes it beside boosting prompts."""
    n, deep = {"n_ctx": 8}, {"depth": 12} if setting.profile == "full" else {}
    if name == "maple":
        return replace(host, hparams=n | deep)
    if name == "promptsrc":
        own = host.hparams | n | {"n_ctx_vision": 8}
        both = deep | {f"{key}_vision": J for key, J in deep.items()}
        return replace(host, hparams=own if setting.transfer else own | both)
    if name == "coop" and setting.transfer:
        return replace(host, epochs=10, batch_size=4, lr=0.0035)
    if name == "coop":
        return replace(host, hparams=n, epochs=50)
    if name == "cocoop" and not setting.transfer:
        return replace(host, hparams=n | {"init": ""})
    return host
