"""Linear layers over the quaternions r + x i + y j + z k.

Quaternion neural networks as in Parcollet et al., Quaternion Recurrent Neural Networks
(ICLR 2019; arXiv 1806.04418), and Gaudet and Maida, Deep Quaternion Networks (IJCNN
2018; arXiv 1712.04604).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptkit.errors import expect


class QuaternionLinear(nn.Module):
    r"""y = W \otimes x + b: every output quaternion is a sum of Hamilton products of a
    weight, on the left, with an input quaternion.

    Features (..., 4p) hold p quaternions as four contiguous blocks, all r first, then
    all i, j and k; so do the outputs (..., 4q). The weights are four matrices (p, q), a
    quarter of a linear layer's.

    Args:
        features, outputs: 4p and 4q.

    Raises:
        InputError: one of them is not a multiple of four.
    """

    def __init__(self, features: int, outputs: int):
        super().__init__()
        for name, width in {"features": features, "outputs": outputs}.items():
            expect(width > 0 and width % 4 == 0, name, width, "a multiple of four")
        parts = unitary_draw(features // 4, outputs // 4)
        self.r_weight, self.i_weight, self.j_weight, self.k_weight = (
            nn.Parameter(part) for part in parts
        )
        self.bias = nn.Parameter(torch.zeros(outputs))

    def matrix(self) -> Tensor:
        """M, (4p, 4q), with y = x M + b: the four weights in the four orders and signs
        that i i = j j = k k = i j k = -1 asks for.
        """
        r, i, j, k = self.r_weight, self.i_weight, self.j_weight, self.k_weight
        rows = (r, i, j, k), (-i, r, k, -j), (-j, -k, r, i), (-k, j, -i, r)
        return torch.cat([torch.cat(row, dim=1) for row in rows])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix().T, self.bias)


def unitary_draw(p: int, q: int) -> tuple[Tensor, ...]:
    """Four initial weights (p, q): quaternions m (cos a + u sin a) with a modulus m of
    Glorot's scale, a random imaginary unit u and an angle a.
    """
    modulus = torch.randn(4, p, q).norm(dim=0) / math.sqrt(2 * (p + q))
    axis = F.normalize(torch.randn(3, p, q), dim=0)
    angle = (2 * torch.rand(p, q) - 1) * math.pi
    return modulus * angle.cos(), *(modulus * angle.sin() * axis)
