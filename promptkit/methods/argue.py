"""ArGue: a class is the mean of what its attributes say. Which of these stay is chosen
in :mod:`promptkit.sampling`.

ArGue: Attribute-Guided Prompt Tuning for Vision-Language Models; Tian et al., CVPR
2024; arXiv 2311.16494. With ``neg_weight=3.0`` it is ArGue-N.

Deviations: everything is float32 by default, where the published runs use mixed
precision. The regulariser runs over the classes trained on alone, where the published
code's sees the names of the new classes too (``reg_names``). Attributes of classes
trained on are chosen by their training images; those of other classes by their texts,
where the published lists were chosen by training images of all classes. As in that
code, and not in the paper's figure, the regulariser is about names, not attributes, and
negative texts are "a background of" the class behind the context. Its lists for
ImageNet and FGVC-Aircraft are unsampled; here 3 stay everywhere. The published
attributes are a language model's and not part of this package, which takes the
descriptions of the dataset; of the 35 templates, 30 are OpenAI's first ones and five
name the kinds of things that the datasets hold, which need not be the published five.
"""

import copy
from functools import cached_property

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from promptkit.data import frozen_features
from promptkit.descriptions import by_class, linked, said_of
from promptkit.errors import InputError, expect, expect_templates
from promptkit.method import Method, register
from promptkit.methods.coop import check_words
from promptkit.picture import Picture, Target, learned
from promptkit.prompts import Context, Template
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe
from promptkit.sampling import sampled
from promptkit.towers import Edit

TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES[:30]]
TEMPLATES += [
    "a photo of a {}, a type of flower.",
    "a photo of a person doing {}.",
    "a centered satellite photo of {}.",
    "a photo of a {}, a type of aircraft.",
    "a photo of a {}, a type of texture.",
]


def attributes_of(dataset) -> dict[str, list[str]]:
    """The descriptions of each class, behind its name: "cat which has whiskers"."""
    said = dataset.descriptions if dataset else {}
    return {
        name: [f"{name} {linked(t)}" for t in texts] for name, texts in said.items()
    }


def templates_of(dataset) -> list[str]:
    """The 35; in the mini world, whose CLIP never read them, its own."""
    return list(dataset.templates) if dataset and dataset.world == "mini" else TEMPLATES


class Norms(Edit):
    """The layer norms of a tower's blocks, in place of its own."""

    def __init__(self, norms: nn.ModuleList):
        self.norms = norms

    def norm(self, layer, which, weight, bias):
        if layer is not None:
            weight, bias = self.norms[layer][which].parameters()
        return weight, bias


class Sentences:
    """Texts behind a shared context; a text that occurs twice is computed once."""

    def __init__(self, clip, texts: list[str], length: int):
        distinct = list(dict.fromkeys(texts))
        ids = [clip.encode(f"{text}.") for text in distinct]
        self.template = Template(clip, distinct, [length, ids])
        rows = [distinct.index(text) for text in texts]
        self.rows = torch.tensor(rows, device=clip.device)


@register
class ArGue(Method):
    r"""One context before several attributes of each class, whose logits are averaged.

    With the normalised features :math:`\hat a_{c,j} = \overline{g([v]\,[a_{c,j}]\,.) +
    w}` of J attributes of each class, those :math:`\hat p_c` of its name and
    :math:`\hat n_c` of "a background of" it, and frozen features :math:`q_{t,c}` of the
    name in T templates,

    .. math:: z_c = \frac sJ \sum_j \hat f^\top \hat a_{c,j}, \qquad
       r = \mathrm{softmax}(s\,\hat f^\top \hat n), \\
       L = L_{ce}(z) + \frac{\lambda}{TC} \sum_{t,c} L_{ce}(s\,q_{t,c}^\top \hat p, c)
       + \frac{\mu}{BC} \sum_{b,c} r_{bc} \log r_{bc}

    The first regulariser holds the context to what templates mean (LASP's). The second
    asks for an undecided answer to backgrounds. Beside the context learn w, which moves
    all text features, and the layer norms inside the image tower.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        reg_weight, neg_weight: lambda and mu. mu = 0 is ArGue, 3 is ArGue-N.
        clusters: into so many groups the attributes of a class are clustered by their
            features, and of each the one stays that its training images agree with
            most; for classes without such, the one nearest to its group's centre. 0:
            all stay.
        correction: learn w.
        tune_norms: learn the layer norms ln_1 and ln_2 of the image tower's blocks, at
            a tenth of the rate.
        noise: standard deviation of what is added to q, in half of the steps.
        attributes: ``{class name: ["cat which has whiskers", ...]}``. None: from the
            descriptions of the dataset that it is aimed at. A class without any has its
            name.
        negatives: ``{class name: [text, ...]}``, equally many for each class, said as
            they are spelt (an underscore is a letter, as in the published code). None:
            "a background of" the class.
        reg_names: the class names of the first regulariser. None: those trained on.
        templates: of q. None: 35, or those of the mini world's tasks.
        n_ctx: the number of vectors. None: 4, or the number of words in ``init``.
        init: words that the vectors start from; empty: normal, std 0.02.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or a text is too long
            for the text tower.
    """

    name = "argue"
    title = "ArGue"
    year = 2023
    paper = "2311.16494"
    kind = "prompt"
    reads_sentences = True
    picture = Picture(
        text=("SOS", learned("$v_1$ … $v_M$"), "[class]", "which has …", ".", "EOT"),
        image_blocks={0: learned("layer norms")},
        text_out=learned("$+\\,u$"),
        text_reference=Target("names in\ntemplates", "told apart"),
        prompts="several attributes for each class",
        several=("text",),
    )
    from_dataset = {"attributes": attributes_of, "templates": templates_of}
    official_hyperparameters = {
        "n_ctx": "n_ctx",
        "ctx_init": "init",
        "ctx_init_text_of_the_recipe": "init",
        "correction_w": "correction",
        "finetune_visual_ln": "tune_norms",
        "reg_weight": "reg_weight",
        "neg_weight": "neg_weight",
        "noise": "noise",
        "templates": "templates",
        "attributes": "attributes",
        "negatives": "negatives",
        "attributes_per_class": None,  # these two follow from the lists
        "negatives_per_class": None,
        "new_classnames": None,  # further classes of the lists, see from_official
        "new_attributes": None,
        "new_negatives": None,
    }
    published = {
        "base-to-new": usual(
            "ArGue: its base-to-new runs",
            "300 epochs of batches of 32 at 0.032, with w and the layer norms; 25 on"
            " ImageNet as in its domain generalization (which file it used is not"
            " told). Its attributes were a language model's.",
        ),
        "few-shot": usual(
            "ArGue: its base-to-new runs",
            "The settings of base-to-new.",
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "ArGue: its runs on ImageNet",
            "25 epochs. Cross-dataset numbers were not published.",
        ),
        shifts_alone=True,
    )
    official_dropped = (*Method.official_dropped, "class_text_features")

    def __init__(
        self,
        clip,
        classnames,
        *,
        reg_weight: float = 5.0,
        neg_weight: float = 0.0,
        clusters: int = 3,
        correction: bool = True,
        tune_norms: bool = True,
        noise: float = 0.05,
        attributes: dict | None = None,
        negatives: dict | None = None,
        reg_names: list[str] | None = None,
        templates: list[str] | None = None,
        n_ctx: int | None = None,
        init: str = "a photo of a",
    ):
        super().__init__(clip, classnames)
        weights = {"reg_weight": reg_weight, "neg_weight": neg_weight, "noise": noise}
        for name, value in (weights | {"clusters": clusters}).items():
            expect(value >= 0, name, value, "at least 0")
        check_words(n_ctx, init)
        for name, given in (("attributes", attributes), ("negatives", negatives)):
            fits = all(_texts(texts) for texts in (given or {}).values())
            expect(fits, name, given, "a list of texts for each class name")
        fits = reg_names is None or _texts(reg_names)
        expect(fits, "reg_names", reg_names, "one class name or more")
        expect_templates("templates", templates)
        self.reg_weight, self.neg_weight, self.noise = weights.values()
        self.clusters = clusters
        length = n_ctx or (None if init else 4)
        self.context = Context(clip, self.classnames, length, init or None)
        self.w = nn.Parameter(torch.zeros(1, clip.embed_dim)) if correction else None
        blocks = clip.model.visual.transformer.resblocks if tune_norms else ()
        theirs = [nn.ModuleDict({"ln_1": b.ln_1, "ln_2": b.ln_2}) for b in blocks]
        norms = copy.deepcopy(nn.ModuleList(theirs))
        self.norms = norms.float().requires_grad_()
        self.reads = "images" if tune_norms else "features"
        # Which attributes of each class trained on stay; -1 where there are fewer.
        self.register_buffer("kept", torch.zeros(0, max(clusters, 1), dtype=torch.long))

    # --- attributes -------------------------------------------------------------------

    @cached_property
    def pools(self) -> list[list[str]]:
        """All attributes of each class; its name where there are none."""
        said = said_of(self.option("attributes"), self.classnames)
        pairs = zip(said, self.classnames, strict=True)
        return [list(texts or [name]) for texts, name in pairs]

    def prepare(self, dataset, recipe, generator, stage):
        """Choose the attributes by the training images."""
        if self.clusters:
            features = frozen_features(self.clip, dataset.train).to(self.clip.device)
            labels = dataset.train.labels.to(self.clip.device)
            shape = (len(self.classnames), self.clusters)
            self.kept = torch.full(shape, -1, device=self.clip.device)
            for c, pool in enumerate(self.pools):
                mine = features[labels == c][:100]
                chosen = sampled(self.clip, pool, self.clusters, mine).chosen
                self.kept[c, : len(chosen)] = chosen
            self.set_classes(self.classnames)
        return dataset

    @cached_property
    def attributes(self) -> list[list[str]]:
        """J attributes of each class; a class that has fewer repeats its first."""
        kept = dict(zip(self.trained_on, self.kept.tolist(), strict=False))
        lists = []
        for name, pool in zip(self.classnames, self.pools, strict=True):
            chosen = [i for i in kept.get(name, []) if 0 <= i < len(pool)]
            if self.clusters and not chosen:
                chosen = sampled(self.clip, pool, self.clusters).chosen.tolist()
            lists.append([pool[i] for i in chosen] if self.clusters else pool)
        J = max(map(len, lists))
        return [texts + texts[:1] * (J - len(texts)) for texts in lists]

    # --- the text side ----------------------------------------------------------------

    @cached_property
    def said(self) -> Sentences:
        """The attributes, class by class."""
        texts = [text.replace("_", " ") for text in sum(self.attributes, [])]
        return Sentences(self.clip, texts, self.context.length)

    @property
    def names(self) -> list[str]:
        """Of the classes that the first regulariser runs over."""
        names = self.hparams["reg_names"] or self.classnames
        return [name.replace("_", " ") for name in names]

    @cached_property
    def named(self) -> Sentences:
        """These names."""
        return Sentences(self.clip, self.names, self.context.length)

    @cached_property
    def negated(self) -> Sentences:
        """The negative texts, class by class."""
        said = said_of(self.hparams["negatives"] or {}, self.classnames)
        pairs = zip(said, self.classnames, strict=True)
        lists = [list(texts or [f"a background of {name}"]) for texts, name in pairs]
        if len({*map(len, lists)}) > 1:
            raise InputError("negatives must hold equally many texts for each class")
        return Sentences(self.clip, sum(lists, []), self.context.length)

    @cached_property
    def references(self):
        """q, (T, C, E), normalised: the names in the templates."""
        templates = self.option("templates")
        texts = [t.replace("{}", name) for t in templates for name in self.names]
        features = F.normalize(self.clip.encode_text(texts), dim=-1)
        return features.view(len(templates), len(self.names), -1)

    def speak(self, sentences: Sentences):
        """Normalised features of n sentences behind the context, (n, E)."""
        prompt = sentences.template(self.context.vectors)
        features = self.clip.text(prompt)[0][sentences.rows]
        return F.normalize(features if self.w is None else features + self.w, dim=-1)

    def text_features(self, image_features=None):
        """(C, E), the mean of the normalised attribute features of each class, which is
        not normalised again: its products are the mean logits.
        """
        return self.speak(self.said).unflatten(0, (len(self.classnames), -1)).mean(1)

    def image_edit(self):
        return Norms(self.norms) if len(self.norms) else None

    def score(self, image, text):
        image = F.normalize(image.float(), dim=-1)
        return self.clip.logit_scale * image @ text.float().T

    # --- the loss ---------------------------------------------------------------------

    def text_to_text(self, noise=0.0):
        """The first regulariser, (): each name in each template is told from the other
        names by the learned prompts.
        """
        prompts, q = self.speak(self.named), self.references + noise
        logits = self.clip.logit_scale * q @ prompts.T  # (T, C, C)
        target = torch.arange(len(prompts), device=logits.device).repeat(len(q))
        return F.cross_entropy(logits.flatten(0, 1), target)

    def text_to_bias(self, image):
        """The second, (): minus the entropy of the answers of images (B, E) to the
        negative texts, over the number of classes.
        """
        shape = (len(self.classnames), -1)
        logits = self.score(image, self.speak(self.negated)).unflatten(1, shape).mean(2)
        return (logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).mean()

    def regularizer(self, batch, image, text):
        total, noise, source = 0.0, 0.0, batch.generator
        if self.reg_weight:
            if self.training and self.noise and torch.rand((), generator=source) < 0.5:
                drawn = torch.randn(self.references.shape, generator=source)
                noise = (self.noise * drawn).to(self.references.device)
            total = total + self.reg_weight * self.text_to_text(noise)
        if self.neg_weight:
            total = total + self.neg_weight * self.text_to_bias(image)
        return total

    def param_groups(self, recipe):
        own = [p for name, p in self.named_parameters() if not name.startswith("norms")]
        norms = list(self.norms.parameters())
        return [{"params": own}, {"params": norms, "lr": 0.1 * recipe.lr}]

    # --- the published code -----------------------------------------------------------

    def official_names(self):
        names = {"prompt_learner.ctx": "context.vectors"}
        names |= {"prompt_learner.w": "w"} if self.w is not None else {}
        for name, _ in self.norms.named_parameters():
            names[f"image_encoder.transformer.resblocks.{name}"] = f"norms.{name}"
        return names

    def official_state(self, state):
        """A learner that was saved alone leaves the layer norms as they are."""
        ours, names = self.state_dict(), self.official_names()
        norms = {k: ours[n] for k, n in names.items() if n.startswith("norms")}
        return norms | state

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method, with its constants: all attributes that are listed, and no
        noise unless it is asked for. Lists of texts follow ``classnames`` and, those of
        new classes, ``new_classnames``; the regulariser runs over both.
        """
        ours = {"clusters": 0, "noise": 0.0} | cls.official_hparams(hyperparameters)
        lists = ("attributes", "negatives")
        ours = by_class(ours, hyperparameters, classnames, *lists)
        if "n_ctx" in ours and len((ours.get("init") or "").split()) != ours["n_ctx"]:
            ours["init"] = ""
        new = hyperparameters.get("new_classnames") or []
        ours["reg_names"] = [*classnames, *new]
        return cls(clip, classnames, **ours, **objects)

    @classmethod
    def recipe(cls, setting):
        """The published code's."""
        short = setting.transfer or setting.dataset == "imagenet"
        epochs, warmup = (25, 3) if short else (300, 7)
        return Recipe(epochs=epochs, lr=0.032, warmup_epochs=warmup, clip_norm=1.0)


def _texts(given) -> bool:
    """Whether it is a list of texts, one or more."""
    listed = isinstance(given, list | tuple) and len(given) > 0
    return listed and all(isinstance(text, str) and text.strip() for text in given)
