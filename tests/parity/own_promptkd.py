"""What PromptKD's common fixtures hold beside the common arrays."""

import torch
from own import close
from torch.nn.functional import normalize

from promptkit.method import Batch
from promptkit.methods.promptkd import as_seen_by
from promptkit.recipe import Recipe


def also_promptkd(method, fixture, arrays, batch):
    """The teacher's side; the student with the statistics of a batch, and those that
    the recorded steps leave behind.
    """
    student = getattr(method, "host", method)
    teacher = student.teacher
    images = as_seen_by(teacher.clip, batch.images, method.clip)
    seen = teacher.image_features(images)
    close(normalize(seen, dim=-1), arrays, "teacher_image_features", atol=1e-5)
    close(student.target(batch), arrays, "teacher_logits")
    text = normalize(student.text_features(), dim=-1)
    for name in ("teacher_text_features", "teacher_text"):
        close(text, arrays, name, atol=1e-5)
    plain = Batch(images=batch.images)
    method.eval()
    image = normalize(method.encode(plain), dim=-1)
    close(image, arrays, "image_features", atol=1e-4)
    state = {name: x.clone() for name, x in method.state_dict().items()}
    method.train()
    with torch.no_grad():
        image = student.encode(plain)
        close(normalize(image, dim=-1), arrays, "train_image_features", atol=1e-4)
        close(student.score(image, text), arrays, "train_logits")
    method.load_state_dict(state)
    after = {"running_mean_after": "running_mean", "running_var_after": "running_var"}
    if not after.keys() & arrays.keys():
        return
    named = ("lr", "momentum", "weight_decay")
    options = {name: fixture["optimizer"][name] for name in named}
    groups = method.param_groups(Recipe(lr=options["lr"]))
    optimizer = torch.optim.SGD(groups, **options)
    for _ in arrays["trace"]:
        optimizer.zero_grad()
        method.backward(batch)
        optimizer.step()
    for name, buffer in after.items():
        close(getattr(student.project[1], buffer), arrays, name, atol=1e-5)


ALSO = {"promptkd": also_promptkd}
