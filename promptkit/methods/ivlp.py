"""IVLP: deep prompts in both towers, learned independently; the baseline inside
PromptSRC.

Self-regulating Prompts: Foundational Model Adaptation without Forgetting; Khattak et
al., ICCV 2023; arXiv 2307.06948; also the uncoupled variant of MaPLe (arXiv
2210.03117). Without prompts in one of the towers it is deep language or deep vision
prompting.

Deviations: prompts are kept in float32, where the papers' runs use half precision.
"""

import torch
from torch import nn

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.methods.maple import overwriting_context
from promptkit.prompts import deep_prompts
from promptkit.recipe import Recipe
from promptkit.towers import Replace


@register
class IVLP(Method):
    """Learned tokens at the input of the first blocks of both towers; each tower has
    its own, block by block.

    Text block i < J_t reads n_t tokens right behind SOS, image block i < J_v reads n_v
    tokens behind the patches. What a block made of the last block's prompts is thrown
    away.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx, n_ctx_vision: n_t and n_v, tokens a block.
        depth, depth_vision: J_t and J_v, blocks with prompts; None: three quarters of
            the text tower's, 9 of
            12. 0: none in that tower; without text prompts the classes are CLIP's "a
                photo of a {}.".
        init: the words of the prompt. Their first n_t tokens learn and the others stay
            as they are; empty, or with more than 4 tokens: normal, std 0.02, and no
            other words.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "ivlp"
    title = "IVLP"
    year = 2023
    paper = "2307.06948"
    kind = "multi-modal prompt"
    reads = "images"
    official_hyperparameters = {
        "n_ctx_text": "n_ctx",
        "n_ctx_vision": "n_ctx_vision",
        "prompt_depth_text": "depth",
        "prompt_depth_vision": "depth_vision",
        "ctx_init": "init",
        "loss": None,
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 4,
        n_ctx_vision: int = 4,
        depth: int | None = None,
        depth_vision: int | None = None,
        init: str = "a photo of a",
    ):
        super().__init__(clip, classnames)
        expect(n_ctx_vision >= 1, "n_ctx_vision", n_ctx_vision, "at least 1")
        text, vision = deep_prompts(clip, depth), deep_prompts(clip, depth_vision)
        expect(
            text + vision > 0,
            "depth",
            depth,
            "above 0 where depth_vision is 0: something has to learn",
        )
        self.context = (
            overwriting_context(clip, self.classnames, n_ctx, init) if text else None
        )
        self.deep = prompts(text - 1, n_ctx, clip.width)
        self.vision = prompts(vision, n_ctx_vision, clip.vision_width)
        if not vision:  # the image tower's features are CLIP's own, and can be cached
            self.reads = self.reads_at_test = "features"

    def text_edit(self):
        if self.context is None:
            return None
        start = self.context.start
        return Replace({i: (start, p) for i, p in enumerate(self.deep, start=1)})

    def image_prompt(self):
        return self.vision[0] if len(self.vision) else None

    def image_edit(self):
        if not len(self.vision):
            return None
        behind = self.clip.image_tower.length  # the class token and the patches
        deep = list(self.vision)[1:]
        return Replace({i: (behind, p) for i, p in enumerate(deep, start=1)})

    def official_names(self):
        names = {"prompt_learner.ctx": "context.vectors"} if self.context else {}
        for tower, deep, start in (("text", self.deep, 1), ("image", self.vision, 0)):
            ours = "deep" if tower == "text" else "vision"
            for n in range(len(deep)):
                block = (
                    f"transformer.resblocks.{n + start}.VPT_shallow"
                    if n + start
                    else "VPT"
                )
                names[f"{tower}_encoder.{block}"] = f"{ours}.{n}"
        return names

    @classmethod
    def recipe(cls, setting):
        """PromptSRC's, without its regularisers."""
        transfer = setting.protocol in ("cross-dataset", "domain-generalization")
        hparams = {"depth": 3, "depth_vision": 3} if transfer else {}
        epochs = 50 if setting.protocol == "few-shot" else 20
        return Recipe(hparams=hparams, epochs=epochs, batch_size=4, lr=0.0025)


def prompts(blocks: int, length: int, width: int) -> nn.ParameterList:
    """A parameter (length, width) for each block, normal with std 0.02."""
    return nn.ParameterList(
        torch.empty(length, width).normal_(0, 0.02) for _ in range(blocks)
    )
