"""MaPLe: prompts in both towers, those of the image tower made from those of the text
tower.

MaPLe: Multi-modal Prompt Learning; Khattak et al., CVPR 2023; arXiv 2210.03117.

Deviations: everything is float32 by default, where the paper's runs keep CLIP's
weights, the context and its projection in half precision (deep prompts and their
projections in float32). As in the published code, two learned vectors take the place of
"a photo" alone: "of a" stays in the prompt.
"""

import copy

from torch import nn

from promptkit.method import Method, register
from promptkit.picture import Bridge, Picture, learned, made
from promptkit.prompts import block_prompts, deep_prompts, overwriting_context
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe
from promptkit.towers import Replace


@register
class MaPLe(Method):
    r"""n learned tokens at the input of the first J blocks of both towers, coupled
    block by block.

    .. math:: \tilde p_i = A_i\,p_i + b_i, \qquad i = 0, \dots, J-1

    Text block i reads p_i, (n, D), right behind SOS; image block i reads the coupled
    tokens, (n, Dv), behind the patches. What a block made of the last block's prompts
    is thrown away. Gradients of both towers reach p.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx: n, the number of tokens a block.
        depth: J, blocks with prompts, the first of them included; None: three quarters,
            9 of 12.
        init: the words of the prompt. Their first n tokens learn and the others stay as
            they are; empty: normal, std 0.02, and no other words. None: "a photo of a",
            or with more than 4 tokens no words.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "maple"
    title = "MaPLe"
    year = 2022
    paper = "2210.03117"
    kind = "multi-modal prompt"
    reads = "images"
    picture = Picture(
        text=("SOS", learned("$p_0$"), "of a", "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", made(r"$\tilde{p}_0$")),
        blocks=("1", "2 … J", "J+1 … L"),
        text_blocks={1: learned("$p_i$")},
        image_blocks={1: made(r"$\tilde{p}_i$")},
        bridges=(
            Bridge(learned("$A_0$"), "text tokens", "image tokens"),
            Bridge(learned("$A_i$"), "text 1", "image 1"),
        ),
    )
    official_hyperparameters = {
        "n_ctx": "n_ctx",
        "ctx_init": "init",
        "prompt_depth": "depth",
        "N_CTX": "n_ctx",
        "CTX_INIT": "init",
        "PROMPT_DEPTH": "depth",
        "coupling": None,  # described, never chosen: linear
        "loss": None,  # described, never chosen: cross-entropy
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "base-to-new": usual("MaPLe: its base-to-new runs", "The same."),
        "few-shot": usual(
            "MaPLe: its base-to-new runs",
            "The 5 epochs of base-to-new: on EuroSAT with one shot 10 steps, 2 of them"
            " at the warm-up rate. The few-shot numbers of later papers are theirs.",
            extrapolation=True,
        ),
    } | transfer(
        usual("MaPLe: its cross-dataset runs", "Depth 3, 2 epochs, rate 0.0026.")
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 2,
        depth: int | None = None,
        init: str | None = None,
    ):
        super().__init__(clip, classnames)
        self.depth = deep_prompts(clip, depth, least=1)
        self.context = overwriting_context(clip, self.classnames, n_ctx, init)
        self.couple = nn.Linear(clip.width, clip.vision_width)
        self.deep = block_prompts(self.depth - 1, n_ctx, clip.width)
        projection = nn.Linear(
            clip.width, clip.vision_width
        )  # all start equal, and part in training
        self.couple_deep = nn.ModuleList(copy.deepcopy(projection) for _ in self.deep)

    def text_edit(self):
        start = self.context.start
        return Replace.deep(start, self.deep)

    def image_prompt(self):
        return self.couple(self.context.vectors)  # (n, Dv)

    def image_edit(self):
        behind = self.clip.image_tower.length  # the class token and the patches
        coupled = [A(p) for A, p in zip(self.couple_deep, self.deep, strict=True)]
        return Replace.deep(behind, coupled)

    def official_names(self):
        names = {
            "ctx": "context.vectors",
            "proj.weight": "couple.weight",
            "proj.bias": "couple.bias",
        }
        for i in range(self.depth - 1):
            names[f"compound_prompts_text.{i}"] = f"deep.{i}"
            for part in ("weight", "bias"):
                names[f"compound_prompt_projections.{i}.{part}"] = (
                    f"couple_deep.{i}.{part}"
                )
        return {f"prompt_learner.{official}": ours for official, ours in names.items()}

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; with more than 4 tokens the published code drops the
        words.
        """
        return overwritten(super().official_hparams(hyperparameters))

    @classmethod
    def recipe(cls, setting):
        """The paper's; few-shot runs, which it has not, take the settings of
        base-to-new.
        """
        if setting.protocol in ("cross-dataset", "domain-generalization"):
            return Recipe(hparams={"depth": 3}, epochs=2, batch_size=4, lr=0.0026)
        return Recipe(epochs=5, batch_size=4, lr=0.0035)


def overwritten(hparams: dict) -> dict:
    """Official options as the published code reads them: initial words only where they
    are given and at most 4 tokens learn. An option that is nothing (None) is not given.
    """
    given = {name: value for name, value in hparams.items() if value is not None}
    if "init" in hparams:
        words = hparams["init"] if given.get("n_ctx", 1) <= 4 else ""
        given["init"] = words or ""
    return given
