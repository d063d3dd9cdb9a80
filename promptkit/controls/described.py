"""The control of ProText: the sentences that it learns from, averaged by class."""

import torch
import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.descriptions import key_of, sentence_features, sentences_of
from promptkit.method import register
from promptkit.methods.clip import CLIP


@register
class Described(CLIP):
    r"""Zero-shot CLIP with an ensemble of the sentences about a class in place of one
    template, which is what CuPL does (Pratt et al., ICCV 2023).

    .. math:: \hat w_c = \frac{\bar w_c}{\lVert \bar w_c \rVert}, \qquad
       \bar w_c = \frac{1}{K_c} \sum_{k=1}^{K_c} \hat g(\text{sentence } k
       \text{ about } c)

    A class that nothing is said of keeps its template.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        descriptions: ``{class: [sentence, ...]}``; keys without a class are left out,
            and case and underscores do not count. None: those of the dataset it is
            aimed at.
        template: as in zero-shot CLIP.
    """

    name = "described"
    title = "Ensemble of descriptions"
    from_dataset = {"descriptions": sentences_of} | CLIP.from_dataset
    official_hyperparameters = {}
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        descriptions: dict | None = None,
        template: str | list[str] | None = None,
    ):
        super().__init__(clip, classnames, template=template)

    def text_features(self, image_features=None):
        rows = zero_shot_features(self.clip, self.classnames, self.templates)  # (C, E)
        said = self.option("descriptions")
        keys = key_of(said, self.classnames)
        known = [c for c, key in enumerate(keys) if key is not None and said[key]]
        if not known:
            return rows
        lists = [said[keys[c]] for c in known]
        features = sentence_features(self.clip, [text for x in lists for text in x])
        means = [part.mean(dim=0) for part in features.split([len(x) for x in lists])]
        rows = rows.clone()
        rows[known] = F.normalize(torch.stack(means), dim=-1)
        return rows
