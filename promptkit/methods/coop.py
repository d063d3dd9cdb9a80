"""CoOp: learn the words around the class name.

Learning to Prompt for Vision-Language Models; Zhou et al., IJCV 2022; arXiv 2109.01134.

Deviations: the context is stored and optimised in float32, where the paper's runs keep
it in half precision. Everything else follows the published code, "front" among the
class positions included, which the paper does not have.
"""

from typing import Literal

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.prompts import Context
from promptkit.recipe import Recipe


@register
class CoOp(Method):
    r"""M learned vectors in the space of token embeddings take the place of "a photo of
    a".

    .. math:: t_c = [\mathrm{SOS}]\,[v_1] \dots [v_M]\,[\mathrm{class}_c]\,[.]\,[\mathrm{EOT}], \qquad
       p(y = c \mid x) \propto \exp(s \cos(f(x), g(t_c)))

    Both towers f and g stay frozen; the cross-entropy of a few labelled images trains v
    alone.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx: M, the number of vectors. With ``init`` it is the number of words there,
            whatever is asked for here.
        init: words whose embeddings the vectors start from, such as "a photo of a";
            empty: normal, std 0.02.
        position: of the class name: after the context, in its middle (M // 2 vectors
            come first) or before it.
        class_specific: each class has its own context, which then cannot serve other
            classes. Without effect with ``init``, as in the published code.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "coop"
    title = "CoOp"
    year = 2021
    paper = "2109.01134"
    kind = "prompt"
    official_hyperparameters = {
        "N_CTX": "n_ctx",
        "CTX_INIT": "init",
        "CLASS_TOKEN_POSITION": "position",
        "CSC": "class_specific",
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 16,
        init: str = "",
        position: Literal["end", "middle", "front"] = "end",
        class_specific: bool = False,
    ):
        super().__init__(clip, classnames)
        expect(n_ctx >= 1, "n_ctx", n_ctx, "at least 1")
        self.context = Context(
            clip,
            self.classnames,
            length=None if init else n_ctx,
            words=init or None,
            position=position,
            class_specific=class_specific and not init,
        )

    def official_names(self):
        return {"prompt_learner.ctx": "context.vectors"}

    @classmethod
    def recipe(cls, setting):
        """The paper's few-shot runs; the other protocols as the CoCoOp paper ran them
        (arXiv 2203.05557).
        """
        words = {"n_ctx": 4, "init": "a photo of a"}
        if setting.protocol in ("cross-dataset", "domain-generalization"):
            return Recipe(hparams=words, epochs=50)
        if setting.protocol == "base-to-new":
            return Recipe(
                hparams=words, epochs=50 if setting.dataset == "imagenet" else 200
            )
        epochs = 50 if setting.shots <= 1 else 100 if setting.shots <= 4 else 200
        return Recipe(
            hparams={"n_ctx": 16},
            epochs=50 if setting.dataset == "imagenet" else epochs,
        )
