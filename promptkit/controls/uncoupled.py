"""The control of MaPLe: its maps, and its start, over separate inputs."""

from torch import nn

from promptkit.method import register
from promptkit.methods.maple import MaPLe
from promptkit.towers import Replace


@register
class Uncoupled(MaPLe):
    r"""MaPLe whose image prompts are made from vectors of their own.

    .. math:: \tilde p_i = A_i\,r_i + b_i, \qquad i = 0, \dots, J-1

    The r_i, (n, D), start as copies of the text prompts p_i, so the first step sees
    MaPLe's prompts; then each tower's gradient reaches its own vectors alone.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx, depth, init: as in MaPLe.
    """

    name = "uncoupled"
    title = "MaPLe without sharing"
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 2,
        depth: int | None = None,
        init: str | None = None,
    ):
        super().__init__(clip, classnames, n_ctx=n_ctx, depth=depth, init=init)
        shared = [self.context.vectors, *self.deep]
        self.own = nn.ParameterList(p.detach().clone() for p in shared)

    def image_prompt(self):
        return self.couple(self.own[0])  # (n, Dv)

    def image_edit(self):
        behind = self.clip.image_tower.length  # the class token and the patches
        pairs = zip(self.couple_deep, list(self.own)[1:], strict=True)
        return Replace({i: (behind, A(r)) for i, (A, r) in enumerate(pairs, start=1)})

    def official_names(self):
        return {}  # nobody published it
