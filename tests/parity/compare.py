"""What a fixture stores beside what a method computes."""

import copy

import torch
from torch.nn.functional import normalize

from promptkit.methods.promptkd import PromptKD
from promptkit.prompts import Template

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # logits are scaled by 100


class Arrays(dict):
    """A fixture's arrays by name; ``unread`` are those that nothing was compared
    with.
    """

    def __init__(self, arrays):
        super().__init__(arrays)
        self.unread = set(arrays)

    def __getitem__(self, name):
        self.unread.discard(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        return self[name] if name in self else default

    def items(self):
        return [(name, self[name]) for name in self]


def close(ours, arrays, name, **tolerance):
    """Compare with a stored array, if the fixture has it; whether it has."""
    if name not in arrays:
        return False
    expected = arrays[name]
    torch.testing.assert_close(
        ours.to(expected.dtype),
        expected,
        **(CLOSE | tolerance),
        msg=lambda why: f"{name}: {why}",
    )
    return True


def close_gradient(grad, arrays, name, kind="", rtol=1e-3):
    """Compare the norm and the first values of a gradient, as far as they are stored;
    how many of the two are.
    """
    norm = arrays.get(f"gradnorm{kind}/{name}", torch.zeros(()))
    length = grad.double().norm()
    done = close(length, arrays, f"gradnorm{kind}/{name}", rtol=rtol, atol=1e-6)
    stored = arrays.get(f"grad{kind}/{name}")
    if stored is None:
        return done
    # single values are small differences of large ones: they are held to the scale of
    # the whole
    scale = max(stored.abs().max().item(), norm.item() / grad.numel() ** 0.5)
    first = grad.flatten()[: len(stored)]
    return done + close(first, arrays, f"grad{kind}/{name}", atol=1e-3 * scale)


def close_features(arrays, name, *ours):
    """Compare features, which fixtures store normalised or not, before a trained head
    or behind it, and sometimes their first columns alone.
    """
    if name not in arrays:
        return False
    stored = arrays[name]
    normalised = [normalize(each, dim=-1) for each in ours]
    width = stored.shape[-1]
    versions = [
        features[..., :width]
        for features in (*ours, *normalised)
        if features.shape[-1] >= width
    ]
    if not any(torch.allclose(features, stored, **CLOSE) for features in versions):
        close(min(versions, key=lambda f: (f - stored).abs().max()), arrays, name)
    return True


# --- what is said of the classes ------------------------------------------------------


def close_ids(ids, arrays, name):
    """Compare token ids, of each class a list with None where a token is learned, with
    rows that may be cut anywhere or padded with zeros.
    """
    if name not in arrays:
        return False
    stored = arrays[name].tolist()
    assert len(stored) == len(ids), f"{name}: {len(stored)} rows for {len(ids)} classes"
    for c, (row, own) in enumerate(zip(stored, ids, strict=True)):
        own = (own + [0] * len(row))[: len(row)]
        wrong = [
            f"{at}: {theirs}, not {mine}"
            for at, (theirs, mine) in enumerate(zip(row, own, strict=True))
            if mine is not None and mine != theirs
        ]
        assert not wrong, f"{name} of class {c} at {', '.join(wrong)}"
    return True


def close_prompts(method, arrays):
    """Compare the prompts' tokens and where EOT stands, of a method with learned ones;
    how many arrays that were.
    """
    template = written(method)
    if template is None:
        return False
    ends = torch.tensor(template.lengths) - 1
    done = close(ends, arrays, "eot", rtol=0, atol=0)
    ids = [[template.clip.tokenizer.sot_token_id] for _ in template.lengths]
    for item in template.items:
        for c, row in enumerate(ids):
            row += [None] * item if isinstance(item, int) else item[c]
    return done + close_ids(ids, arrays, "tokens")


def written(method):
    """The template of the prompts as the published codes tokenise them: the class name
    at the end, wherever it goes; of PromptKD the teacher's, of no prompt None.
    """
    student = method.nest()[-1]
    method = student.teacher if isinstance(student, PromptKD) else method
    context = getattr(method, "context", None)
    if context is None:
        if not hasattr(method, "boosting"):
            return None
        method.boosting.prompt(method.classnames)
        return method.boosting._template
    if context.position == "end":
        return context.template
    context = copy.copy(context)
    context.position, names = "end", context.template.classnames
    return Template(context.clip, names, context.pattern(names))
