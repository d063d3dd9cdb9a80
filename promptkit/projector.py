"""A projector from the features of one model into the space of another's, as PromptKD
(arXiv 2403.02781) and TextRefiner (arXiv 2412.08176) learn it.

Their published code writes its layers as convolutions over one pixel, "conv1".
"""

from torch import Tensor, nn

from promptkit.method import Method


def projector(before: int, after: int, layers: int = 2) -> nn.Sequential:
    """Linear layers (..., before) -> (..., after) with batch normalisation and ReLU
    between them.
    """
    parts = [nn.Linear(before, after)]
    for _ in range(layers - 1):
        parts += [nn.BatchNorm1d(after), nn.ReLU(), nn.Linear(after, after)]
    return nn.Sequential(*parts)


def projector_names(official: str, ours: str, method: Method) -> dict[str, str]:
    """The official names of a projector's parameters and statistics."""
    names = [name for name in method.state_dict() if name.startswith(f"{ours}.")]
    return {
        f"{official}.conv1.{name.removeprefix(f'{ours}.')}": name
        for name in names
        if not name.endswith("num_batches_tracked")
    }


def flat(state: dict[str, Tensor], method: Method) -> dict[str, Tensor]:
    """A state dict of a method's own repository whose convolutions over one pixel are
    linear layers, without the number of batches that were seen. Where statistics are
    missing, they are the method's.
    """
    own, names = method.state_dict(), method.official_names()
    statistics = {key: own[names[key]] for key in names if "running" in key}
    return statistics | {
        key: x.flatten(1) if x.dim() == 4 else x
        for key, x in state.items()
        if not key.endswith("num_batches_tracked")
    }
