"""PromptKD: a small prompted image tower learns a large one's predictions, without
labels.

PromptKD: Unsupervised Prompt Distillation for Vision-Language Models; Li et al., CVPR
2024; arXiv 2403.02781.

Deviations: everything is float32 by default, where the published runs are in half
precision. The published code chooses the epoch, and the teacher, by the accuracy on
test images; here the last epoch is the result, and one teacher of seed 1 serves all
students. As in that code, and not in the paper, the divergence is divided by B C and
multiplied by 1000, or 200.

In the transfer protocols the teacher learns on the source, and one student for each
target on that target's images without labels, as published: those for training, and in
the shifted versions, which have none, those for testing.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkit.clip import FrozenCLIP
from promptkit.data import transform
from promptkit.errors import InputError, expect
from promptkit.method import Batch, Method, register
from promptkit.methods.ivlp import IVLP
from promptkit.methods.promptsrc import PromptSRC
from promptkit.picture import Picture, Target, learned
from promptkit.projector import flat, projector, projector_names
from promptkit.prompts import block_prompts, deep_prompts
from promptkit.published import Published, transfer
from promptkit.recipe import Recipe

# Weights of the published scripts where they are not 1000.
LIGHTER = {"fgvc_aircraft": 200.0, "oxford_flowers": 200.0, "dtd": 200.0}


@register
class PromptKD(Method):
    r"""A student without a text tower: deep prompts in its image tower and a projector
    P into the teacher's space, where the teacher's text features W are its classifier.

    With the features f of the student and f' of the teacher,

    .. math:: q = s\,\hat P(f)\,\hat W^\top, \qquad q' = s'\,\hat f'\,\hat W^\top, \\
       L = \lambda\,\frac{T^2}{B C} \sum_{b,c} p'_{bc}
       \log\frac{p'_{bc}}{p_{bc}}, \quad p = \mathrm{softmax}(q / T)

    The teacher was taught on a few labelled images of some classes; the student sees
    images of all classes, and no label. W follows the class names, and the teacher's
    image tower is not run at test time.

    Args:
        clip: the frozen backbone of the student.
        classnames: the C class names.
        teacher: any method with one feature a class; the paper's is PromptSRC on a
            larger CLIP.
        weight: lambda.
        temperature: T, of both softmaxes.
        n_ctx_vision: tokens a block; None: 4.
        depth_vision: blocks of the image tower with prompts; None: three quarters of
            the text tower's, 9 of 12; 0: none, so that the projector alone learns.
        layers: of the projector, with batch normalisation and ReLU between them.
        distil: "predictions", or in their place the "l1" or "mse" distance of the
            normalised image features, with the same weight (ablations).

    Raises:
        InputError: a hyperparameter does not fit, or the teacher's class features
            depend on the image.
    """

    name = "promptkd"
    title = "PromptKD"
    year = 2024
    paper = "2403.02781"
    kind = "distillation"
    reads = "images"
    supervision = "pool"
    by_target = True
    picture = Picture(
        text=("SOS", "teacher's $v$", "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", learned("$q_0$")),
        blocks=("1", "2 … J", "J+1 … L"),
        image_blocks={1: learned("$q_i$")},
        image_out=learned("projector"),
        text_tower="teacher's text tower",
        image_tower="student's image tower",
        targets=(Target("teacher's prediction", "divergence"),),
        images="an image $x$ without a label",
    )
    official_hyperparameters = {
        "n_ctx_vision": "n_ctx_vision",
        "prompt_depth_vision": "depth_vision",
        "kd_weight": "weight",
        "temperature": "temperature",
        "N_CTX_VISION": "n_ctx_vision",
        "PROMPT_DEPTH_VISION": "depth_vision",
        "KD_WEIGHT": "weight",
        "TEMPERATURE": "temperature",
        "teacher_n_ctx": None,  # these three make the teacher, see from_official
        "teacher_depth": None,
        "N_CTX_TEXT": None,
        # of no effect: which classes are tested, and a text branch that is never run
        **dict.fromkeys(
            ("modal", "MODAL", "n_ctx_text", "prompt_depth_text", "PROMPT_DEPTH_TEXT",
             "ctx_init", "CTX_INIT", "ce_weight", "CE_WEIGHT", "PREC")
        ),
    }  # fmt: skip
    published = {
        "base-to-new": Published(
            ("ViT-B-16",),
            (),
            "PromptKD: its base-to-new scripts",
            "20 epochs of 8 images, depth 9; lambda 200 on Flowers102, DTD and"
            " FGVC-Aircraft. The teacher is PromptSRC on ViT-L/14 with 16 shots of the"
            " base classes, at rate 0.005 in batches of 8.",
        ),
        "few-shot": Published(
            ("ViT-B-16",),
            (),
            "PromptKD: its base-to-new scripts",
            "The settings of base-to-new; the teacher learns on all classes.",
            extrapolation=True,
        ),
    } | transfer(
        Published(
            ("ViT-B-16",),
            (),
            "PromptKD: its cross-dataset scripts",
            "Depth 3, the teacher's 9. One student for each target, on the target's"
            " own images.",
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        teacher: Method,
        weight: float = 1000.0,
        temperature: float = 1.0,
        n_ctx_vision: int | None = None,
        depth_vision: int | None = None,
        layers: int = 2,
        distil: Literal["predictions", "l1", "mse"] = "predictions",
    ):
        super().__init__(clip, classnames)
        if teacher.conditional:
            raise InputError(
                f"{self.name} keeps one feature a class, and those of {teacher.spec}"
                " depend on the image: take another teacher, such as promptsrc"
            )
        expect(weight >= 0, "weight", weight, "at least 0")
        expect(temperature > 0, "temperature", temperature, "above 0")
        expect(layers >= 1, "layers", layers, "at least 1")
        depth = deep_prompts(clip, depth_vision)
        n_ctx, used = n_ctx_vision, depth > 0 or n_ctx_vision is None
        expect(used, "n_ctx_vision", n_ctx, "left out where depth_vision is 0")
        n_ctx = 4 if n_ctx is None else n_ctx
        expect(n_ctx >= 1, "n_ctx_vision", n_ctx, "at least 1")
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.distil = distil
        self.vision = block_prompts(depth, n_ctx, clip.vision_width)
        self.project = projector(clip.embed_dim, teacher.clip.embed_dim, layers)
        self._known = None  # what the teacher says of each training image
        self._told = None  # and of the last batch

    # --- the two towers ---------------------------------------------------------------

    def text_features(self, image_features=None):
        """W, (C, E'): the teacher's, which remembers them."""
        with torch.no_grad():
            return self.teacher.class_features()

    image_prompt, image_edit = IVLP.image_prompt, IVLP.image_edit  # of self.vision

    def adapt(self, features):
        """P, (B, E) -> (B, E')."""
        if self.training and len(features) == 1:
            raise InputError(
                f"{self.spec} normalises over a batch, so it cannot train on one image:"
                " give it two or more"
            )
        return self.project(features)

    # --- the teacher ------------------------------------------------------------------

    def prepare(self, dataset, recipe, generator, stage):
        """Without augmentation the teacher looks at each image once."""
        self._known = self._told = None
        if not recipe.augment:
            clip, images = self.teacher.clip, dataset.train.images
            rows = torch.arange(len(dataset.train)).split(64)
            seen = [self._ask(transform(clip, images(part))) for part in rows]
            self._known = torch.cat(seen)
        return dataset

    def finish(self, dataset, recipe, generator):
        self._known = self._told = None

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self._known = self._told = None

    @torch.no_grad()
    def _ask(self, images) -> Tensor:
        """What the teacher says of its own images (B, 3, H, W): logits (B, C), or
        normalised features (B, E') where these are distilled.
        """
        batch = Batch(images=images)
        if self.distil == "predictions":
            return self.teacher.logits(batch)
        return F.normalize(self.teacher.encode(batch), dim=-1)

    def target(self, batch) -> Tensor:
        """What the teacher says of a batch, see `_ask`; of one batch it is asked once,
        however often its terms of the loss need it.
        """
        if self._known is not None and batch.indices is not None:
            return self._known[batch.indices]
        if self._told is None or self._told[0] is not batch.images:
            images = as_seen_by(self.teacher.clip, batch.images, self.clip)
            self._told = batch.images, self._ask(images)
        return self._told[1]

    def criterion(self, batch, image, text, score=None):
        target = self.target(batch)
        if self.distil != "predictions":
            distance = F.l1_loss if self.distil == "l1" else F.mse_loss
            return self.weight * distance(F.normalize(image, dim=-1), target)
        logits = (score or self.score)(image, text)
        return self.weight * divergence(target, logits, self.temperature)

    # --- the names of its own repository ----------------------------------------------

    def official_names(self):
        names = {}
        for n in range(len(self.vision)):
            place = f"transformer.resblocks.{n}.VPT_shallow" if n else "VPT"
            names[f"image_encoder.{place}"] = f"vision.{n}"
        names |= projector_names("VPT_image_trans", "project", self)
        taught = self.teacher.official_names()
        return names | {f"teacher.{key}": f"teacher.{taught[key]}" for key in taught}

    def official_state(self, state):
        """Its convolutions over one pixel are linear layers here; the teacher has a
        checkpoint of its own.
        """
        own, names = self.state_dict(), self.official_names()
        taught = {k: own[names[k]] for k in names if k.startswith("teacher.")}
        return taught | flat(state, self)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; without prompts their length is none."""
        ours = super().official_hparams(hyperparameters)
        if ours.get("depth_vision") == 0:
            ours.pop("n_ctx_vision", None)
        return ours

    @classmethod
    def from_official(
        cls, clip, classnames, hyperparameters, *, teacher=None, **objects
    ):
        """As for any method; of a backbone as the teacher PromptSRC is made, with 4
        tokens in 9 blocks of both towers, or in all that it has.
        """
        ours, options = cls.official_hparams(hyperparameters), hyperparameters
        if ours.get("depth_vision") is not None:
            blocks = len(clip.image_tower.blocks)
            ours["depth_vision"] = min(ours["depth_vision"], blocks)
        if isinstance(teacher, FrozenCLIP):
            depth = int(str(options.get("teacher_depth") or 9).partition(",")[0])
            towers = (teacher.text_tower, teacher.image_tower)
            depth = min(depth, *(len(tower.blocks) for tower in towers))
            n_ctx = options.get("teacher_n_ctx") or 4
            teacher = PromptSRC(
                teacher, classnames, n_ctx=options.get("N_CTX_TEXT") or n_ctx,
                n_ctx_vision=n_ctx, depth=depth, depth_vision=depth,
            )  # fmt: skip
        objects |= {} if teacher is None else {"teacher": teacher}
        return cls(clip, classnames, **ours, **objects)

    @classmethod
    def recipe(cls, setting):
        """The published scripts'; in the mini world its larger CLIP teaches."""
        deep = {"depth": None, "depth_vision": None} if setting.transfer else {}
        teacher = {"method": "promptsrc@mini-teacher"} | deep
        if setting.profile == "full":
            teacher = {"method": "promptsrc@ViT-L-14/openai"} | deep
            teacher |= {"lr": 0.005, "batch_size": 8}
            if setting.protocol == "few-shot":  # as for base-to-new
                teacher |= {"epochs": 20, "gpa_mean": 0.75, "gpa_std": 0.05}
        hparams = {"depth_vision": 3} if setting.transfer else {}
        if setting.dataset in LIGHTER and not setting.transfer:
            hparams["weight"] = LIGHTER[setting.dataset]
        return Recipe(
            hparams, epochs=20, batch_size=8, lr=0.005, objects={"teacher": teacher}
        )


def divergence(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), (), as the mean over all of
    (B, C).
    """
    target = (target / temperature).log_softmax(dim=-1)
    logits = (logits / temperature).log_softmax(dim=-1)
    total = F.kl_div(logits, target, reduction="sum", log_target=True)
    return temperature**2 * total / logits.numel()


def as_seen_by(clip, images: Tensor, normalised_for) -> Tensor:
    """Images (B, 3, H, W) that were made for one CLIP, for another one: its own
    normalisation, and of larger ones the part that its patches cover, as in the
    published code; others are resized.
    """
    if (clip.mean, clip.std) != (normalised_for.mean, normalised_for.std):
        images = clip.normalize(normalised_for.denormalize(images))
    size, patch = clip.image_size, clip.model.visual.conv1.kernel_size[0]
    if images.shape[-1] == size:
        return images
    if images.shape[-1] // patch == size // patch:
        return images[..., :size, :size]
    return F.interpolate(
        images, (size, size), mode="bicubic", antialias=True, align_corners=False
    )
