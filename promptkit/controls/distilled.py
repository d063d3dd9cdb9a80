"""The control of ProGrad: the teacher's divergence as a second loss, not as a limit."""

from dataclasses import replace

from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.methods.prograd import ProGrad


@register
class Distilled(ProGrad):
    r"""CoOp with plain distillation from ProGrad's teacher.

    .. math:: L = L_{ce} + \alpha L_{kl}

    Context, teacher and recipe are ProGrad's; one gradient is followed, of the sum.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        alpha: the weight of the divergence.
        temperature, template, words, n_ctx: as in ProGrad.
    """

    name = "distilled"
    title = "Distillation"
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        alpha: float = 1.0,
        temperature: float = 1.0,
        template: str = "a photo of a {}.",
        words: bool = True,
        n_ctx: int = 16,
    ):
        teacher = {"temperature": temperature, "template": template}
        super().__init__(clip, classnames, **teacher, words=words, n_ctx=n_ctx)
        expect(alpha >= 0, "alpha", alpha, "at least 0")
        self.alpha = alpha

    def regularizer(self, batch, image, text):
        return self.alpha * self.divergence(image, text)

    backward = Method.backward

    @classmethod
    def recipe(cls, setting):
        """ProGrad's, which says nothing of alpha."""
        recipe = super().recipe(setting)
        hparams = {k: v for k, v in recipe.hparams.items() if k != "lam"}
        return replace(recipe, hparams=hparams)
