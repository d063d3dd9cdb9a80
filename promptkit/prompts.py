"""Prompts around class names: learned tokens, words and names in any order, as input of
the text tower.

A prompt is an ordered list of segments. Positions follow from the segments' lengths in
tokens, so names of different lengths need no padding inside the sentence, and the class
name can stand anywhere.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from promptkit.clip import FrozenCLIP, check_classnames
from promptkit.errors import InputError, unknown
from promptkit.towers import Prompt

__all__ = ["Context", "Template", "assemble", "deep_prompts", "overwriting_context"]

POSITIONS = ("end", "middle", "front")


class Template:
    """The fixed part of a prompt for a list of classes; calling it with the learned
    tokens gives the prompt.

    Everything that follows from the names (tokens, positions, embeddings) is computed
    once, so that a training step only concatenates or gathers.

    Args:
        clip (FrozenCLIP): whose tokens and embeddings these are.
        classnames (Sequence[str]): C names; underscores are read as spaces.
        pattern (Sequence): the segments, in order. An int n: n learned tokens, given at
            the call. A str: words; "{}" in it stands for the class name and is
            tokenised jointly with what surrounds it, as in "{}.". A list of C items: a
            text, or token ids, for each class. A 1-D long Tensor: token ids.
        truncate (bool): cut a prompt that is too long behind its last learned tokens,
            EOT staying its last token, in place of refusing it.

    Attributes:
        items (list): the segments: a length, or C lists of token ids, the last EOT.
        slots (list[int]): the lengths of the learned segments.
        starts (list[int | None]): where each learned segment begins in the full
            sequence, SOS being 0; None where that differs by class.
        lengths (list[int]): tokens of each class's prompt, SOS and EOT included.

    Raises:
        InputError: for unusable names or segments, or a class whose prompt exceeds the
            context length.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        classnames: Sequence[str],
        pattern: Sequence,
        truncate: bool = False,
    ):
        self.clip = clip
        self.classnames = check_classnames(classnames, allow_duplicates=True)
        C = len(self.classnames)
        # Each item is an int (a slot), or C token lists that are one and the same
        # object when shared.
        items: list = []
        for segment in pattern:
            if isinstance(segment, bool) or not isinstance(
                segment, int | str | list | tuple | Tensor
            ):
                raise InputError(
                    "a segment must be a length, text, texts or token ids, not"
                    f" {segment!r}"
                )
            if isinstance(segment, int):
                items.append(segment)
            elif isinstance(segment, Tensor):
                items.append([segment.tolist()] * C)
            elif isinstance(segment, str):
                if "{}" in segment:
                    items.append(
                        [
                            clip.encode(segment.replace("{}", name))
                            for name in self.classnames
                        ]
                    )
                else:
                    items.append([clip.encode(segment)] * C)
            else:
                if len(segment) != C:
                    raise InputError(
                        f"a segment has {len(segment)} texts for {C} classes"
                    )
                items.append(
                    [
                        clip.encode(text) if isinstance(text, str) else list(text)
                        for text in segment
                    ]
                )
        if truncate:
            items = _truncated(items, C, clip.context_length - 2)  # SOS and EOT
        items.append([[clip.tokenizer.eot_token_id]] * C)
        self.items = items
        self.slots = [item for item in items if isinstance(item, int)]
        self.starts: list[int | None] = []
        ends = [1] * C  # behind SOS
        for item in items:
            if isinstance(item, int):
                self.starts.append(ends[0] if len(set(ends)) == 1 else None)
            ends = [
                end + (item if isinstance(item, int) else len(item[c]))
                for c, end in enumerate(ends)
            ]
        self.lengths = ends
        longest = max(range(C), key=self.lengths.__getitem__)
        if self.lengths[longest] > clip.context_length:
            raise InputError(
                f"the prompt of class {_short(self.classnames[longest])} takes"
                f" {self.lengths[longest]} tokens, but the model reads at most"
                f" {clip.context_length}; shorten the name or the context"
            )
        self._layouts: dict[tuple[bool, ...], _Layout] = {}

    def __call__(self, *tokens: Tensor, classes: Tensor | None = None) -> Prompt:
        """The prompt with the learned segments filled in.

        Args:
            tokens (Tensor): one a slot, each (M, D) shared, (C, M, D) by class, (G, 1,
                M, D) by group or (G, C, M, D) by both, where M is the slot's length.
            classes (Tensor | None): (n,) positions of the classes to make it for; None:
                all. Without them, the embeddings of all classes are never held at once.

        Returns:
            Prompt: whose prefix ends where the first token that differs by class
                begins.

        Raises:
            InputError: if a tensor does not fit its slot.
        """
        C, D = len(self.classnames), self.clip.width
        if len(tokens) != len(self.slots):
            raise InputError(
                f"the template has {len(self.slots)} learned segments, but"
                f" {len(tokens)} were given"
            )
        groups = 1
        for x, length in zip(tokens, self.slots, strict=True):
            fits = x.dim() in (2, 3, 4) and x.shape[-2:] == (length, D)
            if not fits or (x.dim() > 2 and x.shape[-3] not in (1, C)):
                raise InputError(
                    f"learned tokens must be ({length}, {D}), ({C}, {length}, {D}) or "
                    f"(groups, 1 or {C}, {length}, {D}), not {tuple(x.shape)}"
                )
            groups = max(groups, x.shape[0] if x.dim() == 4 else 1)
        by_class = tuple(x.dim() > 2 and x.shape[-3] > 1 for x in tokens)
        if by_class not in self._layouts:
            self._layouts[by_class] = _Layout(self.clip, self.items, by_class)
        return self._layouts[by_class](tokens, groups, C, classes)


class _Layout:
    """Where everything stands, given which slots differ by class.

    The sequence is cut into a shared prefix; a head of segments that differ by class
    but have one length; and a tail, from the first text of varying length on. A tail
    with slots gathers from a bank of embeddings.
    """

    def __init__(self, clip: FrozenCLIP, items: list, by_class: tuple[bool, ...]):
        C = len(next(item for item in items if not isinstance(item, int)))
        flags = iter(by_class)
        own = [
            (
                next(flags)
                if isinstance(item, int)
                else any(ids != item[0] for ids in item)
            )
            for item in items
        ]
        ragged = [
            not isinstance(item, int) and len({len(ids) for ids in item}) > 1
            for item in items
        ]
        # EOT, the last item, always starts the suffix at the latest.
        cut = next((i for i, differs in enumerate(own) if differs), len(items) - 1)
        slot_numbers, n = [], 0
        for item in items:
            slot_numbers.append(n if isinstance(item, int) else None)
            n += isinstance(item, int)
        last_slot = max(
            (i for i, number in enumerate(slot_numbers) if number is not None),
            default=-1,
        )
        stop = next((i for i in range(cut, len(items)) if ragged[i]), len(items))
        if last_slot < stop:  # no slot follows a ragged text: the rest is one constant
            stop = max(cut, last_slot + 1)

        sot = clip.embed([clip.tokenizer.sot_token_id])  # (1, D)
        self.prefix: list = [sot] + [
            number if number is not None else clip.embed(item[0])
            for item, number in zip(items[:cut], slot_numbers[:cut], strict=True)
        ]
        self.head: list = [
            number if number is not None else clip.embed(item)  # (C, n, D)
            for item, number in zip(
                items[cut:stop], slot_numbers[cut:stop], strict=True
            )
        ]
        tail, numbers = items[stop:], slot_numbers[stop:]
        self.tail_slots = [number for number in numbers if number is not None]
        # Rows of the bank: the distinct fixed tokens, then each slot's, class by class
        # if those differ.
        fixed = sorted(
            {
                t
                for item in tail
                if not isinstance(item, int)
                for ids in item
                for t in ids
            }
        )
        row_of, base = {t: i for i, t in enumerate(fixed)}, len(fixed)
        bases = {}
        for item, number in zip(tail, numbers, strict=True):
            if number is not None:
                bases[number] = base
                base += item * (C if by_class[number] else 1)
        rows = []
        for c in range(C):
            row: list[int] = []
            for item, number in zip(tail, numbers, strict=True):
                if number is None:
                    row += [row_of[t] for t in item[c]]
                else:
                    start = bases[number] + (c * item if by_class[number] else 0)
                    row += range(start, start + item)
            rows.append(torch.tensor(row, dtype=torch.long))
        head_length = sum(
            item if isinstance(item, int) else len(item[0]) for item in items[cut:stop]
        )
        self.eot = torch.tensor(
            [head_length + len(row) - 1 for row in rows], device=clip.device
        )  # (C,)
        index = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(
            clip.device
        )  # (C, T)
        self.fixed = clip.embed(fixed)  # (U, D)
        self.index = index

    @cached_property
    def tail(self) -> Tensor:
        """(C, T, D); without slots the tail never changes."""
        return self.fixed[self.index]

    def __call__(
        self, tokens: Sequence[Tensor], groups: int, C: int, classes: Tensor | None
    ) -> Prompt:
        prefix = []
        for part in self.prefix:
            part = tokens[part] if isinstance(part, int) else part
            part = (
                part[:, 0] if part.dim() == 4 else part
            )  # (n, D), (1, n, D) or (G, n, D)
            prefix.append(part.expand(groups, -1, -1))
        prefix = torch.cat(prefix, dim=1)  # (G, P, D)
        index, eot = self.index, self.eot
        if classes is not None:
            classes = classes.to(index.device)
            index, eot = index[classes], eot[classes]
        if self.tail_slots:
            learned = [tokens[n] for n in self.tail_slots]
            tail = self._gather(
                [
                    self.fixed,
                    *(x.flatten(-3, -2) if x.dim() > 2 else x for x in learned),
                ],
                index,
            )
        else:
            tail = self.tail if classes is None else self.fixed[index]
        if not self.head:
            return Prompt(prefix, tail, eot)
        suffix = [tokens[part] if isinstance(part, int) else part for part in self.head]
        if classes is not None:
            C = len(classes)
            suffix = [
                part[..., classes, :, :]
                if part.dim() > 2 and part.shape[-3] > 1
                else part
                for part in suffix
            ]
        suffix.append(tail)
        deep = any(part.dim() == 4 for part in suffix)
        shape = (groups, C, -1, -1) if deep else (C, -1, -1)
        return Prompt(
            prefix,
            torch.cat([part.expand(*shape) for part in suffix], dim=-2),
            eot,
        )

    def _gather(self, bank: list[Tensor], index: Tensor) -> Tensor:
        """Rows of the tail: (C, T, D), or (G, C, T, D) if a slot differs by group."""
        groups = max(part.shape[0] if part.dim() == 3 else 1 for part in bank)
        C, T = index.shape
        if groups == 1:
            bank = torch.cat(
                [part[0] if part.dim() == 3 else part for part in bank]
            )  # (R, D)
            return bank.index_select(0, index.reshape(-1)).view(C, T, -1)
        bank = torch.cat(
            [part.expand(groups, -1, -1) for part in bank], dim=1
        )  # (G, R, D)
        return bank.index_select(1, index.reshape(-1)).view(groups, C, T, -1)


def _truncated(items: list, C: int, limit: int) -> list:
    """The items with fixed tokens cut off each class's end, down to the last slot."""
    last = max((i for i, item in enumerate(items) if isinstance(item, int)), default=-1)
    items = [item if isinstance(item, int) else list(item) for item in items]
    for c in range(C):
        excess = -limit + sum(
            item if isinstance(item, int) else len(item[c]) for item in items
        )
        for item in reversed(items[last + 1 :]):
            if excess > 0:
                kept = max(len(item[c]) - excess, 0)
                excess, item[c] = excess - len(item[c]) + kept, item[c][:kept]
    return items


def assemble(clip: FrozenCLIP, classnames: Sequence[str], segments: Sequence) -> Prompt:
    """A prompt from its segments, once. A training loop keeps a `Template` instead.

    Args:
        clip (FrozenCLIP): the model.
        classnames (Sequence[str]): C names.
        segments (Sequence): in order, each a float Tensor of learned tokens, (M, D),
            (C, M, D), (G, 1, M, D) or (G, C, M, D), or anything fixed that `Template`
            takes.

    Returns:
        Prompt: of G groups and C classes.

    Raises:
        InputError: naming the class whose prompt is too long, or the segment that does
            not fit.
    """
    learned = [s for s in segments if isinstance(s, Tensor) and s.is_floating_point()]
    pattern = [
        s.shape[-2] if isinstance(s, Tensor) and s.is_floating_point() else s
        for s in segments
    ]
    return Template(clip, classnames, pattern)(*learned)


class Context(nn.Module):
    """Learned tokens around a class name: CoOp's prompt learner (arXiv 2109.01134,
    section 3.2). With h = M // 2, or where "[CLS]" stands in the words::

        end:    SOS | v_1 .. v_M | name . EOT
        middle: SOS | v_1 .. v_h | name | v_h+1 .. v_M | . EOT
        front:  SOS | name | v_1 .. v_M | . EOT

    The name is tokenised with what follows it, and the published code, followed here,
    takes as many of these tokens for the name as the name alone has: of "St." the full
    stop that ends the sentence is one token with the name's own, and stands with it.
    Where the words have more tokens than vectors, the tokens left over count too.

    Args:
        clip (FrozenCLIP): the model; not part of this module.
        classnames (Sequence[str]): C names.
        length (int | None): M; by default 16, or the number of `words`.
        words (str | None): initial words, such as "a photo of a"; the context is then
            shared by all classes. Their first M tokens learn, and the rest stay fixed
            behind them. Where there are fewer words than M, as many tokens as there are
            words learn, and zero vectors stand before them.
        position (str): "end", "middle" or "front".
        class_specific (bool): a context for each class.
        std (float): of the random initialisation, normal with mean 0.
        generator (torch.Generator | None): where the random initialisation comes from,
            on the CPU.
        ending (str): the text that holds the class name, such as "{}, a type of pet.".
        overwrite (bool): the first M tokens of the written prompt learn, however many
            words they are (MaPLe, APEX). Where the words have fewer, the learned tokens
            begin as the words, EOT and padding, and take the places of as many first
            tokens of the class name and what follows it, as in the published code.

    Attributes:
        vectors (Parameter): (M, D), or (C, M, D) when class-specific.
        template (Template): of the classes it is aimed at. A subclass that puts other
            tokens around the context overrides :meth:`pattern`, and `slot` says which
            of the learned segments there is the first of the context's own.

    Raises:
        InputError: for an unknown position, a length below 1, unusable names, an
            `ending` without "{}" (or that does not begin with it, in the middle and in
            front), a class-specific context with words, a prompt that is too long, or a
            name that `overwrite` would leave nothing of, not even EOT.
    """

    slot = 0

    def __init__(
        self,
        clip: FrozenCLIP,
        classnames: Sequence[str],
        length: int | None = None,
        words: str | None = None,
        position: str = "end",
        class_specific: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
        ending: str = "{}.",
        overwrite: bool = False,
    ):
        super().__init__()
        if position not in POSITIONS:
            raise unknown("position", position, POSITIONS)
        if "{}" not in ending:
            raise InputError(
                f"ending must hold {{}} for the class name, got {ending!r}"
            )
        self.__dict__["clip"] = clip
        self._extra: list[int] = []
        self._taken = 0  # tokens of the name that learned ones stand for
        if length is not None and length < 1:
            raise InputError(f"a context needs at least one token, not length={length}")
        words = (words or "").replace("_", " ").split()
        marked = words.index("[CLS]") if "[CLS]" in words else None  # the name's place
        if marked is not None:
            words.remove("[CLS]")
            if position == "front":
                raise InputError(
                    "position 'front' and [CLS] in the words name two places for the"
                    " class name: leave one of them out"
                )
            position = "middle"
        if position != "end" and not ending.startswith("{}"):
            raise InputError(
                f"ending must begin with {{}} where the class name stands {position!r},"
                f" got {ending!r}"
            )
        self.position, self.ending, words = position, ending, " ".join(words)
        if words and class_specific:
            raise InputError(
                f"a context that starts from words ({words!r}) is shared by all"
                " classes: leave the words out, or class_specific"
            )
        if words:
            ids = clip.encode(words)
            if overwrite and (length or 0) > len(ids):
                self._taken = length - len(ids)
                ids += [clip.tokenizer.eot_token_id, *[0] * (self._taken - 1)]
            known = len(ids) if overwrite else len(words.split())
            known = min(known, len(ids), length or len(ids))
            length = length or known
            self._extra = ids[known:]
            vectors = nn.functional.pad(
                clip.embed(ids[:known]), (0, 0, length - known, 0)
            )  # zeros come first
        else:
            length = length or 16
            shape = (
                (len(check_classnames(classnames, True)), length)
                if class_specific
                else (length,)
            )
            vectors = (
                torch.empty(*shape, clip.width)
                .normal_(0, std, generator=generator)
                .to(clip.device)
            )
        self.class_specific, self.length = class_specific, length
        self._half = length // 2 if marked is None else marked
        self._own: list[str] | None = None
        self.set_classes(classnames)
        self.vectors = nn.Parameter(vectors)

    @property
    def start(self) -> int | None:
        """Position of the first learned token in the full sequence, SOS being 0; None
        where names of different lengths stand before it.
        """
        first = self.position == "middle" and self._half == 0  # of two, an empty one
        return self.template.starts[self.slot + first]

    def set_classes(self, classnames: Sequence[str]) -> None:
        """Aim the context at other classes; the learned tokens stay.

        Raises:
            InputError: if the context is class-specific and these are not its classes.
        """
        names = check_classnames(classnames, allow_duplicates=True)
        if self.class_specific:
            if self._own is not None and names != self._own:
                raise InputError(
                    f"a class-specific context of {len(self._own)} classes has nothing"
                    f" for other classes ({len(names)} given); use a shared context"
                )
            self._own = names
        self.__dict__["template"] = Template(self.clip, names, self.pattern(names))

    def pattern(self, names: list[str]) -> list:
        """The segments of the prompt, as `Template` takes them, for C names."""
        extra = [torch.tensor(self._extra)] if self._extra else []
        if self.position == "end" and not self._taken:
            return [self.length, *extra, self.ending]
        tails = [
            self._extra + self.clip.encode(self.ending.replace("{}", name))
            for name in names
        ]
        if self._taken:
            return [
                self.length,
                [self._left(*both) for both in zip(names, tails, strict=True)],
            ]
        sizes = [len(self.clip.encode(name)) for name in names]
        own = [tail[:n] for tail, n in zip(tails, sizes, strict=True)]
        rest = [tail[n:] for tail, n in zip(tails, sizes, strict=True)]
        if self.position == "front":
            return [own, self.length, rest]
        return [self._half, own, self.length - self._half, rest]

    def _left(self, name, tail):
        """What learned tokens leave of a name and what follows it."""
        if self._taken > len(tail):
            raise InputError(
                f"{self.length} learned tokens, of which the initial words are"
                f" {self.length - self._taken}, would overwrite the end of the prompt"
                f" of class {_short(name)}, which has {len(tail)} more: take fewer"
                " tokens or more initial words"
            )
        return tail[self._taken :]

    def prompt(
        self, vectors: Tensor | None = None, classes: Tensor | None = None
    ) -> Prompt:
        """The classes' prompt.

        Args:
            vectors (Tensor | None): instead of `self.vectors`: also (G, 1, M, D) or (G,
                C, M, D), for contexts that depend on the image.
            classes (Tensor | None): (n,) positions of some classes, for them alone.

        Returns:
            Prompt: of G groups and C, or n, classes.
        """
        vectors = self.vectors if vectors is None else vectors
        if self.position == "middle":
            return self.template(
                vectors[..., : self._half, :],
                vectors[..., self._half :, :],
                classes=classes,
            )
        return self.template(vectors, classes=classes)


def overwriting_context(
    clip: FrozenCLIP, classnames: Sequence[str], n_ctx: int, init: str | None
) -> Context:
    """Learned tokens that overwrite the first n of a written prompt, whose other words
    stay.

    Args:
        clip (FrozenCLIP): the model.
        classnames (Sequence[str]): C names.
        n_ctx (int): n.
        init (str | None): the words of the prompt, "" for none; None: "a photo of a",
            or none with more than 4 tokens, as in MaPLe's published code.

    Raises:
        InputError: if n is below 1, the words mark a place for the class name, or there
            are words and more than 4 tokens.
    """
    if n_ctx < 1:
        raise InputError(f"n_ctx must be at least 1, got {n_ctx!r}")
    if init is None:
        init = "a photo of a" if n_ctx <= 4 else ""
    if init and n_ctx > 4:
        raise InputError(
            f"n_ctx must be at most 4 where init={init!r} starts the prompt, as in the"
            f" published code, got {n_ctx}: leave the words out"
        )
    if "[CLS]" in init:
        raise InputError(
            f"init={init!r} marks a place for the class name, which stands at the end"
            " here: leave [CLS] out"
        )
    return Context(clip, classnames, n_ctx, words=init or None, overwrite=True)


def _short(name: str) -> str:
    return repr(name if len(name) <= 60 else name[:57] + "...")


def deep_prompts(clip: FrozenCLIP, depth: int | None, least: int = 0) -> int:
    """How many blocks of both towers get prompts of their own.

    Args:
        depth (int | None): the number, or None for three quarters of the text tower's
            blocks: 9 of 12.
        least (int): the smallest depth that makes sense.

    Raises:
        InputError: if a tower has fewer blocks.
    """
    towers = (clip.text_tower.blocks, clip.image_tower.blocks)
    blocks = min(len(blocks) for blocks in towers if blocks)  # a ResNet has none
    if depth is None:
        return max(len(clip.text_tower.blocks) * 3 // 4, 1)
    if not least <= depth <= blocks:
        raise InputError(
            f"depth must be from {least} to the {blocks} blocks of {clip.name!r}, got"
            f" {depth}"
        )
    return depth


def block_prompts(blocks: int, length: int, width: int) -> nn.ParameterList:
    """A parameter (length, width) for each block, normal with std 0.02."""
    return nn.ParameterList(
        torch.empty(length, width).normal_(0, 0.02) for _ in range(blocks)
    )
