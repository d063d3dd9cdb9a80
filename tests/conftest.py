"""Fixtures that several test files share."""

import open_clip
import pytest
import torch

from promptkit.clip import FrozenCLIP


def _make_clip(
    seed: int = 0, layers: int = 3, quick_gelu: bool = True, **kwargs
) -> FrozenCLIP:
    """A tiny random CLIP with the real vocabulary, whose attention is far from
    uniform.
    """
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=dict(width=32, heads=2, layers=layers),
        quick_gelu=quick_gelu,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "logit_scale":
                p.fill_(torch.tensor(100.0).log())
            elif "ln_" in name and name.endswith("weight"):
                p.normal_(1.0, 0.2, generator=generator)
            elif p.dim() == 1 or "embedding" in name:
                p.normal_(0, 0.3, generator=generator)
            else:
                p.normal_(0, 1.5 * p[0].numel() ** -0.5, generator=generator)
    return FrozenCLIP(model, name="tiny", **kwargs)


@pytest.fixture(scope="session")
def make_clip():
    """A function that makes tiny CLIPs, of a seed, a number of text layers, a
    precision, ...
    """
    return _make_clip


@pytest.fixture(scope="session")
def tiny_clip(make_clip) -> FrozenCLIP:
    """Text width 32, 3 layers; images of 32 px in patches of 8, width 32, 2 layers;
    features of 24.
    """
    return make_clip()
