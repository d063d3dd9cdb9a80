"""MMA: adapters beside the upper blocks of both towers, coupled in their middle.

MMA: Multi-Modal Adapter for Vision-Language Models; Yang et al., CVPR 2024, pages
23826-23837.

Deviations: everything is float32 by default, where the published runs are in mixed
precision. The transfer protocols, whose settings were not published, follow what the
authors said of them. Where the towers differ in depth, blocks are paired from the last
ones on, and not from the first ones. Where an adapter is as wide as its tower, the
published code has another module; here it is the same bottleneck.
"""

import torch.nn.functional as F
from torch import nn

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.picture import Bridge, Picture, learned
from promptkit.prompts import Template
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe
from promptkit.towers import Edit, Prompt

PLAIN = "a photo of a {}."


def amplified(x, factor: float):
    """x itself, whose gradient arrives multiplied by a factor."""
    return x.detach() + factor * (x - x.detach())


class Adapter(Edit):
    """The adapters of one tower, block by block: y = s up(relu(shared(relu(down(h))))),
    of the block's input, added to its output.

    Args:
        blocks: the tower's.
        own: level -> {"down": Linear, "up": Linear}. Level L is the L-th block of the
            tower with fewer blocks, 0 what enters the tower.
        shared: level -> Linear.
        scale: s.
        deeper: how many blocks more than the other this tower has.
    """

    def __init__(self, blocks, own, shared, scale: float, deeper: int):
        self.blocks, self.own, self.shared_layers = blocks, own, shared
        self.scale, self.deeper = scale, deeper

    def branch_of(self, level: int, h):
        """y, of the shape of h, (..., D). Above level 0 every gradient is what it would
        be at s = 1.
        """
        own, factor = self.own[str(level)], 1 / self.scale if level else 1.0
        middle = self.shared_layers[str(level)]
        for layer in (own["down"], middle, own["up"]):
            weight, bias = (amplified(p, factor) for p in (layer.weight, layer.bias))
            h = F.linear(h, weight, bias)
            h = h if layer is own["up"] else h.relu()
        return self.scale * h

    def entering(self, x):
        """What enters the tower, (..., D), with the adapter of level 0."""
        return x + self.branch_of(0, x) if "0" in self.own else x

    def after(self, layer, x_in, x_out, span):
        level = layer + 1 - self.deeper
        if level < 1 or str(level) not in self.own:
            return x_out
        return x_out + self.branch_of(level, self.blocks[layer].module.ln_1(x_in))


class ImageAdapter(Adapter):
    """In the image tower level 0 stands behind ln_pre."""

    def before(self, layer, x, span):
        return x if layer else self.entering(x)


@register
class MMA(Method):
    r"""A bottleneck beside each of the blocks k .. L of both towers; the two at one
    block share their middle layer.

    .. math:: y = s\,U\,\mathrm{ReLU}\bigl(S\,\mathrm{ReLU}(D\,\mathrm{ln}_1(x))\bigr),
       \qquad x \leftarrow \mathrm{block}(x) + y

    x is the block's input and ln_1 its own frozen norm. s is tiny, and the gradients of
    D, S and U are divided by it: they are those that they would have at s = 1, while
    what flows on into x is as it is. No token is added.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        start, end: the first and the last block, counted from 1 in the tower with fewer
            of them; in the other, the last ones are those beside them. None: the upper
            ``share``, to the last one. 0 as start: also what enters the towers, the
            token embeddings and the output of ln_pre, without a norm before and without
            larger gradients.
        share: of the blocks, from the top. None: two thirds, 5 to 12 of 12.
        width: of the bottleneck.
        scale: s.
        shared: False, the ablation: each tower has a middle layer of its own.
        template: of the prompts, with "{}" for the class name.

    Raises:
        InputError: a hyperparameter does not fit, or a prompt is too long.
    """

    name = "mma"
    title = "MMA"
    year = 2024
    paper = "cvpr2024:23826"  # CVPR 2024, page 23826
    kind = "multi-modal adapter"
    reads = "images"
    picture = Picture(
        blocks=("1 … 4", "5 … L"),
        text_blocks={1: learned("adapter")},
        image_blocks={1: learned("adapter")},
        bridges=(
            Bridge(learned("shared\nprojection"), "text 1", "image 1", both=True),
        ),
    )
    official_hyperparameters = {
        "adapter_start": "start",
        "adapter_end": "end",
        "adapter_dim": "width",
        "adapter_scale": "scale",
        "text_template": "template",
        "text_ctx": "template",  # "a photo of a": the class name and "." follow
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "base-to-new": usual(
            "MMA: its base-to-new configurations",
            "Blocks 5 to 12, 5 epochs, batches of 16, of ImageNet 128.",
        ),
        "few-shot": usual(
            "MMA: its base-to-new configurations",
            "The settings of base-to-new.",
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "MMA: its authors on its transfer runs",
            "The last four of 12 blocks and 1 epoch, as its authors say; batches of 128"
            " are ImageNet's of base-to-new. No configuration was released.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        start: int | None = None,
        end: int | None = None,
        share: float | None = None,
        width: int = 32,
        scale: float = 0.001,
        shared: bool = True,
        template: str = PLAIN,
    ):
        super().__init__(clip, classnames)
        blocks = min(len(clip.text_tower.blocks), len(clip.image_tower.blocks))
        expect(share is None or start is None, "share", share, "left out beside start")
        share = 2 / 3 if share is None else share
        expect(0 < share <= 1, "share", share, "above 0 and at most 1")
        first = blocks - max(round(share * blocks), 1) + 1 if start is None else start
        last = blocks if end is None else end
        expect(0 <= first <= blocks, "start", start, f"from 0 to {blocks} blocks")
        expect(first <= last <= blocks, "end", end, f"from start to {blocks} blocks")
        expect(width >= 1, "width", width, "at least 1")
        expect(scale > 0, "scale", scale, "above 0")
        fine = template.count("{}") == 1
        expect(fine, "template", template, "one sentence with {} for the class name")
        self.scale, self.template = scale, template
        levels = range(first, last + 1)
        self.text_adapter, self.image_adapter = (
            nn.ModuleDict({str(level): _bottleneck(D, width) for level in levels})
            for D in (clip.width, clip.vision_width)
        )
        self.shared_adapter = _middles(levels, width)
        self.image_middle = None if shared else _middles(levels, width)

    def set_classes(self, classnames):
        super().set_classes(classnames)
        # What stands before the name is shared by all classes.
        before, hole, after = self.template.rpartition("{}")
        words, _, glued = before.rpartition(" ")
        pattern = [part for part in (words, glued + hole + after) if part]
        prompt = Template(self.clip, self.classnames, pattern)
        self.__dict__["prompt"] = prompt()

    def text_prompt(self, image_features=None):
        edit, prompt = self.text_edit(), self.prompt
        return Prompt(
            edit.entering(prompt.prefix), edit.entering(prompt.suffix), prompt.eot
        )

    def text_edit(self):
        return self._edit(Adapter, "text", self.shared_adapter)

    def image_edit(self):
        return self._edit(
            ImageAdapter, "image", self.image_middle or self.shared_adapter
        )

    def _edit(self, kind, side, middle):
        text, image = self.clip.text_tower.blocks, self.clip.image_tower.blocks
        blocks = text if side == "text" else image
        deeper = len(blocks) - min(len(text), len(image))
        own = getattr(self, f"{side}_adapter")
        return kind(blocks, own, middle, self.scale, deeper)

    def official_names(self):
        towers = {
            "text_adapter": "text_adapter",
            "visual_adapter": "image_adapter",
            "shared_adapter": "shared_adapter",
        }
        names = {}
        for official, ours in towers.items():
            for name, _ in getattr(self, ours).named_parameters():
                level, *part, leaf = name.split(".")
                part = {"down": "down.0", "up": "up"}[part[0]] if part else "0"
                names[f"adapter_learner.{official}.{level}.{part}.{leaf}"] = (
                    f"{ours}.{name}"
                )
        return names

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; words alone stand before the class name."""
        ours = super().official_hparams(hyperparameters)
        if "{}" not in ours.get("template", PLAIN):
            words = ours["template"].replace("_", " ")
            ours["template"] = f"{words} {{}}.".lstrip()
        return ours

    @classmethod
    def recipe(cls, setting):
        """The paper's; few-shot runs, which were not published, take the settings of
        base-to-new.
        """
        options = {"lr": 0.0015, "warmup_epochs": 0}
        if setting.transfer:
            return Recipe(hparams={"share": 1 / 3}, epochs=1, batch_size=128, **options)
        batch_size = 128 if setting.dataset == "imagenet" else 16
        return Recipe(epochs=5, batch_size=batch_size, **options)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Normal weights of variance 2 / outputs, no bias at first."""
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def _bottleneck(width: int, inner: int) -> nn.ModuleDict:
    return nn.ModuleDict({"down": _linear(width, inner), "up": _linear(inner, width)})


def _middles(levels, inner: int) -> nn.ModuleDict:
    return nn.ModuleDict({str(level): _linear(inner, inner) for level in levels})
