"""POMP: one context for twenty thousand classes, learned from a few of them at a time.

Prompt Pre-Training with Twenty-Thousand Classes for Open-Vocabulary Visual Recognition;
Ren et al., NeurIPS 2023; arXiv 2304.04704.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the context in half precision. The last epoch is the result, where they
choose the best one on the images that they report. The paper writes the correction with
a logarithm; as in its code, which its numbers belong to, it is the one of base 10. Of
its proposals the uniform one, which it uses, is here.
"""

import math
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from promptkit.data import transform
from promptkit.errors import InputError, expect
from promptkit.method import register
from promptkit.methods.coop import CoOp
from promptkit.picture import Target
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe

CHUNK = 1024  # classes whose prompts are held at a time where nothing is learned
MASK = 1e6  # taken from the logit of an image's own class among the negatives


@register
class POMP(CoOp):
    r"""CoOp whose softmax runs over an image's own class and K - 1 drawn ones, each of
    which stands for several.

    .. math:: L = -\frac1B \sum_b \log \frac{e^{z_{b y_b}}}
       {e^{z_{b y_b}} + \sum_{j \in \mathcal N,\, j \neq y_b} e^{z_{bj} + m}}, \qquad
       m = \log_{10} \frac{C - 1}{|\mathcal N \setminus y_b|}

    The K - 1 classes :math:`\mathcal N` are drawn anew at each step, without repetition
    and for the whole batch. So a step encodes at most B + K - 1 prompts, whatever C is;
    at test time all C are encoded in chunks. With K > C it is CoOp. Inference is
    CoOp's.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        sampled: K, classes an image is compared with, its own included; None: all.
        correction: whether the margin m is added to the drawn classes.
        margin: m itself; None: by the formula.
        log_base: of its logarithm; 2.718281828 for the natural one.
        copies: of each training image in a batch, each cut out, flipped and distorted
            anew (RandAugment); 1: the images as the recipe reads them.
        n_ctx, init, class_specific: the context, as in CoOp; the class name stands at
            the end. A class-specific context serves its own classes alone.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "pomp"
    title = "POMP"
    year = 2023
    paper = "2304.04704"
    picture = replace(
        CoOp.picture,
        prompts="prompts of the labels and of K − 1 drawn classes",
        targets=(Target("labels of a few images", "local contrast"),),
    )
    default_n_ctx = 4
    official_hyperparameters = {
        "N_CTX": "n_ctx",
        "n_ctx": "n_ctx",
        "CTX_INIT": "init",
        "ctx_init": "init",
        "CSC": "class_specific",
        "class_specific_context": "class_specific",
        "K": "sampled",
        "UPDATE_CLASS_NUM": "sampled",
        "local_correction": "correction",
        "LOCAL_CORRECTION": "correction",
        "k_transforms": "copies",
        "K_TRANSFORMS": "copies",
        "EPT": None,  # whether classes are drawn, see official_hparams
        "negative_sampling": None,  # "random" alone, see official_hparams
        "CLASS_TOKEN_POSITION": None,  # "end" alone, see official_hparams
        "class_token_position": None,
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "few-shot": usual(
            "POMP: its Table 3, on ImageNet",
            "50 epochs, K = 512. With fewer classes than that it is CoOp.",
        ),
        "base-to-new": usual(
            "POMP: its Table 3, on ImageNet",
            "The settings of few-shot.",
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "POMP: its script `vit_b16_ep5_randaug2`",
            "The settings of its pre-training on ImageNet-21K, of 5 epochs: 4 vectors,"
            " K = 1000, 4 copies of each image. Published on 8 GPUs with 32 images on"
            " each, 256 a step; here 32. To run it, give that dataset.",
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        sampled: int | None = 1000,
        correction: bool = True,
        margin: float | None = None,
        log_base: float = 10.0,
        copies: int = 1,
        n_ctx: int | None = None,
        init: str = "",
        class_specific: bool = False,
    ):
        about = {"init": init, "class_specific": class_specific}
        super().__init__(clip, classnames, n_ctx=n_ctx, **about)
        expect(sampled is None or sampled >= 2, "sampled", sampled, "at least 2")
        expect(log_base > 1, "log_base", log_base, "above 1")
        expect(copies >= 1, "copies", copies, "at least 1")
        expect(
            margin is None or correction,
            "margin",
            margin,
            "left out where correction=False adds none",
        )
        self.sampled, self.copies = sampled, copies
        self.correction, self.margin, self.log_base = correction, margin, log_base
        if copies > 1:
            self.reads, self.reads_at_test = "views", "features"

    # --- some of the classes ----------------------------------------------------------

    def features_of(self, classes: Tensor) -> Tensor:
        """Class features (n, E) of the classes at these positions, (n,), alone."""
        return self.clip.text(self.context.prompt(classes=classes))[0]

    def text_features(self, image_features=None):
        parts = torch.arange(len(self.classnames)).split(CHUNK)
        if len(parts) == 1:
            return super().text_features()
        return torch.cat([self.features_of(part) for part in parts])

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """(K - 1,) positions of drawn classes; all C, if there are no more."""
        order = torch.randperm(len(self.classnames), generator=generator)
        return order[: self.sampled - 1]

    def local_logits(self, image: Tensor, labels: Tensor, drawn: Tensor) -> Tensor:
        """Logits (B, 1 + n) of features (B, E): of their labels (B,) first, then of the
        drawn classes (n,), corrected. Each distinct class is encoded once.
        """
        asked = torch.cat([labels.cpu(), drawn.cpu()])
        classes, where = asked.unique(return_inverse=True)
        where = where.to(image.device)
        logits = self.score(image, self.features_of(classes))  # (B, distinct)
        own, others = where[: len(labels)], where[len(labels) :]
        positive = logits.gather(1, own[:, None])
        hit = own[:, None] == others[None]  # (B, n), an image's own class
        negative = logits[:, others] - MASK * hit
        if self.correction:
            negative = negative + self.margins(hit)
        return torch.cat([positive, negative], dim=1)

    def margins(self, hit: Tensor) -> Tensor | float:
        """m of each image, (B, 1), given which of the drawn classes are its own."""
        if self.margin is not None:
            return self.margin
        valid = (hit.shape[1] - hit.sum(dim=1, keepdim=True)).clamp(min=1)
        all_others = max(len(self.classnames) - 1, 1)
        return (all_others / valid).log() / math.log(self.log_base)

    # --- training ---------------------------------------------------------------------

    def loss(self, batch):
        if batch.views is None:
            image, labels = self.encode(batch), batch.labels
        else:
            image = self.clip.encode_image(batch.views.flatten(0, 1))  # (B V, E)
            labels = batch.labels.repeat_interleave(batch.views.shape[1])
        if self.sampled is None:
            return F.cross_entropy(self.score(image, self.text_features()), labels)
        logits = self.local_logits(image, labels, self.draw(batch.generator))
        return F.cross_entropy(logits, torch.zeros_like(labels))

    def views(self, images, generator):
        made = []
        for _ in range(self.copies):
            crops = transform(self.clip, images, augment=True, generator=generator)
            pixels = (255 * self.clip.denormalize(crops)).round().clamp(0, 255).byte()
            seed = int(torch.randint(2**31, (), generator=generator))
            rng = random.Random(seed)
            pixels = [pil_to_tensor(distorted(to_pil_image(x), rng)) for x in pixels]
            made.append(self.clip.normalize(torch.stack(pixels).float() / 255))
        return torch.stack(made, dim=1).to(self.clip.device)  # (B, V, 3, S, S)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for CoOp; what the published code offers and cannot run is refused."""
        for name in ("CLASS_TOKEN_POSITION", "class_token_position"):
            place = hyperparameters.get(name, "end")
            expect(place == "end", name, place, "'end', the only one that it can train")
        proposal = hyperparameters.get("negative_sampling", "random")
        if proposal not in ("random", False, None):
            raise InputError(
                f"negative_sampling must be 'random', got {proposal!r}: the others read"
                " a memory bank that the published code never makes"
            )
        ours = super().official_hparams(hyperparameters)
        return ours if hyperparameters.get("EPT", True) else ours | {"sampled": None}

    @classmethod
    def recipe(cls, setting):
        """The paper's pre-training for what is tested elsewhere, else its runs on one
        dataset. Copies need augmentation, which the small profiles leave out.
        """
        if setting.transfer:
            copies = {"copies": 4} if setting.profile == "full" else {}
            hparams = {"n_ctx": 4, "sampled": 1000} | copies
            return Recipe(hparams=hparams, epochs=5)
        return Recipe(hparams={"n_ctx": 4, "sampled": 512})


# --- the paper's RandAugment ----------------------------------------------------------


def _shifted(image, x, y):
    w, h = image.size
    return image.transform(
        image.size, Image.Transform.AFFINE, (1, 0, x * w, 0, 1, y * h)
    )


def _sheared(image, x, y):
    return image.transform(image.size, Image.Transform.AFFINE, (1, x, 0, y, 1, 0))


# What is done, and the range of its strength.
OPERATIONS = (
    (lambda image, v: ImageOps.autocontrast(image), 0, 1),
    (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.1, 1.9),
    (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.1, 1.9),
    (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.1, 1.9),
    (lambda image, v: ImageOps.equalize(image), 0, 1),
    (lambda image, v: image, 0, 1),
    (lambda image, v: ImageOps.invert(image), 0, 1),
    (lambda image, v: ImageOps.posterize(image, max(1, int(v))), 4, 8),
    (lambda image, v: image.rotate(v), -30, 30),
    (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.1, 1.9),
    (lambda image, v: _sheared(image, v, 0), -0.3, 0.3),
    (lambda image, v: _sheared(image, 0, v), -0.3, 0.3),
    (lambda image, v: ImageOps.solarize(image, v), 0, 256),
    (lambda image, v: _shifted(image, v, 0), -0.3, 0.3),
    (lambda image, v: _shifted(image, 0, v), -0.3, 0.3),
)


def distorted(image: Image.Image, rng: random.Random) -> Image.Image:
    """Two operations, drawn with repetition, each done with probability 0.6 and a
    random strength.
    """
    for operation, low, high in rng.choices(OPERATIONS, k=2):
        if rng.random() <= 0.6:
            image = operation(image, rng.uniform(low, high))
    return image
