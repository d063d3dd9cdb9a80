"""The control of the QNet-style method: plain linear maps that start as large as its
quaternion layers, of full rank or of as many weights.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from promptkit.method import register
from promptkit.methods.maple import MaPLe


class PlainMap(nn.Module):
    """A linear map (..., D) -> (..., Dv), its rows scaled as those of a quaternion
    layer that reads 2 D features, half of them zero.

    Args:
        width, vision_width: D and Dv.
        rank: of the map, the product of two factors; None: one whole matrix.
    """

    def __init__(self, width: int, vision_width: int, rank: int | None):
        super().__init__()
        std = math.sqrt(2 / (2 * width + vision_width))
        shapes = [(vision_width, width)]
        if rank is not None:
            shapes = [(rank, width), (vision_width, rank)]
        stds = [std, *(1 / math.sqrt(shape[1]) for shape in shapes[1:])]
        self.factors = nn.ParameterList(
            torch.empty(shape).normal_(0, s)
            for shape, s in zip(shapes, stds, strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(vision_width))

    def forward(self, x):
        for factor in self.factors:
            x = F.linear(x, factor)
        return x + self.bias


@register
class PlainCoupled(MaPLe):
    r"""MaPLe whose maps start like the QNet-style method's: drawn block by block, as
    large as its layers, with biases of zero.

    .. math:: \tilde p_i = A_i\,p_i + b_i, \qquad A_i = U_i V_i
       \text{ where the rank is limited}

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        rank: "full"; "equal", the one at which a map has as many weights as a
            quaternion layer with imaginary packing, D Dv / 2.
        n_ctx, depth, init: as in MaPLe.
    """

    name = "plain_map"
    title = "Plain maps"
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        rank: Literal["full", "equal"] = "full",
        n_ctx: int = 2,
        depth: int | None = None,
        init: str | None = None,
    ):
        super().__init__(clip, classnames, n_ctx=n_ctx, depth=depth, init=init)
        D, Dv = clip.width, clip.vision_width
        n = None if rank == "full" else max(D * Dv // (2 * (D + Dv)), 1)
        self.couple = PlainMap(D, Dv, n)
        self.couple_deep = nn.ModuleList(PlainMap(D, Dv, n) for _ in self.deep)

    def official_names(self):
        return {}  # nobody published it
