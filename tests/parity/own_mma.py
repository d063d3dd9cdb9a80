"""What MMA's fixtures hold beside the common arrays."""

from own import close

from promptkit.registry import build


def also_mma(method, fixture, arrays, batch):
    if "n_parameters" in fixture:
        assert method.n_parameters == fixture["n_parameters"]
    plain = build("clip", method.clip, method.classnames, template=method.template)
    close(plain.logits(batch), arrays, "logits_frozen_clip")


ALSO = {"mma": also_mma}
