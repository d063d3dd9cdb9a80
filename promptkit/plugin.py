"""Plug-ins: methods that extend another method, their host, and so nest:
``dept(atprompt(maple))``.
"""

from dataclasses import replace
from typing import ClassVar

from promptkit.errors import InputError
from promptkit.method import Method


class Plugin(Method):
    """A method that extends another one: it passes on to its host what it does not
    change itself.

    Hooks compose: text features come from this plug-in's :meth:`text_prompt` and
    :meth:`text_edit`, which are the host's until they are overridden, and so on. So a
    plug-in extends a hook by overriding it and calling ``super()``. What it overrides
    without calling its host's it names in ``replaces``: a host that has a hook of its
    own there is refused, since that would be lost silently.

    Args:
        host: the method to extend. ``self.host`` holds it, its learnables included.

    Raises:
        InputError: the host has a hook that the plug-in would leave out, or makes image
            features of its own kind (KAPT, AWT).
    """

    plugin = True
    supervision = "none"  # beyond its host's
    hosts: ClassVar[tuple[str, ...]] = ("coop",)  # those of its paper
    replaces: ClassVar[tuple[str, ...]] = ()

    def __init__(self, clip, classnames, *, host: Method):
        super().__init__(clip, classnames)
        if host.clip is not clip:
            raise InputError(f"{self.name} and its host stand on two different CLIPs")
        _check_host(type(self), host)
        self.host = host
        self.reads = host.reads
        self.reads_at_test = type(self).reads_at_test or host.reads_at_test
        self.conditional = host.conditional
        self.official_dropped = host.official_dropped

    @property
    def spec(self):
        return self.name if self.alone else f"{self.name}({self.host.spec})"

    @property
    def context(self):
        """The host's: a plug-in that changes it puts another one there."""
        return self.host.context

    def nest(self):
        return [self, *self.host.nest()]

    def owns(self, hook: str) -> bool:
        """Whether it has a hook of its own, which a plug-in around it must call."""
        return _overrides(type(self), hook)

    @property
    def taught(self):
        own = set(self.supervision.split("+")) - {"none"}
        return own | (set() if self.alone else self.host.taught)

    def begin(self, classnames):
        self.host.begin(classnames)
        super().begin(classnames)

    def vectors(self, image_features=None, **options):
        return self.host.vectors(image_features, **options)

    def text_prompt(self, image_features=None):
        return self.host.text_prompt(image_features)

    def text_edit(self):
        return self.host.text_edit()

    def text_features(self, image_features=None):
        if _owner(self.host, "text_features"):
            return self.host.text_features(image_features)
        return super().text_features(image_features)

    def image_prompt(self):
        return self.host.image_prompt()

    def image_edit(self):
        return self.host.image_edit()

    def image_features(self, images, local=False):
        if _owner(self.host, "image_features"):
            return self.host.image_features(images, *([True] if local else []))
        return super().image_features(images, local)

    def adapt(self, features):
        return self.host.adapt(features)

    def encode(self, batch):
        if _owner(self.host, "encode"):
            return self.host.encode(batch)
        return super().encode(batch)

    def score(self, image, text):
        return self.host.score(image, text)

    def criterion(self, batch, image, text, score=None):
        return self.host.criterion(batch, image, text, score or self.score)

    def regularizer(self, batch, image, text):
        return self.host.regularizer(batch, image, text)

    def prepare(self, dataset, recipe, generator, stage):
        return self.host.prepare(dataset, recipe, generator, stage)

    def param_groups(self, recipe):
        own = [
            p
            for name, p in self.named_parameters()
            if p.requires_grad and not name.startswith("host.")
        ]
        return [*self.host.param_groups(recipe), *([{"params": own}] if own else [])]

    def views(self, images, generator):
        return self.host.views(images, generator)

    def backward(self, batch, outer=None):
        return self.host.backward(batch, outer or self)

    def end_epoch(self, epoch, recipe, outer=None):
        self.host.end_epoch(epoch, recipe, outer or self)

    def finish(self, dataset, recipe, generator):
        self.host.finish(dataset, recipe, generator)

    def official_names(self):
        names = self.host.official_names()
        return {official: f"host.{ours}" for official, ours in names.items()}

    def official_state(self, state):
        return self.host.official_state(state)

    @classmethod
    def official_hparams(cls, hyperparameters):
        known = cls.official_hyperparameters
        own = {k: v for k, v in hyperparameters.items() if k in known}
        return super().official_hparams(own)

    @classmethod
    def recipe(cls, setting):
        """The host's own recipe, unless the plug-in's paper says otherwise."""
        theirs = setting.host.recipe
        return replace(theirs, hparams={"host": theirs.hparams})


# Hooks that a host may have whole, where its own is passed on; then these go unread.
_COMPOSED = {
    "text_features": ("text_prompt", "text_edit"),
    "image_features": ("image_prompt", "image_edit"),
    "encode": ("adapt", "image_features", "image_prompt", "image_edit"),
}
# Hooks that a plug-in makes anew of others and never passes on.
_ANEW = ("features", "forward", "loss")


def _overrides(cls: type[Method], hook: str) -> bool:
    return getattr(cls, hook) not in (getattr(Method, hook), getattr(Plugin, hook))


def _owner(method: Method, hook: str) -> Method | None:
    """The outermost part of a nesting that has a hook of its own, if one does."""
    *plugins, inner = method.nest()
    owners = [part for part in plugins if part.owns(hook)]
    owners += [inner] if _overrides(type(inner), hook) else []
    return owners[0] if owners else None


def _check_host(plugin: type[Plugin], host: Method) -> None:
    lost = [hook for hook in plugin.replaces if _owner(host, hook)]
    for hook, parts in (_COMPOSED | dict.fromkeys(_ANEW)).items():
        if _owner(host, hook) and not _overrides(plugin, hook):
            unread = parts is None or any(_overrides(plugin, part) for part in parts)
            lost += [hook] if unread else []
    # Features that a score of their own reads are none that another can (KAPT's).
    if _owner(host, "encode") and _owner(host, "score"):
        lost += ["encode"] if _overrides(plugin, "score") else []
    if lost:
        raise InputError(
            f"{plugin.name} cannot extend {host.spec}, which has {lost[0]}() of its own"
            f" that {plugin.name} would leave out; its hosts are"
            f" {', '.join(plugin.hosts)}"
        )
