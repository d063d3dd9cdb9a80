"""QNet-style, reconstructed: MaPLe whose coupling of the two towers is a quaternion
layer.

After Prompt Learning with Quaternion Networks; Shi et al., ICLR 2024; OpenReview
dKlxDx2SoS. THIS IS A RECONSTRUCTION: the paper's code was never published, and what is
known of it here is its abstract, its reviews and the code of a sister method (Domain
Prompt Learning with Quaternion Networks, arXiv 2312.08878). The following is ours: the
coupling goes from text to image alone and has no noise; a learned prompt stands on the
axes j and k, and the other two are zero, as in the sister method; there is no
activation unless it is asked for; each block's layer is drawn on its own and sees that
block's prompt alone; the loss and the recipe are MaPLe's. Numbers that it reaches are
those of a QNet-style method, not QNet's.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from promptkit.errors import expect
from promptkit.method import register
from promptkit.methods.maple import MaPLe
from promptkit.picture import Bridge, learned
from promptkit.published import Published, everywhere
from promptkit.quaternion import QuaternionLinear


class Coupler(nn.Module):
    """Image prompts (n, Dv) from text prompts (n, D), read as quaternions.

    Args:
        width, vision_width: D and Dv.
        packing: "imaginary", a prompt is the parts j and k of D / 2 quaternions, with r
            = i = 0; or "full", it is all four parts of D / 4.
        activation: "none", or "relu" between two layers, the first to a quarter of D.
    """

    def __init__(self, width, vision_width, packing, activation):
        super().__init__()
        read = 2 * width if packing == "imaginary" else width
        self.packing = packing
        if activation == "none":
            self.layers = nn.ModuleList([QuaternionLinear(read, vision_width)])
        else:
            first = QuaternionLinear(read, width // 4)
            self.layers = nn.ModuleList(
                [first, QuaternionLinear(width // 4, vision_width)]
            )

    def forward(self, prompts):
        if self.packing == "imaginary":
            prompts = torch.cat([torch.zeros_like(prompts), prompts], dim=-1)
        x = self.layers[0](prompts)
        return self.layers[1](x.relu()) if len(self.layers) > 1 else x


@register
class QNet(MaPLe):
    r"""MaPLe's prompts; block by block, those of the image tower are quaternion
    products of learned weights with those of the text tower.

    .. math:: \tilde p_i = W_i \otimes (0, 0, p_i^{(1)}, p_i^{(2)}) + b_i,
       \qquad i = 0, \dots, J-1

    with the two halves of p_i on the axes j and k, and the Hamilton product. A layer
    has a quarter of the weights that a linear one would have on the same input. All
    else is MaPLe. A reconstruction, see the module.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        packing: "imaginary", as above; "full": the four quarters of p_i on all axes,
            for half of the weights.
        activation: "none"; "relu": two layers with a ReLU between them, D / 4 wide.
        n_ctx, depth, init: n, J and the words, as in MaPLe.

    Raises:
        InputError: a hyperparameter or a class name does not fit, a width of the
            towers is no multiple of four, or the whole is too long for the text tower.
    """

    name = "qnet"
    title = "QNet-style, reconstructed"
    year = 2024
    paper = "https://openreview.net/forum?id=dKlxDx2SoS"
    picture = replace(
        MaPLe.picture,
        bridges=(
            Bridge(learned("quaternions $W_0$"), "text tokens", "image tokens"),
            Bridge(learned("quaternions $W_i$"), "text 1", "image 1"),
        ),
    )
    official_hyperparameters = MaPLe.official_hyperparameters | {
        "depth": "depth",
        "packing": "packing",
        "activation": "activation",
    }
    published = everywhere(
        Published(
            (),
            (),
            "MaPLe: its runs",
            "A reconstruction with MaPLe's settings: neither code nor settings of QNet"
            " are public.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        packing: Literal["imaginary", "full"] = "imaginary",
        activation: Literal["none", "relu"] = "none",
        n_ctx: int = 2,
        depth: int | None = None,
        init: str | None = None,
    ):
        super().__init__(clip, classnames, n_ctx=n_ctx, depth=depth, init=init)
        narrow = clip.width // 4 if activation == "relu" else 4
        fits = clip.width % 4 == clip.vision_width % 4 == narrow % 4 == 0
        expect(
            fits,
            "the widths of the towers",
            (clip.width, clip.vision_width),
            "multiples of four for quaternions, of sixteen with an activation",
        )
        shape = clip.width, clip.vision_width, packing, activation
        self.couple = Coupler(*shape)
        self.couple_deep = nn.ModuleList(Coupler(*shape) for _ in self.deep)

    def official_names(self):
        """Those of our own reference: there are no others."""
        names = {"text_prompts.0": "context.vectors"}
        names |= {f"text_prompts.{i + 1}": f"deep.{i}" for i in range(len(self.deep))}
        for i, coupler in enumerate([self.couple, *self.couple_deep]):
            ours = "couple" if i == 0 else f"couple_deep.{i - 1}"
            for layer, _ in enumerate(coupler.layers):
                inner = f"{layer}." if len(coupler.layers) > 1 else ""
                for part in ("r_weight", "i_weight", "j_weight", "k_weight", "bias"):
                    names[f"couplers.{i}.{inner}{part}"] = (
                        f"{ours}.layers.{layer}.{part}"
                    )
        return names
