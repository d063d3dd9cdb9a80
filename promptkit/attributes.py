"""The search for ATPrompt's attributes: which of a few words to anchor prompts at.

Advancing Textual Prompt Learning with Anchored Attributes; Li et al., ICCV 2025; arXiv
2412.09442.

Deviations: the search samples its validation batches, where the published code sees the
same first 100 images at each step.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import nn

from promptkit.errors import InputError, expect
from promptkit.method import Method
from promptkit.methods.atprompt import AttributeContext, check_attributes
from promptkit.recipe import Recipe, learning_rate
from promptkit.towers import Prompt
from promptkit.train import make_optimizer, reader, shuffled

# The paper's: five words for each dataset, that a language model proposed.
BASES = {
    "imagenet": "color size shape habitat behavior",
    "caltech101": "shape color material function size",
    "oxford_pets": "loyalty affection playfulness energy intelligence",
    "stanford_cars": "design engine performance luxury color",
    "oxford_flowers": "color flower habitat growth season",
    "food101": "flavor texture origin ingredients preparation",
    "fgvc_aircraft": "design capacity range engines liveries",
    "sun397": "architecture environment structure design function",
    "dtd": "pattern texture color design structure",
    "eurosat": "habitat foliage infrastructure terrain watercourse",
    "ucf101": "precision coordination technique strength control",
}


class AttributeSearch(Method):
    r"""All combinations of a few words at once, each with learned tokens of its own and
    a weight.

    With the class features W_k of CoOp's prompts with the attributes of combination k,

    .. math:: z = \sum_k \mathrm{softmax}(\alpha)_k \; s\,\hat f^\top \hat W_k

    Tokens and weights are trained in turns, see :meth:`step`.

    Args:
        bases: the words to combine, in order.
        n_ctx: tokens before the class name.
        n_att: tokens before each attribute; None: as many.
        most: of the words that a combination has; None: all of them.
        only: these combinations alone, in place of all.
        one_token: as in :class:`~promptkit.methods.atprompt.ATPrompt`.
    """

    def __init__(
        self,
        clip,
        classnames,
        *,
        bases: list[str],
        n_ctx: int = 4,
        n_att: int | None = None,
        most: int | None = None,
        only: list[list[str]] | None = None,
        one_token: bool = False,
    ):
        super().__init__(clip, classnames)
        n_att = n_ctx if n_att is None else n_att
        check_attributes(bases, [n_att] * len(bases), n_att)
        expect(len({*bases}) == len(bases), "bases", bases, "different words")
        most = len(bases) if most is None else most
        expect(1 <= most <= len(bases), "most", most, f"from 1 to {len(bases)}")
        sizes = range(1, most + 1)
        every = [list(c) for n in sizes for c in combinations(bases, n)]
        fits = only is None or (only and all(words in every for words in only))
        expect(fits, "only", only, f"some of the combinations of {bases}")
        self.combinations = every if only is None else only
        self.contexts = nn.ModuleList(
            AttributeContext(
                clip,
                self.classnames,
                words,
                [n_att] * len(words),
                one_token=one_token,
                length=n_ctx,
            )
            for words in self.combinations
        )
        self.alpha = nn.Parameter(torch.rand(len(self.combinations)))

    def set_classes(self, classnames):
        super().set_classes(classnames)
        for context in self.contexts:
            context.set_classes(self.classnames)

    @property
    def weights(self):
        """(K,), the share of each combination."""
        return self.alpha.softmax(dim=0)

    def text_features(self, image_features=None):
        """(K, C, E): prompts of one length go through the tower together, as groups."""
        prompts, alike = [context.prompt() for context in self.contexts], {}
        for k, prompt in enumerate(prompts):
            lengths = prompt.prefix.shape[1], prompt.suffix.shape[1]
            alike.setdefault(lengths, []).append(k)
        parts, order = [], sum(alike.values(), [])
        for ks in alike.values():
            suffix = torch.stack([prompts[k].suffix for k in ks])
            prefix = torch.cat([prompts[k].prefix for k in ks])
            parts.append(self.clip.text(Prompt(prefix, suffix, prompts[ks[0]].eot)))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def each(self, image, text):
        """Logits of each combination, (K, B, C)."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return self.clip.logit_scale * image @ text.transpose(1, 2)

    def score(self, image, text):
        return torch.einsum("k,kbc->bc", self.weights, self.each(image, text))

    def param_groups(self, recipe):
        return [{"params": list(self.contexts.parameters())}]

    def step(self, batch, validation, theta, alpha):
        """The tokens follow a training batch, then the weights a validation batch, each
        with the other held still.

        Args:
            theta, alpha: the optimizers.

        Returns:
            Both losses, each before its step.
        """
        theta.zero_grad()
        trained = self.loss(batch)
        trained.backward()
        theta.step()
        with torch.no_grad():
            image, text = self.encode(validation), self.text_features()
        alpha.zero_grad()
        validated = self.criterion(validation, image, text)
        validated.backward()
        alpha.step()
        return trained.item(), validated.item()


@dataclass
class Found:
    """What a search went through."""

    combinations: list[list[str]]  # K of them
    weights: torch.Tensor  # (epochs + 1, K), of the start and after each epoch
    losses: list[tuple[float, float]]  # of the tokens and of the weights, one a step

    @property
    def best(self) -> list[str]:
        """The combination of the largest weight: pass it as ``attributes``."""
        return self.combinations[self.weights[-1].argmax()]


def search_attributes(
    clip,
    dataset,
    bases: list[str] | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 1,
    alpha_lr: float = 0.02,
    validation: int = 100,
    **options,
) -> Found:
    """Which attributes to anchor the prompts of a dataset at, by gradient descent.

    Args:
        dataset: the few-shot training images, of the base classes alone where new ones
            shall stay unseen, and its validation images. Without such, or where they
            are the test images, half of the training images take their place.
        bases: the words. None: the paper's for this dataset, else :func:`pool_of`.
        recipe: of the tokens. None: the paper's 40 epochs.
        alpha_lr: learning rate of the weights' Adam.
        validation: images of a validation batch, at most.
        options: of :class:`AttributeSearch`.

    Raises:
        InputError: there are too few images or no words, or an option does not fit.
    """
    dataset = dataset.for_training()
    recipe = Recipe(epochs=40) if recipe is None else recipe
    if bases is None:
        bases = BASES.get(dataset.name, "").split() or pool_of(dataset)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        search = AttributeSearch(clip, dataset.classnames, bases=bases, **options)
    train, val = dataset.train, dataset.val
    if len(val) == 0:
        rows = train.labels.argsort(stable=True)
        train, val = train.take(rows[::2].tolist()), train.take(rows[1::2].tolist())
    if len(train) == 0 or len(val) == 0:
        raise InputError(f"{dataset.name} has too few images to search attributes on")
    read = reader(search, train, generator, recipe)
    read_val = reader(search, val, generator, replace(recipe, augment=False))
    theta = make_optimizer(search, recipe)
    alpha = torch.optim.Adam([search.alpha], lr=alpha_lr, betas=(0.5, 0.999))
    curve, losses = [search.weights.detach().clone()], []
    for epoch in range(recipe.epochs):
        for group in theta.param_groups:
            group["lr"] = learning_rate(recipe, epoch, group["peak_lr"])
        batches = shuffled(len(train), recipe.batch_size, generator)
        for rows in islice(batches, recipe.steps(len(train))):
            chosen = torch.randperm(len(val), generator=generator)[:validation]
            pair = (read(rows).to(clip.device), read_val(chosen).to(clip.device))
            losses.append(search.step(*pair, theta, alpha))
        curve.append(search.weights.detach().clone())
    return Found(search.combinations, torch.stack(curve).cpu(), losses)


def pool_of(dataset, n: int = 5) -> list[str]:
    """The n words that the descriptions of most classes share: what is said of all
    classes is an attribute, and what differs its value. In place of a language model's
    list; ties go by the order of the descriptions.

    Raises:
        InputError: the dataset has no descriptions, or they share no words.
    """
    names = set(re.findall(r"[a-z]+", " ".join(dataset.classnames).lower()))
    counts = Counter()
    for name in dataset.classnames:
        said = " ".join(dataset.descriptions.get(name, [])).lower()
        words = dict.fromkeys(re.findall(r"[a-z]{3,}", said))
        counts.update(w for w in words if w not in ENGLISH_STOP_WORDS | names)
    if not counts:
        raise InputError(
            f"{dataset.name} has no descriptions to take attributes from: name them,"
            " bases=['color', 'shape', ...]"
        )
    return [word for word, _ in counts.most_common(n)]
