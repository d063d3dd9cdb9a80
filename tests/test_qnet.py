"""Quaternion layers, and the QNet-style method (reconstructed) that couples its towers
by them.
"""

import pytest
import torch

from promptkit.errors import InputError
from promptkit.quaternion import QuaternionLinear, unitary_draw
from promptkit.registry import build
from promptkit.testing import NAMES

# e_a e_b = sign e_c, by Hamilton's rules i i = j j = k k = i j k = -1.
TABLE = {
    ("i", "j"): (1, "k"), ("j", "k"): (1, "i"), ("k", "i"): (1, "j"),
    ("j", "i"): (-1, "k"), ("k", "j"): (-1, "i"), ("i", "k"): (-1, "j"),
}  # fmt: skip


def times(a, b):
    """The unit that two units multiply to, with its sign."""
    if a == "r" or b == "r":
        return 1, b if a == "r" else a
    return (-1, "r") if a == b else TABLE[a, b]


def test_a_layer_multiplies_quaternions_with_the_weight_on_the_left():
    torch.manual_seed(0)
    layer, p, q = QuaternionLinear(12, 8), 3, 2
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(5, 12)
    weights = {unit: getattr(layer, f"{unit}_weight") for unit in "rijk"}
    parts = dict(zip("rijk", x.split(p, dim=1), strict=True))
    sums = {unit: torch.zeros(5, q) for unit in "rijk"}
    for a, weight in weights.items():
        for b, part in parts.items():
            sign, unit = times(a, b)
            sums[unit] = sums[unit] + sign * part @ weight
    expected = torch.cat([sums[unit] for unit in "rijk"], dim=1) + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_a_unit_quaternion_keeps_lengths():
    """|w x| = |w| |x|, which no other pattern of signs keeps."""
    layer = QuaternionLinear(4, 4)
    x = torch.randn(7, 4)
    weight = torch.stack([p.detach() for p in list(layer.parameters())[:4]]).norm()
    torch.testing.assert_close(layer(x).norm(dim=1), weight * x.norm(dim=1))
    with pytest.raises(InputError, match="outputs must be a multiple of four, got 6"):
        QuaternionLinear(4, 6)


def test_initial_weights_have_glorots_scale():
    torch.manual_seed(0)
    parts = torch.stack(unitary_draw(200, 120))
    square = parts.square().sum(0)  # chi of four degrees of freedom, squared
    assert square.mean() == pytest.approx(4 / (2 * 320), rel=0.02)
    assert all(abs(part.mean()) < 1e-3 for part in parts)
    assert parts[0].var() == pytest.approx(square.mean().item() / 2, rel=0.03)


def test_the_image_prompts_are_products_with_the_text_prompts(tiny_clip):
    method = build("qnet", tiny_clip, NAMES, depth=2)
    D = tiny_clip.width
    for couple, p in [
        (method.couple, method.context.vectors),
        (method.couple_deep[0], method.deep[0]),
    ]:
        layer = couple.layers[0]
        r, i, j, k = (getattr(layer, f"{unit}_weight") for unit in "rijk")
        y, z = p[:, : D // 2], p[:, D // 2 :]  # on j and k
        product = [-y @ j - z @ k, z @ j - y @ k, y @ r - z @ i, y @ i + z @ r]
        torch.testing.assert_close(couple(p), torch.cat(product, 1) + layer.bias)
        couple(p).sum().backward()
        assert all(weight.grad.any() for weight in (r, i, j, k))
    assert not torch.equal(
        method.couple.layers[0].r_weight, method.couple_deep[0].layers[0].r_weight
    )


def test_sizes_and_widths(tiny_clip):
    """A quarter of the weights that a linear layer has on what is read."""
    D, Dv = tiny_clip.width, tiny_clip.vision_width
    sizes = {
        ("imaginary", "none"): 2 * D * Dv // 4 + Dv,
        ("full", "none"): D * Dv // 4 + Dv,
        ("imaginary", "relu"): (2 * D + Dv) * (D // 4) // 4 + D // 4 + Dv,
    }
    for (packing, activation), size in sizes.items():
        options = {"packing": packing, "activation": activation}
        method = build("qnet", tiny_clip, NAMES, **options)
        assert sum(p.numel() for p in method.couple.parameters()) == size
        images = torch.randn(2, 3, 32, 32)
        assert method.logits(images).shape == (2, len(NAMES))
        other = build("qnet", tiny_clip, NAMES, seed=3, **options)
        names = method.official_names()
        assert set(names.values()) == set(method.state_dict())
        other.load_official(
            {key: method.state_dict()[ours] for key, ours in names.items()}
        )
        torch.testing.assert_close(other.logits(images), method.logits(images))
    with pytest.raises(InputError, match="packing must be one of"):
        build("qnet", tiny_clip, NAMES, packing="real")


def test_with_a_linear_coupling_it_is_maple(tiny_clip):
    method = build("qnet", tiny_clip, NAMES, depth=2)
    maple = build("maple", tiny_clip, NAMES, depth=2)
    method.couple, method.couple_deep = maple.couple, maple.couple_deep
    method.deep, method.context.vectors = maple.deep, maple.context.vectors
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(method.logits(images), maple.logits(images))
