"""The control of ProText: the same prompts, told something else of the classes."""

from typing import Literal

from promptkit.method import register
from promptkit.methods.protext import ProText


@register
class Retold(ProText):
    """ProText on other sentences.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        told: what each class is paired with. "swapped": the sentences about the next
            class, its own name in them; "longest": the longest of its own alone;
            "templates": the ``templates``, which say nothing of it, with its name.
        templates: sentences with {} for the class name. None: those of the dataset it
            is aimed at.
        descriptions, loss, weight, ending, n_ctx, depth, init: as in ProText.
    """

    name = "retold"
    title = "ProText on other sentences"
    from_dataset = ProText.from_dataset | {
        "templates": lambda dataset: list(dataset.templates) if dataset else []
    }
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        told: Literal["swapped", "longest", "templates"] = "swapped",
        templates: list[str] | None = None,
        descriptions: dict | None = None,
        loss: Literal["mse", "l1"] = "mse",
        weight: float = 1000.0,
        ending: str | None = "{}.",
        n_ctx: int | None = None,
        depth: int | None = None,
        init: str | None = None,
    ):
        super().__init__(
            clip, classnames, descriptions=descriptions, loss=loss, weight=weight,
            ending=ending, n_ctx=n_ctx, depth=depth, init=init,
        )  # fmt: skip
        self.told = told

    def pairs(self):
        lists: dict[int, list[str]] = {}
        for label, text in super().pairs():
            lists.setdefault(label, []).append(text)
        if self.told == "longest":
            return [(c, max(texts, key=len)) for c, texts in lists.items()]
        names = {c: self.classnames[c].replace("_", " ") for c in lists}
        if self.told == "templates":
            every = self.option("templates")
            return [(c, text.replace("{}", names[c])) for c in lists for text in every]
        after = dict(zip(lists, [*list(lists)[1:], *list(lists)[:1]], strict=True))
        return [
            (c, text.replace(names[after[c]], names[c]))
            for c in lists
            for text in lists[after[c]]
        ]
