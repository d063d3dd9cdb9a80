"""What CoPrompt draws in training, and what its fixtures hold beside the common
arrays.
"""

import torch
from own import close, described_images

from promptkit.method import Method


def before_coprompt(method, fixture, batch, part):
    """The second view, and the sentence of each step."""
    described = {**fixture, "images": fixture["images"]["second_view"]}
    described |= {"batch": fixture["images"]["batch"]}
    size = fixture["images"].get("resolution")
    described |= {"resolution": size} if size else {}
    batch.views = torch.stack([batch.images, described_images(described)], dim=1)
    drawn = fixture["sentence_index"][part]
    drawn = iter(drawn if isinstance(drawn, list) else [drawn])
    method.sentence = lambda batch: next(drawn)


def also_coprompt(method, fixture, arrays, batch):
    before_coprompt(method, fixture, batch, "loss")
    image, text = method.features(batch)
    terms = method.criterion(batch, image, text), method.regularizer(batch, image, text)
    terms = [torch.as_tensor(term) for term in terms]  # 0.0 without consistency
    close(torch.stack(terms), arrays, "terms", atol=1e-5)
    if "sentence_bank" in arrays:
        columns = arrays["sentence_bank"].shape[-1]
        close(method.bank[..., :columns], arrays, "sentence_bank", atol=1e-5)
    plain = Method.text_features(method)  # without the adapter
    close(plain, arrays, "text_features_before_adapter")


BEFORE = {"coprompt": before_coprompt}
ALSO = {"coprompt": also_coprompt}
