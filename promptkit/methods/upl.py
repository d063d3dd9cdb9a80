"""UPL: CoOp on pseudo-labels of zero-shot CLIP, several times over.

Unsupervised Prompt Learning for Vision-Language Models; Huang et al., 2022; arXiv
2204.03649.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the context in half precision. All members of the ensemble learn from the
same batches, where the published ones draw each their own; their initial values differ
in both. Confidences that are equal keep the order of the pool.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptkit.clip import FrozenCLIP, zero_shot_features
from promptkit.data import frozen_features
from promptkit.errors import InputError, expect, expect_templates
from promptkit.method import register
from promptkit.methods.clip import CLIP
from promptkit.methods.coop import CoOp
from promptkit.picture import Target
from promptkit.published import Published, everywhere
from promptkit.recipe import Recipe

RULES = Literal["per_class", "global", "threshold", "per_class_or_threshold"]
CHUNK = 65_536  # images that get their class probabilities together


@register
class UPL(CoOp):
    r"""Zero-shot CLIP labels the pool of images; the K most confident ones of each
    predicted class train R contexts, whose logits are averaged.

    .. math:: \bar p_i = \frac1S \sum_{s=1}^{S} p^{(s)}(\cdot \mid x_i), \qquad
       \tilde y_i = \arg\max_c \bar p_{ic}, \qquad
       z_{bc} = \frac1R \sum_{r=1}^{R} s\,\hat f_b^\top \hat w^{(r)}_c

    A class that CLIP never predicts contributes no image and stays a class. With S > 1
    backbones it is the paper's UPL*. Labels are made once, and count all the same.

    Args:
        clip: the frozen backbone; the first of the S that label.
        classnames: the C class names.
        top_k: K, images of each predicted class; -1: all.
        rule: what is chosen. "per_class": the paper's; "global": the K C most confident
            images of all; "threshold": all above it; "per_class_or_threshold": those
            that either rule takes.
        threshold: of the confidence, from 0 to 1.
        members: R, contexts of the ensemble.
        template: of the sentence that labels, or several for an ensemble. None: that of
            the dataset it is aimed at, "a photo of a {}." before.
        backbones: further ones that label, S - 1.
        n_ctx, init, position, class_specific: the contexts, as in CoOp. With words all
            members would be the same.

    Attributes:
        context: its ``vectors`` are (R, 1, M, D), or (R, C, M, D) if class-specific.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "upl"
    title = "UPL"
    year = 2022
    paper = "2204.03649"
    supervision = "pool"
    picture = replace(
        CoOp.picture,
        targets=(Target("zero-shot CLIP’s labels", "cross-entropy"),),
        images="an image $x$ without a label",
        text_feature="mean class feature $w_c$",
        note="16 contexts, whose class features are averaged",
    )
    from_dataset = {"template": CLIP.from_dataset["template"]}
    official_hyperparameters = CoOp.official_hyperparameters | {
        "n_ctx": "n_ctx",
        "class_specific_context": "class_specific",
        "class_token_position": "position",
        "template": "template",
        "top_k": "top_k",
        "prompt_ensemble": "members",
        "pseudo_label_models": None,  # counts the backbones
        "CLASS_EQULE": None,  # of no effect on what is trained: it is per class
        "CONF_THRESHOLD": None,
    }
    published = everywhere(
        Published(
            ("RN50",),
            (),
            "UPL: its 16 runs",
            "The settings of few-shot. In base-to-new the pool has images of all"
            " classes; a transfer learns on the source's.",
            extrapolation=True,
        )
    ) | {
        "few-shot": Published(
            ("RN50",),
            (),
            "UPL: its 16 runs",
            "All images for training, without labels, and all classes: none is new to"
            " it.",
        )
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        top_k: int = 16,
        rule: RULES = "per_class",
        threshold: float = 0.9,
        members: int = 16,
        template: str | list[str] | None = None,
        backbones: list[FrozenCLIP] | None = None,
        n_ctx: int | None = None,
        init: str = "",
        position: Literal["end", "middle", "front"] = "end",
        class_specific: bool = False,
    ):
        about = {"position": position, "class_specific": class_specific}
        super().__init__(clip, classnames, n_ctx=n_ctx, init=init, **about)
        expect(top_k >= 1 or top_k == -1, "top_k", top_k, "at least 1, or -1 for all")
        expect(0 <= threshold <= 1, "threshold", threshold, "from 0 to 1")
        expect(members >= 1, "members", members, "at least 1")
        expect(
            members == 1 or not init,
            "members",
            members,
            f"1 where all would start from init={init!r}",
        )
        expect_templates("template", template)
        self.top_k, self.rule, self.threshold = top_k, rule, threshold
        self.backbones = list(backbones or [])
        first = self.context.vectors.detach()
        more = [torch.empty_like(first).normal_(0, 0.02) for _ in range(members - 1)]
        stack = torch.stack([first, *more])
        self.context.vectors = nn.Parameter(
            stack if class_specific else stack[:, None]
        )  # (R, 1 or C, M, D)

    @property
    def templates(self) -> list[str]:
        """The sentences that label, as they stand."""
        template = self.option("template")
        return [template] if isinstance(template, str) else list(template)

    # --- pseudo-labels ----------------------------------------------------------------

    def probabilities(self, features: list[Tensor]) -> Tensor:
        r"""p̄, (N, C): the mean over the backbones of their zero-shot probabilities.

        Args:
            features: of the same images, (N, E_s) for each backbone s, this one first.
        """
        total = torch.zeros(len(features[0]), len(self.classnames))
        for clip, images in zip([self.clip, *self.backbones], features, strict=True):
            text = zero_shot_features(clip, self.classnames, self.templates)
            # All of ImageNet's at once would be 5 GB, several times over.
            for part, of in zip(images.split(CHUNK), total.split(CHUNK), strict=True):
                cosine = F.normalize(part.float(), dim=-1) @ text.T
                of += (clip.logit_scale * cosine).softmax(dim=-1).cpu()
        return total.div_(len(features))

    def prepare(self, dataset, recipe, generator, stage):
        """The dataset with the chosen images of the pool, and CLIP's labels."""
        pool = dataset.unlabelled
        clips = [self.clip, *self.backbones]
        p = self.probabilities([frozen_features(clip, pool) for clip in clips])
        index, labels, _ = select(p, self.rule, self.top_k, self.threshold)
        if len(pool) and not len(index):
            raise InputError(
                f"no image of {dataset.name} has a confidence above"
                f" threshold={self.threshold}: lower it, or use rule='per_class'"
            )
        return replace(dataset, train=pool.take(index, labels))

    # --- the ensemble -----------------------------------------------------------------

    def member_features(self) -> Tensor:
        """ŵ of each member, (R, C, E), normalised."""
        return F.normalize(self.clip.text(self.context.prompt()), dim=-1)

    def text_features(self, image_features=None):
        """The members' mean, (C, E): not normalised again, so that its score is the
        mean of theirs.
        """
        return self.member_features().mean(dim=0)

    def score(self, image, text):
        return self.clip.logit_scale * F.normalize(image.float(), dim=-1) @ text.T

    def member_logits(self, image: Tensor) -> Tensor:
        """(R, B, C) of features (B, E)."""
        return torch.stack([self.score(image, text) for text in self.member_features()])

    def loss(self, batch):
        """The sum of the members' losses: each follows its own gradient alone."""
        logits = self.member_logits(self.encode(batch))
        return sum(F.cross_entropy(z, batch.labels) for z in logits)

    def official_names(self):
        return {"prompt_learner.ctx": "context.vectors"}

    def official_state(self, state):
        """Contexts as CoOp's code keeps them, (M, D) or (C, M, D), become one tensor:
        "ctx" of one run, or "ctx/0", "ctx/1", ... of R runs.
        """
        state = {k.removeprefix("prompt_learner."): x for k, x in state.items()}
        shape = self.context.vectors.shape
        own = shape[1:] if self.context.class_specific else shape[2:]
        runs = [state.pop(f"ctx/{r}") for r in range(shape[0]) if f"ctx/{r}" in state]
        runs = runs or [state[name] for name in ("ctx",) if name in state]
        if len(runs) == shape[0] and all(x.shape == own for x in runs):
            state["ctx"] = torch.stack(runs).view(shape)
        return state

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for CoOp; any negative K takes all images."""
        ours = super().official_hparams(hyperparameters)
        return ours | {"top_k": max(ours["top_k"], -1)} if "top_k" in ours else ours

    @classmethod
    def recipe(cls, setting):
        """The paper's, the same everywhere."""
        return Recipe(epochs=50)


def select(
    p: Tensor, rule: str = "per_class", k: int = 16, threshold: float = 0.9
) -> tuple[Tensor, Tensor, Tensor]:
    """The images to learn from, by their probabilities p (N, C).

    Args:
        rule: as in :class:`UPL`.
        k: images a class, -1 for all; of the rule "global" k C in all.

    Returns:
        Positions (n,), labels (n,) and confidences (n,): by class and then falling
        confidence, without classes ("global", "threshold") by confidence alone.
    """
    confidence, label = p.max(dim=-1)
    order = confidence.argsort(descending=True, stable=True)
    label = label[order]
    if rule == "threshold":
        keep = confidence[order] > threshold
    elif rule == "global":
        keep = torch.arange(len(order), device=order.device) < (
            k * p.shape[1] if k >= 0 else len(order)
        )
    else:
        by_class = label.argsort(stable=True)
        order, label = order[by_class], label[by_class]
        counts = label.bincount(minlength=p.shape[1])
        rank = torch.arange(len(label), device=label.device)
        rank = rank - (counts.cumsum(0) - counts)[label]  # 0, 1, ... in a class
        keep = rank < k if k >= 0 else torch.ones_like(rank, dtype=torch.bool)
        if rule == "per_class_or_threshold":
            keep |= confidence[order] > threshold
    return order[keep], label[keep], confidence[order][keep]
