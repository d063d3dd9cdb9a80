"""Fills the API pages: every module of the package gets a section, so that a new file
needs no edit here.

In a page, the line ``[modules: promptkit]`` stands for a section for `promptkit` and
for each public module below it, and ``[modules: promptkit -promptkit.methods]`` leaves
a subpackage out. The line ``[recipes]`` stands for what each method says of the
published runs behind its recipes.
"""

import re
from pathlib import Path

RECIPES = re.compile(r"^\[recipes\]$", re.MULTILINE)
LINE = re.compile(r"^\[modules: ([\w.]+)(?: -([\w.]+))?\]$", re.MULTILINE)

# Each layer imports only from those before it, and a reader meets them in that order.
LAYERS = (
    "errors files frozen towers adapters weights clip mini_clip prompts boosting"
    " descriptions data views randaugment recipe published"
    " hyperparameters picture heads quaternion transport waffle lettering"
    " method sets projector sampling plugin controls registry train attributes probe"
    " pretrain intervals results identity costs runs evidence protocols workers grids"
    " tuning export testing parameters plots diagram widgets pages chapter kernel"
    " reproduce audit cli"
).split()

SECTION = """## `{name}`

```{{eval-rst}}
.. automodule:: {name}
```
"""


def rank(name):
    """Sorts by layer, then by name; modules that no layer names come last."""
    layer = name.split(".")[1] if "." in name else ""
    return (
        LAYERS.index(layer) if layer in LAYERS else len(LAYERS) if layer else -1,
        name,
    )


def modules(root, package, without=None):
    """Names of the public modules of a package, from its files: importing them is left
    to autodoc.
    """
    files = (root / package.replace(".", "/")).rglob("*.py")
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in files
    ]
    names = [name for name in names if not re.search(r"\._", name)]
    if without:
        names = [name for name in names if not f"{name}.".startswith(f"{without}.")]
    return sorted(names, key=rank)


def fill(app, docname, source):
    def sections(line):
        return "\n".join(
            SECTION.format(name=name)
            for name in modules(Path(app.srcdir), *line.groups())
        )

    source[0] = LINE.sub(sections, source[0])
    if RECIPES.search(source[0]):
        from promptkit.published import table
        from promptkit.registry import methods

        source[0] = RECIPES.sub(lambda line: table(methods()), source[0])


def setup(app):
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
