"""A frozen CLIP: any open_clip model whose image tower is a ViT or CLIP's ResNet and
whose text tower is a causal transformer.

Learning Transferable Visual Models From Natural Language Supervision (arXiv
2103.00020).
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from promptkit.errors import InputError, unknown
from promptkit.towers import Edit, ImageTower, Prompt, ResNetTower, TextTower
from promptkit.weights import clip_state, read_checkpoint, recorded

__all__ = ["FrozenCLIP", "check_classnames", "load_clip", "zero_shot_features"]

MINI = ("mini", "mini-teacher")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERPOLATIONS, RESIZE_MODES = ("bicubic", "bilinear"), ("shortest", "squash")
_ADVICE = (
    "use a CLIP with a ViT, or CLIP's ResNet, and a causal text transformer, such as"
    " ViT-B-16 or RN50"
)


class FrozenCLIP(nn.Module):
    """CLIP's two towers with all weights frozen, always in evaluation mode.

    Matrix products run in the dtype of `precision`; layer norms, the residual stream
    and all features are float32; a ResNet runs in that dtype but for its features. A
    copy is the same object, and another process that is sent one loads it again from
    its `source`.

    Args:
        model (open_clip.CLIP): used as it is, not copied: its parameters are frozen
            and, below float32, cast.
        tokenizer: with `encode`, `sot_token_id` and `eot_token_id`; by default CLIP's
            own BPE.
        name (str): what to call the model.
        pretrained (str | None): where its weights came from.
        image_size (int | None): by default the model's own.
        mean (tuple[float, ...] | None): of the images' channels, for normalisation; by
            default the model's own.
        std (tuple[float, ...] | None): likewise.
        interpolation (str | None): of resizing, "bicubic" or "bilinear"; by default the
            model's own.
        resize_mode (str | None): "shortest", the shorter side to the image size and a
            centre crop, or "squash", both sides; by default the model's own.
        precision (str): "fp32", "bf16" or "fp16".
        budget (int | None): bytes of activations that either tower may keep for the
            backward pass before it recomputes in chunks; by default 2 GiB, on a GPU
            half its memory.
        source (dict | None): the arguments of `load_clip` that load it again.

    Attributes:
        vit (bool): whether the image tower is a ViT, with tokens and blocks that a
            method may work on; otherwise it is CLIP's ResNet, and gives features alone.
        width (int): D, of the text tower.
        vision_width (int): Dv, of the image tower; in a ResNet, its channels.
        embed_dim (int): E, of the features.
        context_length (int): the most tokens of a text, SOS and EOT included.

    Raises:
        InputError: if the architecture cannot serve.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer=None,
        name: str = "custom",
        pretrained: str | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        resize_mode: str | None = None,
        precision: str = "fp32",
        budget: int | None = None,
        source: dict | None = None,
    ):
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        _check_architecture(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer or _bpe()
        self.name, self.pretrained, self.precision = name, pretrained, precision
        self.source = source
        vocabulary = model.token_embedding.num_embeddings
        if self.tokenizer.eot_token_id >= vocabulary:
            raise InputError(
                f"the tokenizer has more entries than the {vocabulary} of model"
                f" {name!r}; pass its own"
            )
        self.width = model.ln_final.normalized_shape[0]
        visual = model.visual
        self.vit = isinstance(visual, VisionTransformer)
        if self.vit:
            self.vision_width, self.embed_dim = visual.proj.shape
        else:
            self.vision_width = visual.attnpool.c_proj.in_features
            self.embed_dim = visual.output_dim
        self.context_length = model.positional_embedding.shape[0]
        self.image_size = image_size or self._size[0]
        own = getattr(model.visual, "preprocess_cfg", {})
        self.mean = tuple(mean or own.get("mean") or open_clip.OPENAI_DATASET_MEAN)
        self.std = tuple(std or own.get("std") or open_clip.OPENAI_DATASET_STD)
        self.interpolation = interpolation or own.get("interpolation") or "bicubic"
        self.resize_mode = resize_mode or own.get("resize_mode") or "shortest"
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)
        if self.resize_mode not in RESIZE_MODES:
            raise unknown("resize mode", self.resize_mode, RESIZE_MODES)
        _cast(model, PRECISIONS[precision])
        self._budget = budget
        budget = budget or _memory(self.device)
        # Not modules: their parameters are the model's.
        self.text_tower = TextTower(model, budget)
        self.image_tower = (
            ImageTower(model, budget)
            if self.vit
            else ResNetTower(model, budget, PRECISIONS[precision])
        )

    def _apply(self, fn, recurse=True):  # what .to(), .cuda(), .half() come to
        for dtype in (torch.float32, self.dtype):
            if fn(torch.empty(0, dtype=dtype)).dtype != dtype:
                raise InputError(
                    "the precision of a CLIP is chosen when it is loaded, by"
                    f" precision={', '.join(map(repr, PRECISIONS))}: leave out the"
                    " conversion"
                )
        super()._apply(fn, recurse)
        for tower in (self.text_tower, self.image_tower):
            tower.budget = self._budget or _memory(self.device)
        return self

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def __reduce_ex__(self, protocol):
        if self.source is None:
            raise InputError(
                "a FrozenCLIP that load_clip() did not make cannot be sent to another"
                " process, nor pickled: load it there, or save what was learned by"
                " Method.save()"
            )
        return _again, (self.source, self.fingerprint)

    def train(self, mode: bool = True):
        """A frozen CLIP stays in evaluation mode, whatever a method that holds it is
        in.
        """
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.model.positional_embedding.device

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of the images that the image tower reads."""
        size = self.model.visual.image_size
        return tuple(size) if isinstance(size, tuple | list) else (size, size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return self.model.visual.conv1.weight.dtype

    @property
    def logit_scale(self) -> Tensor:
        """(), the factor of the cosines, 100 for OpenAI's weights."""
        return self.model.logit_scale.detach().float().exp().reshape(())

    def describe(self) -> dict:
        """What loads it again, and what tells it from others."""
        names = ("name", "pretrained", "precision", "fingerprint", "source")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that features depend on: weights, activation,
        heads, preprocessing.
        """
        blocks = [self.model.transformer.resblocks[0]]
        blocks += [self.model.visual.transformer.resblocks[0]] if self.vit else []
        shape = [(type(b.mlp.gelu).__name__, b.attn.num_heads) for b in blocks]
        shape += [] if self.vit else [("ReLU", self.model.visual.attnpool.num_heads)]
        facts = [shape, self.image_size, self.mean, self.std]
        resizing = (self.interpolation, self.resize_mode)
        if resizing != ("bicubic", "shortest"):
            facts.append(resizing)
        digest = hashlib.sha256(repr(tuple(facts)).encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
        return digest.hexdigest()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, H, W) from 0 to 1 as the image tower reads them."""
        return (pixels - self._channels(self.mean, pixels)) / self._channels(
            self.std, pixels
        )

    def denormalize(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`."""
        return images * self._channels(self.std, images) + self._channels(
            self.mean, images
        )

    @staticmethod
    def _channels(values, like):
        return torch.tensor(values, device=like.device).view(3, 1, 1)

    def encode(self, text: str) -> list[int]:
        """BPE ids of a text, without SOS and EOT.

        Raises:
            InputError: if it is not a string, or spells out a marker such as
                <end_of_text>.
        """
        if not isinstance(text, str):
            raise InputError(f"a text must be a string, not {text!r}")
        ids = self.tokenizer.encode(text)
        if self.tokenizer.eot_token_id in ids or self.tokenizer.sot_token_id in ids:
            raise InputError(
                f"the text {_short(text)} contains a marker of the tokenizer; remove it"
            )
        return ids

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Ids of texts: SOS, the text, EOT, then zeros.

        Args:
            texts (str | Sequence[str]): N texts.

        Returns:
            Tensor: (N, n) long on the CPU, n the longest text's number of tokens.

        Raises:
            InputError: naming a text that exceeds the context length; none is
                truncated.
        """
        rows = self._rows([texts] if isinstance(texts, str) else texts)
        ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        sot, eot = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = [[sot, *self.encode(text), eot] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context_length:
                raise InputError(
                    f"the text {_short(text)} takes {len(row)} tokens, but the model"
                    f" reads at most {self.context_length}; shorten it"
                )
        return rows

    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Token embeddings, without positions: ids (...) -> (..., D) float32."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.device)
        return F.embedding(ids, self.model.token_embedding.weight).float()

    def text(self, prompt: Prompt, edit: Edit | None = None, tokens: bool = False):
        """Text features (G, C, E), not normalised; see `TextTower`. Gradients reach
        prompt and edit.
        """
        return self.text_tower(prompt, edit, tokens)

    def image(
        self,
        images: Tensor,
        prompt: Tensor | None = None,
        edit: Edit | None = None,
        tokens: bool = False,
        attention: bool = False,
    ):
        """Image features, (B, E), not normalised, of normalised images; see
        `ImageTower`.
        """
        size = self._size
        if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != size:
            raise InputError(
                f"images must be (B, 3, {size[0]}, {size[1]}) for model {self.name!r},"
                f" not {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise InputError(
                f"images must be normalised floating-point numbers, not {images.dtype}"
            )
        return self.image_tower(images.to(self.device), prompt, edit, tokens, attention)

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str]) -> Tensor:
        """Features of texts, each distinct text computed once, common beginnings
        shared.

        Args:
            texts (str | Sequence[str]): N texts.

        Returns:
            Tensor: (N, E), not normalised, without gradient.

        Raises:
            InputError: naming a text that exceeds the context length.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        distinct = list(dict.fromkeys(texts))
        rows = self._rows(distinct)
        features = torch.empty(len(distinct), self.embed_dim, device=self.device)
        for members, shared in _families(rows):
            prefix = self.embed([rows[members[0]][:shared]])  # (1, P, D)
            for i in range(
                0, len(members), 1024
            ):  # bounds the embeddings that exist at a time
                part = members[i : i + 1024]
                ids = [torch.tensor(rows[m][shared:]) for m in part]
                eot = torch.tensor([len(row) - 1 for row in ids], device=self.device)
                suffix = self.embed(
                    nn.utils.rnn.pad_sequence(ids, batch_first=True)
                )  # (c, T, D)
                features[torch.tensor(part, device=self.device)] = self.text(
                    Prompt(prefix, suffix, eot)
                )[0]
        where = {text: i for i, text in enumerate(distinct)}
        return features[
            torch.tensor(
                [where[text] for text in texts], dtype=torch.long, device=self.device
            )
        ]

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of normalised images (B, 3, H, W): (B, E), not normalised, without
        gradient, in chunks.
        """
        return self.image(images.detach())


def _families(rows: list[list[int]]) -> list[tuple[list[int], int]]:
    """Token rows in groups that begin alike: [(rows, how many tokens they share)]; EOT
    is never shared.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    families: list[tuple[list[int], int]] = []
    for i in order:
        if families:
            members, shared = families[-1]
            row, other = rows[i], rows[members[-1]]
            common = 0
            while common < min(shared, len(row) - 1) and row[common] == other[common]:
                common += 1
            # Joining costs the others what they no longer share; 64 tokens are worth a
            # pass of their own.
            if (shared - common) * len(members) <= 64:
                members.append(i)
                families[-1] = members, common
                continue
        families.append(([i], len(rows[i]) - 1))
    return families


def check_classnames(
    classnames: Iterable[str], allow_duplicates: bool = False
) -> list[str]:
    """Class names as prompts read them: underscores become spaces.

    Args:
        classnames (Iterable[str]): the names.
        allow_duplicates (bool): warn of a repetition in place of refusing it: ImageNet
            has two pairs of equal names.

    Returns:
        list[str]: the names, in order.

    Raises:
        InputError: if there are none, or one is not a string, empty, or (unless
            allowed) a repetition.
    """
    if isinstance(classnames, str):
        raise InputError(
            f"class names must be a list of strings, not the string {classnames!r}"
        )
    names = []
    for position, name in enumerate(classnames):
        if not isinstance(name, str):
            raise InputError(f"class name {position} must be a string, not {name!r}")
        names.append(name.replace("_", " "))
        if not names[-1].strip():
            raise InputError(f"class name {position} is empty")
    if not names:
        raise InputError("the list of class names is empty")
    seen: dict[str, int] = {}
    for position, name in enumerate(names):
        if seen.setdefault(name, position) != position:
            found = (
                f"class name {name!r} appears twice, at positions {seen[name]} and"
                f" {position}"
            )
            if not allow_duplicates:
                raise InputError(found)
            warnings.warn(
                f"{found}: no text tells the two classes apart", stacklevel=1
            )  # once a process, not a caller
    return names


@torch.no_grad()
def zero_shot_features(
    clip: FrozenCLIP, classnames: Sequence[str], templates: str | Sequence[str]
) -> Tensor:
    """The zero-shot classifier: per class the mean of its normalised sentences'
    features, normalised again.

    Args:
        clip (FrozenCLIP): the model.
        classnames (Sequence[str]): C names; underscores are read as spaces.
        templates (str | Sequence[str]): one sentence or several, "{}" standing for the
            name.

    Returns:
        Tensor: (C, E), each row of length 1.

    Raises:
        InputError: for unusable names, or a template without "{}".
    """
    names = check_classnames(classnames, allow_duplicates=True)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise InputError("the list of templates is empty")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise InputError(
                f"the template {template!r} has no '{{}}' where the class name would"
                " stand"
            )
    texts = [template.replace("{}", name) for template in templates for name in names]
    features = F.normalize(clip.encode_text(texts), dim=-1).view(
        len(templates), len(names), -1
    )  # (K, C, E)
    return F.normalize(features.mean(0), dim=-1)


def load_clip(
    name: str = "mini",
    pretrained: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    *,
    like: str | None = None,
    quickgelu: bool | None = None,
) -> FrozenCLIP:
    """A frozen CLIP by name.

    Of a tag's weights, and of the mini CLIPs', it is known which activation, mean,
    standard deviation and resizing they want. Of a file's they are those of the tag
    that `like` names; else the activation must be known from the model's name
    ("ViT-B-16-quickgelu"), from the file (OpenAI's archives, a configuration in it or
    open_clip_config.json beside it) or from `quickgelu`, and the rest is CLIP's own. No
    code in a file is run.

    Args:
        name (str): "mini" or "mini-teacher", which come with the package, or a model of
            open_clip.
        pretrained (str | None): for a model of open_clip, one of its tags or the path
            of a file: safetensors, or a state dict or checkpoint of torch.
        device (str | torch.device | None): by default a GPU if there is one.
        precision (str): "fp32", "bf16" or "fp16", of the matrix products.
        like (str | None): for a file, the tag whose weights it was trained from, such
            as "openai".
        quickgelu (bool | None): for a file, whether its weights want QuickGELU.

    Returns:
        FrozenCLIP: on the device. Its `source` are the arguments that load it again.

    Raises:
        InputError: for an unknown model, tag or precision, a missing or damaged file,
            one whose activation is not known, weights that cannot be fetched, or an
            architecture that cannot serve.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    device = _device(device)
    if name in MINI:
        for option, value in dict(
            pretrained=pretrained, like=like, quickgelu=quickgelu
        ).items():
            if value is not None:
                raise InputError(
                    f"model {name!r} comes with its weights; leave out"
                    f" {option}={value if option == 'quickgelu' else str(value)!r}"
                )
        from promptkit.mini_clip import build

        source = _source(name, None, precision)
        return FrozenCLIP(
            build(name).to(device), name=name, precision=precision, source=source
        )
    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        raise unknown("model", name, [*MINI, *open_clip.list_models()])
    _check_config(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise InputError(
            f"model {name!r} needs weights: pass a checkpoint file or one of"
            f" {', '.join(tags) or 'no tags'}"
        )
    pretrained = os.fspath(pretrained)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        if like is not None or quickgelu not in (None, tag.get("quick_gelu", False)):
            option = f"{like=}" if like is not None else f"{quickgelu=}"
            raise InputError(
                f"the weights {pretrained!r} of model {name!r} have an activation and"
                f" a preprocessing of their own: leave out {option}"
            )
        model, preprocess = _published(name, pretrained, tag), tag
        source = _source(name, pretrained, precision)
    else:
        path = _file(name, pretrained, tags)
        model, preprocess, quickgelu = _from_file(name, path, like, quickgelu)
        source = _source(name, str(path.resolve()), precision, like, quickgelu)
    facts = ("mean", "std", "interpolation", "resize_mode")
    return FrozenCLIP(
        model.to(device),
        open_clip.get_tokenizer(name),
        name=name,
        pretrained=pretrained,
        precision=precision,
        source=source,
        **{fact: preprocess.get(fact) for fact in facts},
    )


def _device(device) -> torch.device:
    """A device that this machine has; by default a GPU if there is one."""
    try:
        device = torch.device(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
    except (RuntimeError, TypeError):
        raise InputError(
            f"the device {device!r} is none that torch knows; use 'cpu' or 'cuda'"
        ) from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(
            f"the device {str(device)!r} is asked for, and torch finds {count} GPUs on"
            " this machine; leave it out, or use 'cpu'"
        )
    return device


def _again(source: dict, fingerprint: str) -> FrozenCLIP:
    """The CLIP of another process.

    Raises:
        InputError: if its weights are others here.
    """
    clip = load_clip(**source)
    if clip.fingerprint != fingerprint:
        raise InputError(
            f"the weights of {source['name']!r} are {clip.fingerprint[:12]} here, and"
            f" {fingerprint[:12]} where they come from"
        )
    return clip


def _source(name, pretrained, precision, like=None, quickgelu=None) -> dict:
    return dict(
        name=name,
        pretrained=pretrained,
        precision=precision,
        like=like,
        quickgelu=quickgelu,
    )


def _published(name: str, pretrained: str, tag: dict) -> open_clip.CLIP:
    quick = tag.get("quick_gelu", False)
    try:
        return open_clip.create_model(name, pretrained, force_quick_gelu=quick)
    except Exception as error:  # whatever the network, the hub or the file may raise
        raise InputError(
            f"the weights {pretrained!r} of model {name!r} could not be loaded: {error}"
        ) from error


def _file(name: str, pretrained: str, tags: list[str]) -> Path:
    path = Path(pretrained).expanduser()
    if not (path.suffix or len(path.parts) > 1 or path.exists()):
        raise unknown(f"weights of model {name!r}:", pretrained, tags)
    return path


def _from_file(
    name: str, path: Path, like: str | None, quickgelu: bool | None
) -> tuple[open_clip.CLIP, dict, bool]:
    """The model with a file's weights, its preprocessing, and whether it has
    QuickGELU.
    """
    tag = {}
    if like is not None:
        tag = open_clip.get_pretrained_cfg(name, like)
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise unknown(f"tag of model {name!r} in like=", like, tags)
    config = open_clip.get_model_config(name)
    checkpoint = read_checkpoint(path)
    try:
        state = clip_state(checkpoint)
        said, preprocess = recorded(checkpoint, path)
        quick = _activation(path, config.get("quick_gelu"), tag, said, quickgelu)
        model = open_clip.CLIP(**config | {"quick_gelu": quick})
        _fill(model, state)
    except InputError as error:
        raise InputError(
            f"the file {str(path)!r} cannot serve as model {name!r}: {error}"
        ) from None
    return model, tag or preprocess, quick


def _activation(path, named, tag: dict, said, asked) -> bool:
    """Whether a file's weights want QuickGELU, by all that is known of it."""
    if asked is not None:
        if named and not asked:
            raise InputError(
                "its name says QuickGELU and quickgelu=False denies it: take one back"
            )
        return asked
    known = {"the model's name": named or None, "the file": said}
    if tag:
        known["the tag in like="] = tag.get("quick_gelu", False)
    known = {who: bool(quick) for who, quick in known.items() if quick is not None}
    if not known:
        raise InputError(
            "nothing says whether its weights want QuickGELU or plain GELU, and the"
            " wrong one costs accuracy; pass like='openai' (--like openai) for weights"
            " trained from OpenAI's, or another tag, or else quickgelu=True or False"
            " (--quickgelu, --no-quickgelu)"
        )
    if len(set(known.values())) > 1:
        each = ", ".join(
            f"{who} {'QuickGELU' if quick else 'plain GELU'}"
            for who, quick in known.items()
        )
        raise InputError(
            f"what is said of its activation differs ({each}): pass quickgelu=True or"
            " False (--quickgelu, --no-quickgelu)"
        )
    return next(iter(known.values()))


def _fill(model: open_clip.CLIP, state: dict[str, Tensor]) -> None:
    """Load a state dict into a model of its architecture, whatever its dtype."""
    ours = model.state_dict()
    state = dict(state)
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(ours["logit_scale"].shape)
    positions = "visual.positional_embedding"
    if positions in ours:  # of a ViT
        theirs, here = state.get(positions, ours[positions]), ours[positions]
        before, after = theirs.numel() // here.shape[1] - 1, len(here) - 1
        square = before > 0 and before == math.isqrt(before) ** 2
        if before != after and square and theirs.shape == (before + 1, here.shape[1]):
            resize_pos_embed(state, model)
            warnings.warn(
                f"the weights are of a model that reads {before} patches an image, and"
                f" this one reads {after}: their positions were interpolated",
                stacklevel=4,
            )
    counts = {k: v for k, v in ours.items() if k.endswith("num_batches_tracked")}
    state = counts | state  # which nothing reads once a ResNet is trained
    strange = {
        "of other shapes": [
            f"{key} is {tuple(state[key].shape)} and not {tuple(value.shape)}"
            for key, value in ours.items()
            if key in state and state[key].shape != value.shape
        ],
        "missing": [key for key in ours if key not in state],
        "unknown": [key for key in state if key not in ours],
        "not finite": [
            key for key, value in state.items() if not value.isfinite().all()
        ],
    }
    for what, keys in strange.items():
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"its weights are {what}: {keys[0]}{more}")
    model.load_state_dict(state)


def _memory(device: torch.device) -> int:
    """Bytes that a tower may keep: 2 GiB, or half of a GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    return 2 << 30


def _check_config(name: str) -> None:
    """Refuse a model that cannot serve before its weights are fetched."""
    config = open_clip.get_model_config(name)
    if (
        config.pop("custom_text", False)
        or "hf_model_name" in config["text_cfg"]
        or "multimodal_cfg" in config
    ):
        raise InputError(
            f"model {name!r} cannot serve: it has a text tower of another kind;"
            f" {_ADVICE}"
        )
    if "timm_model_name" in config["vision_cfg"]:
        raise InputError(
            f"model {name!r} cannot serve: its image tower is timm's; {_ADVICE}"
        )
    with torch.device("meta"):
        _check_architecture(open_clip.CLIP(**config), name)


def _check_architecture(model: nn.Module, name: str) -> None:
    def refuse(what: str):
        raise InputError(f"model {name!r} cannot serve: {what}; {_ADVICE}")

    if not isinstance(model, open_clip.CLIP):
        refuse(f"{type(model).__name__} has a text tower of another kind")
    visual = model.visual
    if not isinstance(visual, VisionTransformer | ModifiedResNet):
        refuse(f"its image tower is a {type(visual).__name__}")
    blocks = list(model.transformer.resblocks)
    if isinstance(visual, VisionTransformer):
        if visual.attn_pool is not None or visual.pool_type != "tok":
            refuse("its image tower does not read the class token")
        if visual.proj is None:
            refuse("a tower lacks its projection")
        blocks += visual.transformer.resblocks
    if model.text_projection is None:
        refuse("a tower lacks its projection")
    if model.attn_mask is None:
        refuse("its text tower is not causal")
    if model.text_pool_type != "argmax":
        refuse(f"its text tower reads {model.text_pool_type!r} rather than EOT")
    for block in blocks:
        if (
            type(block) is not ResidualAttentionBlock
            or block.attn.in_proj_weight is None
        ):
            refuse(f"its blocks are {type(block).__name__}")
        if not isinstance(block.mlp.gelu, QuickGELU | nn.GELU):
            refuse(f"its activation is {type(block.mlp.gelu).__name__}")


def _cast(model: open_clip.CLIP, dtype: torch.dtype) -> None:
    """Cast what matrix products read. Norms, embeddings and positions stay float32."""
    model.float()
    visual, blocks = model.visual, list(model.transformer.resblocks)
    if isinstance(visual, VisionTransformer):
        blocks += visual.transformer.resblocks
        visual.conv1.to(dtype)
        visual.proj.data = visual.proj.data.to(dtype)
    else:
        for part in visual.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.to(dtype)
    for block in blocks:
        block.attn.to(dtype)
        block.mlp.to(dtype)
    if isinstance(model.text_projection, nn.Linear):
        model.text_projection.to(dtype)
    else:
        model.text_projection.data = model.text_projection.data.to(dtype)


_tokenizer = None


def _bpe():
    """CLIP's tokenizer; reading its vocabulary takes a while, so once a process."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return _tokenizer


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
