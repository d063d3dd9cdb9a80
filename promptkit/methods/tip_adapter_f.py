"""Tip-Adapter-F: fine-tune the keys of Tip-Adapter's cache.

Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification; Zhang et al.,
ECCV 2022; arXiv 2207.09519.

Deviations: the published code keeps the epoch that is best on the test images and
reports the better of two accuracies on them; here the epoch, alpha and beta are chosen
on the validation images of the few-shot draw, and without any the last epoch and the
configured values stay. An incomplete last batch of an epoch is dropped, as for every
method here. The others are Tip-Adapter's.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from promptkit.data import frozen_features
from promptkit.method import register
from promptkit.methods.tip_adapter import PUBLISHED, TipAdapter
from promptkit.picture import LABELS, Head, Target, learned
from promptkit.recipe import Recipe


@register
class TipAdapterF(TipAdapter):
    r"""Tip-Adapter whose keys start from the features of the few-shot images and learn.

    .. math:: L = L_{ce}\bigl(s\,\hat f\,\hat w^\top
       + \alpha\,\exp(-\beta\,(1 - \hat f K^\top))\,V\bigr)

    with the first alpha and beta. The rows of K are not normalised again, so that an
    affinity may exceed 1.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        learn: what of the cache learns, the paper's ablation.
        alpha, beta, passes, cache_size, search, search_scale, search_step, template: as
            in Tip-Adapter. ``search`` chooses the epoch too.

    Raises:
        InputError: a hyperparameter does not fit.
    """

    name = "tip_adapter_f"
    title = "Tip-Adapter-F"
    picture = replace(
        TipAdapter.picture,
        heads=(Head(learned("cache of few-shot features"), ("image",)),),
        targets=(Target(LABELS, "cross-entropy"),),
    )
    official_hyperparameters = TipAdapter.official_hyperparameters
    published = {
        protocol: replace(run, notes=f"20 epochs of AdamW, of EuroSAT 100. {run.notes}")
        for protocol, run in PUBLISHED.items()
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        learn: Literal["keys", "values", "both"] = "keys",
        alpha: float | None = None,
        beta: float = 1.0,
        passes: int = 10,
        cache_size: int | None = None,
        search: bool = True,
        search_scale: list[float] | None = None,
        search_step: list[int] | None = None,
        template: str | list[str] | None = None,
    ):
        options = {"alpha": alpha, "beta": beta, "passes": passes, "search": search}
        options |= {"search_scale": search_scale, "search_step": search_step}
        options |= {"cache_size": cache_size, "template": template}
        super().__init__(clip, classnames, **options)
        self.seen = None  # features (N, E) and labels (N,) to choose an epoch by
        self.learned = ("keys", "values") if learn == "both" else (learn,)
        self.fill(self.keys, self.values)

    def fill(self, keys, values):
        for name, x in (("keys", keys), ("values", values)):
            setattr(self, name, nn.Parameter(x) if name in self.learned else x)

    def prepare(self, dataset, recipe, generator, stage):
        super().prepare(dataset, recipe, generator, stage)
        self.training_state = {}
        self.seen = None
        if self.hparams["search"] and len(dataset.val):
            features = frozen_features(self.clip, dataset.val)
            self.seen = features, dataset.val.labels.to(features.device)
        return dataset

    @torch.no_grad()
    def keep_best(self, image, labels):
        """Keep the cache if it is the best so far on image features (N, E); whether it
        is.
        """
        logits = self.score(image, self.classifier)
        hits = (logits.argmax(-1) == labels).double().mean()
        if hits <= self.training_state.get("hits", 0.0):
            return False
        kept = {name: getattr(self, name).detach().clone() for name in self.learned}
        self.training_state = {"hits": hits, **kept}
        return True

    def end_epoch(self, epoch, recipe, outer=None):
        if self.seen is not None:
            self.keep_best(*self.seen)

    @torch.no_grad()
    def finish(self, dataset, recipe, generator):
        for name in self.learned:
            if name in self.training_state:
                getattr(self, name).copy_(self.training_state[name])
        self.seen = None
        super().finish(dataset, recipe, generator)

    def official_names(self):
        return {"adapter.weight": "keys"} if "keys" in self.learned else {}

    @classmethod
    def recipe(cls, setting):
        """The paper's, the same for all protocols."""
        return Recipe(
            epochs=100 if setting.dataset == "eurosat" else 20,
            batch_size=256,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.01,
            options={"eps": 1e-4},
            schedule="cosine-steps",
            warmup_epochs=0,
            crop=(0.5, 1.0),
        )
