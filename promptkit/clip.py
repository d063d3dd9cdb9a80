"""A frozen CLIP: any open_clip model with a ViT image tower and a causal text
transformer.

Learning Transferable Visual Models From Natural Language Supervision (arXiv
2103.00020).
"""

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from promptkit.errors import InputError, unknown
from promptkit.towers import Edit, ImageTower, Prompt, TextTower

__all__ = ["FrozenCLIP", "check_classnames", "load_clip", "zero_shot_features"]

MINI = ("mini", "mini-teacher")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ADVICE = (
    "use a CLIP with a ViT and a causal text transformer, such as ViT-B-16 or ViT-L-14"
)


class FrozenCLIP(nn.Module):
    """CLIP's two towers with all weights frozen, always in evaluation mode.

    Matrix products run in the dtype of `precision`; layer norms, the residual stream
    and all features are float32.

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
        precision (str): "fp32", "bf16" or "fp16".
        budget (int | None): bytes of activations that either tower may keep for the
            backward pass before it recomputes in chunks; by default 2 GiB, on a GPU
            half its memory.

    Attributes:
        width (int): D, of the text tower.
        vision_width (int): Dv, of the image tower.
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
        precision: str = "fp32",
        budget: int | None = None,
    ):
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        _check_architecture(model, name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer or _bpe()
        self.name, self.pretrained, self.precision = name, pretrained, precision
        vocabulary = model.token_embedding.num_embeddings
        if self.tokenizer.eot_token_id >= vocabulary:
            raise InputError(
                f"the tokenizer has more entries than the {vocabulary} of model"
                f" {name!r}; pass its own"
            )
        self.width = model.ln_final.normalized_shape[0]
        self.vision_width = model.visual.conv1.out_channels
        self.embed_dim = model.visual.proj.shape[1]
        self.context_length = model.positional_embedding.shape[0]
        self.image_size = image_size or model.visual.image_size[0]
        preprocess = getattr(model.visual, "preprocess_cfg", {})
        self.mean = tuple(
            mean or preprocess.get("mean") or open_clip.OPENAI_DATASET_MEAN
        )
        self.std = tuple(std or preprocess.get("std") or open_clip.OPENAI_DATASET_STD)
        _cast(model, PRECISIONS[precision])
        if budget is None:
            cuda = self.device.type == "cuda"
            budget = (
                torch.cuda.get_device_properties(self.device).total_memory // 2
                if cuda
                else 2 << 30
            )
        # Not modules: their parameters are the model's.
        self.text_tower = TextTower(model, budget)
        self.image_tower = ImageTower(model, budget)

    def train(self, mode: bool = True):
        """A frozen CLIP stays in evaluation mode, whatever a method that holds it is
        in.
        """
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.model.positional_embedding.device

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
        names = ("name", "pretrained", "precision", "fingerprint")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that features depend on: weights, activation,
        heads, preprocessing.
        """
        text, image = (
            self.model.transformer.resblocks[0],
            self.model.visual.transformer.resblocks[0],
        )
        shape = [(type(b.mlp.gelu).__name__, b.attn.num_heads) for b in (text, image)]
        digest = hashlib.sha256(
            repr((shape, self.image_size, self.mean, self.std)).encode()
        )
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
        size = self.model.visual.image_size
        if (
            images.dim() != 4
            or images.shape[1] != 3
            or tuple(images.shape[2:]) != tuple(size)
        ):
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

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Features of normalised images (B, 3, H, W): (B, E), not normalised, without
        gradient, in chunks.
        """
        return self.image(images)


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
) -> FrozenCLIP:
    """A frozen CLIP by name.

    Args:
        name (str): "mini" or "mini-teacher", which come with the package, or a model of
            open_clip.
        pretrained (str | None): for a model of open_clip, one of its tags or the path
            of a checkpoint. Tags know whether their weights want QuickGELU, as OpenAI's
            do; for a checkpoint the name must say so ("ViT-B-16-quickgelu").
        device (str | torch.device | None): by default a GPU if there is one.
        precision (str): "fp32", "bf16" or "fp16", of the matrix products.

    Returns:
        FrozenCLIP: on the device.

    Raises:
        InputError: for an unknown model, tag or precision, a missing or damaged file,
            weights that cannot be fetched, or an architecture that cannot serve.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name in MINI:
        if pretrained is not None:
            raise InputError(
                f"model {name!r} comes with its weights; leave out"
                f" pretrained={str(pretrained)!r}"
            )
        from promptkit.mini_clip import build

        return FrozenCLIP(build(name).to(device), name=name, precision=precision)
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
    model = _create(name, os.fspath(pretrained), tags)
    tokenizer = open_clip.get_tokenizer(name)
    return FrozenCLIP(
        model.to(device),
        tokenizer,
        name=name,
        pretrained=os.fspath(pretrained),
        precision=precision,
    )


def _create(name: str, pretrained: str, tags: list[str]) -> open_clip.CLIP:
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    path = Path(pretrained).expanduser()
    if tag:
        config = open_clip.get_model_config(name)
        quick = tag.get("quick_gelu", False) or config.get("quick_gelu", False)
        try:
            return open_clip.create_model(name, pretrained, force_quick_gelu=quick)
        except (
            Exception
        ) as error:  # whatever the network, the hub or the file may raise
            raise InputError(
                f"the weights {pretrained!r} of model {name!r} could not be loaded:"
                f" {error}"
            ) from error
    looks_like_file = path.suffix or len(path.parts) > 1 or path.exists()
    if not looks_like_file:
        raise unknown(f"weights of model {name!r}:", pretrained, tags)
    if not path.is_file():
        raise InputError(f"the weights file {pretrained!r} does not exist")
    try:
        if not _is_torchscript(path):
            return open_clip.create_model(name, str(path))
        model = open_clip.create_model(name)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch would rather not have TorchScript at all
            state = torch.jit.load(path, map_location="cpu").state_dict()
        for key in ("input_resolution", "context_length", "vocab_size"):
            state.pop(key, None)
        model.load_state_dict(state)
        return model
    except Exception as error:  # each file format has errors of its own
        reason = (
            str(error).strip().splitlines()[0]
            if str(error).strip()
            else type(error).__name__
        )
        raise InputError(
            f"the file {pretrained!r} holds no weights of model {name!r}: {reason}"
        ) from error


def _is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of code and weights, as OpenAI published its
    models.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in entry for entry in archive.namelist())


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
    if not isinstance(visual, VisionTransformer):
        refuse(f"its image tower is a {type(visual).__name__}, not a ViT")
    if visual.attn_pool is not None or visual.pool_type != "tok":
        refuse("its image tower does not read the class token")
    if visual.proj is None or model.text_projection is None:
        refuse("a tower lacks its projection")
    if model.attn_mask is None:
        refuse("its text tower is not causal")
    if model.text_pool_type != "argmax":
        refuse(f"its text tower reads {model.text_pool_type!r} rather than EOT")
    for block in [*model.transformer.resblocks, *visual.transformer.resblocks]:
        if (
            type(block) is not ResidualAttentionBlock
            or block.attn.in_proj_weight is None
        ):
            refuse(f"its blocks are {type(block).__name__}")
        if not isinstance(block.mlp.gelu, QuickGELU | nn.GELU):
            refuse(f"its activation is {type(block.mlp.gelu).__name__}")


def _cast(model: open_clip.CLIP, dtype: torch.dtype) -> None:
    """Cast what matrix products read. Layer norms, embeddings and positions stay
    float32.
    """
    model.float()
    for block in [*model.transformer.resblocks, *model.visual.transformer.resblocks]:
        block.attn.to(dtype)
        block.mlp.to(dtype)
    model.visual.conv1.to(dtype)
    model.visual.proj.data = model.visual.proj.data.to(dtype)
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
