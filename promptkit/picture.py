"""What a method adds to CLIP's two towers, said in a few words: what is frozen, what
learns, what is put in where. :func:`promptkit.diagram.towers` draws it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace

from promptkit.errors import InputError

FROZEN, LEARNED, MADE, VALUE = "frozen", "learned", "made", "value"
LABELS = "labels of a few images"


@dataclass(frozen=True)
class Part:
    """A box: its label, in which formulas stand between dollars, and its state."""

    label: str
    state: str = FROZEN


def learned(label: str) -> Part:
    """What training, or a step at test time, changes."""
    return Part(label, LEARNED)


def made(label: str) -> Part:
    """What has no parameters of its own but is computed from what is learned."""
    return Part(label, MADE)


def value(label: str) -> Part:
    """What is no weight and no token: a feature, a label, a step of the computation."""
    return Part(label, VALUE)


@dataclass(frozen=True)
class Target:
    """What something is compared with, and the loss that compares; without a loss it is
    only read, by a bridge.
    """

    part: Part | str
    loss: str = ""


@dataclass(frozen=True)
class Head:
    """A classifier beside the cosine, and which features it reads."""

    part: Part | str
    reads: Sequence[str] = ("text", "image")


@dataclass(frozen=True)
class Bridge:
    """A box between the towers, with an arrow from a source and one to a target.

    Args:
        source, target: "text tokens" or "image tokens" (those that are not frozen),
            "text 1" (what stands in row 1 of the text tower's blocks), "text tower"
            (its last block), "text out", "text feature", "text reference", the same of
            the image, or "score".
        both: the arrows have two heads: source and target share the box.
    """

    part: Part | str
    source: str
    target: str
    both: bool = False


@dataclass(frozen=True)
class Picture:
    """A method in CLIP's two towers. Where a part is wanted, a string stands for a
    frozen token or a value; what is left out is CLIP's.

    Args:
        text, image: the tokens that enter each tower, as segments in their order.
        blocks: rows of blocks, the first at the bottom, by their numbers; both towers
            have the same rows.
        text_blocks, image_blocks: row (from 0): what is put in there, deep prompts or
            adapters.
        text_out, image_out: what transforms the tower's output.
        text_feature, image_feature: names of the features.
        text_reference, image_reference: features that these are held near.
        bridges: what maps from one place to another.
        score: what compares the two features.
        heads, fusion: further classifiers, and how all are combined.
        targets: what the prediction is compared with.
        prompts, images: what enters, in words.
        several: of "text" and "image", those of which several enter at once.
        text_tower, image_tower: names of the towers.
        note: a line below the picture.
    """

    text: Sequence[Part | str] = ("SOS", "a photo of a", "[class]", ".", "EOT")
    image: Sequence[Part | str] = ("CLS", "patches of the image")
    blocks: Sequence[str] = ("1 … L",)
    text_blocks: Mapping[int, Part] = field(default_factory=dict)
    image_blocks: Mapping[int, Part] = field(default_factory=dict)
    text_out: Part | None = None
    image_out: Part | None = None
    text_feature: str = "class feature $w_c$"
    image_feature: str = "image feature $f$"
    text_reference: Target | None = None
    image_reference: Target | None = None
    bridges: Sequence[Bridge] = ()
    score: Part | str = "cosine"
    heads: Sequence[Head] = ()
    fusion: str = ""
    targets: Sequence[Target] = (Target(LABELS, "cross-entropy"),)
    prompts: str = "a prompt for each class"
    images: str = "an image $x$"
    several: Sequence[str] = ()
    text_tower: str = "text tower"
    image_tower: str = "image tower"
    note: str = ""

    def over(self, host: "Picture") -> "Picture":
        """A plug-in's picture on top of its host's: what it does not say itself is the
        host's; bridges, heads and notes are added to it.
        """
        joined = {}
        for f in fields(self):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            own, below = getattr(self, f.name), getattr(host, f.name)
            joined[f.name] = below if own == default else own
        return replace(
            self,
            **joined
            | {
                "text_blocks": {**host.text_blocks, **self.text_blocks},
                "image_blocks": {**host.image_blocks, **self.image_blocks},
                "bridges": (*host.bridges, *self.bridges),
                "heads": (*host.heads, *self.heads),
                "note": "; ".join(filter(None, (host.note, self.note))),
            },
        )

    def parts(self) -> list[tuple[Part, str]]:
        """Every part with its place in words."""
        found = []
        for side in ("text", "image"):
            tower = getattr(self, f"{side}_tower")
            tokens = getattr(self, side)
            found += [(part(p), f"among the {side} tokens") for p in tokens]
            for row, p in getattr(self, f"{side}_blocks").items():
                found.append((part(p), f"in {self.row(row)} of the {tower}"))
            out = getattr(self, f"{side}_out")
            found += [(part(out), f"on the output of the {tower}")] if out else []
        for b in self.bridges:
            word = "between" if b.both else "from"
            link = "and" if b.both else "to"
            ends = self.place(b.source), self.place(b.target)
            found.append((part(b.part), f"{word} the {f' {link} the '.join(ends)}"))
        found += [(part(h.part), f"as a head on the {h.reads[-1]} feature"
                   if len(h.reads) == 1 else "as a head on both features")
                  for h in self.heads]  # fmt: skip
        return [*found, (part(self.score), "as the score")]

    def row(self, row: int) -> str:
        """Its blocks in words.

        Raises:
            InputError: there is no such row.
        """
        if not 0 <= row < len(self.blocks):
            raise InputError(
                f"a picture has no row {row} of blocks; it has {len(self.blocks)}, from"
                " 0 on"
            )
        numbers = self.blocks[row]
        return f"block{'s' if '…' in numbers else ''} {numbers}"

    def place(self, name: str) -> str:
        """An end of a bridge in words."""
        side, _, what = name.partition(" ")
        if what.isdigit():
            return f"{side} tower's {self.row(int(what))}"
        words = {"out": "tower's output", "reference": "feature's reference"}
        return f"{side} {words[what]}" if what in words else name

    def alt(self, title: str = "") -> str:
        """The picture in a few sentences, for those who do not see it."""
        by_state, steps = {LEARNED: [], MADE: []}, []
        for p, where in self.parts():
            if p.state in by_state:
                by_state[p.state].append(f"{p.label} {where}")
            elif where.startswith(("from", "between")):
                steps.append(f"{p.label} {where}")
        said = [f"Diagram of {title or 'a method'}: CLIP's two towers."]
        entering = "; ".join(part(p).label for p in self.text)
        said.append(f"Into the {self.text_tower}, {self.prompts}: {entering}.")
        said.append(f"Into the {self.image_tower}, {self.images}.")
        names = ", ".join(by_state[LEARNED]) or "nothing"
        said.append(f"Learned: {names}; all else is frozen.")
        if by_state[MADE]:
            said.append(f"Made from it: {', '.join(by_state[MADE])}.")
        said += [f"Steps: {', '.join(steps)}."] if steps else []
        said += [f"Classifiers: {self.fusion}."] if self.fusion else []
        losses = [
            f"{t.loss} ({mine}{part(t.part).label})"
            for t, mine in (
                *((t, "") for t in self.targets),
                (self.text_reference, f"{self.text_feature} against "),
                (self.image_reference, f"{self.image_feature} against "),
            )
            if t and t.loss
        ]
        said += [f"Losses: {', '.join(losses)}."] if losses else []
        said += [f"{self.note[0].upper()}{self.note[1:]}."] if self.note else []
        return plain(" ".join(said))


def part(thing: Part | str, state: str = FROZEN) -> Part:
    """A string is a part in the given state."""
    return Part(thing, state) if isinstance(thing, str) else thing


def plain(text: str) -> str:
    """A label without the marks of formulas and the breaks of lines."""
    text = re.sub(r"\\tilde\{?(\w)\}?", r"\1~", text.replace("\n", " "))
    return re.sub(r"\\(?:mathrm|,|;|!)|[${}]", "", text)
