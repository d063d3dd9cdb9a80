"""CoOp: learn the words around the class name.

Learning to Prompt for Vision-Language Models; Zhou et al., IJCV 2022; arXiv 2109.01134.

Deviations: everything is float32 by default, where the paper's runs keep CLIP's weights
and the context in half precision. All else follows the published code, "front" among
the class positions included, which the paper does not have.
"""

from typing import Literal

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.picture import Picture, learned
from promptkit.prompts import Context
from promptkit.published import Published, transfer, usual
from promptkit.recipe import Recipe


@register
class CoOp(Method):
    r"""M learned vectors in the space of token embeddings take the place of "a photo of
    a".

    .. math:: t_c = [\mathrm{SOS}]\,[v_1] \dots [v_M]\,[\mathrm{class}_c]\,[.]\,
       [\mathrm{EOT}], \qquad p(y = c \mid x) \propto \exp(s \cos(f(x), g(t_c)))

    Both towers f and g stay frozen; the cross-entropy of a few labelled images trains v
    alone.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx: M, the number of vectors. None: 16, or the number of words in ``init``.
        init: words whose embeddings the vectors start from, such as "a photo of a";
            empty: normal, std 0.02.
        position: of the class name: after the context, in its middle (M // 2 vectors
            come first) or before it.
        class_specific: each class has its own context, which then cannot serve other
            classes. Not with ``init``, whose words all classes share.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "coop"
    title = "CoOp"
    year = 2021
    paper = "2109.01134"
    kind = "prompt"
    picture = Picture(text=("SOS", learned("$v_1$ … $v_M$"), "[class]", ".", "EOT"))
    default_n_ctx = 16  # where neither n_ctx nor words say how many
    official_hyperparameters = {
        "N_CTX": "n_ctx",
        "CTX_INIT": "init",
        "CLASS_TOKEN_POSITION": "position",
        "CSC": "class_specific",
        "n_ctx": "n_ctx",  # these two as other configurations write them
        "class_token_position": "position",
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "few-shot": Published(
            ("RN50", "RN101", "ViT-B-32", "ViT-B-16"),
            (1, 2, 4, 8, 16),
            "CoOp: its few-shot runs (`COOP.md`)",
            "16 random vectors, the class name at the end. The documented runs and"
            " figures are RN50's.",
        ),
        "base-to-new": usual(
            "CoOp: as run in the CoCoOp paper",
            '4 vectors from "a photo of a", 200 epochs, of ImageNet 50.',
        ),
    } | transfer(
        usual(
            "CoOp: as run in the CoCoOp paper",
            "4 vectors from words, 50 epochs, which every later table quotes; CoOp's"
            " own script has 16 random vectors.",
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int | None = None,
        init: str = "",
        position: Literal["end", "middle", "front"] = "end",
        class_specific: bool = False,
    ):
        super().__init__(clip, classnames)
        check_words(n_ctx, init)
        expect(
            not (init and class_specific),
            "class_specific",
            class_specific,
            f"False where init={init!r} starts the context, which all classes share",
        )
        self.context = Context(
            clip,
            self.classnames,
            length=n_ctx or (None if init else self.default_n_ctx),
            words=init or None,
            position=position,
            class_specific=class_specific,
        )

    def official_names(self):
        return {"prompt_learner.ctx": "context.vectors"}

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; initial words decide, where there are any: they set the
        length, and one context serves all classes.
        """
        return words_first(super().official_hparams(hyperparameters))

    @classmethod
    def recipe(cls, setting):
        """The paper's few-shot runs; the other protocols as the CoCoOp paper ran them
        (arXiv 2203.05557).
        """
        words = {"init": "a photo of a"}
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


def check_words(n_ctx: int | None, init: str) -> None:
    """Initial words set the number of vectors.

    Raises:
        InputError: if n_ctx is below 1, or another number than that of the words.
    """
    words = [word for word in init.replace("_", " ").split() if word != "[CLS]"]
    expect(n_ctx is None or n_ctx >= 1, "n_ctx", n_ctx, "at least 1")
    expect(
        n_ctx is None or not words or n_ctx == len(words),
        "n_ctx",
        n_ctx,
        f"the number of words in init={init!r}, {len(words)}; leave one of the two out",
    )


def words_first(hparams: dict) -> dict:
    """Official options as the published code reads them: words, where there are any,
    set the length whatever is configured, and are shared by all classes. An option that
    is nothing (None) is not given.
    """
    given = {name: value for name, value in hparams.items() if value is not None}
    if {"init", "n_ctx", "class_specific"} & set(hparams):
        given["init"] = hparams.get("init") or ""
    ignored = ("n_ctx", "class_specific") if given.get("init") else ()
    return {name: value for name, value in given.items() if name not in ignored}
