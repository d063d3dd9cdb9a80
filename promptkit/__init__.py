"""promptkit: prompt learning for vision-language models, one readable module per
paper.
"""

from importlib import import_module

# Imported when first asked for: torch takes seconds to load, and the command line must
# not wait for it.
_HOME = {
    "clip": ["FrozenCLIP", "load_clip", "zero_shot_features"],
    "errors": ["InputError"],
    "method": ["Batch", "Method", "register"],
    "plugin": ["Plugin"],
    "recipe": ["Recipe", "Setting"],
    "registry": ["build", "load_method"],
    "train": ["accuracy", "fit"],
}

__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name):
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"promptkit.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
