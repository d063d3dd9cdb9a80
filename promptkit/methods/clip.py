"""Zero-shot CLIP: the class names, written into hand-made sentences, are the
classifier.

Learning Transferable Visual Models From Natural Language Supervision; Radford et al.,
ICML 2021; arXiv 2103.00020. The templates are those of the prompt-learning benchmark
(CoOp, arXiv 2109.01134), which every later table calls "CLIP".

Deviation: everything is float32 by default, where the published runs are in half
precision.
"""

from promptkit.clip import zero_shot_features
from promptkit.data.benchmark import TABLE
from promptkit.errors import expect_templates
from promptkit.method import Method, register
from promptkit.picture import Picture
from promptkit.published import Published, dataset_of
from promptkit.recipe import PROTOCOLS, Recipe

PLAIN = "a photo of a {}."


@register
class CLIP(Method):
    r"""Score an image x by its cosine with a sentence about each class.

    .. math:: p(y = c \mid x) \propto \exp(s \cos(f(x), w_c)), \qquad
       w_c = g(\text{"a photo of a [class c]."})

    An ensemble of templates is one class feature too: the mean of the normalised
    features, normalised again.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        template: a sentence with "{}" in place of the class name, or several of them
            for an ensemble. None: that of the dataset it is aimed at, "a photo of a
            {}." before.

    Raises:
        InputError: there is no template, or one lacks "{}".
    """

    name = "clip"
    title = "Zero-shot CLIP"
    year = 2021
    paper = "2103.00020"
    kind = "zero-shot"
    supervision = "none"
    seeded = False
    picture = Picture(targets=())
    from_dataset = {"template": lambda dataset: dataset.template if dataset else PLAIN}
    official_hyperparameters = {
        "template": "template",
        "dataset": None,  # stands for its template, see official_hparams
        "ensemble_templates": None,
    }
    published = {
        protocol: Published(
            ("ViT-B-16",)
            if protocol in ("base-to-new", "cross-dataset")
            else ("RN50", "RN101", "ViT-B-32", "ViT-B-16"),
            (),
            "CoOp: its zero-shot CLIP",
            "One template a dataset.",
        )
        for protocol in PROTOCOLS
    }

    def __init__(self, clip, classnames, *, template: str | list[str] | None = None):
        super().__init__(clip, classnames)
        expect_templates("template", template)

    @property
    def templates(self) -> list[str]:
        """The sentences as they stand."""
        template = self.option("template")
        return [template] if isinstance(template, str) else list(template)

    def text_features(self, image_features=None):
        return zero_shot_features(self.clip, self.classnames, self.templates)  # (C, E)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; a dataset stands for its template."""
        ours = super().official_hparams(hyperparameters)
        dataset = hyperparameters.get("dataset")
        if dataset and not ours.get("template"):
            ours["template"] = TABLE[dataset_of(dataset)].template
        return ours

    @classmethod
    def recipe(cls, setting):
        """Nothing is learned."""
        return Recipe(epochs=0, augment=False)
