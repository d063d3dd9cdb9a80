"""Weak distribution detectors: the surer of two classifiers has more to say.

Weak Distribution Detectors Lead to Stronger Generalizability of Vision-Language Prompt
Tuning; Ding et al., AAAI 2024; arXiv 2404.00603.

The published code has the hosts CoOp, ProGrad and KgCoOp, whose image features are
CLIP's own. Over a host that changes these, or that scores by itself, logits are mixed
in place of class features; that is an extension of this package.

Deviations: everything is float32 by default, where the published runs are in half
precision. As released, only the modes "msp" and "constant" of the published code run;
the other two are its formulas. Its energy is scaled twice, so that all weights lie near
1/2; "energy" is scaled once, "energy_twice" is as published.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from promptkit.data.benchmark import PLAIN, TABLE
from promptkit.errors import InputError, expect, unknown
from promptkit.method import Method, register
from promptkit.methods.coop import CoOp
from promptkit.methods.kgcoop import KgCoOp
from promptkit.methods.prograd import ProGrad
from promptkit.picture import Head, Picture
from promptkit.plugin import Plugin, _owner
from promptkit.published import dataset_of, everywhere, usual
from promptkit.train import reader

MODES = {  # as the published configuration calls them
    "SOFTmsp": "msp",
    "SOFTenergy": "energy_twice",
    "alpha": "entropy",
    "weight": "constant",
}
HOST_OPTIONS = {  # in the published configuration: in the host's own
    "n_ctx": "N_CTX",
    "ctx_init": "CTX_INIT",
    "class_token_position": "CLASS_TOKEN_POSITION",
    "csc": "CSC",
    "dataset": "dataset",
}


@dataclass
class Competition:
    """What the two classifiers say of B images in C classes."""

    zero_logits: Tensor  # (B, C), of the hand-written prompt
    tuned_logits: Tensor  # (B, C), of the host
    zero_score: Tensor  # (B,), higher: more sure
    tuned_score: Tensor  # (B,)
    weight: Tensor  # (B,), of the host


@register
class WeakDetectors(Plugin):
    r"""At test time a trained host and zero-shot CLIP are mixed image by image, by how
    sure either is.

    With the class features w of the host and w' of a hand-written prompt, neither
    normalised, and a detector D of their logits z and z',

    .. math:: \sigma = \mathrm{sigmoid}\bigl(W (D(z) - D(z'))\bigr), \\
       p(y = c \mid x) \propto \exp\bigl(s \cos(f(x), (1-\sigma)\,w'_c + \sigma\,w_c)
       \bigr)

    Nothing is learned beyond the host; training is the host's. Where the host changes
    the image features, or scores by itself, the mixture is :math:`(1-\sigma) z' +
    \sigma z`, with z' of CLIP's own image features.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        host: the method to extend.
        detector: D. "msp": the largest probability; "entropy": that of the prediction,
            negative, in units of ln C; "energy": the log-sum of the exponentials, in
            units of ln C + s; "energy_twice": that, divided by s again; "constant":
            sigma is W for every image, 1 being the host and 0 CLIP.
        sharpness: W; with "constant" sigma itself.
        template: of the hand-written prompt, with "{}" for the class name. None: the
            host's own, if it has one, or that of the dataset.

    Raises:
        InputError: a hyperparameter or the host does not fit.
    """

    name = "weak_detectors"
    title = "Weak detectors"
    year = 2024
    paper = "2404.00603"
    kind = "test-time"
    picture = Picture(
        heads=(Head("cosine with a hand-written prompt", ("image",)),),
        fusion="at test time, image by image, the surer has more weight",
        targets=(),
    )
    hosts = ("coop", "prograd", "kgcoop")
    at_test = ("detector", "sharpness", "template")
    from_dataset = {"template": lambda dataset: dataset.template if dataset else PLAIN}
    official_hyperparameters = {
        "mode": "detector",  # with the sharpness behind it, as in "SOFTmsp_64"
        "template": "template",
        "modes": None,  # several of them
        "base": None,  # this and the rest make the host, see from_official
        **dict.fromkeys(HOST_OPTIONS),
    }
    published = everywhere(
        usual(
            "VLPT-OOD: its scripts",
            "The host's own training: CoOp and ProGrad 50 epochs with 16 vectors,"
            " KgCoOp 100, batches of 32. The largest probability at W = 64.",
        )
    ) | {
        "cross-dataset": usual(
            "VLPT-OOD: its scripts",
            "The settings of domain generalization.",
            extrapolation=True,
        )
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        host: Method,
        detector: Literal[
            "msp", "entropy", "energy", "energy_twice", "constant"
        ] = "msp",
        sharpness: float = 64.0,
        template: str | None = None,
    ):
        super().__init__(clip, classnames, host=host)
        fits = template is None or "{}" in template
        expect(fits, "template", template, "a sentence with {} for the class name")
        self.detector, self.sharpness = detector, sharpness
        frozen = not any(_owner(host, hook) for hook in ("image_features", "adapt"))
        frozen &= host.image_prompt() is None and host.image_edit() is None
        # Whether class features can be mixed: one image feature is compared with both.
        self.mixes_features = frozen and _owner(host, "score") is None
        known = self.reads_at_test or self.reads
        if not self.mixes_features and "features" not in known.split("+"):
            self.reads_at_test = f"{known}+features"

    # --- the zero-shot classifier -----------------------------------------------------

    @property
    def template(self) -> str | list[str]:
        """The hand-written prompt, or several, as it stands."""
        mine = self.hparams["template"] is None
        theirs = next((p for p in self.host.nest() if "template" in p.hparams), None)
        return theirs.option("template") if mine and theirs else self.option("template")

    @cached_property
    def zero_shot(self) -> Tensor:
        """w', (C, E), not normalised; of several prompts the mean."""
        several = [self.template] if isinstance(self.template, str) else self.template
        texts = [t.replace("{}", name) for t in several for name in self.classnames]
        features = self.clip.encode_text(texts)
        return features.unflatten(0, (len(several), -1)).mean(dim=0)

    def owns(self, hook):
        """Where features are mixed, the image features are the host's."""
        return super().owns(hook) and not (hook == "encode" and self.mixes_features)

    # --- the mixture ------------------------------------------------------------------

    def encode(self, batch):
        """The host's image features, (B, E'); where logits are mixed at test time, with
        CLIP's own behind them, (B, E' + E).
        """
        tuned = super().encode(batch)
        if self.training or self.mixes_features:
            return tuned
        known = batch.features is not None
        frozen = batch.features if known else self.clip.encode_image(batch.images)
        return torch.cat([tuned, frozen], dim=-1)

    def text_features(self, image_features=None):
        """The host's, of its own image features alone."""
        if image_features is not None and not self.mixes_features:
            image_features = image_features[:, : self.clip.embed_dim]
        return super().text_features(image_features)

    def score(self, image, text):
        """The host's logits in training; the mixture at test time, (B, C)."""
        if self.training:
            return super().score(image, text)
        found = self.compete(image, text)
        s = found.weight[:, None]  # (B, 1)
        if not self.mixes_features:
            return (1 - s) * found.zero_logits + s * found.tuned_logits
        # cos(f, (1-s) w' + s w) without the mixed features themselves, (B, C, E)
        w, u = text.float(), self.zero_shot.float()
        image = F.normalize(image.float(), dim=-1)
        own = image @ w.T if w.dim() == 2 else (w @ image[:, :, None]).squeeze(-1)
        products = (1 - s) * (image @ u.T) + s * own
        squares = (
            (1 - s) ** 2 * u.square().sum(-1)
            + 2 * s * (1 - s) * (u * w).sum(-1)
            + s**2 * w.square().sum(-1)
        )
        return self.clip.logit_scale * products / squares.clamp(min=1e-12).sqrt()

    def compete(self, image, text) -> Competition:
        """What both classifiers say of images, as `features` gives these and the
        classes.
        """
        tuned = frozen = image
        if not self.mixes_features:
            tuned, frozen = image.tensor_split([-self.clip.embed_dim], dim=-1)
            if not tuned.shape[-1]:
                raise InputError(
                    f"{self.spec} reads two kinds of image features, so it must be the"
                    " outermost plug-in"
                )
        z = super().score(tuned, text)
        z_zero = Method.score(self, frozen, self.zero_shot)
        sure, sure_zero = self.detect(z), self.detect(z_zero)
        if self.detector == "constant":
            weight = torch.full_like(sure, self.sharpness)
        else:
            weight = torch.sigmoid(self.sharpness * (sure - sure_zero))
        return Competition(z_zero, z, sure_zero, sure, weight)

    def detect(self, logits: Tensor, detector: str | None = None) -> Tensor:
        """D, (B,), of logits (B, C); "constant" has none and gives that of "msp"."""
        detector = detector or self.detector
        scale, classes = self.clip.logit_scale, max(logits.shape[-1], 2)
        if detector == "entropy":
            p = logits.softmax(dim=-1) + 1e-5
            return (p * p.log()).sum(dim=-1) / math.log(classes)
        if detector in ("energy", "energy_twice"):
            energy = logits.logsumexp(dim=-1) / (math.log(logits.shape[-1]) + scale)
            return energy / scale if detector == "energy_twice" else energy
        return logits.softmax(dim=-1).amax(dim=-1)

    # --- the names of its own repository ----------------------------------------------

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; a mode holds its sharpness."""
        ours = super(Plugin, cls).official_hparams(hyperparameters)
        mode, _, sharpness = ours.pop("detector", "SOFTmsp_64").partition("_")
        if mode not in MODES:
            raise unknown("mode of the published detectors", mode, MODES)
        ours |= {"detector": MODES[mode]}
        ours |= {"sharpness": float(sharpness)} if sharpness else {}
        template = ours.pop("template", None)
        return ours | ({"template": template} if template else {})

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, *, host=None, **objects):
        """As for any method; without a host, "base" names one of the three published
        ones, which its options make.
        """
        given = {k: v for k, v in hyperparameters.items() if v is not None}
        ours = cls.official_hparams(given)
        if host is not None:
            return cls(clip, classnames, host=host, **ours, **objects)
        base = given.get("base", "CoOp").lower()
        hosts = {"coop": CoOp, "prograd": ProGrad, "kgcoop": KgCoOp}
        if base not in hosts:
            raise unknown("base of the published detectors", base, hosts)
        known = hosts[base].official_hyperparameters
        if base == "kgcoop":  # four words, whatever its options say
            known = ("dataset", "CSC")
        names = {k: name for k, name in HOST_OPTIONS.items() if name in known}
        theirs = {name: given[k] for k, name in names.items() if k in given}
        if base == "kgcoop":
            theirs["CTX_INIT"] = True
        if base == "prograd":  # its own default are the words of its template
            theirs.setdefault("CTX_INIT", False)
        if base == "coop" and given.get("dataset") and "template" not in ours:
            ours["template"] = TABLE[dataset_of(given["dataset"])].template
        made = hosts[base].from_official(clip, classnames, theirs)
        return cls(clip, classnames, host=made, **ours, **objects)

    @classmethod
    def recipe(cls, setting):
        """The host's training as the published runs have it."""
        recipe = super().recipe(setting)
        if setting.host.spec in ("coop", "prograd"):
            hparams = recipe.hparams["host"] | {"n_ctx": 16}
            hparams.pop("init", None)
            hparams.pop("lam", None)  # ProGrad's is 1 in these runs
            return replace(recipe, hparams={"host": hparams}, epochs=50)
        if setting.host.spec == "kgcoop":
            return replace(recipe, batch_size=32)
        return recipe


@torch.no_grad()
def separations(method: WeakDetectors, base, new) -> dict[str, float]:
    """For each detector the AUROC, in percent, of D(z) - D(z') telling the test images
    of a dataset with trained classes from those of one with new ones, each among its
    own names; 50 is chance.
    """
    known = ("msp", "entropy", "energy")
    found = {name: [] for name in known}
    for dataset in (base, new):
        method.aim(dataset)
        read = reader(method.eval(), dataset.test, torch.Generator().manual_seed(0))
        for rows in torch.arange(len(dataset.test)).split(100):
            batch = read(rows).to(method.clip.device)
            result = method.compete(*method.features(batch))
            for name in known:
                sure = method.detect(result.tuned_logits, name)
                zero = method.detect(result.zero_logits, name)
                found[name].append(sure - zero)
    labels = torch.cat([torch.ones(len(base.test)), torch.zeros(len(new.test))])
    return {
        name: 100.0 * roc_auc_score(labels, torch.cat(found[name]).cpu())
        for name in known
    }
