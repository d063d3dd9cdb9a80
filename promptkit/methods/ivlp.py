"""IVLP: deep prompts in both towers, learned independently; the baseline inside
PromptSRC.

Self-regulating Prompts: Foundational Model Adaptation without Forgetting; Khattak et
al., ICCV 2023; arXiv 2307.06948; also the uncoupled variant of MaPLe (arXiv
2210.03117). Without prompts in one of the towers it is deep language or deep vision
prompting.

Deviations: everything is float32 by default, where the papers' runs keep CLIP's weights
and the context in half precision (the other prompts in float32).
"""

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.methods.maple import overwritten
from promptkit.picture import Picture, learned
from promptkit.prompts import block_prompts, deep_prompts, overwriting_context
from promptkit.published import transfer, usual
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
        n_ctx, n_ctx_vision: n_t and n_v, tokens a block; None: 4.
        depth, depth_vision: J_t and J_v, blocks with prompts; None: three quarters of
            the text tower's, 9 of 12. 0: none in that tower; without text prompts the
            classes are CLIP's "a photo of a {}.".
        init: the words of the prompt. Their first n_t tokens learn and the others stay
            as they are; empty: normal, std 0.02, and no other words. None: "a photo of
            a", or with more than 4 tokens no words.

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
    picture = Picture(
        text=("SOS", learned("$p_0$"), "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", learned("$q_0$")),
        blocks=("1", "2 … J", "J+1 … L"),
        text_blocks={1: learned("$p_i$")},
        image_blocks={1: learned("$q_i$")},
    )
    official_hyperparameters = {
        "n_ctx_text": "n_ctx",
        "n_ctx_vision": "n_ctx_vision",
        "prompt_depth_text": "depth",
        "prompt_depth_vision": "depth_vision",
        "ctx_init": "init",
        "loss": None,  # described, never chosen: cross-entropy
    }
    published = {
        "base-to-new": usual(
            "PromptSRC: its configuration of IVLP",
            "PromptSRC's IVLP. The MaPLe paper's is another: 2+2 tokens, depth 12, rate"
            " 0.0035, 5 epochs; its deep language prompts are 4 tokens and its deep"
            " vision prompts 8, both of depth 12, rate 0.0025, 5 epochs.",
        ),
        "few-shot": usual(
            "PromptSRC: its few-shot runs",
            "PromptSRC's 50 epochs without its regularisers.",
            shots=(1, 2, 4, 8, 16),
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "PromptSRC: its configuration `...ep20...cross_datasets`",
            "PromptSRC's depth 3 without its regularisers.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int | None = None,
        n_ctx_vision: int | None = None,
        depth: int | None = None,
        depth_vision: int | None = None,
        init: str | None = None,
    ):
        super().__init__(clip, classnames)
        text, vision = deep_prompts(clip, depth), deep_prompts(clip, depth_vision)
        expect(
            text + vision > 0,
            "depth",
            depth,
            "above 0 where depth_vision is 0: something has to learn",
        )
        idle = {"n_ctx": n_ctx, "init": init} if not text else {}
        idle |= {"n_ctx_vision": n_ctx_vision} if not vision else {}
        for name, value in idle.items():
            expect(value is None, name, value, "left out: its tower has no prompts")
        n_ctx, n_ctx_vision = (4 if n is None else n for n in (n_ctx, n_ctx_vision))
        expect(n_ctx_vision >= 1, "n_ctx_vision", n_ctx_vision, "at least 1")
        self.context = (
            overwriting_context(clip, self.classnames, n_ctx, init) if text else None
        )
        self.deep = block_prompts(text - 1, n_ctx, clip.width)
        self.vision = block_prompts(vision, n_ctx_vision, clip.vision_width)
        if not vision:  # the image tower's features are CLIP's own, and can be cached
            self.reads = self.reads_at_test = "features"

    @classmethod
    def needs_vit(cls, hparams):
        """Unless its prompts are in the text tower alone."""
        return hparams.get("depth_vision") != 0

    def text_edit(self):
        if self.context is None:
            return None
        start = self.context.start
        return Replace.deep(start, self.deep)

    def image_prompt(self):
        return self.vision[0] if len(self.vision) else None

    def image_edit(self):
        if not len(self.vision):
            return None
        behind = self.clip.image_tower.length  # the class token and the patches
        return Replace.deep(behind, self.vision[1:])

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
    def official_hparams(cls, hyperparameters):
        """As for any method; with more than 4 tokens the published code drops the
        words, and without vision prompts their length says nothing.
        """
        ours = overwritten(super().official_hparams(hyperparameters))
        if ours.get("depth_vision") == 0:
            ours.pop("n_ctx_vision", None)
        return ours

    @classmethod
    def recipe(cls, setting):
        """PromptSRC's, without its regularisers."""
        transfer = setting.protocol in ("cross-dataset", "domain-generalization")
        hparams = {"depth": 3, "depth_vision": 3} if transfer else {}
        epochs = 50 if setting.protocol == "few-shot" else 20
        return Recipe(hparams=hparams, epochs=epochs, batch_size=4, lr=0.0025)
