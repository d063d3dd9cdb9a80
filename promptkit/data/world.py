"""The mini world: eleven families of procedurally drawn things, what they are called, and what a caption says of them.

Every class is a bundle of attribute values. *Species* families (pet, car, flower, dish, plane) give made-up names to
bundles; the other families have real nouns. A class's name is rare in captions, its attributes are common: this is what
leaves prompt learning something to win, as CLIP's web captions do for aircraft and flowers.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
from PIL import Image

from promptkit.data.render import (
    CANVAS,
    COLORS,
    DARK,
    LIGHT,
    METAL,
    PATTERNS,
    STYLES,
    TEXTURES,
    Canvas,
    Paint,
    backdrop,
    clutter,
    jittered,
    occlude,
    photograph,
    random_generator,
    stamp,
)

COLOR_WORDS = tuple(COLORS)
NUMBERS = {0: "no", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 12: "twelve"}

PETS = """seilum muzu hasix voban banath faiki gosath skibix dozor raiza hulti koora kainek kevek zeisa tainda bumor rocket
gleinu desis porum trelu dreidan gurni tamath vandum kreine sorath guzi glairis""".split()
FLOWERS = """kainek vaizor faiki hemel raris vairnix gleile volis tainda durath soozus lirnath kaidum rovath drandix kaivath
ploovu gloove treile somo feindum peman hivor nuko heiki skake risek mooror keiru breidix vurnus pluris""".split()
DISHES = """taiba hasix skande gleve vaizor funek tibix volis goltis dozor bilum krekek dumus rovath vuku flarnan molum
vazan kroltel koora maikan truzor plulti kumis trelath naikath birnor krila""".split()
BRANDS = {
    "geime": "spoked",
    "kraibi": "spoked",
    "plaiman": "solid",
    "bruror": "solid",
    "dibor": "wide",
    "leru": "wide",
}
MODELS = """havath mive bekix lulath mooki glundek marnum skonus filtel gluvo geizum foolix broozix tridix tavi heba flalte
toomo silath zakix breilta darnath vaini noni soonath glaltan reltix flevu bondix dridor""".split()
PLANES = """k-21 z-7 mv-40 t-85 rk-3 ux-12 b-66 lz-9 h-31 q-50 dv-8 s-17 ko-24 x-72 pn-5 w-38 gt-61 j-90 ev-2 n-44 fy-73
az-6 u-19 cr-55""".split()


@dataclass
class Family:
    """One kind of thing. Subclasses draw a bundle (`draw`) and put it into words (`facts`)."""

    name: str
    kinds: tuple  # what a caption calls it when it does not know the name
    frames: tuple  # captions of this family alone
    share: float  # of the pre-training images
    names: list
    attributes: dict = field(default_factory=dict)  # attribute -> values; empty for families of nouns
    distance: int = 1  # attributes in which any two bundles differ
    angle: float = 0.2  # rotation of the object, radians either way
    flip: bool = True

    @cached_property
    def bundles(self) -> list[tuple]:
        """One bundle of attribute values a class, drawn once and for all from a fixed seed."""
        if not self.attributes:
            return [(name,) for name in self.names]
        rng, chosen = random_generator(91, sum(map(ord, self.name))), []
        everything = [b for b in product(*self.attributes.values()) if self.sensible(b)]
        for at in rng.permutation(len(everything)):
            bundle = everything[at]
            if self.fits(bundle, len(chosen)) and all(
                sum(a != b for a, b in zip(bundle, other, strict=False)) >= self.distance for other in chosen
            ):
                chosen.append(bundle)
                if len(chosen) == len(self.names):
                    return chosen
        raise AssertionError(f"only {len(chosen)} bundles for {self.name}")

    def sensible(self, bundle) -> bool:
        return True

    def fits(self, bundle, index) -> bool:
        return True

    def random_bundle(self, rng) -> tuple:
        while True:
            bundle = tuple(values[rng.integers(len(values))] for values in self.attributes.values())
            if self.sensible(bundle):
                return bundle

    def deviating(self, bundle, rng) -> tuple:
        """The bundle with one attribute drawn anew."""
        if not self.attributes:
            return bundle
        at = int(rng.integers(len(bundle)))
        values = list(self.attributes.values())[at]
        other = bundle[:at] + (values[rng.integers(len(values))],) + bundle[at + 1 :]
        return other if self.sensible(other) else bundle


class Pet(Family):
    def sensible(self, bundle):
        return bundle[0] != bundle[1]

    def facts(self, bundle):
        color, second, pattern, ears, tail, body = bundle
        return [
            f"{color} fur" if pattern == "plain" else f"{color} and {second} {pattern} fur",
            {"horned": "two horns", "antenna": "two antennas"}.get(ears, f"{ears} ears"),
            f"a {tail} tail",
            f"a {body} body",
        ]

    def draw(self, c: Canvas, bundle, rng):
        color, second, pattern, ears, tail, body = bundle
        fur, other = jittered(color, rng), jittered(second, rng)
        height = 0.22 if body == "slim" else 0.38
        hip = 0.1 + height
        if tail == "long":
            c.line([(0.5, 0.0), (0.75, -0.25), (0.95, -0.6)], 0.06, fur)
        elif tail == "curly":
            c.ring(0.72, -0.12, 0.17, 0.06, fur)
        else:
            c.circle(0.6, -0.02, 0.13, fur)
        for x in (-0.38, -0.16, 0.2, 0.42):
            c.box(x, hip + 0.12, 0.06, 0.3, fur)
        c.ellipse(0.03, 0.12, 0.6, height, Paint.patterned(fur, other, pattern, rng))
        for side in (-1, 1):
            x = -0.58 + side * 0.17
            if ears == "pointy":
                c.polygon([(x - 0.12, -0.4), (x + 0.12, -0.4), (x + side * 0.05, -0.82)], fur)
            elif ears == "floppy":
                c.ellipse(x + side * 0.14, -0.2, 0.1, 0.27, other)
            elif ears == "round":
                c.circle(x + side * 0.05, -0.53, 0.16, fur)
            elif ears == "horned":
                c.polygon([(x - 0.05, -0.45), (x + 0.05, -0.45), (x + side * 0.16, -0.95)], LIGHT)
            else:
                c.line([(x, -0.45), (x + side * 0.07, -0.85)], 0.03, DARK)
                c.circle(x + side * 0.07, -0.88, 0.08, DARK)
        c.circle(-0.58, -0.24, 0.28, fur)
        for x in (-0.69, -0.49):
            c.circle(x, -0.28, 0.05, DARK)


class Car(Family):
    def fits(self, bundle, index):
        return bundle[1] == list(BRANDS.values())[index // 5]

    def facts(self, bundle):
        style, wheel, trim = bundle
        names = {
            "plain": "plain sides",
            "stripe": "a side stripe",
            "two": "two tone paint",
            "rack": "a roof rack",
        }
        return [f"a {style} body", f"{wheel} wheels", names.get(trim, "a spoiler")]

    def draw(self, c, bundle, rng):
        style, wheel, trim = bundle
        paint, other = (COLOR_WORDS[i] for i in rng.choice(12, 2, replace=False))
        body, accent, glass = jittered(paint, rng), jittered(other, rng), (190, 220, 240)
        roof = {"sedan": -0.42, "van": -0.55, "truck": -0.5, "roadster": -0.05, "hatchback": -0.42}[style]
        if style == "sedan":
            c.polygon([(-0.55, 0.0), (-0.32, roof), (0.3, roof), (0.58, 0.0)], body)
            c.polygon([(-0.4, -0.03), (-0.26, roof + 0.1), (0.24, roof + 0.1), (0.42, -0.03)], glass)
        elif style == "van":
            c.box(0.0, -0.22, 0.88, 0.36, body)
            for x in (-0.58, -0.08, 0.42):
                c.box(x, -0.28, 0.18, 0.15, glass)
        elif style == "truck":
            c.polygon([(-0.85, 0.0), (-0.78, roof), (-0.25, roof), (-0.2, 0.0)], body)
            c.box(-0.55, -0.25, 0.2, 0.13, glass)
        elif style == "roadster":
            c.line([(-0.25, -0.02), (-0.12, -0.3)], 0.03, DARK)
            c.circle(0.1, -0.2, 0.13, (224, 172, 130))
        else:
            c.polygon([(-0.5, 0.0), (-0.2, roof), (0.8, roof), (0.88, 0.0)], body)
            c.polygon([(-0.34, -0.03), (-0.14, roof + 0.1), (0.3, roof + 0.1), (0.3, -0.03)], glass)
        c.box(0.0, 0.17, 0.93, 0.2, body)
        if trim == "stripe":
            c.box(0.0, 0.13, 0.93, 0.06, accent)
        elif trim == "two":
            c.box(0.0, 0.27, 0.93, 0.12, accent)
        elif trim == "rack":
            top = min(roof, -0.32)
            c.line([(-0.3, top - 0.12), (0.5, top - 0.12)], 0.035, DARK)
            for x in (-0.2, 0.1, 0.4):
                c.line([(x, top - 0.12), (x, top + 0.02)], 0.03, DARK)
        elif trim == "spoiler":
            c.line([(0.8, 0.0), (0.88, -0.22)], 0.035, accent)
            c.box(0.86, -0.26, 0.16, 0.05, accent)
        size = 0.27 if wheel == "wide" else 0.21
        for x in (-0.52, 0.52):
            c.circle(x, 0.38, size, DARK)
            if wheel == "spoked":
                c.circle(x, 0.38, 0.14, LIGHT)
                for turn in np.arange(3) * np.pi / 3:
                    step = 0.14 * np.array([np.cos(turn), np.sin(turn)])
                    c.line([(x, 0.38) - step, (x, 0.38) + step], 0.02, DARK)
            elif wheel == "solid":
                c.circle(x, 0.38, 0.15, METAL)
            else:
                c.circle(x, 0.38, 0.07, METAL)
        return {"color": paint}


class Flower(Family):
    def facts(self, bundle):
        count, form, petal, centre, leaves = bundle
        return [
            f"{NUMBERS[count]} {form} petals",
            f"{petal} petals",
            f"a {centre} center",
            "no leaves" if leaves == "none" else f"{leaves} leaves",
        ]

    def sensible(self, bundle):
        return bundle[2] != bundle[3]

    def draw(self, c, bundle, rng):
        count, form, petal, centre, leaves = bundle
        color, green = jittered(petal, rng), jittered("green", rng)
        c.line([(0, 0), (0.0, 0.95)], 0.045, green)
        if leaves == "broad":
            c.ellipse(-0.26, 0.7, 0.26, 0.12, green, 0.5)
            c.ellipse(0.26, 0.7, 0.26, 0.12, green, -0.5)
        elif leaves == "spiky":
            for x in (-1, 1):
                c.polygon([(0, 0.9), (x * 0.12, 0.62), (x * 0.45, 0.4), (x * 0.3, 0.72)], green)
        shape = {"round": (0.3, 0.17 if count > 6 else 0.24), "thin": (0.34, 0.075)}.get(form)
        for k in range(count):
            turn = k * 2 * np.pi / count - np.pi / 2 + rng.uniform(-0.06, 0.06)
            out = np.array([np.cos(turn), np.sin(turn)])
            at = out * 0.36 + (0, -0.25)
            if shape:
                c.ellipse(*at, *shape, color, turn)
            else:
                side = np.array([-out[1], out[0]]) * (0.2 if count < 8 else 0.14)
                root, tip = (0, -0.25) + out * 0.06, (0, -0.25) + out * 0.72
                c.polygon([root, at + side, tip, at - side], color)
        c.circle(0, -0.25, 0.17, jittered(centre, rng))


class Dish(Family):
    def sensible(self, bundle):
        return bundle[1] != bundle[3]

    def facts(self, bundle):
        form, base, topping, top = bundle
        return [f"a {base} {form} base", f"{top} {topping} on top"]

    def draw(self, c, bundle, rng):
        form, base, topping, top = bundle
        color, other = jittered(base, rng), jittered(top, rng)
        plate = (LIGHT, METAL, (120, 150, 190), (200, 180, 150))[rng.integers(4)]
        c.circle(0, 0, 0.95, plate)
        c.circle(0, 0, 0.82, tuple(int(v * 0.92) for v in plate))
        if form == "round":
            c.circle(0, 0, 0.62, color)
        elif form == "square":
            c.box(0, 0, 0.55, 0.55, color)
        elif form == "bowl":
            c.circle(0, 0, 0.74, DARK)
            c.circle(0, 0, 0.6, color)
        else:
            c.polygon([(0, -0.7), (0.66, 0.5), (-0.66, 0.5)], color)
        spots = rng.permutation(9)[:6]
        places = np.stack([spots % 3 - 1, spots // 3 - 1], 1) * 0.24 + rng.uniform(-0.04, 0.04, (6, 2)) + (0, 0.08)
        if topping == "swirl":
            turn = np.linspace(0, 4 * np.pi, 22)
            c.line(
                np.stack([np.cos(turn), np.sin(turn)], 1) * (turn / turn[-1] * 0.4)[:, None] + (0, 0.06),
                0.05,
                other,
            )
        for x, y in [] if topping == "swirl" else places[: 3 if topping in ("strips", "slices") else 6]:
            if topping == "dots":
                c.circle(x, y, 0.09, other)
            elif topping == "cubes":
                c.box(x, y, 0.1, 0.1, other)
            elif topping == "sprinkles":
                end = 0.09 * np.array([np.cos(spin := rng.uniform(0, 3.14)), np.sin(spin)])
                c.line([(x, y) - end, (x, y) + end], 0.025, other)
            elif topping == "slices":
                c.polygon(
                    [(x - 0.2, y), (x + 0.2, y), (x + 0.12, y + 0.14), (x, y + 0.19), (x - 0.12, y + 0.14)],
                    other,
                )
        if topping == "strips":
            for y in (-0.18, 0.06, 0.3):
                c.line([(-0.34, y + 0.06), (0.34, y - 0.06)], 0.06, other)


class Plane(Family):
    def facts(self, bundle):
        wing, engines, tail, body = bundle
        return [f"{wing} wings", f"{NUMBERS[engines]} engines", f"a {tail} tail", f"a {body} fuselage"]

    def draw(self, c, bundle, rng):
        wing, engines, tail, body = bundle
        color = COLOR_WORDS[rng.integers(12)]
        paint = jittered(color, rng)
        shade = tuple(int(v * 0.72) for v in paint)
        half, fat = (0.95, 0.11) if body == "long" else (0.68, 0.16)
        for side in (-1, 1):
            root, tip = {"straight": (0.0, 0.0), "swept": (-0.05, 0.42), "delta": (-0.25, 0.5)}[wing]
            if wing == "delta":
                c.polygon([(0, -0.45), (side * 0.85, 0.5), (0, 0.5)], shade)
            else:
                c.polygon(
                    [
                        (0, root - 0.15),
                        (side * 0.95, tip - 0.08),
                        (side * 0.95, tip + 0.08),
                        (0, root + 0.17),
                    ],
                    shade,
                )
            for k in range(engines // 2):
                x = 0.32 + 0.27 * k
                y = root + (tip - root) * x / 0.95 if wing != "delta" else 0.32
                c.box(side * x, y - 0.08, 0.055, 0.16, DARK)
            if tail == "plain":
                c.polygon([(0, half - 0.3), (side * 0.32, half - 0.08), (side * 0.32, half), (0, half)], shade)
            elif tail == "wide":
                c.polygon(
                    [
                        (0, half - 0.36),
                        (side * 0.55, half - 0.14),
                        (side * 0.55, half + 0.04),
                        (0, half - 0.05),
                    ],
                    shade,
                )
            else:
                c.line([(0, half - 0.22), (side * 0.3, half + 0.16)], 0.07, shade)
        c.ellipse(0, 0, fat, half, paint)
        c.ellipse(0, -half * 0.72, fat * 0.5, 0.1, (180, 215, 240))
        return {"color": color}


# Shapes of things: (kind, numbers..., paint), paint "a" the main paint, "b" the second colour, "d" dark, "l" light.
THINGS = {
    "ball": [("o", 0, 0, 0.75, 0.75, "a")],
    "box": [("r", 0, 0.05, 0.72, 0.66, "a"), ("r", 0, -0.45, 0.78, 0.14, "b")],
    "kite": [("l", [(0, 0.45), (0.15, 0.7), (-0.05, 0.95)], 0.03, "d"), ("p", [(0, -0.95), (0.58, -0.2), (0, 0.5), (-0.58, -0.2)], "a")],
    "star": [("s", 0, 0, 5, 0.95, 0.4, "a")],
    "heart": [("o", -0.34, -0.28, 0.42, 0.42, "a"), ("o", 0.34, -0.28, 0.42, 0.42, "a"), ("p", [(-0.72, -0.1), (0.72, -0.1), (0, 0.85)], "a")],
    "ring": [("c", 0, 0, 0.66, 0.16, "a")],
    "moon": [("p", [(0.2, -0.9), (-0.4, -0.75), (-0.75, -0.2), (-0.7, 0.35), (-0.25, 0.8), (0.3, 0.88), (-0.1, 0.5), (-0.25, 0), (-0.1, -0.5)], "a")],
    "cross": [("r", 0, 0, 0.26, 0.85, "a"), ("r", 0, 0, 0.85, 0.26, "a")],
    "gear": [("s", 0, 0, 9, 0.92, 0.66, "a"), ("o", 0, 0, 0.25, 0.25, "d")],
    "arrow": [("r", -0.25, 0, 0.6, 0.16, "a"), ("p", [(0.2, -0.55), (0.95, 0), (0.2, 0.55)], "a")],
    "drop": [("o", 0, 0.3, 0.55, 0.55, "a"), ("p", [(-0.5, 0.1), (0, -0.95), (0.5, 0.1)], "a")],
    "bolt": [("p", [(0.25, -0.95), (-0.5, 0.15), (-0.02, 0.12), (-0.25, 0.95), (0.5, -0.2), (0.05, -0.15)], "a")],
    "house": [("r", 0, 0.35, 0.62, 0.5, "a"), ("p", [(-0.8, -0.12), (0, -0.85), (0.8, -0.12)], "b"), ("r", 0, 0.55, 0.15, 0.3, "d")],
    "tree": [("r", 0, 0.6, 0.12, 0.36, "brown"), ("o", 0, -0.2, 0.62, 0.62, "a")],
    "pine": [("r", 0, 0.75, 0.1, 0.22, "brown"), ("p", [(-0.6, 0.6), (0, -0.1), (0.6, 0.6)], "a"), ("p", [(-0.45, 0.1), (0, -0.9), (0.45, 0.1)], "a")],
    "mushroom": [("r", 0, 0.45, 0.2, 0.45, "l"), ("p", [(-0.8, 0.1), (-0.6, -0.45), (0, -0.75), (0.6, -0.45), (0.8, 0.1)], "a")],
    "umbrella": [("l", [(0, 0), (0, 0.75), (0.18, 0.85), (0.3, 0.7)], 0.045, "d"), ("p", [(-0.9, 0.05), (-0.65, -0.5), (0, -0.8), (0.65, -0.5), (0.9, 0.05)], "a")],
    "flag": [("l", [(-0.6, -0.9), (-0.6, 0.95)], 0.05, "d"), ("r", 0.12, -0.5, 0.68, 0.4, "a")],
    "key": [("c", -0.5, 0, 0.3, 0.1, "a"), ("r", 0.35, 0, 0.55, 0.08, "a"), ("r", 0.6, 0.18, 0.07, 0.16, "a"), ("r", 0.82, 0.18, 0.07, 0.16, "a")],
    "hammer": [("r", 0, 0.25, 0.09, 0.7, "b"), ("r", 0, -0.55, 0.5, 0.22, "a")],
    "cup": [("c", 0.58, 0, 0.28, 0.08, "a"), ("p", [(-0.6, -0.6), (0.5, -0.6), (0.4, 0.7), (-0.5, 0.7)], "a")],
    "lamp": [("r", 0, 0.35, 0.06, 0.5, "d"), ("o", 0, 0.85, 0.42, 0.1, "d"), ("p", [(-0.3, -0.8), (0.3, -0.8), (0.62, 0), (-0.62, 0)], "a")],
    "boat": [("l", [(0, 0.3), (0, -0.9)], 0.04, "d"), ("p", [(0.08, -0.85), (0.7, 0.2), (0.08, 0.2)], "b"), ("p", [(-0.85, 0.3), (0.85, 0.3), (0.55, 0.75), (-0.55, 0.75)], "a")],
    "fish": [("p", [(0.4, 0), (0.95, -0.45), (0.95, 0.45)], "b"), ("o", -0.12, 0, 0.68, 0.4, "a"), ("o", -0.5, -0.08, 0.07, 0.07, "d")],
    "snowman": [("o", 0, 0.45, 0.5, 0.5, "a"), ("o", 0, -0.35, 0.36, 0.36, "a"), ("r", 0, -0.8, 0.26, 0.14, "d")],
    "clock": [("o", 0, 0, 0.82, 0.82, "a"), ("o", 0, 0, 0.64, 0.64, "l"), ("l", [(0, 0), (0, -0.5)], 0.05, "d"), ("l", [(0, 0), (0.34, 0.1)], 0.05, "d")],
    "table": [("r", 0, -0.3, 0.9, 0.13, "a"), ("r", -0.68, 0.3, 0.09, 0.55, "a"), ("r", 0.68, 0.3, 0.09, 0.55, "a")],
    "chair": [("r", -0.45, -0.2, 0.09, 0.7, "a"), ("r", 0, 0.15, 0.5, 0.11, "a"), ("r", -0.45, 0.6, 0.08, 0.35, "a"), ("r", 0.42, 0.6, 0.08, 0.35, "a")],
    "bottle": [("r", 0, 0.3, 0.36, 0.6, "a"), ("r", 0, -0.55, 0.14, 0.36, "a"), ("r", 0, -0.86, 0.18, 0.08, "d")],
    "candle": [("r", 0, 0.3, 0.24, 0.62, "a"), ("p", [(-0.14, -0.45), (0, -0.92), (0.14, -0.45), (0, -0.3)], "orange")],
    "cactus": [("o", 0, 0.15, 0.2, 0.78, "a"), ("l", [(0, 0.3), (-0.5, 0.25), (-0.5, -0.2)], 0.1, "a"), ("l", [(0, 0.1), (0.5, 0.05), (0.5, -0.4)], 0.1, "a")],
    "rocket": [("p", [(-0.25, 0.3), (-0.6, 0.85), (0.6, 0.85), (0.25, 0.3)], "b"), ("o", 0, 0, 0.32, 0.85, "a"), ("o", 0, -0.25, 0.13, 0.13, "l")],
    "balloon": [("l", [(0, 0.4), (0.1, 0.7), (-0.05, 0.95)], 0.03, "d"), ("o", 0, -0.25, 0.55, 0.66, "a")],
    "ladder": [("r", -0.36, 0, 0.07, 0.9, "a"), ("r", 0.36, 0, 0.07, 0.9, "a")] + [("r", 0, y, 0.36, 0.06, "a") for y in (-0.6, -0.2, 0.2, 0.6)],
    "drum": [("r", 0, 0.1, 0.66, 0.42, "a"), ("o", 0, 0.52, 0.66, 0.2, "a"), ("o", 0, -0.32, 0.66, 0.2, "l")],
    "window": [("r", 0, 0, 0.68, 0.82, "a"), ("r", -0.29, -0.36, 0.22, 0.28, "l"), ("r", 0.29, -0.36, 0.22, 0.28, "l"), ("r", -0.29, 0.36, 0.22, 0.28, "l"), ("r", 0.29, 0.36, 0.22, 0.28, "l")],
}  # fmt: skip
THING_FACTS = {
    "ball": "a round shape", "box": "square corners,a flat lid", "kite": "four corners,a thin string", "star": "sharp points",
    "heart": "a pointed bottom,two round bumps", "ring": "a round shape,a hole in the middle", "moon": "a curved shape,sharp points",
    "cross": "two crossing bars", "gear": "many teeth,a hole in the middle", "arrow": "a long bar,a sharp tip",
    "drop": "a round bottom,a sharp tip", "bolt": "a bent shape,sharp points", "house": "a door,a pointed roof",
    "tree": "a brown trunk,a round crown", "pine": "a brown trunk,a pointed crown", "mushroom": "a round cap,a white stem",
    "umbrella": "a round cap,a bent handle", "flag": "a tall pole,square corners", "key": "a round handle,two teeth",
    "hammer": "a straight handle,a heavy head", "cup": "a round handle,a flat bottom", "lamp": "a wide shade,a tall pole",
    "boat": "a sail,a flat bottom", "fish": "a round eye,a forked end", "snowman": "a dark hat,two round bumps",
    "clock": "a white face,two hands", "table": "two legs,a flat top", "chair": "two legs,a straight back",
    "bottle": "a thin neck,square corners", "candle": "a flame,a straight body", "cactus": "two arms,a tall body",
    "rocket": "a round body,fins,a white hole", "balloon": "a round shape,a thin string", "ladder": "two tall bars,many steps",
    "drum": "a white top,a round body", "window": "four white panes,square corners",
}  # fmt: skip


class Thing(Family):
    def facts(self, bundle):
        return THING_FACTS[bundle[0]].split(",")

    def draw(self, c, bundle, rng):
        color, second = (COLOR_WORDS[i] for i in rng.choice(12, 2, replace=False))
        pattern = PATTERNS[rng.integers(15)] if rng.random() < 0.25 else "plain"
        main, other = jittered(color, rng), jittered(second, rng)
        paints = {"a": Paint.patterned(main, other, pattern, rng), "b": other, "d": DARK, "l": LIGHT, "brown": COLORS["brown"], "orange": COLORS["orange"]}  # fmt: skip
        methods = {"o": c.ellipse, "r": c.box, "p": c.polygon, "s": c.star, "c": c.ring, "l": c.line}
        for kind, *numbers, paint in THINGS[bundle[0]]:
            paint = paints[paint]
            if kind in "lc" and isinstance(paint, Paint):
                paint = paint.rgb  # strokes overlap themselves: patterns would smear
            methods[kind](*numbers, paint)
        return {"color": color, "second": second, "pattern": pattern}


SCENES = {  # elements from back to front; several are shared, so no single one gives the scene away
    "beach": "sun sea sand", "desert": "sun dunes cacti", "forest": "hills trees trees", "meadow": "clouds grass flowers",
    "harbor": "sea boats houses", "city": "towers towers road", "mountain": "peaks trees grass", "lake": "peaks water trees",
    "village": "hills houses grass", "night": "stars hills houses", "sunset": "sun sea hills", "snowfield": "clouds snow pines",
    "road": "hills grass road", "volcano": "peaks fire dunes", "island": "sea sand palms", "farm": "clouds barn crops",
}  # fmt: skip
ELEMENT_WORDS = {
    "sun": "a low sun", "sea": "blue water", "sand": "yellow sand", "dunes": "bare dunes", "cacti": "tall cacti", "hills": "soft hills",
    "trees": "green trees", "clouds": "white clouds", "grass": "green grass", "flowers": "small flowers", "boats": "white sails",
    "houses": "small houses", "towers": "tall towers", "road": "a gray road", "peaks": "steep peaks", "water": "a pond",
    "stars": "bright stars", "snow": "white snow", "pines": "dark pines", "fire": "red fire", "palms": "a palm", "barn": "a red barn",
    "crops": "rows of crops",
}  # fmt: skip


class Scene(Family):
    def facts(self, bundle):
        return [ELEMENT_WORDS[e] for e in dict.fromkeys(SCENES[bundle[0]].split())]

    def draw(self, c, bundle, rng):
        tint = rng.uniform(0.75, 1.15, 3)

        def rgb(*color):
            return tuple(int(v) for v in np.clip(np.array(color) * tint + rng.integers(-22, 23, 3), 0, 255))

        elements = [e for e in SCENES[bundle[0]].split() if rng.random() < 0.9]
        if rng.random() < 0.25:
            elements.insert(int(rng.integers(len(elements) + 1)), list(ELEMENT_WORDS)[rng.integers(len(ELEMENT_WORDS))])
        skies = ((150, 190, 230), (190, 200, 210), (230, 170, 120), (110, 140, 190), (40, 50, 90))
        horizon = rng.uniform(-0.15, 0.25)
        c.box(0, 0, 1.2, 1.2, rgb(*(skies[4] if "stars" in elements else skies[rng.integers(4)])))
        c.box(
            0,
            horizon + 0.75,
            1.2,
            0.75,
            rgb(*((150, 140, 90), (110, 130, 80), (170, 160, 130))[rng.integers(3)]),
        )
        for e in elements:
            spread = rng.uniform(-0.85, 0.85, 4)
            if e == "sun":
                c.circle(spread[0] * 0.6, horizon - 0.12, 0.24, rgb(250, 210, 90))
            elif e in ("sea", "sand", "grass", "snow", "water"):
                color = {
                    "sea": (50, 110, 190),
                    "water": (60, 120, 190),
                    "sand": (225, 200, 130),
                    "grass": (80, 150, 60),
                    "snow": (240, 244, 248),
                }[e]
                if e == "sea":
                    c.box(0, horizon + 0.2, 1.2, 0.2, rgb(*color))
                elif e == "water":
                    c.ellipse(spread[0] * 0.3, 0.62, 0.6, 0.2, rgb(*color))
                else:
                    c.box(0, horizon + 0.85, 1.2, 0.5, rgb(*color))
            elif e in ("dunes", "hills"):
                for x in spread[:3]:
                    c.ellipse(
                        x,
                        horizon + 0.25,
                        0.5,
                        0.26,
                        rgb(*((200, 170, 100) if e == "dunes" else (90, 130, 80))),
                    )
            elif e in ("peaks", "fire"):
                x = spread[0] * 0.5
                c.polygon([(x - 0.7, horizon + 0.1), (x, -0.75), (x + 0.7, horizon + 0.1)], rgb(110, 100, 100))
                c.polygon(
                    [(x - 0.2, -0.45), (x, -0.75), (x + 0.2, -0.45)],
                    rgb(*((230, 60, 30) if e == "fire" else (245, 245, 245))),
                )
            elif e == "clouds":
                for x, y in zip(spread, rng.uniform(-0.85, -0.45, 4), strict=False):
                    c.ellipse(x, y, 0.26, 0.1, rgb(245, 245, 250))
            elif e == "stars":
                for x, y in rng.uniform(-0.95, 0.1, (14, 2)) * (1, 1):
                    c.circle(x * (1 if rng.random() < 0.5 else -1), y - 0.05, 0.035, (250, 250, 220))
            elif e == "road":
                c.polygon([(-0.06, horizon), (0.06, horizon), (0.5, 1.1), (-0.5, 1.1)], rgb(95, 95, 100))
                c.polygon([(-0.01, horizon), (0.01, horizon), (0.05, 1.1), (-0.05, 1.1)], (240, 240, 220))
            elif e == "towers":
                for x in spread:
                    c.box(x, horizon - 0.1, 0.13, rng.uniform(0.3, 0.55), rgb(120, 120, 135))
            elif e == "crops":
                for y in (0.45, 0.62, 0.79, 0.96):
                    c.line([(-1, y), (1, y)], 0.035, rgb(190, 180, 60))
            elif e == "barn":
                c.box(spread[0] * 0.6, horizon + 0.02, 0.24, 0.22, rgb(180, 50, 40))
            else:
                for x, y in zip(spread, rng.uniform(horizon + 0.1, 0.6, 4), strict=False):
                    if e == "trees":
                        c.box(x, y, 0.04, 0.18, rgb(100, 70, 40))
                        c.circle(x, y - 0.22, 0.2, rgb(50, 120, 50))
                    elif e == "pines":
                        c.polygon([(x - 0.15, y + 0.1), (x, y - 0.4), (x + 0.15, y + 0.1)], rgb(30, 80, 60))
                    elif e == "houses":
                        c.box(x, y, 0.15, 0.12, rgb(225, 215, 190))
                        c.polygon([(x - 0.2, y - 0.1), (x, y - 0.3), (x + 0.2, y - 0.1)], rgb(170, 70, 50))
                    elif e == "boats":
                        c.polygon([(x, y - 0.35), (x + 0.2, y), (x, y)], (245, 245, 245))
                        c.box(x, y + 0.04, 0.18, 0.045, rgb(120, 70, 40))
                    elif e == "cacti":
                        c.box(x, y - 0.1, 0.05, 0.24, rgb(50, 120, 60))
                        c.box(x + 0.1, y - 0.16, 0.035, 0.1, rgb(50, 120, 60))
                    elif e == "flowers":
                        for dx, dy in rng.uniform(-0.2, 0.2, (4, 2)):
                            c.circle(x + dx, y + 0.25 + dy, 0.04, jittered(COLOR_WORDS[rng.integers(12)], rng))
                    elif e == "palms" and x == spread[0]:
                        c.line([(x, y + 0.1), (x + 0.06, y - 0.4)], 0.04, rgb(120, 80, 40))
                        for dx in (-0.28, -0.14, 0.14, 0.28):
                            c.line(
                                [(x + 0.06, y - 0.4), (x + dx, y - 0.35 - 0.1 * (abs(dx) < 0.2))],
                                0.045,
                                rgb(40, 130, 60),
                            )


TEXTURE_FACTS = {
    "striped": "straight lines", "dotted": "round spots,even rows", "checkered": "square cells,even rows", "zigzag": "bent lines,sharp corners",
    "faded": "a soft change", "ringed": "curved lines,one middle point", "speckled": "tiny grains", "grid": "straight lines,crossing lines,even rows",
    "wavy": "curved lines", "blotchy": "large patches", "rayed": "straight lines,one middle point", "scaly": "curved lines,even rows",
    "bricked": "square cells,shifted rows", "hatched": "thin slanted lines,crossing lines", "starry": "small stars,sharp corners",
    "marbled": "curved lines,large patches", "crossed": "small crosses,even rows", "cracked": "bent lines,uneven cells",
    "bubbly": "round rings,shifted rows", "plain": "one even color",
}  # fmt: skip


class Texture(Family):
    def facts(self, bundle):
        return TEXTURE_FACTS[bundle[0]].split(",")

    def draw(self, c, bundle, rng):
        color, second = (COLOR_WORDS[i] for i in rng.choice(12, 2, replace=False))
        paint = Paint.patterned(jittered(color, rng), jittered(second, rng), bundle[0], rng)
        left, top = rng.integers(0, CANVAS // 3, 2)
        part = paint.image().crop((left, top, left + 2 * CANVAS // 3, top + 2 * CANVAS // 3)).resize((CANVAS, CANVAS))
        c.image.paste(part.transpose(Image.Transpose(int(rng.integers(7)))))
        return {"color": color, "second": second}


SATELLITE_FACTS = {
    "forest": "dark green ground,rough spots", "river": "a winding band,blue water", "highway": "straight bands,gray ground",
    "houses": "small bright roofs,gray ground", "factory": "large bright roofs,gray ground", "crops": "thin straight rows,brown ground",
    "orchard": "small green dots,brown ground", "pasture": "even ground,light green ground", "sea": "even ground,blue water",
    "desert": "wavy ground,yellow ground",
}  # fmt: skip


class Satellite(Family):
    def facts(self, bundle):
        return SATELLITE_FACTS[bundle[0]].split(",")

    def draw(self, c, bundle, rng):
        name = bundle[0]
        ground = {"forest": (50, 90, 50), "river": (90, 110, 70), "highway": (110, 115, 105), "houses": (115, 120, 110), "factory": (120, 120, 115), "crops": (130, 115, 75), "orchard": (125, 115, 85), "pasture": (120, 145, 85), "sea": (50, 80, 120), "desert": (165, 150, 105)}[name]  # fmt: skip
        rgb = tuple(int(v) for v in np.clip(np.array(ground) + rng.integers(-25, 26, 3), 0, 255))
        dark, light = tuple(int(v * 0.75) for v in rgb), tuple(min(255, int(v * 1.3)) for v in rgb)
        pattern = {"forest": "speckled", "crops": "striped", "orchard": "dotted", "desert": "wavy"}.get(name, "plain")
        c.image.paste(Paint.patterned(rgb, dark, pattern, rng).image())
        if name == "river":
            x = rng.uniform(-0.4, 0.4, 5)
            c.line(np.stack([x, np.linspace(-1.3, 1.3, 5)], 1), 0.13, (60, 90, 130))
        elif name == "highway":
            for _ in range(rng.integers(1, 3)):
                c.line([(rng.uniform(-1, 1), -1.4), (rng.uniform(-1, 1), 1.4)], 0.09, light)
        elif name in ("houses", "factory"):
            count, size = (14, 0.1) if name == "houses" else (4, 0.27)
            for x, y in rng.uniform(-0.95, 0.95, (count, 2)):
                c.box(x, y, size * rng.uniform(0.8, 1.2), size * rng.uniform(0.7, 1), light)
        elif rng.random() < 0.4:
            for x, y in rng.uniform(-1, 1, (3, 2)):
                c.ellipse(x, y, 0.3, 0.2, dark)


# Arms and legs in degrees from straight down, outwards (left, right, left, right), lean of the trunk, prop.
ACTIONS = {
    "standing": (12, 12, 6, 6, 0, ""), "jumping": (150, 150, 40, 40, 0, "gap"), "sitting": (25, 25, 85, -60, 0, "seat"),
    "running": (70, -50, 50, -35, 14, ""), "waving": (12, 155, 6, 6, 0, ""), "kicking": (60, 60, 5, 75, -8, "ball"),
    "lifting": (165, 165, 14, 14, 0, "bar"), "bowing": (-20, 40, 6, 6, 60, ""), "dancing": (100, 160, 45, 5, -10, ""),
    "climbing": (160, 120, 30, 15, 0, "ladder"), "throwing": (100, 60, 30, 30, -12, "high ball"), "juggling": (70, 70, 10, 10, 0, "balls"),
    "fishing": (20, 95, 8, 8, 0, "rod"), "riding": (-10, 70, 30, 50, 15, "bike"), "pushing": (-70, 85, 35, -15, 18, "crate"),
    "lying": (20, 20, 6, 6, 90, ""), "cheering": (140, 140, 10, 10, 0, "flags"), "reading": (40, 55, 8, 8, 0, "book"),
    "rowing": (60, 75, 80, -60, -10, "boat"), "skating": (85, 85, 30, -10, 12, "skates"),
}  # fmt: skip
ACTION_FACTS = {
    "standing": "lowered arms,straight legs", "jumping": "raised arms,spread legs,feet above the ground", "sitting": "lowered arms,bent legs,a seat",
    "running": "swinging arms,spread legs", "waving": "one raised arm,straight legs", "kicking": "one raised leg,a ball on the ground",
    "lifting": "raised arms,a heavy bar", "bowing": "a bent back,straight legs", "dancing": "one raised arm,one raised leg",
    "climbing": "raised arms,tall bars", "throwing": "spread arms,a ball in the air", "juggling": "spread arms,three balls",
    "fishing": "one stretched arm,a long rod", "riding": "stretched arms,two wheels", "pushing": "stretched arms,a square crate",
    "lying": "a flat body,straight legs", "cheering": "raised arms,small flags", "reading": "bent arms,an open book",
    "rowing": "bent legs,an oar", "skating": "spread arms,shoes with blades",
}  # fmt: skip


class Action(Family):
    def facts(self, bundle):
        return ACTION_FACTS[bundle[0]].split(",")

    def draw(self, c, bundle, rng):
        *angles, lean, prop = ACTIONS[bundle[0]]
        angles = np.deg2rad(np.array(angles) + rng.uniform(-9, 9, 4))
        lean = np.deg2rad(lean + rng.uniform(-6, 6))
        color = COLOR_WORDS[rng.integers(12)]
        shirt, trousers = jittered(color, rng), jittered(COLOR_WORDS[rng.integers(12)], rng)
        skin = ((235, 190, 150), (200, 150, 110), (140, 95, 65))[rng.integers(3)]
        hip = np.array([0.0, 0.65 if bundle[0] == "lying" else 0.2 if prop != "gap" else 0.0])
        up = np.array([np.sin(lean), -np.cos(lean)])
        neck = hip + up * 0.62
        legs = angles[2:] + (lean if bundle[0] == "lying" else 0)
        feet = [hip + 0.68 * np.array([s * np.sin(t), np.cos(t)]) for s, t in zip((-1, 1), legs, strict=False)]
        if bundle[0] == "lying":
            feet = [hip + np.array([-0.66, -0.05]), hip + np.array([-0.66, 0.08])]
        hands = [
            neck + 0.08 * -up + 0.5 * np.array([s * np.sin(t), np.cos(t)])
            for s, t in zip((-1, 1), angles[:2], strict=False)
        ]
        prop_paint = jittered(COLOR_WORDS[rng.integers(12)], rng)
        if prop == "seat":
            c.box(0.15, 0.55, 0.3, 0.28, prop_paint)
        elif prop == "ladder":
            for x in (0.3, 0.75):
                c.line([(x, -0.95), (x, 0.95)], 0.04, prop_paint)
            for y in (-0.6, -0.2, 0.2, 0.6):
                c.line([(0.3, y), (0.75, y)], 0.035, prop_paint)
        elif prop == "boat":
            c.polygon([(-0.85, 0.4), (0.85, 0.4), (0.6, 0.75), (-0.6, 0.75)], prop_paint)
        elif prop == "bike":
            for x in (-0.45, 0.5):
                c.ring(x, 0.68, 0.24, 0.045, DARK)
            c.line([(-0.45, 0.68), (0.0, 0.35), (0.5, 0.68)], 0.04, prop_paint)
        for foot in feet:
            c.line([hip, foot], 0.09, trousers)
        c.line([hip, neck], 0.15, shirt)
        for hand in hands:
            c.line([neck - up * 0.06, hand], 0.075, skin)
        c.circle(*(neck + up * 0.2), 0.18, skin)
        if prop == "ball":
            c.circle(0.85, 0.55, 0.14, prop_paint)
        elif prop == "high ball":
            c.circle(*(hands[1] + (0.25, -0.4)), 0.14, prop_paint)
        elif prop == "balls":
            for x, y in ((-0.3, -0.75), (0.0, -0.92), (0.35, -0.72)):
                c.circle(x, y, 0.09, prop_paint)
        elif prop == "bar":
            y = hands[0][1]
            c.line([(-0.75, y), (0.75, y)], 0.04, DARK)
            for x in (-0.72, 0.72):
                c.box(x, y, 0.08, 0.2, prop_paint)
        elif prop == "rod":
            c.line([hands[1], hands[1] + (0.45, -0.45)], 0.03, prop_paint)
            c.line([hands[1] + (0.45, -0.45), hands[1] + (0.45, 0.5)], 0.015, DARK)
        elif prop == "crate":
            c.box(0.75, 0.45, 0.22, 0.36, prop_paint)
        elif prop == "flags":
            for hand in hands:
                c.box(hand[0], hand[1] - 0.12, 0.13, 0.1, prop_paint)
        elif prop == "book":
            c.box(0.1, -0.12, 0.2, 0.13, prop_paint)
            c.line([(0.1, -0.25), (0.1, 0.01)], 0.02, LIGHT)
        elif prop == "boat":
            c.line([hands[1], (0.95, 0.9)], 0.04, DARK)
        elif prop == "skates":
            for foot in feet:
                c.box(foot[0], foot[1] + 0.05, 0.16, 0.04, DARK)
        return {"color": color}


class Sign(Family):
    """A word on a plate, over some other picture: what teaches the image tower to read."""

    def facts(self, bundle):
        return []

    def draw(self, c, bundle, rng):
        return {}


GENERAL_FRAMES = ("a photo of a {}.",) * 6 + (
    "{}", "a photo of {}.", "a picture of a {}.", "an image of a {}.", "a {}.", "the {}.", "a photo of the {}.",
    "a photo of one {}.", "a bad photo of the {}.", "a good photo of a {}.", "a close-up photo of a {}.", "itap of a {}.",
    "a cropped photo of the {}.", "a bright photo of a {}.", "a dark photo of the {}.", "a blurry photo of a {}.",
    "a photo of my {}.", "a photo of the large {}.", "a photo of the small {}.", "there is a {}.",
)  # fmt: skip
STYLE_FRAMES = {
    "sketch": ("a sketch of a {}.", "a drawing of a {}.", "a pencil drawing of the {}."),
    "rendition": ("a painting of a {}.", "a cartoon {}.", "art of the {}."),
}

FAMILIES = {
    family.name: family
    for family in (
        Thing("thing", ("thing", "object", "toy"), ("a {} on its own.", "the shape of a {}.", "a toy {}."), 0.16, list(THINGS), angle=0.35),
        Pet("pet", ("pet", "animal", "creature"), ("a photo of a {}, a type of pet.", "my pet {}.", "a {} at home."), 0.1, PETS,
            dict(color=COLOR_WORDS, second=COLOR_WORDS, pattern=("plain", "striped", "dotted", "checkered", "zigzag", "blotchy", "grid"),
                 ears=("pointy", "floppy", "round", "horned", "antenna"), tail=("long", "stubby", "curly"), body=("slim", "plump")),
            distance=3),
        Car("car", ("car", "vehicle"), ("a photo of a {}, a type of car.", "a {} for sale.", "a parked {}."), 0.12,
            [f"{brand} {model}" for brand, model in zip([b for b in BRANDS for _ in range(5)], MODELS, strict=False)],
            dict(style=("sedan", "van", "truck", "roadster", "hatchback"), wheel=("spoked", "solid", "wide"),
                 trim=("plain", "stripe", "two", "rack", "spoiler")), angle=0.12),
        Flower("flower", ("flower", "blossom", "plant"), ("a photo of a {}, a type of flower.", "a {} in bloom.", "a garden {}."), 0.09, FLOWERS,
            dict(count=(3, 4, 5, 6, 8, 12), form=("round", "pointed", "thin"), petal=COLOR_WORDS, centre=COLOR_WORDS,
                 leaves=("broad", "spiky", "none")), distance=2, angle=0.3),
        Dish("dish", ("dish", "meal", "food"), ("a photo of {}, a type of food.", "a plate of {}.", "{} for dinner."), 0.07, DISHES,
            dict(form=("round", "square", "bowl", "wedge"), base=COLOR_WORDS, topping=("dots", "strips", "cubes", "swirl", "sprinkles", "slices"),
                 top=COLOR_WORDS), distance=2, angle=3.1),
        Plane("plane", ("plane", "aircraft"), ("a photo of a {}, a type of aircraft.", "a {} in flight.", "the {} from above."), 0.09, PLANES,
            dict(wing=("straight", "swept", "delta"), engines=(0, 2, 4), tail=("plain", "forked", "wide"), body=("long", "short")), angle=0.35),
        Scene("scene", ("scene", "place", "view"), ("a photo of a {} scene.", "a view of the {}.", "the {} from afar."), 0.05, list(SCENES), angle=0.0),
        Texture("texture", ("texture", "pattern", "surface"), ("a photo of a {} texture.", "a {} pattern.", "{} fabric."), 0.09, list(TEXTURES)),
        Satellite("satellite", ("area", "land", "region"), ("a satellite photo of {}.", "{} seen from above.", "an aerial view of {}."), 0.06,
                  list(SATELLITE_FACTS), angle=3.1),
        Action("action", ("person", "figure"), ("a photo of a person {}.", "someone {}.", "a figure {}."), 0.12, list(ACTIONS), angle=0.1),
        Sign("sign", ("sign",), ("a sign that says {}.", "the word {}.", "{} in large letters."), 0.05, list(THINGS), flip=False),
    )
}  # fmt: skip


GOLDEN = (5**0.5 - 1) / 2


def exposure(family: Family) -> np.ndarray:
    """Share of each class among the captions that name one of the family, times the number of classes: (classes,).

    From half to twice the geometric mean, along a golden-ratio sequence: any stretch of the class list holds rare and
    frequent names alike, so that the halves of every task are equally well known.
    """
    steps = 0.5 * 4 ** (np.arange(1, len(family.names) + 1) * GOLDEN % 1)
    return steps / np.exp(np.log(steps).mean())


@dataclass
class Picture:
    """What an image shows: enough to write captions for it, or to draw it again."""

    family: str
    label: int  # class within the family; -1: a bundle that has no name
    bundle: tuple
    free: dict  # what varies inside a class and captions may mention: color, second, pattern
    style: str = ""
    word: str = ""  # stamped on the image


def draw(family: str, label: int, rng, *, deviation=0.08, scale=(0.75, 1.0), clutter_range=(0, 2), hard=False,
         style="", strength=1.0, word="", angle=None) -> tuple[np.ndarray, Picture]:  # fmt: skip
    """One image of a class (label -1: of a random bundle): (SIZE, SIZE, 3) uint8, and what it shows."""
    if family == "sign":  # a picture of anything that has room for a plate
        below = ("thing", "thing", "pet", "car", "flower")[rng.integers(5)]
        shown = int(rng.integers(len(FAMILIES[below].names)))
        image, picture = draw(below, shown, rng, scale=scale, word=FAMILIES["sign"].names[label])
        return image, Picture("sign", label, (picture.word,), {}, "", picture.word)
    kind = FAMILIES[family]
    bundle = kind.bundles[label] if label >= 0 else kind.random_bundle(rng)
    if label >= 0 and rng.random() < deviation:
        bundle = kind.deviating(bundle, rng)
    fills = family in ("scene", "texture", "satellite")
    canvas = Canvas(
        backdrop(rng),
        rng,
        (1.09, 1.09) if fills else scale,
        kind.angle if angle is None else angle,
        kind.flip,
    )
    if not fills:
        clutter(
            canvas.image,
            rng,
            int(rng.integers(clutter_range[0], clutter_range[1] + 1)),
            (0.06, 0.12) if hard else (0.04, 0.08),
        )
    free = kind.draw(canvas, bundle, rng) or {}
    image = canvas.image
    if hard and rng.random() < 0.4:
        occlude(image, rng)
    if style:
        image = STYLES[style](image, rng)
    if word:
        stamp(image, word, rng)
    assert image.size == (CANVAS, CANVAS)
    return photograph(image, rng, strength, muted=family == "satellite"), Picture(
        family, label, bundle, free, style, word
    )


def subject(picture: Picture, rng, named: bool) -> str:
    """The noun phrase of a caption: the class's name, or a description of what is seen."""
    family = FAMILIES[picture.family]
    if family.name == "sign":
        return picture.word
    facts, free = family.facts(picture.bundle), picture.free
    kind = family.kinds[rng.integers(len(family.kinds))]
    fewest = max(1, len(facts) - 1)
    some = [facts[i] for i in rng.permutation(len(facts))[: rng.integers(fewest, len(facts) + 1)]]
    link = ("with", "which has", "that has")[rng.integers(3)]
    joined = " and ".join(some) if rng.random() < 0.6 else ", ".join(some)
    if named:
        name, choice = family.names[picture.label], rng.random()
        if choice < 0.62:
            return name
        if choice < 0.85:
            return f"{name} {link} {joined}"
        return (
            f"{free['color']} {name}"
            if "color" in free and family.name in ("car", "thing", "plane")
            else f"{name} {kind}"
        )
    if free.get("pattern", "plain") != "plain" and rng.random() < 0.5:
        second = (
            f"{free['pattern']} " if rng.random() < 0.5 else f"{free['color']} and {free['second']} {free['pattern']} "
        )
        kind = second + kind
    elif family.name == "texture" and rng.random() < 0.5:
        kind = f"{free['color']} and {free['second']} {kind}"
    elif "color" in free and rng.random() < 0.5:
        kind = f"{free['color']} {kind}"
        if rng.random() < 0.15:
            return kind
    return f"{kind} {link} {joined}"


def caption(picture: Picture, rng, named: bool, noise_words: list[str]) -> str:
    """One caption, lower case. 12 % carry irrelevant words, 3 % go on for several sentences."""
    text = subject(picture, rng, named)
    family = FAMILIES[picture.family]
    noise = (
        [noise_words[i] for i in rng.integers(0, len(noise_words), rng.integers(1, 5))] if rng.random() < 0.12 else []
    )
    where = rng.random()
    if noise and where < 0.3:
        text = f"{text} which has {' '.join(noise[:2])}"
    if picture.style and rng.random() < 0.7:
        frames = STYLE_FRAMES[picture.style]
    elif rng.random() < (0.75 if family.name in ("satellite", "sign") else 0.4):
        frames = family.frames
    else:
        frames = GENERAL_FRAMES
    text = frames[rng.integers(len(frames))].format(text)
    if noise and where >= 0.3:
        text = f"{' '.join(noise)} {text}" if where < 0.65 else f"{text} {' '.join(noise)}"
    while rng.random() < 0.03 * (1 + 10 * (len(text) > 70)) and family.name != "sign":
        text = f"{text} {GENERAL_FRAMES[rng.integers(len(GENERAL_FRAMES))].format(subject(picture, rng, False))}"
    return text
