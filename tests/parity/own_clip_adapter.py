"""What CLIP-Adapter's fixtures hold beside the common arrays."""

import torch
from own import close

from promptkit.registry import build


def also_clip_adapter(method, fixture, arrays, batch):
    if "adapter_output" in arrays:
        image = method.clip.encode_image(batch.images)
        n = arrays["adapter_output"].shape[1]
        with torch.no_grad():
            mapped = method.image_adapter(image)[:, :n]
        close(mapped, arrays, "adapter_output", atol=1e-5)
    template = method.option("template")
    plain = build("clip", method.clip, method.classnames, template=template)
    close(plain.logits(batch), arrays, "logits_frozen_clip")


ALSO = {"clip_adapter": also_clip_adapter}
