"""The CLIPs that the fixtures were computed from."""

import open_clip
import pytest
from seeded import PARITY_CLIP, PARITY_TEACHER, load_seeded

from promptkit.clip import FrozenCLIP


def seeded_clip(config, salt):
    """A CLIP of a fixture's shape and seeded weights, with QuickGELU as in the
    original.
    """
    model = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=config["vision_layers"],
            width=config["vision_width"],
            patch_size=config["vision_patch_size"],
            image_size=config["image_resolution"],
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=config["context_length"],
            vocab_size=config["vocab_size"],
            width=config["transformer_width"],
            heads=config["transformer_heads"],
            layers=config["transformer_layers"],
        ),
        quick_gelu=True,
    )
    return FrozenCLIP(load_seeded(model, salt))


@pytest.fixture(scope="session")
def parity_clip():
    return seeded_clip(PARITY_CLIP, salt=0)


@pytest.fixture(scope="session")
def parity_teacher():
    return seeded_clip(PARITY_TEACHER, salt=1)
