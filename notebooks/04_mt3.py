# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One image: before, views, after
#
# MT3 ([AISTATS 2022](https://arxiv.org/abs/2103.16201)) prepares a network for a single step of
# self-supervision on views of a single image. The image is predicted after the step, and the step
# is forgotten. No stream and no batch is needed.
#
# Here one corrupted digit goes through it in slow motion, and then sixty of them at once.
#
# **What to expect.** The paper trains for 200 epochs. This notebook trains a very small network
# for seconds, so that all of it can be run; after that the step may well gain nothing. What longer
# schedules gain is measured in `docs/mt3.md`. The mechanics are the same.

# %%
import logging

import altair as alt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from lightning.pytorch import seed_everything
from PIL import Image
from torchvision.utils import make_grid

from tta_lightning import Trainer, meta
from tta_lightning.data import Digits, LabelledImages, LabelledTasks
from tta_lightning.data.corruptions import corrupt
from tta_lightning.inner_loop import InnerLoop, embed, inner_adapt, ssl_loss
from tta_lightning.methods import MT3
from tta_lightning.models import BYOLHeads, Embedder, SmallConvNet
from tta_lightning.views import ViewOptions, generator, ssl_views

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Charts become SVG when they are made: they need neither a network nor JavaScript to be seen.
alt.renderers.enable("svg")
quiet = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "limit_val_batches": 0,
    "logger": False,
    "run_dir": False,
}

# %% [markdown]
# ## Train to adapt
#
# Two stages, as in `configs/fit/jt_digits.yaml` and `mt3_digits.yaml`, but much shorter and on a
# smaller network. First joint training: labels and self-supervision together. Then meta-training:
# the network is changed such that one self-supervised step on one image makes its classification
# better. No view is flipped, because a 6 upside down is a 9.

# %%
seed_everything(0, verbose=False)
train, test = Digits("train"), Digits("test")
network = BYOLHeads(SmallConvNet(norm="group", width=8), hidden=64, projection=32)
Trainer(max_epochs=2, **quiet).fit(
    meta.JointTraining(network, lr=0.005, optimizer="adamw", schedule="cosine", flips=False),
    datamodule=LabelledImages(train, batch_size=50),
)

# %%
STEP = 0.1  # learning rate of the one step
Trainer(max_epochs=1, max_steps=30, **quiet).fit(
    meta.MT3(
        network,
        lr=0.002,
        optimizer="adam",
        schedule="cosine",
        inner_lr=STEP,
        inner_warmup=0.25,
        ssl_weight=0.0,
        task_mode="repeat",
        flips=False,
    ),
    datamodule=LabelledTasks(train, tasks=6, images_per_task=1),
)
_ = network.eval()
# %% [markdown]
# ## One image
#
# A digit from the test images, in snow. It was chosen by its number, before anything was known of
# its prediction.

# %%
NUMBER, COPIES = 321, 16


def show(images, columns=8, zoom=3):
    """Lay images [N, 3, H, W] in [0, 1] out in a grid."""
    grid = make_grid(images.detach(), nrow=columns, padding=2, pad_value=1.0)
    pixels = (grid.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), 0)


def snowy(number):
    """Return a test digit in snow, [3, 32, 32] in [0, 1]."""
    pixels = corrupt(test.load(number), "snow", 3, index=number)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


image, label = snowy(NUMBER), int(test.labels[NUMBER])
clean = torch.from_numpy(test.load(NUMBER)).permute(2, 0, 1).float() / 255
show(torch.stack([clean, image]), zoom=4)

# %% [markdown]
# ## Before the step
#
# What the network says of the image as it is. The outlined bar is the right class.

# %%
before = network(image[None]).softmax(dim=1)[0].detach()


def probabilities(**columns):
    """Draw the probabilities [10] of each class, one panel a name."""
    rows = [
        {"class": str(k), "probability": float(p[k]), "when": name, "right": k == label}
        for name, p in columns.items()
        for k in range(10)
    ]
    bars = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(color="#0072B2", strokeWidth=2)
        .encode(
            x=alt.X("class:N", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("probability:Q", scale=alt.Scale(domain=[0, 1])),
            stroke=alt.condition("datum.right", alt.value("black"), alt.value(None)),
        )
    )
    panels = bars.properties(width=230, height=160)
    return panels.facet(column=alt.Column("when:N", sort=list(columns), title=None))


probabilities(before=before)

# %% [markdown]
# ## The views
#
# Two times sixteen views of this one image: a random square of it, resized, with other brightness
# and contrast. The upper two rows are the first views of each pair, the lower two the second ones.

# %%
draws = generator(0, 0)  # seed, and how many images came before
copies = image.expand(2 * COPIES, -1, -1, -1)
views = ssl_views(copies, draws, ViewOptions(flips=False)).view(2, COPIES, *image.shape)
show(views.flatten(0, 1))

# %% [markdown]
# ## The step
#
# The self-supervised loss asks that from one view of a pair the projection of the other one can be
# told. It lies between 0 and 8. One step of gradient descent on it gives new parameters; those of
# the network itself stay as they are. The first two rows of the table say whether the step did
# what it was for, the last two whether that holds for views that it has not seen.

# %%
embedder = Embedder(network)
moving = set(embedder.adapted())
theta = {
    name: parameter.detach().requires_grad_(name in moving)
    for name, parameter in embedder.named_parameters()
}
loop = InnerLoop(steps=1, lr=STEP, clip=None, first_order=True)
phi, loss = inner_adapt(embedder, theta, views, loop)

fresh = ssl_views(copies, generator(0, 1), ViewOptions(flips=False)).view_as(views)
with torch.no_grad():
    losses = {
        "before, on these views": float(loss),
        "after, on these views": float(ssl_loss(embedder, phi, views)),
        "before, on other views": float(ssl_loss(embedder, theta, fresh)),
        "after, on other views": float(ssl_loss(embedder, phi, fresh)),
    }
pd.Series(losses, name="self-supervised loss").round(4).to_frame()

# %% [markdown]
# ## After the step
#
# The prediction of the image itself, by the parameters of the step.

# %%
after = embed(embedder, phi, image[None]).logits.softmax(dim=1)[0].detach()
probabilities(before=before, after=after)

# %%
change = float(after[label] - before[label])
Markdown(
    f"The image shows a **{label}**. Before the step the network says {int(before.argmax())}, "
    f"after it {int(after.argmax())}; the probability of the right class changes by "
    f"{100 * change:+.2f} points."
)

# %% [markdown]
# The method does the same in one call, and forgets:

# %%
method = MT3(network, copies=COPIES, lr=STEP, flips=False, episodes="loop")
by_method = method.adapt_step(image[None]).softmax(dim=1)[0]
torch.testing.assert_close(by_method, after)
torch.testing.assert_close(network(image[None]).softmax(dim=1)[0].detach(), before)

# %% [markdown]
# ## Sixty images
#
# Each by itself. Below the dashed line the step made the right class more likely.

# %%
numbers = range(0, 900, 15)
images, labels = torch.stack([snowy(n) for n in numbers]), torch.tensor(test.labels[numbers])
method.reset()
logits = {"before": network(images).detach(), "after": method.adapt_step(images)}
nll = {
    when: torch.nn.functional.cross_entropy(found, labels, reduction="none")
    for when, found in logits.items()
}
frame = pd.DataFrame(nll).astype("float64").round(4)
right = {when: found.argmax(dim=1) == labels for when, found in logits.items()}
frame["prediction"] = np.select(
    [right["before"] & right["after"], right["before"], right["after"]],
    ["right", "broken by the step", "mended by the step"],
    "wrong",
)
kinds = ["right", "wrong", "mended by the step", "broken by the step"]
limit = float(frame[["before", "after"]].to_numpy().max())
points = (
    alt.Chart(frame)
    .mark_point(filled=True, size=50)
    .encode(
        x=alt.X("before:Q", title="-log p of the right class before (nats)"),
        y=alt.Y("after:Q", title="and after the step"),
        color=alt.Color(
            "prediction:N",
            scale=alt.Scale(domain=kinds, range=["#56B4E9", "#7F7F7F", "#009E73", "#D55E00"]),
        ),
        shape=alt.Shape("prediction:N", scale=alt.Scale(domain=kinds)),
    )
)
diagonal = alt.Chart(pd.DataFrame({"before": [0, limit], "after": [0, limit]}))
diagonal = diagonal.mark_line(strokeDash=[4, 3], color="grey").encode(x="before:Q", y="after:Q")
(diagonal + points).properties(width=360, height=360)

# %%
counts = frame["prediction"].value_counts().reindex(kinds, fill_value=0)
gain = float((nll["before"] - nll["after"]).mean())
spread = float((nll["before"] - nll["after"]).std()) / len(frame) ** 0.5
Markdown(
    f"Of {len(frame)} images {int(right['before'].sum())} are right before the step and "
    f"{int(right['after'].sum())} after it: {counts['mended by the step']} mended, "
    f"{counts['broken by the step']} broken. The mean of -log p falls by {gain:.3f} ± {spread:.3f} "
    "nats (standard error); a negative number is a loss. On so few images, after so short a "
    "training, this shows how it works and not what it is worth."
)
