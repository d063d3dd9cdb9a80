"""promptkit: prompt learning for vision-language models, one readable module per paper."""

from importlib import import_module

# Imported when first asked for: torch takes seconds to load, and the command line must not wait for it.
_HOME = {"FrozenCLIP": "clip", "load_clip": "clip", "zero_shot_features": "clip", "InputError": "errors"}

__all__ = ["FrozenCLIP", "InputError", "load_clip", "zero_shot_features"]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"promptkit.{_HOME[name]}"), name)
