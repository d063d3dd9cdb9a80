"""What ProText's fixtures hold beside the common arrays: the pairs, in their order, and
the features of both sides.
"""

import torch.nn.functional as F
from compare import close_ids
from own import close

from promptkit.methods.protext import WORDS


def also_protext(method, fixture, arrays, batch):
    n = method.context.length
    start = WORDS if n <= 4 else " ".join("X" * n)
    pairs = [
        {"input": f"{start} {method.inputs[c].lower() if n <= 4 else method.inputs[c]}",
         "target": text, "label": c}
        for c, text in method.pairs()
    ]  # fmt: skip
    assert pairs == fixture["all_pairs"]
    close(method.named(batch.labels), arrays, "prompted_features", atol=1e-5)
    close(method.targets(batch.texts), arrays, "target_features", atol=1e-5)
    features = F.normalize(method.text_features(), dim=-1)
    close(features, arrays, "class_text_features", atol=1e-5)
    if "tokens" in arrays:
        words = start if method.words else " ".join("X" * n)
        texts = [
            f"{words} {method.context.ending.replace('{}', name)}"
            for name in method.classnames
        ]
        close_ids(method.clip.tokenize(texts).tolist(), arrays, "tokens")


ALSO = {"protext": also_protext}
