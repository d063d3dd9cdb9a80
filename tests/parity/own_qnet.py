"""What QNet's fixtures hold beside the common arrays."""

import torch
from own import close


def also_qnet(method, fixture, arrays, batch):
    if "visual_prompts" in arrays:
        stored = arrays["visual_prompts"]
        with torch.no_grad():
            prompts = [method.image_prompt()]
            for couple, p in zip(method.couple_deep, method.deep, strict=True):
                prompts.append(couple(p))
        ours = torch.stack(prompts)  # (J, n, Dv)
        every = ours.shape[-1] // stored.shape[-1]
        close(ours[..., ::every], arrays, "visual_prompts", atol=1e-5)
    if "n_parameters" in fixture:
        assert method.n_parameters == fixture["n_parameters"]


ALSO = {"qnet": also_qnet}
