"""Things to play with in a chapter; where no kernel runs, they show the state they were
saved in.
"""

import base64
import html
import io

import ipywidgets as widgets
from PIL import Image

from promptkit.errors import InputError


class Playground(widgets.VBox):
    """Pick an image, write a template and class names, see the probabilities that a
    model gives.

    Beside the live widget its notebook output holds the same as static HTML, so that a
    page without a kernel or without widget scripts shows the first state.

    Args:
        classify: function (index of the image, class names, template) -> probabilities,
            one a name.
        images: (n, 3, H, W) uint8 tensor or array to choose from.
        titles: n texts for the list of images.
        classnames: the names to begin with.
        template: the template to begin with; "{}" stands for the name.
    """

    def __init__(
        self, classify, images, titles, classnames, template="a photo of a {}."
    ):
        self.classify, self.pixels = classify, images
        self.choice = widgets.Dropdown(
            options=[(title, i) for i, title in enumerate(titles)], description="image"
        )
        self.template = widgets.Text(
            template, description="template", continuous_update=False
        )
        self.names = widgets.Text(
            ", ".join(classnames), description="classes", continuous_update=False
        )
        self.view = widgets.HTML()
        wide = widgets.Layout(width="95%")
        self.template.layout = self.names.layout = wide
        for control in (self.choice, self.template, self.names):
            control.observe(self.refresh, names="value")
        super().__init__([self.choice, self.template, self.names, self.view])
        self.refresh()

    def refresh(self, _change=None):
        """Classify again and draw; a bad template or name is answered by its error's
        sentence.
        """
        names = [name.strip() for name in self.names.value.split(",") if name.strip()]
        try:
            if "{}" not in self.template.value:
                raise InputError("the template needs {} where the class name goes")
            probabilities = [
                float(p)
                for p in self.classify(self.choice.value, names, self.template.value)
            ]
        except InputError as error:
            self.view.value = f"<p>{html.escape(str(error))}</p>"
            return
        ranked = sorted(zip(probabilities, names, strict=True), reverse=True)
        self.view.value = _picture(self.pixels[self.choice.value]) + "".join(
            _bar(p, name) for p, name in ranked
        )

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data:
            said = f"template: <code>{html.escape(self.template.value)}</code>"
            data["text/html"] = f"<div>{said}<br>{self.view.value}</div>"
        return bundle


def zero_shot_playground(
    clip, images, titles, classnames, template="a photo of a {}."
) -> Playground:
    """A playground for zero-shot CLIP.

    Args:
        clip: FrozenCLIP.
        images: (n, 3, H, W) uint8 tensor, or a list of n tensors (3, H, W) of any
            sizes.
        titles, classnames, template: see :class:`Playground`.
    """
    import torch

    from promptkit.clip import zero_shot_features
    from promptkit.data import transform

    with torch.no_grad():
        features = clip.encode_image(transform(clip, images))  # (n, E)
        features = features / features.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def classify(index, names, template):
        text = zero_shot_features(clip, names, template)  # (C, E)
        return (clip.logit_scale * features[index] @ text.T).softmax(dim=-1).tolist()

    return Playground(classify, images, titles, classnames, template)


def _picture(image):
    """(3, H, W) uint8 as an <img>, enlarged without smoothing."""
    array = image.numpy() if hasattr(image, "numpy") else image
    buffer = io.BytesIO()
    Image.fromarray(array.transpose(1, 2, 0)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    look = (
        "image-rendering: pixelated; width: 144px; border: 1px solid #555; margin:"
        " .3em 0"
    )
    return (
        f'<img alt="the chosen image" src="data:image/png;base64,{data}"'
        f' style="{look}">'
    )


def _bar(probability, name):
    fill = (
        f"display: inline-block; width: {200 * probability:.0f}px; height: .8em;"
        " background: #555"
    )
    return (
        f'<div><span style="{fill}"></span> {probability:6.1%}'
        f" {html.escape(name)}</div>"
    )
