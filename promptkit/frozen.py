"""Arithmetic with frozen weights: the gradient goes to the input alone, and little is
kept for it.

Autograd's own formulas would give the same numbers; these keep 9 floats a channel and
token in a block instead of 19, and need a fifth of the operations. Where nothing needs
a gradient, only plain operations run, which can be traced, exported and compiled.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return F.linear(grad, ctx.weight.t()), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, frozen: weight (O, I), bias (O,); x (..., I) is cast to the
    weight's dtype.
    """
    x = x.to(weight.dtype)
    if _learns(x):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _activate(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The activation of z, and what its derivative needs; z is overwritten."""
    if kind == "quick":  # z sigmoid(1.702 z) = silu(1.702 z) / 1.702
        z = z.mul_(1.702)
        return F.silu(z).mul_(1 / 1.702), z
    return F.gelu(z, approximate=kind), z


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc, fc_bias, proj, proj_bias, kind):
        h, z = _activate(F.linear(x, fc, fc_bias), kind)  # (..., 4D)
        ctx.save_for_backward(z)
        ctx.weights, ctx.kind = (fc, proj), kind
        return F.linear(h, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        fc, proj = ctx.weights
        grad = F.linear(grad, proj.t())  # (..., 4D)
        if ctx.kind == "quick":  # the two factors of 1.702 cancel
            grad = torch.ops.aten.silu_backward(grad, z)
        else:
            grad = torch.ops.aten.gelu_backward(grad, z, approximate=ctx.kind)
        return F.linear(grad, fc.t()), None, None, None, None, None


def mlp(x: Tensor, module: nn.Module, kind: str) -> Tensor:
    """The MLP of an open_clip block, c_proj(activation(c_fc(x))), all frozen.

    Args:
        x (Tensor): (..., D), cast to the weights' dtype.
        module (nn.Module): holds `c_fc` and `c_proj`.
        kind (str): "quick" for QuickGELU, "none" or "tanh" for GELU, exact or
            approximated.

    Returns:
        Tensor: (..., D) in the weights' dtype.
    """
    fc, proj = module.c_fc, module.c_proj
    x = x.to(fc.weight.dtype)
    if _learns(x):
        return _MLP.apply(x, fc.weight, fc.bias, proj.weight, proj.bias, kind)
    h, _ = _activate(F.linear(x, fc.weight, fc.bias), kind)  # (..., 4D)
    return F.linear(h, proj.weight, proj.bias)


def _heads(qkv: Tensor, c: int, heads: int) -> Tensor:
    """(G, c T, 3D) -> (3, G, H, c, T, d): one copy, and all products that follow read
    contiguous blocks.
    """
    G, rows, width = qkv.shape
    return (
        qkv.view(G, c, rows // c, 3, heads, width // (3 * heads))
        .permute(3, 0, 4, 1, 2, 5)
        .contiguous()
    )


def _rows(x: Tensor) -> Tensor:
    """(G, H, c, T, d) -> (G, c T, D), the heads side by side."""
    G, H, c, T, d = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(G, c * T, H * d)


@cache
def _future(T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): minus infinity above the diagonal, zero elsewhere."""
    return torch.full((T, T), float("-inf"), device=device, dtype=dtype).triu_(1)


def _attend(qkv: Tensor, shared: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple]:
    """Causal attention of c sequences over themselves and over keys and values that
    they share.

    The scores against the shared keys are one matrix product a head for all sequences
    together, so nothing shared is ever repeated, and the gradients of the shared keys
    are summed by that same product.

    Args:
        qkv (Tensor): (3, G, H, c, T, d).
        shared (tuple[Tensor, Tensor] | None): keys and values before the sequences, (G,
            H, P, d) each.

    Returns:
        tuple[Tensor, tuple]: (G, H, c, T, d), and what `_attend_backward` needs.
    """
    _, G, H, c, T, d = qkv.shape
    P = shared[0].shape[2] if shared else 0
    q, k, v = qkv.view(3, G * H * c, T, d).unbind(0)
    own = torch.baddbmm(
        _future(T, q.dtype, q.device), q, k.transpose(1, 2), alpha=d**-0.5
    )  # (GHc, T, T)
    if not P:
        probs = torch.softmax(own, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(probs, v).view(G, H, c, T, d), (qkv, probs)
    kp, vp = (x.reshape(G * H, P, d) for x in shared)
    before = torch.bmm(q.view(G * H, c * T, d), kp.transpose(1, 2)).mul_(
        d**-0.5
    )  # (GH, cT, P)
    scores = torch.cat([before.view(-1, T, P), own], dim=-1)  # (GHc, T, P+T)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    own, before = probs[..., P:], probs.view(G * H, c * T, P + T)[..., :P]
    out = torch.bmm(before, vp).view(-1, T, d).baddbmm_(own, v)  # (GHc, T, d)
    return out.view(G, H, c, T, d), (qkv, own, before, kp, vp)


def _attend_backward(
    grad: Tensor, qkv, own, before=None, kp=None, vp=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and of the shared keys and values, given grad (G, H, c, T,
    d).
    """
    _, G, H, c, T, d = qkv.shape
    scale = d**-0.5
    q, k, v = qkv.view(3, G * H * c, T, d).unbind(0)
    grads = torch.empty_like(qkv)
    dq, dk, dv = grads.view(3, G * H * c, T, d).unbind(0)
    grad = grad.reshape(-1, T, d)
    # Softmax: dS = P * (dP - sum(P * dP)), the sum over what comes before and the
    # sequence's own.
    ds = torch.bmm(grad, v.transpose(1, 2)).mul_(own)  # (GHc, T, T)
    total = ds.sum(-1, keepdim=True)  # (GHc, T, 1)
    dkp = dvp = None
    if before is None:
        ds.addcmul_(own, total, value=-1)
        torch.bmm(ds, k, out=dq).mul_(scale)
    else:
        grad_b, q_b = grad.view(G * H, c * T, d), q.view(G * H, c * T, d)
        ds_b = torch.bmm(grad_b, vp.transpose(1, 2)).mul_(before)  # (GH, cT, P)
        total += ds_b.sum(-1).view(-1, T, 1)
        ds.addcmul_(own, total, value=-1)
        ds_b.addcmul_(before, total.view(G * H, c * T, 1), value=-1)
        torch.baddbmm(
            torch.bmm(ds_b, kp).view(-1, T, d), ds, k, beta=scale, alpha=scale, out=dq
        )
        dkp = torch.bmm(ds_b.transpose(1, 2), q_b).mul_(scale).view(G, H, -1, d)
        dvp = torch.bmm(before.transpose(1, 2), grad_b).view(G, H, -1, d)
    torch.bmm(ds.transpose(1, 2), q, out=dk).mul_(scale)
    torch.bmm(own.transpose(1, 2), grad, out=dv)
    return grads, dkp, dvp


def _prefix_attention(qkv, prefix_k, prefix_v):
    """The heads side by side, and what the backward pass needs."""
    G, c, T, D = qkv.shape
    own = _heads(qkv.flatten(1, 2), c, prefix_k.shape[1])
    out, saved = _attend(own, (prefix_k, prefix_v))
    return _rows(out).view(G, c, T, D // 3), saved


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out, saved = _prefix_attention(*args)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        G, c, T, D = grad.shape
        grad = grad.view(G, c, T, saved[0].shape[2], -1).permute(0, 3, 1, 2, 4)
        grads, dk, dv = _attend_backward(grad, *saved)
        return grads.permute(1, 3, 4, 0, 2, 5).reshape(G, c, T, 3 * D), dk, dv


def prefix_attention(qkv: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Causal multi-head attention of c sequences over a prefix that they share and over
    themselves.

    Args:
        qkv (Tensor): (G, c, T, 3D), queries, keys and values of the sequences.
        prefix_k (Tensor): (G, H, P, d), keys of the shared prefix; D = H d.
        prefix_v (Tensor): (G, H, P, d), its values.

    Returns:
        Tensor: (G, c, T, D), heads side by side, before the output projection.
    """
    args = qkv, prefix_k, prefix_v
    return (
        _PrefixAttention.apply(*args) if _learns(*args) else _prefix_attention(*args)[0]
    )


def _packed_attention(qkv, heads, P, c, pad, keep):
    """The heads side by side, and what the backward pass needs."""
    prefix = _heads(qkv[:, :P], 1, heads)
    own = _heads(qkv[:, P:] if pad is None else qkv.index_select(1, pad), c, heads)
    out_p, saved_p = _attend(prefix, None)
    out_c, saved_c = _attend(own, (prefix[1, :, :, 0], prefix[2, :, :, 0]))
    out_c = _rows(out_c)
    out_c = out_c if keep is None else out_c.index_select(1, keep)
    return torch.cat([_rows(out_p), out_c], dim=1), (*saved_p, *saved_c)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads, P, c, pad, keep):
        out, saved = _packed_attention(qkv, heads, P, c, pad, keep)
        ctx.save_for_backward(*saved)
        ctx.keep = keep
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, keep = ctx.saved_tensors, ctx.keep
        _, G, H, c, T, d = saved[2].shape
        P, D = saved[0].shape[4], grad.shape[-1]
        own = grad[:, P:]
        if keep is not None:
            own = grad.new_zeros(G, c * T, D).index_copy_(1, keep, own)
        own = own.view(G, c, T, H, d).permute(0, 3, 1, 2, 4)
        own, dk, dv = _attend_backward(own, *saved[2:])
        prefix = grad[:, :P].view(G, 1, P, H, d).permute(0, 3, 1, 2, 4)
        prefix, _, _ = _attend_backward(prefix, *saved[:2])
        prefix[1, :, :, 0] += dk
        prefix[2, :, :, 0] += dv
        prefix = prefix.permute(1, 3, 4, 0, 2, 5).reshape(G, P, 3 * D)
        own = own.permute(1, 3, 4, 0, 2, 5).reshape(G, c * T, 3 * D)
        # A padded position has no gradient: nothing that is read attends to it.
        grads = torch.cat(
            [prefix, own if keep is None else own.index_select(1, keep)], dim=1
        )
        return grads, None, None, None, None, None


def packed_attention(
    qkv: Tensor,
    heads: int,
    prefix: int,
    classes: int,
    pad: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """`prefix_attention` of rows without padding, together with the causal attention of
    the prefix itself.

    Args:
        qkv (Tensor): (G, P + R, 3D): the rows of the prefix, then those of all
            sequences one after another.
        heads (int): H.
        prefix (int): P.
        classes (int): c, the number of sequences.
        pad (Tensor | None): (c T,) the row of every position of the padded sequences,
            counted from the prefix's first; any row for padding. None when all
            sequences have length T.
        keep (Tensor | None): (R,) the position of every row among the padded sequences;
            None likewise.

    Returns:
        Tensor: (G, P + R, D), heads side by side, before the output projection.
    """
    args = qkv, heads, prefix, classes, pad, keep
    return (
        _PackedAttention.apply(*args) if _learns(qkv) else _packed_attention(*args)[0]
    )
