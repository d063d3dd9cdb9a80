"""KgCoOp: stay close to what the hand-written prompt says.

Visual-Language Prompt Tuning with Knowledge-guided Context Optimization; Yao et al.,
CVPR 2023; arXiv 2303.13283.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the context in half precision. The paper writes the penalty as a squared
distance, which for unit vectors is twice the code's 1 - cos; the published weight of 8
belongs to the code's form, used here.
"""

from dataclasses import replace
from functools import cached_property

import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.errors import expect, expect_templates
from promptkit.method import register
from promptkit.methods.coop import CoOp
from promptkit.picture import Target
from promptkit.published import dataset_of, transfer, usual
from promptkit.recipe import Recipe

PLAIN = "a photo of a {}."
# The published code's; elsewhere the dataset's own.
TEMPLATES = {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "a photo of a {}, a type of texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}


def template_of(dataset) -> str:
    """What a class of a dataset is called by hand."""
    return TEMPLATES.get(dataset.name, dataset.template) if dataset else PLAIN


@register
class KgCoOp(CoOp):
    r"""CoOp whose class features w are held near those u of a hand-written template.

    .. math:: L = L_{ce}
       + \lambda\,\frac1C \sum_{c=1}^{C} \bigl(1 - \cos(w_c, u_c)\bigr)

    The penalty runs over all C classes at every step, not over those in the batch.
    Inference is CoOp's.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        lam: the penalty's weight; 0 is CoOp.
        template: of the hand-written prompts, with "{}" for the class name, or several
            for their mean. None: that of the dataset it is aimed at, "a photo of a {}."
            before.
        n_ctx, init, class_specific: the context, as in CoOp; the class name stands at
            the end.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "kgcoop"
    title = "KgCoOp"
    year = 2023
    paper = "2303.13283"
    picture = replace(
        CoOp.picture, text_reference=Target("frozen CLIP,\na template", "1 − cos")
    )
    from_dataset = {"template": template_of}
    default_n_ctx = 4
    official_hyperparameters = {
        "W": "lam",
        "N_CTX": "n_ctx",
        "n_ctx": "n_ctx",
        "CTX_INIT": "init",
        "CSC": "class_specific",
        "handcrafted_template": "template",
        "dataset": None,  # stands for its template, see official_hparams
        "DATASET": None,
        "CLASS_TOKEN_POSITION": None,  # ignored: the name ends the prompt
    }
    published = {
        "base-to-new": usual(
            "KgCoOp: its base-to-new runs", "100 epochs, batches of 128, weight 8."
        ),
        "few-shot": usual(
            "KgCoOp: its script `xd_train`",
            "The settings of base-to-new. The script trains on all classes at 4 shots.",
            shots=(4,),
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "KgCoOp: its script `xd_train`",
            "The settings of base-to-new. The script trains on ImageNet at 4 shots, the"
            " paper's table says 16.",
            shots=(4,),
            extrapolation=True,
        )
    )
    official_dropped = (
        *CoOp.official_dropped,
        "bias_vectors",
        "meta_net",
        "adapter",
    )  # never trained

    def __init__(
        self,
        clip,
        classnames,
        *,
        lam: float = 8.0,
        template: str | list[str] | None = None,
        n_ctx: int | None = None,
        init: str = "a photo of a",
        class_specific: bool = False,
    ):
        super().__init__(
            clip, classnames, n_ctx=n_ctx, init=init, class_specific=class_specific
        )
        expect(lam >= 0, "lam", lam, "at least 0")
        expect_templates("template", template)
        self.lam = lam

    @cached_property
    def anchor(self):
        """u, (C, E), normalised: features of the hand-written prompts, computed when
        training first asks.
        """
        return zero_shot_features(self.clip, self.classnames, self.option("template"))

    def regularizer(self, batch, image, text):
        cosine = F.cosine_similarity(
            text, self.anchor, dim=-1, eps=1e-7
        )  # (C,), or (B, C)
        return self.lam * (1 - cosine.mean())

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for CoOp; any true CTX_INIT means "a photo of a", and a dataset stands for
        its template.
        """
        if "CTX_INIT" in hyperparameters:
            words = "a photo of a" if hyperparameters["CTX_INIT"] else ""
            hyperparameters = hyperparameters | {"CTX_INIT": words}
        ours = super().official_hparams(hyperparameters)
        dataset = hyperparameters.get("DATASET", hyperparameters.get("dataset"))
        if dataset and not ours.get("template"):
            ours["template"] = TEMPLATES.get(dataset_of(dataset), PLAIN)
        return ours

    @classmethod
    def recipe(cls, setting):
        """The paper's, the same for all protocols."""
        return Recipe(epochs=100, batch_size=128)
