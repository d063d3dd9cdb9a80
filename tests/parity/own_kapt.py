"""What the fixtures of KAPT hold beside the common arrays."""

import torch
import torch.nn.functional as F
from own import close


def also_kapt(method, fixture, arrays, batch):
    """Texts, tokens, attention and cues, and the form with a feature for each class."""
    with torch.no_grad():
        Z, text = method.eval().features(batch)
        g = F.normalize(text, dim=-1)
        attention = method.head.attention(Z, g)
        cues = method.head.gather(attention, Z)
        close(method.described, arrays, "description_features", atol=1e-5)
        close(method.vectors()[0], arrays, "continuous_prompt_class0", atol=1e-5)
        mean = attention.mean(dim=2)
        close(mean, arrays, "attention_mean_over_heads", atol=1e-5)
        close(cues[:, 0], arrays, "cue_class0", atol=1e-5)
        lengths = [len(ids) for ids in method.context.template.items[0]]  # as cut
        close(torch.tensor(lengths), arrays, "summary_lengths", rtol=0, atol=0)
        method.pooling = "per_class"
        close(method.score(Z, text), arrays, "logits_per_class")
        loss = method.criterion(batch, Z, text)
        close(loss, arrays, "loss_per_class", atol=1e-6)


ALSO = {"kapt": also_kapt}
