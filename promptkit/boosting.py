"""Boosting prompts: tokens in both towers for a domain, alone or between a method's own
prompts and the class names.

Cascade Prompt Learning for Vision-Language Model Adaptation; Wu et al., ECCV 2024;
arXiv 2409.17805.
"""

import warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from promptkit.files import write_atomically
from promptkit.prompts import Context, Template, block_prompts
from promptkit.towers import Prompt, Replace


class Boosting(nn.Module):
    """Tokens at the input of the first J blocks of both towers.

    Args:
        clip: the frozen backbone; not part of this module.
        n_text, n_vision: n and n', tokens a block in each tower.
        depth: J.
        words: that start those of the first text block; "": random.

    Attributes:
        text: J parameters (n, D).
        vision: J parameters (n', Dv).
    """

    def __init__(self, clip, n_text: int, n_vision: int, depth: int, words: str):
        super().__init__()
        self.__dict__["clip"] = clip
        self.text = block_prompts(depth, n_text, clip.width)
        self.vision = block_prompts(depth, n_vision, clip.vision_width)
        ids = clip.encode(words)
        self.start = clip.embed(ids[:n_text]) if words else None
        self.behind = torch.tensor(ids[n_text:], dtype=torch.long)  # words that stay
        self._template = None
        self.draw(None)

    @torch.no_grad()
    def draw(self, generator) -> None:
        """Initial values: normal, std 0.02, and words in the first text block."""
        for p in self.parameters():
            p.copy_(torch.empty(p.shape).normal_(0, 0.02, generator=generator))
        if self.start is not None:
            self.text[0].copy_(self.start)

    def edit(self, tower: str, position: int) -> Replace:
        """Tokens of the blocks behind the first of the "text" or "vision" tower, at
        ``position``.
        """
        return Replace.deep(position, getattr(self, tower)[1:])

    def prompt(self, classnames: list[str]) -> Prompt:
        """Of C classes, with these tokens alone."""
        if self._template is None or self._template.classnames != classnames:
            stay = [self.behind] if len(self.behind) else []
            pattern = [len(self.text[0]), *stay, "{}."]
            self._template = Template(self.clip, classnames, pattern)
        return self._template(self.text[0])

    def features(self, images: Tensor, classnames: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, E) of images and (C, E) of classes, with these tokens alone."""
        behind = self.clip.image_tower.length  # the class token and the patches
        edit = self.edit("vision", behind)
        text = self.clip.text(self.prompt(classnames), self.edit("text", 1))[0]
        return self.clip.image(images, self.vision[0], edit), text

    def write(self, path) -> None:
        """Keep them in a file."""
        state = {n: p.cpu().contiguous() for n, p in self.state_dict().items()}
        write_atomically(path, lambda file: file.write(safetensors_bytes(state)))

    def read(self, path) -> bool:
        """Take over what :meth:`write` kept; whether it is there. A damaged file is
        passed over with a warning.
        """
        if not path.exists():
            return False
        try:
            self.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            warnings.warn(
                f"damaged boosting prompts {path} ({str(error).splitlines()[0]}):"
                " learning them again",
                stacklevel=4,
            )
            return False
        return True

    def enter(self, context: Context) -> None:
        """Stand between a context and the class names behind it, from now on."""
        context.__class__ = type("Beside", (Beside, type(context)), {})
        context.__dict__["boosting"] = self
        context.set_classes(context.template.classnames)


class Beside:
    """What a context becomes that has boosting prompts between it and the class name;
    stands before the context's own class.
    """

    def pattern(self, names):
        *before, name = super().pattern(names)
        return [*before, len(self.boosting.text[0]), name]

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.template.__class__ = Filled
        self.template.boosting = self.boosting


class Filled(Template):
    """A template whose last learned segment is known."""

    def __call__(self, *tokens, **options):
        return super().__call__(*tokens, self.boosting.text[0], **options)
