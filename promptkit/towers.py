"""The two frozen towers of CLIP, run block by block, with edits and without the work
that cannot matter.

The text transformer is causal and read at EOT, which has two exact consequences. Tokens
after EOT change nothing, so a pass needs max(EOT) + 1 positions instead of 77. Tokens
before the class name see nothing of the class, so their keys and values are computed
once a group and shared by all classes, forward and backward. The parameters are
open_clip's own; nothing is copied, and nothing in the towers learns.
"""

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from promptkit.errors import InputError
from promptkit.frozen import linear, mlp, packed_attention, prefix_attention

__all__ = [
    "Edit",
    "Edits",
    "ImageTower",
    "Prompt",
    "Replace",
    "ResNetTower",
    "Span",
    "TextTower",
    "plain_text",
]

# A pass of its own for classes of another length costs as much as this many
# multiply-adds of padding a layer.
_BUCKET = 2e6


@dataclass
class Prompt:
    """Input of the text tower, before positional embeddings. D is the text width, C the
    number of classes.

    Attributes:
        prefix (Tensor): (G, P, D), P >= 1, what all classes of a group share: SOS and
            the context. G is 1, or one group an image.
        suffix (Tensor): (C, T, D), or (G, C, T, D) when it differs by group: what
            differs by class (the name, ".", EOT), padded to the longest.
        eot (Tensor): (C,) long, position of EOT inside the suffix.
    """

    prefix: Tensor
    suffix: Tensor
    eot: Tensor

    def full(self) -> Tensor:
        """The whole sequences, (G, C, P+T, D): what `plain_text` and the official
        implementations work on.
        """
        groups, classes = self.prefix.shape[0], self.suffix.shape[-3]
        prefix = self.prefix[:, None].expand(-1, classes, -1, -1)  # (G, C, P, D)
        return torch.cat(
            [prefix, self.suffix.expand(groups, -1, -1, -1)], dim=2
        )  # (G, C, P+T, D)


@dataclass(frozen=True)
class Span:
    """Which part of the work an edit is looking at.

    Attributes:
        start (int): position, in the full sequence, of the first token of x.
        groups (slice): the groups (text tower) or images (image tower) of x among all
            of the call.
        classes (slice | Tensor | None): the classes of x among all of the call, to
            index with:
            `tokens[span.classes]`. None where x is shared by all classes, and in the
            image tower.
    """

    start: int
    groups: slice
    classes: slice | Tensor | None


class Edit:
    """What a method does between the blocks of a tower; the identity until methods are
    overridden.

    x is (G, P, D) for the prefix that the classes of each group share, (G, c, T, D) for
    (a chunk of) the classes' suffixes, and (B, N, D) in the image tower; always
    float32. Every hook must be a pure function of its arguments and the learned
    parameters: it sees one sequence in several parts, and is called again when
    activations are recomputed in the backward pass.
    """

    def before(self, layer: int, x: Tensor, span: Span) -> Tensor:
        """The input of block `layer` (counted from 0); returns a tensor of the shape of
        x.
        """
        return x

    def after(self, layer: int, x_in: Tensor, x_out: Tensor, span: Span) -> Tensor:
        """The output of block `layer`, given its input; returns a tensor of the shape
        of x_out.
        """
        return x_out

    def branch(self, layer: int, part: str, h: Tensor, span: Span) -> Tensor:
        """The residual branch "attn" or "mlp" of block `layer` before it is added to
        the stream.
        """
        return h

    def norm(
        self, layer: int | None, which: str, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weight and bias of a layer norm, each (D,), given the frozen ones.

        `which` is "ln_1" or "ln_2" of block `layer`; where `layer` is None, "ln_pre" or
        "ln_post" of the image tower or "ln_final" of the text tower.
        """
        return weight, bias

    def shared(self, layer: int, length: int) -> int:
        """How many of the first `length` positions are still the same for all classes
        at the input of `layer`.

        An edit that makes prefix tokens differ by class must say so here, before
        `before` is called.
        """
        return length

    @property
    def all_rows(self) -> bool:
        """Whether the last block must compute every position rather than the one that
        is read.
        """
        return (
            type(self).after is not Edit.after or type(self).branch is not Edit.branch
        )


class Edits(Edit):
    """Several edits, applied in order.

    Args:
        edits (Edit | None): None is skipped.
    """

    def __init__(self, *edits: Edit | None):
        self.edits = [edit for edit in edits if edit is not None]

    def before(self, layer, x, span):
        for edit in self.edits:
            x = edit.before(layer, x, span)
        return x

    def after(self, layer, x_in, x_out, span):
        for edit in self.edits:
            x_out = edit.after(layer, x_in, x_out, span)
        return x_out

    def branch(self, layer, part, h, span):
        for edit in self.edits:
            h = edit.branch(layer, part, h, span)
        return h

    def norm(self, layer, which, weight, bias):
        for edit in self.edits:
            weight, bias = edit.norm(layer, which, weight, bias)
        return weight, bias

    def shared(self, layer, length):
        for edit in self.edits:
            length = edit.shared(layer, length)
        return length

    @property
    def all_rows(self):
        return any(edit.all_rows for edit in self.edits)


class Replace(Edit):
    """Deep prompts: at the input of some blocks, tokens at given positions are thrown
    away and replaced.

    Args:
        prompts (Mapping[int, tuple[int, Tensor]]): block -> (start, tokens). The tokens
            take positions start .. start + n - 1 of the full sequence (the image
            tower's class token is position 0) and are (n, D); in the text tower also
            (C, n, D) by class or (G, 1 or C, n, D) by group; in the image tower also
            (B, n, D) by image.
    """

    def __init__(self, prompts: Mapping[int, tuple[int, Tensor]]):
        self.prompts = dict(prompts)

    @classmethod
    def deep(cls, start: int, tokens: Iterable[Tensor]) -> "Replace":
        """Tokens at ``start`` of the blocks behind the first, one a block."""
        return cls({block: (start, x) for block, x in enumerate(tokens, start=1)})

    def shared(self, layer, length):
        if layer in self.prompts:
            start, tokens = self.prompts[layer]
            if tokens.dim() > 2 and tokens.shape[-3] > 1:  # differ by class
                return min(length, start)
        return length

    def before(self, layer, x, span):
        if layer not in self.prompts:
            return x
        start, tokens = self.prompts[layer]
        first = max(start, span.start)
        last = min(start + tokens.shape[-2], span.start + x.shape[-2])
        if first >= last:
            return x
        tokens = tokens[..., first - start : last - start, :]
        if tokens.dim() == 4:  # (G, 1 or C, n, D)
            tokens = tokens[span.groups]
            if span.classes is None:
                tokens = tokens[:, 0]  # (G, n, D)
            elif tokens.shape[1] > 1:
                tokens = tokens[:, span.classes]
        elif tokens.dim() == 3:  # (C, n, D), or (B, n, D) in the image tower
            if tokens.shape[0] > 1:
                tokens = tokens[span.groups if x.dim() == 3 else span.classes]
        tokens = tokens.to(x.dtype).expand(*x.shape[:-2], -1, -1)
        head, tail = x[..., : first - span.start, :], x[..., last - span.start :, :]
        return torch.cat([head, tokens, tail], dim=-2)


def plain_text(model: nn.Module, embeddings: Tensor, eot: Tensor) -> Tensor:
    """The plain full-length pass of open_clip: what `TextTower` must reproduce, and is
    measured against.

    Args:
        model (nn.Module): an `open_clip.CLIP`.
        embeddings (Tensor): (N, L, D) token embeddings, L at most the context length;
            padded to it with zeros.
        eot (Tensor): (N,) position of EOT.

    Returns:
        Tensor: (N, E), not normalised.
    """
    length = model.positional_embedding.shape[0]
    x = (
        F.pad(embeddings, (0, 0, 0, length - embeddings.shape[1]))
        + model.positional_embedding
    )  # (N, 77, D)
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    x = x[torch.arange(len(x), device=x.device), eot]  # (N, D)
    project = model.text_projection
    return project(x) if isinstance(project, nn.Linear) else x @ project


def _norm(
    module: nn.Module, x: Tensor, edit: Edit, layer: int | None, which: str
) -> Tensor:
    """Layer norm of x (..., D) in float32, with the edit's weight and bias."""
    if isinstance(module, nn.Identity):  # some models have no ln_pre
        return x
    weight, bias = edit.norm(layer, which, module.weight, module.bias)
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class _Block:
    """One residual attention block of open_clip, in pieces: x + attn(ln_1(x)), then x +
    mlp(ln_2(x)).

    The residual stream and the layer norms are float32; matrix products run in the
    dtype of their weights.
    """

    def __init__(self, layer: int, module: nn.Module):
        self.layer, self.module = layer, module
        self.heads = module.attn.num_heads
        act = module.mlp.gelu
        self.activation = act.approximate if isinstance(act, nn.GELU) else "quick"

    def qkv(self, x: Tensor, edit: Edit) -> Tensor:
        """Queries, keys and values of x (..., D): (..., 3D)."""
        attn, x = self.module.attn, _norm(self.module.ln_1, x, edit, self.layer, "ln_1")
        return linear(x, attn.in_proj_weight, attn.in_proj_bias)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """The parts of (B, N, kD), each (B, H, N, d)."""
        B, N, D = qkv.shape
        d = self.module.attn.head_dim
        return (
            qkv.view(B, N, D // (self.heads * d), self.heads, d)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )

    def finish(self, x: Tensor, attended: Tensor, edit: Edit, span: Span) -> Tensor:
        """The block's output, given its input x and the concatenated heads, both (...,
        D).
        """
        m = self.module
        h = m.ls_1(linear(attended, m.attn.out_proj.weight, m.attn.out_proj.bias))
        x = x + edit.branch(self.layer, "attn", h.float(), span)
        h = mlp(_norm(m.ln_2, x, edit, self.layer, "ln_2"), m.mlp, self.activation)
        return x + edit.branch(self.layer, "mlp", m.ls_2(h).float(), span)


class TextTower:
    """The text transformer of a frozen open_clip model.

    Args:
        model (nn.Module): an `open_clip.CLIP` with a causal text tower.
        budget (int): bytes of activations that may be kept for the backward pass. What
            does not fit is computed in chunks of classes, and again in the backward
            pass.
    """

    def __init__(self, model: nn.Module, budget: int):
        self.model, self.budget = model, budget
        self.blocks = [_Block(*x) for x in enumerate(model.transformer.resblocks)]
        self._plans: dict = {}

    def __call__(self, prompt: Prompt, edit: Edit | None = None, tokens: bool = False):
        """Features of every class in every group.

        Args:
            prompt (Prompt): G groups, C classes.
            edit (Edit | None): what to change between the blocks.
            tokens (bool): also return the features of all positions.

        Returns:
            Tensor: (G, C, E), not normalised; with tokens, a pair of it and (G, C, N,
                E): every position through the final layer norm and projection, zero
                after a class's EOT, where N is the longest sequence up to its EOT.
        """
        learns = torch.is_grad_enabled() and (
            edit is not None
            or prompt.prefix.requires_grad
            or prompt.suffix.requires_grad
        )
        with torch.set_grad_enabled(learns):
            return self._run(prompt, edit, tokens, learns)

    def _run(self, prompt, edit, tokens, learns):
        G, P, _ = prompt.prefix.shape
        C = prompt.suffix.shape[-3]
        suffix = (
            prompt.suffix if prompt.suffix.dim() == 4 else prompt.suffix[None]
        )  # (1 or G, C, T, D)
        packable = edit is None and not tokens
        edit = edit or Edit()
        moved = P - min(edit.shared(layer, P) for layer in range(len(self.blocks)))
        plan = self._plan(prompt.eot, G, P, moved, learns, packable)
        if plan.packing:
            return self._packed(prompt.prefix, suffix, plan.packing)
        whole = plan.chunks[0].classes is None
        if not whole and suffix.requires_grad:
            # The gradient of an index or a slice is as large as what it reads; that of
            # a split is not.
            order = torch.cat([chunk.classes for chunk in plan.chunks])
            parts = suffix.index_select(1, order).split(
                [len(chunk.classes) for chunk in plan.chunks], dim=1
            )
        rows = []
        first = 0
        per_group = len(suffix) > 1
        suffixes = suffix.split(plan.groups) if per_group else None
        for i, prefix in enumerate(prompt.prefix.split(plan.groups)):  # (g, P, D)
            groups = slice(first, first + len(prefix))
            first = groups.stop
            shared = _run(
                plan.recompute_prefix, self._prefix, prefix, edit, groups, tokens
            )
            row = []
            for j, chunk in enumerate(plan.chunks):
                if whole:
                    part = suffixes[i] if per_group else suffix
                elif suffix.requires_grad:
                    part = parts[j].split(plan.groups)[i] if per_group else parts[j]
                else:
                    part = (suffixes[i] if per_group else suffix).index_select(
                        1, chunk.classes
                    )
                span = Span(P, groups, slice(0, C) if whole else chunk.classes)
                part = part[:, :, : chunk.length]  # (1 or g, c, T, D)
                row.append(
                    _run(
                        plan.recompute,
                        self._classes,
                        part,
                        shared,
                        chunk,
                        edit,
                        span,
                        tokens,
                    )
                )
            rows.append(row)
        features = torch.cat(
            [torch.cat([f for f, _ in row], dim=1) for row in rows]
        )  # (G, C, E)
        if tokens:
            longest = max(chunk.length for chunk in plan.chunks) + P
            local = [
                [F.pad(t, (0, 0, 0, longest - t.shape[2])) for _, t in row]
                for row in rows
            ]
            local = torch.cat([torch.cat(row, dim=1) for row in local])  # (G, C, N, E)
        if not whole:
            back = torch.cat([chunk.classes for chunk in plan.chunks]).argsort()
            features = features[:, back]
            local = local[:, back] if tokens else None
        return (features, local) if tokens else features

    def _packed(self, prefix, suffix, packing):
        """Features (G, C, E) in one pass over the rows of the prefix and of all
        classes, without padding.
        """
        G, P, D = prefix.shape
        T, position = packing.length, self.model.positional_embedding
        own = suffix[:, :, :T].float() + position[P : P + T]
        own = (
            own.flatten(1, 2)
            if packing.keep is None
            else own.flatten(1, 2).index_select(1, packing.keep)
        )
        x = torch.cat(
            [prefix.float() + position[:P], own.expand(G, -1, -1)], dim=1
        )  # (G, P+R, D)
        edit, span = Edit(), Span(0, slice(0, G), None)
        for block in self.blocks:
            qkv, classes = block.qkv(x, edit), suffix.shape[1]
            h = packed_attention(
                qkv, block.heads, P, classes, packing.pad, packing.keep
            )
            if block is self.blocks[-1]:
                x, h = (
                    x.index_select(1, packing.read),
                    h.index_select(1, packing.read),
                )  # (G, C, D)
            x = block.finish(x, h, edit, span)
        return self._project(x, edit)

    def _prefix(self, x, edit, groups, tokens):
        """What the classes of each group share.

        Returns, for each block, the prefix's keys and values (G, H, n, d) and the
        states (G, k, D) of those tokens that differ by class from this block on; and,
        if `tokens`, the features of what stayed shared.
        """
        x = x.float() + self.model.positional_embedding[: x.shape[1]]  # (G, P, D)
        span = Span(0, groups, None)
        shared = []
        for layer, block in enumerate(self.blocks):
            n = edit.shared(layer, x.shape[1])
            moved, x = (x[:, n:], x[:, :n]) if n < x.shape[1] else (None, x)
            x = edit.before(layer, x, span)
            q, k, v = block.split(block.qkv(x, edit))  # (G, H, n, d)
            shared.append((k, v, moved))
            if layer + 1 < len(self.blocks) or tokens:
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                attended = attended.transpose(1, 2).flatten(2)  # (G, n, D)
                x = edit.after(layer, x, block.finish(x, attended, edit, span), span)
        return shared, self._project(x, edit) if tokens else None

    def _classes(self, x, shared, chunk, edit, span, tokens):
        """Features (G, c, E) of a chunk of classes, x (1 or G, c, T, D); of all rows
        too, if `tokens`.
        """
        states, prefix_features = shared
        P, G, c, T = span.start, len(states[0][0]), *x.shape[1:3]
        x = (x.float() + self.model.positional_embedding[P : P + T]).expand(
            G, -1, -1, -1
        )
        every = tokens or edit.all_rows
        for layer, (block, (k, v, moved)) in enumerate(
            zip(self.blocks, states, strict=True)
        ):
            if moved is not None:
                x = torch.cat([moved[:, None].expand(-1, c, -1, -1), x], dim=2)
                span = Span(span.start - moved.shape[1], span.groups, span.classes)
            x = edit.before(layer, x, span)
            attended = prefix_attention(block.qkv(x, edit), k, v)  # (G, c, T, D)
            if layer + 1 == len(self.blocks) and not every:
                x, attended = chunk.read(x), chunk.read(attended)  # (G, c, D)
            x = edit.after(layer, x, block.finish(x, attended, edit, span), span)
        if not every:
            return self._project(x, edit), None
        if not tokens:
            return self._project(chunk.read(x), edit), None
        own = self._project(x, edit)  # (G, c, T, E)
        within = (
            torch.arange(x.shape[2], device=x.device)
            < chunk.eot[:, None] + 1 + x.shape[2] - T
        )  # (c, T)
        local = torch.cat(
            [prefix_features[:, None].expand(-1, c, -1, -1), own * within[..., None]],
            dim=2,
        )
        return chunk.read(own), local

    def _project(self, x, edit):
        m = self.model
        x = _norm(m.ln_final, x, edit, None, "ln_final")
        if isinstance(m.text_projection, nn.Linear):
            return linear(x, m.text_projection.weight, m.text_projection.bias).float()
        return linear(x, m.text_projection.t()).float()

    def _plan(self, eot, G, P, moved, learns, packable):
        """Which groups and classes run together: by length, so that little is padded,
        within the budget.
        """
        version = 0 if eot.is_inference() else eot._version
        key = (id(eot), version, G, P, moved, learns, packable, self.budget)
        of, plan = self._plans.get(key, (None, None))
        if of is not eot:  # in a copy of the tower an id may be another tensor's
            if len(self._plans) >= 64:
                self._plans.clear()
            plan = self._make_plan(eot, G, P, moved, learns, packable)
            # Holding eot keeps its id from being taken by another tensor.
            self._plans[key] = eot, plan
        return plan

    def _make_plan(self, eot, G, P, moved, learns, packable):
        D, cpu = self.model.ln_final.normalized_shape[0], eot.device.type == "cpu"
        lengths = [n + 1 for n in eot.tolist()]
        # On a GPU launches dominate.
        buckets = _buckets(
            lengths, moved, overhead=_BUCKET * (1 if cpu else 100) / D**2
        )
        per_token = (
            len(self.blocks) * 4 * (10 * D + self.blocks[0].heads * (P + max(lengths)))
        )
        tokens_per_group = sum(
            len(classes) * (length + moved) for classes, length in buckets
        )
        recompute = learns and G * tokens_per_group * per_token > self.budget
        if learns:
            capacity = (self.budget // 4 if recompute else self.budget) // per_token
        else:
            capacity = (min(self.budget, 2**27) if cpu else self.budget) // (4 * 24 * D)
        # Packed, the padding costs attention alone.
        padded = len(lengths) * max(lengths)
        if (
            packable
            and not recompute
            and padded <= 3 * sum(lengths)
            and G * sum(lengths) <= capacity
        ):
            return _Plan(packing=_Packing.of(lengths, P, eot.device))
        groups = max(1, min(G, capacity // tokens_per_group))
        chunks = []
        for classes, length in buckets:
            step = max(1, capacity // (groups * (length + moved)))
            chunks += [
                (classes[i : i + step], length) for i in range(0, len(classes), step)
            ]
        chunks = [
            _Chunk.of(classes, length, eot, whole=len(chunks) == 1)
            for classes, length in chunks
        ]
        return _Plan(
            groups,
            chunks,
            recompute,
            recompute and G * P * per_token > self.budget // 8,
        )


@dataclass
class _Packing:
    """Rows of all classes one after another, without padding, behind the P rows of the
    prefix.
    """

    length: int  # T, the longest suffix up to its EOT
    read: Tensor  # (C,) rows of EOT
    pad: (
        Tensor | None
    )  # (C T,) the row of every padded position; None when nothing is padded
    keep: Tensor | None  # (R,) the padded position of every row

    @classmethod
    def of(cls, lengths, P, device):
        length, ends = (
            max(lengths),
            torch.tensor(lengths, device=device).cumsum(0),
        )  # (C,)
        read = ends + (P - 1)
        if min(lengths) == length:
            return cls(length, read, None, None)
        within = (
            torch.arange(length, device=device)
            < torch.tensor(lengths, device=device)[:, None]
        )  # (C, T)
        keep = within.flatten().nonzero()[:, 0]
        pad = torch.zeros(len(lengths) * length, dtype=torch.long, device=device)
        pad[keep] = P + torch.arange(len(keep), device=device)
        return cls(length, read, pad, keep)


@dataclass
class _Chunk:
    classes: Tensor | None  # (c,) indices; None for all, in their own order
    length: int  # T, the longest suffix up to its EOT
    eot: Tensor  # (c,)
    ends: bool  # every EOT is at T - 1

    @classmethod
    def of(cls, classes, length, eot, whole):
        index = None if whole else torch.tensor(classes, device=eot.device)
        eot = eot if whole else eot[index]
        return cls(index, length, eot, bool((eot == length - 1).all()))

    def read(self, x: Tensor) -> Tensor:
        """The rows at EOT: (G, c, n, D) -> (G, c, D), where the last T of the n
        positions are the suffix.
        """
        G, c, n, D = x.shape
        if self.ends:
            return x[:, :, -1]
        rows = torch.arange(G * c, device=x.device) * n + (
            self.eot + (n - self.length)
        ).repeat(G)
        return x.reshape(-1, D).index_select(0, rows).view(G, c, D)


@dataclass
class _Plan:
    groups: int = 0  # groups that run together
    chunks: list[_Chunk] | None = None
    recompute: bool = False
    recompute_prefix: bool = False
    packing: _Packing | None = None  # instead of all others: everything in one pass


def _buckets(
    lengths: list[int], moved: int, overhead: float
) -> list[tuple[list[int], int]]:
    """Classes by length, [(classes, length)], so that padding and `overhead` tokens a
    bucket are least.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    sizes = sorted(by_length)
    best: list[tuple[float, int]] = [
        (0.0, 0)
    ]  # cost of the first j sizes, and where its last bucket starts
    for j in range(1, len(sizes) + 1):
        options, count = [], 0
        for i in range(j - 1, -1, -1):
            count += len(by_length[sizes[i]])
            options.append((best[i][0] + overhead + count * (sizes[j - 1] + moved), i))
        best.append(min(options))
    buckets, j = [], len(sizes)
    while j:
        i = best[j][1]
        buckets.append(
            (sorted(sum((by_length[n] for n in sizes[i:j]), [])), sizes[j - 1])
        )
        j = i
    return buckets[::-1]


def _run(recompute: bool, function, *args):
    if not recompute:
        return function(*args)

    def part(*args):  # once forward, once more in the backward pass
        _trim()
        return function(*args)

    return checkpoint(part, *args, use_reentrant=False)


def _trim() -> None:
    """Give freed memory back to the system where the C library is glibc.

    Between the small results of many large parts it would keep gigabytes of gaps.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (B, H, M, d) over keys and values (B, H, N, d)."""
    if (
        q.device.type == "cpu" and k.shape[2] <= 64
    ):  # torch's own is made for long sequences
        probs = torch.softmax(
            (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float(), dim=-1
        )  # (B, H, M, N)
        return probs.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _traced() -> bool:
    """Whether torch records a graph: torch.export, torch.compile, torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class ImageTower:
    """The vision transformer of a frozen open_clip model.

    Args:
        model (nn.Module): an `open_clip.CLIP` with a ViT image tower.
        budget (int): as in `TextTower`, for chunks of images.
    """

    def __init__(self, model: nn.Module, budget: int):
        self.visual, self.budget = model.visual, budget
        self.blocks = [
            _Block(*x) for x in enumerate(model.visual.transformer.resblocks)
        ]
        self.length = len(
            self.visual.positional_embedding
        )  # the class token and the patches; prompts stand behind

    def __call__(
        self,
        images: Tensor,
        prompt: Tensor | None = None,
        edit: Edit | None = None,
        tokens: bool = False,
        attention: bool = False,
    ):
        """Features of images.

        Args:
            images (Tensor): (B, 3, H, W), already normalised by the model's mean and
                std.
            prompt (Tensor | None): (n, Dv) or (B, n, Dv), tokens appended after the
                patches: without positional embedding, through ln_pre like the others.
            edit (Edit | None): what to change between the blocks.
            tokens (bool): also return the patches' features.
            attention (bool): also return the class token's attention to the patches in
                the last block.

        Returns:
            Tensor: (B, E), not normalised. With tokens or attention, a tuple of it,
                then the N patch tokens through ln_post and proj (B, N, E), then the
                attention (B, N), a softmax over all positions averaged over heads.
        """
        B = images.shape[0]  # len() would make a number of it where it is traced
        learns = torch.is_grad_enabled() and (
            edit is not None
            or (prompt is not None and prompt.requires_grad)
            or images.requires_grad
        )
        extra = 0 if prompt is None else prompt.shape[-2]
        D, length = (
            self.visual.conv1.out_channels,
            self.visual.positional_embedding.shape[0] + extra,
        )
        per_image = length * 4 * 10 * D * (len(self.blocks) if learns else 2)
        if _traced():  # the batch may have any size: one part
            args = images, prompt, edit or Edit(), slice(0, B), tokens, attention
            outs = self._images(*args)
            return outs if len(outs) > 1 else outs[0]
        recompute = learns and B * per_image > self.budget
        room = self.budget
        if recompute:
            room //= 4
        elif not learns and images.device.type == "cpu":
            room = min(room, 2**28)  # larger parts leave the cache
        step = max(1, room // per_image)
        prompts = (
            prompt.split(step) if prompt is not None and prompt.dim() == 3 else None
        )
        with torch.set_grad_enabled(learns):
            outs = []
            for i, part in enumerate(images.split(step)):
                groups = slice(i * step, i * step + len(part))
                own = prompts[i] if prompts else prompt
                args = part, own, edit or Edit(), groups, tokens, attention
                outs.append(_run(recompute, self._images, *args))
        outs = tuple(
            torch.cat(parts) if len(parts) > 1 else parts[0]
            for parts in zip(*outs, strict=True)
        )
        return outs if len(outs) > 1 else outs[0]

    def _images(self, images, prompt, edit, groups, tokens, attention):
        v, B = self.visual, images.shape[0]
        x = (
            v.conv1(images.to(v.conv1.weight.dtype)).flatten(2).transpose(1, 2).float()
        )  # (B, N, D)
        N = x.shape[1]
        x = (
            torch.cat([v.class_embedding.expand(B, 1, -1), x], dim=1)
            + v.positional_embedding
        )
        if prompt is not None:
            x = torch.cat([x, prompt.float().expand(B, -1, -1)], dim=1)  # (B, 1+N+n, D)
        x = _norm(v.ln_pre, x, edit, None, "ln_pre")
        span = Span(0, groups, None)
        every = tokens or edit.all_rows
        for layer, block in enumerate(self.blocks):
            x = edit.before(layer, x, span)
            q, k, value = block.split(block.qkv(x, edit))  # (B, H, 1+N+n, d)
            if layer + 1 == len(self.blocks):
                if attention:
                    scores = (
                        q[:, :, :1] @ k.transpose(-1, -2)
                    ).float()  # (B, H, 1, 1+N+n)
                    weights = (
                        (scores * q.shape[-1] ** -0.5)
                        .softmax(-1)[:, :, 0, 1 : 1 + N]
                        .mean(1)
                    )  # (B, N)
                if not every:
                    x, q = x[:, :1], q[:, :, :1]
            attended = _attention(q, k, value).transpose(1, 2).flatten(2)
            x = edit.after(layer, x, block.finish(x, attended, edit, span), span)
        x = x[:, : 1 + N] if tokens else x[:, :1]
        x = linear(_norm(v.ln_post, x, edit, None, "ln_post"), v.proj.t()).float()
        return (
            x[:, 0],
            *([x[:, 1:]] if tokens else []),
            *([weights] if attention else []),
        )


class ResNetTower:
    """The residual network of a frozen open_clip model, with its attention pooling: its
    features, and nothing inside of it.

    Args:
        model (nn.Module): an `open_clip.CLIP` with a ModifiedResNet image tower.
        budget (int): as in `TextTower`, for chunks of images.
        dtype (torch.dtype): of the convolutions and matrix products.
    """

    blocks = ()  # of tokens there are none

    def __init__(self, model: nn.Module, budget: int, dtype: torch.dtype):
        self.visual, self.budget, self.dtype = model.visual, budget, dtype
        self.length = len(
            self.visual.attnpool.positional_embedding
        )  # the mean and the cells of the last grid, which the pooling reads

    def __call__(
        self, images: Tensor, prompt=None, edit=None, tokens=False, attention=False
    ):
        """Features (B, E), not normalised, of normalised images (B, 3, H, W).

        Raises:
            InputError: for prompts, edits, local tokens or their attention.
        """
        if prompt is not None or edit is not None or tokens or attention:
            raise InputError(
                "the image tower is a ResNet: it has no blocks of tokens, and so takes"
                " no prompts or edits and gives no local tokens; take a CLIP with a"
                " ViT, such as ViT-B-16"
            )
        learns = torch.is_grad_enabled() and images.requires_grad
        if _traced():
            return self._images(images)
        width, area = self.visual.conv3.out_channels, images.shape[2] * images.shape[3]
        per_image = 4 * width * area * (8 if learns else 2)
        room = self.budget
        if not learns and images.device.type == "cpu":
            room = min(room, 2**28)  # larger parts leave the cache
        with torch.set_grad_enabled(learns):
            parts = images.split(max(1, room // per_image))
            outs = [self._images(part) for part in parts]
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _images(self, images):
        if self.dtype == torch.float32:
            return self.visual(images)
        with torch.autocast(images.device.type, self.dtype):
            return self.visual(images).float()
