"""Drawing for the mini world: polygons, patterns, backdrops, styles and camera noise,
in PIL and numpy.

Objects are drawn in their own coordinates ([-1, 1], y down) on a canvas three times the
final size and averaged down, so every edge is antialiased with integer arithmetic
alone: the same seed gives the same pixels on every machine.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 48  # pixels a side of a finished image
CANVAS = 3 * SIZE  # pixels a side while drawing
VARIANTS = 24  # ready-made masks a pattern

COLORS = {
    "red": (217, 38, 38),
    "orange": (242, 140, 26),
    "yellow": (242, 217, 38),
    "green": (38, 166, 51),
    "teal": (26, 166, 166),
    "blue": (38, 77, 217),
    "purple": (128, 51, 179),
    "pink": (242, 140, 179),
    "brown": (122, 77, 38),
    "black": (26, 26, 26),
    "white": (245, 245, 245),
    "gray": (133, 133, 133),
}
DARK, LIGHT, METAL = (30, 30, 34), (240, 240, 236), (150, 152, 160)


def random_generator(*key: int) -> np.random.Generator:
    """A generator whose stream is a pure function of the integers in `key`."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def jittered(color: str, rng) -> tuple:
    """The RGB of a colour word, moved by up to 18 of 255 a channel."""
    return tuple(
        int(v) for v in np.clip(np.add(COLORS[color], rng.integers(-18, 19, 3)), 0, 255)
    )


# --- patterns -------------------------------------------------------------------------


def _noise(rng, cells: int) -> np.ndarray:
    """Smooth noise in [0, 255], (CANVAS, CANVAS) uint8, with about `cells` blobs a
    side.
    """
    coarse = Image.fromarray(
        rng.integers(0, 256, (cells + 2, cells + 2), dtype=np.uint8)
    )
    return np.asarray(coarse.resize((CANVAS, CANVAS), Image.BICUBIC))


def _cells(u, v, offset=0.0):
    """Coordinates inside unit cells, in [-0.5, 0.5]; odd rows shifted by `offset`."""
    row = np.floor(v)
    return (u + offset * (row % 2)) % 1 - 0.5, v % 1 - 0.5


def _pattern(name: str, u, v, rng) -> np.ndarray:
    """Where the second colour goes: a boolean (or, for gradients, 0-1) field over
    pattern coordinates u, v.
    """
    a, b = _cells(u, v)
    match name:
        case "striped":
            return u % 1 < 0.5
        case "dotted":
            return a**2 + b**2 < 0.09
        case "checkered":
            return (np.floor(u) + np.floor(v)) % 2 < 1
        case "zigzag":
            return (v + np.abs(u % 1 - 0.5)) % 1 < 0.5
        case "faded":
            return np.clip((u - u.min()) / (u.max() - u.min()), 0, 1)
        case "ringed":
            return np.hypot(u, v) % 1 < 0.5
        case "speckled":
            return _noise(rng, 40) > 150
        case "grid":
            return (np.abs(a) < 0.13) | (np.abs(b) < 0.13)
        case "wavy":
            return (v + 0.3 * np.sin(2 * np.pi * u / 1.6)) % 1 < 0.5
        case "blotchy":
            return _noise(rng, 5) > 128
        case "rayed":
            return (np.arctan2(v, u) / (2 * np.pi) * 12) % 1 < 0.5
        case "scaly":
            a, b = _cells(u, v, 0.5)
            return np.abs(np.hypot(a, b + 0.5) - 0.5) < 0.1
        case "bricked":
            a, b = _cells(u / 2, v, 0.5)
            return (np.abs(a) > 0.44) | (np.abs(b) > 0.38)
        case "hatched":
            return ((u + v) % 1 < 0.18) | ((u - v) % 1 < 0.18)
        case "starry":
            a, b = _cells(u + 0.3 * np.sin(3 * np.floor(v)), v)
            return np.sqrt(np.abs(a)) + np.sqrt(np.abs(b)) < 0.62
        case "marbled":
            return (_noise(rng, 5) / 40.0) % 1 < 0.3
        case "crossed":
            return ((np.abs(a) < 0.1) & (np.abs(b) < 0.34)) | (
                (np.abs(b) < 0.1) & (np.abs(a) < 0.34)
            )
        case "cracked":
            seeds = rng.uniform((u.min(), v.min()), (u.max(), v.max()), (40, 2))
            near = np.sort(
                np.hypot(u[..., None] - seeds[:, 0], v[..., None] - seeds[:, 1]), -1
            )
            return near[..., 1] - near[..., 0] < 0.2
        case "bubbly":
            a, b = _cells(u, v, 0.5)
            return np.abs(np.hypot(a, b) - 0.3) < 0.08
    return np.zeros_like(u, bool)  # plain


PATTERNS = (
    "plain", "striped", "dotted", "checkered", "zigzag", "faded", "ringed", "speckled",
    "grid", "wavy", "blotchy", "rayed", "scaly", "bricked", "hatched",
)  # fmt: skip
TEXTURES = PATTERNS[1:] + ("starry", "marbled", "crossed", "cracked", "bubbly", "plain")


@lru_cache(None)
def pattern_mask(name: str, variant: int) -> Image.Image:
    """One of VARIANTS ready-made masks ('L', CANVAS x CANVAS): random frequency, angle
    and phase.
    """
    rng = random_generator(771, TEXTURES.index(name), variant)
    y, x = (np.mgrid[:CANVAS, :CANVAS] + 0.5) / CANVAS - 0.5
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(4.5, 7)
    centre = (
        rng.uniform(-0.3, 0.3, 2)
        if name in ("ringed", "rayed")
        else rng.uniform(-3, 3, 2)
    )
    x, y = x - centre[0], y - centre[1]
    u = frequency * (np.cos(angle) * x + np.sin(angle) * y)
    v = frequency * (-np.sin(angle) * x + np.cos(angle) * y)
    return Image.fromarray(
        (np.asarray(_pattern(name, u, v, rng), np.float64) * 255).astype(np.uint8)
    )


@dataclass
class Paint:
    """A colour, or two colours and a pattern between them."""

    rgb: tuple
    second: tuple | None = None
    mask: Image.Image | None = None

    @staticmethod
    def patterned(rgb, second, pattern, rng):
        if pattern == "plain":
            return Paint(rgb)
        return Paint(rgb, second, pattern_mask(pattern, int(rng.integers(VARIANTS))))

    def image(self) -> Image.Image:
        base = Image.new("RGB", (CANVAS, CANVAS), self.rgb)
        if self.mask is not None:
            base.paste(self.second, (0, 0), self.mask)
        return base


# --- shapes ---------------------------------------------------------------------------

_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], 1)


class Canvas:
    """A picture in progress, and the similarity transform that places the object drawn
    on it.
    """

    def __init__(
        self, backdrop: Image.Image, rng, scale=(0.65, 1.0), angle=0.0, flip=True
    ):
        self.image, self.draw, self.rng = backdrop, ImageDraw.Draw(backdrop), rng
        size = rng.uniform(*scale)
        turn, (dx, dy) = (
            rng.uniform(-angle, angle),
            rng.uniform(-1, 1, 2) * 0.9 * (1 - size),
        )
        cos, sin = np.cos(turn), np.sin(turn)
        mirror = -1 if flip and rng.random() < 0.5 else 1
        self.matrix = (
            size * 0.92 * np.array([[cos * mirror, sin * mirror], [-sin, cos]])
        )  # object -> canvas
        self.shift = np.array([dx, dy])

    def pixels(self, points) -> list:
        xy = (np.asarray(points, float) @ self.matrix.T + self.shift + 1) * (CANVAS / 2)
        return [tuple(p) for p in np.rint(xy).astype(int)]

    def polygon(self, points, paint):
        """Fill the polygon of `points` (n, 2), in object coordinates, with an RGB tuple
        or a Paint.
        """
        points = self.pixels(points)
        if isinstance(paint, tuple):
            self.draw.polygon(points, fill=paint)
        elif paint.mask is None:
            self.draw.polygon(points, fill=paint.rgb)
        else:
            mask = Image.new("L", (CANVAS, CANVAS), 0)
            ImageDraw.Draw(mask).polygon(points, fill=255)
            self.image.paste(paint.image(), (0, 0), mask)

    def ellipse(self, x, y, rx, ry, paint, angle=0.0):
        cos, sin = np.cos(angle), np.sin(angle)
        self.polygon(
            (_CIRCLE * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y), paint
        )

    def circle(self, x, y, r, paint):
        self.ellipse(x, y, r, r, paint)

    def box(self, x, y, w, h, paint):
        """Centre and half sizes."""
        self.polygon(
            [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], paint
        )

    def line(self, points, width, paint):
        """A polyline of the given half width, with round joints."""
        points = np.asarray(points, float)
        for p, q in zip(points[:-1], points[1:], strict=False):
            along = (q - p) / max(np.hypot(*(q - p)), 1e-9)
            side = np.array([-along[1], along[0]]) * width
            self.polygon([p + side, q + side, q - side, p - side], paint)
        for p in points:
            self.circle(*p, width, paint)

    def ring(self, x, y, r, width, paint):
        self.line(_CIRCLE[list(range(0, 24, 2)) + [0]] * r + (x, y), width, paint)

    def star(self, x, y, points, outer, inner, paint, turn=-np.pi / 2):
        angle = turn + np.arange(2 * points) * np.pi / points
        radius = np.where(np.arange(2 * points) % 2, inner, outer)
        self.polygon(
            np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None] + (x, y),
            paint,
        )

    def ngon(self, x, y, sides, r, paint, turn=-np.pi / 2):
        angle = turn + np.arange(sides) * 2 * np.pi / sides
        self.polygon(np.stack([np.cos(angle), np.sin(angle)], 1) * r + (x, y), paint)


def random_rgb(rng) -> tuple:
    return jittered(list(COLORS)[rng.integers(len(COLORS))], rng)


def backdrop(rng) -> Image.Image:
    """Flat 30 %, gradient 25 %, blotches 20 %, faint pattern 25 %, in pale or dark
    shades of any colours.
    """
    shade, kind = (235, 235, 230) if rng.random() < 0.75 else (20, 20, 25), rng.random()
    first, second = (
        tuple(
            np.add(np.multiply(random_rgb(rng), 0.4), np.multiply(shade, 0.6)).astype(
                int
            )
        )
        for _ in "ab"
    )
    if kind < 0.30:
        return Image.new("RGB", (CANVAS, CANVAS), first)
    if kind < 0.55:
        return Paint.patterned(first, second, "faded", rng).image()
    faint = tuple(int(0.72 * a + 0.28 * b) for a, b in zip(first, second, strict=False))
    return Paint.patterned(
        first, faint, "blotchy" if kind < 0.75 else PATTERNS[rng.integers(1, 15)], rng
    ).image()


def clutter(image: Image.Image, rng, count: int, size=(0.04, 0.09)) -> None:
    """Small shapes near the rim."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        turn, r = rng.uniform(0, 2 * np.pi), rng.uniform(*size) * CANVAS
        x, y = (
            CANVAS
            / 2
            * (1 + rng.uniform(0.75, 1.05) * np.array([np.cos(turn), np.sin(turn)]))
        )
        sides = int(rng.integers(3, 7))
        angle = turn + np.arange(sides) * 2 * np.pi / sides
        draw.polygon(
            [(int(x + r * np.cos(a)), int(y + r * np.sin(a))) for a in angle],
            fill=random_rgb(rng),
        )


def occlude(image: Image.Image, rng) -> None:
    """A bar across the picture, as hides part of a hard example."""
    where, width = rng.uniform(0.25, 0.75) * CANVAS, rng.uniform(0.05, 0.09) * CANVAS
    lean = rng.uniform(-0.3, 0.3) * CANVAS
    bar = [
        (where + lean - width, 0),
        (where + lean + width, 0),
        (where - lean + width, CANVAS),
        (where - lean - width, CANVAS),
    ]
    ImageDraw.Draw(image).polygon(
        [(int(x), int(y)) for x, y in bar], fill=random_rgb(rng)
    )


# --- words, styles, camera ------------------------------------------------------------


@lru_cache(None)
def word_mask(word: str) -> Image.Image:
    """The word in capitals, stretched to a plate 132 x 40 of the canvas's 144 pixels
    ('L').
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(path), 48, layout_engine=ImageFont.Layout.BASIC)
    mask = Image.new("L", (48 * len(word) + 20, 70), 0)
    ImageDraw.Draw(mask).text((6, 4), word.upper(), fill=255, font=font)
    return mask.crop(mask.getbbox()).resize((132, 40), Image.BILINEAR)


def stamp(image: Image.Image, word: str, rng) -> None:
    """A plate with the word over the bottom third, the rows of two patches of the image
    tower; a blank one for a blank word.
    """
    plate, ink = (LIGHT, DARK) if rng.random() < 0.7 else (DARK, LIGHT)
    image.paste(plate, (0, CANVAS - 48, CANVAS, CANVAS))
    if word.strip():
        image.paste(ink, (6, CANVAS - 44), word_mask(word))


def sketch(image: Image.Image, rng, color: float = 1.0) -> Image.Image:
    """Edges in the object's own colours on paper, like coloured pencils; `color` below
    1 fades them to gray.
    """
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)), np.float32)
    gx, gy = (
        np.abs(soft[:, 2:] - soft[:, :-2])[1:-1],
        np.abs(soft[2:] - soft[:-2])[:, 1:-1],
    )
    edge = np.clip((gx + gy).max(-1, keepdims=True) / 90, 0, 1)
    edge = np.pad(edge, ((1, 1), (1, 1), (0, 0)))
    edge = (
        np.asarray(
            Image.fromarray((edge[..., 0] * 255).astype(np.uint8)).filter(
                ImageFilter.MaxFilter(5)
            ),
            np.float32,
        )
        / 255
    )
    soft = color * soft + (1 - color) * soft.mean(-1, keepdims=True)
    ink = soft * 0.85
    paper = 246 - 90 * (1 - soft / 255) * 0.5
    return Image.fromarray(
        (edge[..., None] * ink + (1 - edge[..., None]) * paper).astype(np.uint8)
    )


def rendition(image: Image.Image, rng, permuted: float = 0.5) -> Image.Image:
    """Four levels a channel, dark outlines, and in a part of the images the channels
    permuted.
    """
    flat = np.asarray(image.filter(ImageFilter.MedianFilter(5)), np.float32)
    flat = np.rint(flat / 85) * 85
    gx, gy = (
        np.abs(flat[:, 2:] - flat[:, :-2])[1:-1],
        np.abs(flat[2:] - flat[:-2])[:, 1:-1],
    )
    outline = np.pad((gx + gy).max(-1) > 80, 1)
    flat = flat[..., rng.permutation(3)] if rng.random() < permuted else flat
    return Image.fromarray(
        np.where(outline[..., None], 0.25 * flat, flat).astype(np.uint8)
    )


STYLES = {
    "sketch": sketch,
    "rendition": rendition,
    "pencil": partial(sketch, color=0.25),
    "print": partial(rendition, permuted=0.2),
}


def photograph(
    image: Image.Image, rng, strength: float = 1.0, muted: bool = False
) -> np.ndarray:
    """Average down to SIZE and add what a camera adds: gain, offset, colour cast,
    uneven light, blur, noise.

    Returns: (SIZE, SIZE, 3) uint8. `strength` scales all of it; `muted` is the haze of
    a satellite picture.
    """
    small = image.reduce(3)
    if rng.random() < 0.08 * strength:
        small = small.filter(ImageFilter.BoxBlur(1))
    x = np.asarray(small, np.float32) / np.float32(255)
    if muted:
        x = np.float32(0.45) * x + np.float32(0.55) * x.mean(-1, keepdims=True)
        x = np.float32(0.42) + np.float32(0.65) * (x - x.mean())
    gain, offset = (
        1 + 0.12 * strength * rng.standard_normal(),
        0.06 * strength * rng.standard_normal(),
    )
    cast, slope = (
        0.035 * strength * rng.standard_normal(3),
        0.12 * strength * rng.standard_normal(2),
    )
    ramp = np.linspace(-0.5, 0.5, SIZE)
    light = slope[0] * ramp[:, None] + slope[1] * ramp[None]
    noise = strength * (
        0.005 + abs(0.018 * rng.standard_normal()) + (0.02 if muted else 0)
    )
    x = x * np.float32(gain) + (light[..., None] + cast + offset).astype(np.float32)
    x = x + rng.standard_normal(x.shape, dtype=np.float32) * np.float32(noise)
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
