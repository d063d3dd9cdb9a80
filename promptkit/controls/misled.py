"""The control of AAPE: summaries of sentences about another class."""

from functools import cached_property

from promptkit.method import register
from promptkit.methods.aape import AAPE


@register
class Misled(AAPE):
    """AAPE whose images are summed up by the sentences about the next class.

    If these teach as much as the true ones, what helps is not what sentences say.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        descriptions, sentences, template, heads, hidden, distill, reward, aggregate: as
            in AAPE.
    """

    name = "misled"
    title = "AAPE with another class's sentences"
    published = {}

    @cached_property
    def references(self):
        """As in AAPE, each class's moved to the one before."""
        sentences, there = AAPE.references.func(self)
        return sentences.roll(-1, dims=0), there.roll(-1, dims=0)
