"""The control of CoPrompt: frozen CLIP is given what the prompted model is given."""

from functools import cached_property

from promptkit.clip import zero_shot_features
from promptkit.method import register
from promptkit.methods.coprompt import PLAIN, CoPrompt


@register
class Unperturbed(CoPrompt):
    r"""CoPrompt without perturbations: frozen CLIP reads the prompted model's view of
    each image, and "a photo of a {}." in the place of a drawn sentence.

    Loss, adapters, augmentation of the training images and recipe are CoPrompt's.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        second_view: frozen CLIP keeps its own view of each image, and the sentence
            alone is replaced.
        options: as in CoPrompt; the sentences are not read.
    """

    name = "unperturbed"
    title = "CoPrompt without perturbations"
    published = {}

    def __init__(self, clip, classnames, *, second_view: bool = False, **options):
        super().__init__(clip, classnames, **options)
        self.second_view = second_view

    def views(self, images, generator):
        """CoPrompt's two views, or the first of them twice: (B, 2, 3, S, S)."""
        views = super().views(images, generator)
        return views if self.second_view else views[:, [0, 0]]

    @cached_property
    def bank(self):
        """Frozen features of the one sentence, (1, C, E)."""
        return zero_shot_features(self.clip, self.classnames, PLAIN)[None]

    def official_names(self):
        return {}  # nobody published it
