"""Adapters inside the blocks of a tower: two small layers behind a residual branch.

Houlsby et al., Parameter-Efficient Transfer Learning for NLP (ICML 2019; arXiv
1902.00751).
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from promptkit.towers import Edit


class Adapter(nn.Module):
    """h + scale up(GELU(down h)) of (..., width); the identity at first.

    Args:
        width, bottleneck: of its input, and between its layers.
        scale: None: learned, from 1.
    """

    def __init__(self, width: int, bottleneck: int, scale: float | None = None):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale = nn.Parameter(torch.ones(1)) if scale is None else scale

    def forward(self, h):
        return h + self.scale * self.up(F.gelu(self.down(h)))


class Adapters(nn.ModuleDict):
    """Copies of one adapter: part -> block -> adapter.

    Args:
        adapter: what all are at first.
        blocks: of a tower, counted from 0.
        parts: of "attn" and "mlp", the branches that they stand behind.
    """

    def __init__(self, adapter: Adapter, blocks: Iterable[int], parts: Iterable[str]):
        super().__init__()
        for part in parts:
            copies = {str(block): copy.deepcopy(adapter) for block in blocks}
            self[part] = nn.ModuleDict(copies)

    def edit(self) -> Edit:
        """What they do to their tower."""
        return Adapted(self)


class Adapted(Edit):
    """A tower whose branches pass through adapters where these stand."""

    def __init__(self, adapters: Adapters):
        self.adapters = adapters

    def branch(self, layer, part, h, span):
        blocks = self.adapters[part] if part in self.adapters else {}
        return blocks[str(layer)](h) if str(layer) in blocks else h
