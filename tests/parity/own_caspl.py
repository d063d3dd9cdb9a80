"""What CasPL's fixtures hold beside the common arrays, of both stages."""

import torch
from own import close
from torch.nn.functional import normalize


def also_caspl(method, fixture, arrays, batch):
    if method.alone:
        image, text = method.taught_image(batch), method.taught_text
        text, unit = normalize(text, dim=-1), normalize(image, dim=-1)
        close(text, arrays, "teacher_text_features", atol=1e-5)
        close(unit, arrays, "teacher_image_features", atol=1e-5)
        close(method.score(image, text), arrays, "teacher_logits")
        return
    image, text = method.features(batch)
    if "terms" in arrays:
        host = method.host
        terms = [method.criterion(batch, image, text)]
        terms += host.terms(batch, image, text) if hasattr(host, "terms") else []
        close(torch.stack(terms), arrays, "terms", atol=1e-6)
    if "zero_shot_logits" in arrays:
        frozen = method.clip.encode_image(batch.images)
        close(method.score(frozen, method.host.anchor), arrays, "zero_shot_logits")


ALSO = {"caspl": also_caspl}
