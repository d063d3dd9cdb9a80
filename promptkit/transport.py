"""Optimal transport between weighted sets, by Sinkhorn's iterations.

Cuturi, Sinkhorn Distances: Lightspeed Computation of Optimal Transport (NeurIPS 2013;
arXiv 1306.0895), in the logarithmic domain where a kernel could underflow. Elsewhere it
is the plain form: the number of iterations hangs on how the scalings are rounded.
"""

import torch
from torch import Tensor

SAFE = -60.0  # exp of it, of its double too, is above the least float32


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: float = 0.1,
    iterations: int = 100,
    threshold: float = 1e-2,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropic transport plans between a set of each of B images and one of each of C
    classes: T = diag(r) exp(-cost / epsilon) diag(q).

    Args:
        cost: (B, C, V, J).
        log_a: (B, V), logarithms of the weights of an image's set.
        log_b: (B, C, J), of a class's.
        epsilon, iterations, threshold: an image is done where its scalings r change by
            less than the threshold on average over classes and V.
        together: all images stop when this holds on average over them too.

    Returns:
        The plans (B, C, V, J), whose sums over V are b exactly; how many iterations
        each image took, (B,); and the change of its scalings in each, (B, iterations),
        0 where it was done.
    """
    kernel = -cost / epsilon
    plain = bool(kernel.min() > SAFE)
    if plain:
        kernel, a, b = kernel.exp(), log_a.exp()[:, None], log_b.exp()
        r, q = torch.ones_like(cost[..., 0]), torch.ones_like(cost[:, :, 0])
    else:  # r and q are logarithms
        r, q = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[:, :, 0])
    going = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    steps = torch.zeros(len(cost), dtype=torch.long, device=cost.device)
    changes = []
    for _ in range(iterations):
        if plain:
            new_r = a / (kernel @ q[..., None])[..., 0]
            new_q = b / (kernel.mT @ new_r[..., None])[..., 0]
            change = (new_r - r).abs().mean(dim=(1, 2))  # (B,)
        else:
            new_r = log_a[:, None] - (kernel + q[:, :, None]).logsumexp(dim=3)
            new_q = log_b - (kernel + new_r[..., None]).logsumexp(dim=2)
            change = (new_r.exp() - r.exp()).abs().mean(dim=(1, 2))
        r = torch.where(going[:, None, None], new_r, r)
        q = torch.where(going[:, None, None], new_q, q)
        steps += going
        changes.append(change * going)
        going &= (change.mean() if together else change) >= threshold
        if not going.any():
            break
    if plain:
        plan = r[..., None] * kernel * q[:, :, None]
    else:
        plan = (kernel + r[..., None] + q[:, :, None]).exp()
    return plan, steps, torch.stack(changes, dim=1)
