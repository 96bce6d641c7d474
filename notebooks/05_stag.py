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
# # STAG: anchors, alignment, readings
#
# STAG ([arXiv:2402.09004](https://arxiv.org/abs/2402.09004)) adds a term to the loss of another
# method. From the classifier alone it makes an *anchor* for each class: a derivative of the
# entropy with which the classifier classifies its own rows. The term asks that the entropy
# gradient of each image points along the anchor of its predicted class.
#
# What is here is a reconstruction from the paper's abstract, which leaves open which gradients are
# meant; no parity with the paper's tables is claimed. `docs/stag.md` has the readings, how the
# default was chosen, and what it gains over many streams. This notebook shows what the pieces are.

# %%
import logging
import os
from pathlib import Path

import altair as alt
import pandas as pd
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tta_lightning import Stream, Trainer, load_model
from tta_lightning.data import Digits, LabelledImages
from tta_lightning.functional import entropy, entropy_logit_gradient
from tta_lightning.meta import SourceTraining
from tta_lightning.methods import Tent
from tta_lightning.methods.stag import StagOptions, StagTerm, stag_alignment
from tta_lightning.rules import Adam

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Charts become SVG when they are made: they need neither a network nor JavaScript to be seen.
alt.renderers.enable("svg")
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## A network to adapt
#
# A group-normalised network, trained on clean digits. All notebooks share it: it is trained once,
# and lies in `networks/`, or where the environment variable `TTA_NOTEBOOK_NETWORKS` says.

# %%
networks = Path(os.environ.get("TTA_NOTEBOOK_NETWORKS", "networks"))
checkpoint = networks / "digits_gn" / "checkpoints" / "best.ckpt"
if not checkpoint.is_file():
    seed_everything(0, verbose=False)
    network = {
        "class_path": "tta_lightning.models.SmallConvNet",
        "init_args": {"norm": "group"},
    }
    Trainer(
        run_dir=networks / "digits_gn",
        max_epochs=4,
        callbacks=[ModelCheckpoint(filename="best")],
        log_every_n_steps=10,
        **quiet,
    ).fit(
        SourceTraining(network, lr=0.003),
        datamodule=LabelledImages(Digits("train"), batch_size=100, crop_padding=2),
    )

# %% [markdown]
# ## The anchors
#
# `space` says which gradient of an image's entropy is compared, and each space has an anchor that
# is the same derivative: by the row of the predicted class (`row`), by the features (`feature`),
# or by the whole classifier (`full`). The first two lie in the space of the features, so that they
# can be laid beside the rows of the classifier.

# %%
test = Digits("test")
adapter = Tent(str(checkpoint), Adam(lr=0.001))
adapter.ready()
head = adapter.head
terms = {space: StagTerm(head, StagOptions(space=space)) for space in ("row", "feature", "full")}


def cosines(one, other):
    """Compare every row [N, D] with every other row [M, D]."""
    return torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T


def heat_map(matrix, title, down, across, size=230):
    """Draw a matrix of cosines, orange along and blue against."""
    rows = [
        {down: i, across: j, "cosine": round(float(matrix[i, j]), 4)}
        for i in range(len(matrix))
        for j in range(matrix.shape[1])
        if bool(matrix[i, j].isfinite())
    ]
    return (
        alt.Chart(pd.DataFrame(rows), title=title)
        .mark_rect()
        .encode(
            x=alt.X(f"{across}:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y(f"{down}:O"),
            color=alt.Color("cosine:Q", scale=alt.Scale(scheme="blueorange", domain=[-1, 1])),
        )
        .properties(width=size, height=size)
    )


rows = head.weight.detach()
panels = [
    heat_map(cosines(rows, rows), "rows of the classifier", "class", "other class"),
    *(
        heat_map(
            cosines(terms[s].anchors, terms[s].anchors), f"anchors of `{s}`", "class", "other class"
        )
        for s in ("row", "feature")
    ),
]
alt.hconcat(*panels)

# %% [markdown]
# The anchors of `row` are the rows of the classifier up to their length and sign, so their cosines
# are the same ones up to the sign. Those of `feature` weigh in which *other* classes a class is
# confused with.
#
# How sure the classifier is of its own rows, as an entropy between 0 and ln 10 = 2.30 nats. A
# class that it is quite sure of has an anchor too: only the direction counts.

# %%
own = pd.DataFrame({"class": range(10), "entropy": terms["full"].entropy.float().numpy()})
alt.Chart(own).mark_bar(color="#0072B2").encode(
    x=alt.X("class:O", axis=alt.Axis(labelAngle=0)),
    y=alt.Y("entropy:Q", title="self-structural entropy (nats)"),
).properties(width=360, height=140)

# %% [markdown]
# ## Alignment of the entropy gradient
#
# Four hundred digits with noise, blur, little contrast or snow go through the source model. The
# gradient of each one's entropy by its features is compared with the anchors of `feature` of all
# classes. Each row of the heat map is the mean over the images that are predicted as one class.
# The term asks for a diagonal of ones.

# %%
looked_at = Stream(
    test,
    corruptions=["gaussian_noise", "zoom_blur", "contrast", "snow"],
    scenario="mixed_domains",
    severity=3,
    batch_size=400,
    limit=100,
)
batch = next(iter(looked_at.test_dataloader()))
with torch.no_grad():
    out = adapter.outputs(batch.images)
predicted = out.logits.argmax(dim=1)
gradients = entropy_logit_gradient(out.logits) @ rows
to_all = cosines(gradients, terms["feature"].anchors)
mean = torch.stack([to_all[predicted == c].mean(dim=0) for c in range(10)])
heat_map(mean, "mean cosine with each anchor", "predicted class", "anchor of class", 300)

# %% [markdown]
# The cosine of each image with the anchor of its own predicted class, in the three spaces. Where
# the boxes of right and wrong predictions differ, the term pulls harder at the one than at the
# other; where they do not, it cannot tell them apart.

# %%
parts = []
for space, term in terms.items():
    found = stag_alignment(out.features, out.logits, rows, term.anchors, space=space)
    columns = {"alignment": found.double().numpy(), "right": (predicted == batch.labels).numpy()}
    parts.append(pd.DataFrame(columns).assign(space=space))
aligned = pd.concat(parts, ignore_index=True).round(4)
aligned["prediction"] = aligned["right"].map({True: "right", False: "wrong"})
boxes = (
    alt.Chart(aligned)
    .mark_boxplot(size=26)
    .encode(
        x=alt.X("prediction:N", title=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("alignment:Q", title="cosine with the anchor of the predicted class"),
        color=alt.Color("prediction:N", scale=alt.Scale(range=["#0072B2", "#D55E00"]), legend=None),
    )
)
boxes.properties(width=150, height=230).facet(
    column=alt.Column("space:N", sort=list(terms), title=None)
)

# %% [markdown]
# ## What each reading does
#
# Tent alone, and with the term of each reading, on a stream that shuffles six corruptions: 30
# batches of 20 digits. In a run one would say `Trainer(callbacks=[STAG(space="row")])`, or
# `--trainer.callbacks+=STAG` on the command line; here the term is attached by hand, so that its
# parts can be recorded.

# %%
readings = {
    "Tent alone": None,
    "row": StagOptions(space="row"),
    "feature": StagOptions(space="feature"),
    "full": StagOptions(space="full"),
}
stream = Stream(
    test,
    corruptions=["gaussian_noise", "zoom_blur", "contrast", "snow", "brightness", "fog"],
    scenario="mixed_domains",
    severity=3,
    batch_size=20,
    limit=100,
)
batches = list(stream.test_dataloader())
parts = []
for name, options in readings.items():
    adapter = Tent(load_model(str(checkpoint)), Adam(lr=0.001))
    adapter.ready()
    term = StagTerm(adapter.head, options or StagOptions())
    if options is not None:
        adapter.terms.append(term)
    for number, batch in enumerate(batches):
        logits = adapter.adapt_step(batch.images)
        right = (logits.argmax(dim=1) == batch.labels).float().mean()
        row = {"reading": name, "batch": number, "accuracy": float(right)}
        row["entropy"] = float(entropy(logits).mean())
        if term.alignment is not None:
            row["alignment"] = float(term.alignment)
        parts.append(row)
curves = pd.DataFrame(parts)

# %% [markdown]
# Above, what the term works on: the mean alignment of each batch, in the space of its own reading.
# In the middle what the host minimises: the mean entropy of each batch. Below what counts:
# accuracy from the first batch up to this one.

# %%
curves["running accuracy"] = curves.groupby("reading")["accuracy"].transform(
    lambda values: values.expanding().mean()
)
names = list(readings)
colours = alt.Scale(domain=names, range=["#7F7F7F", "#0072B2", "#D55E00", "#009E73"])
dashes = alt.Scale(domain=names, range=[[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]])
lines = (
    alt.Chart(curves)
    .mark_line()
    .encode(
        x=alt.X("batch:Q"),
        color=alt.Color("reading:N", scale=colours),
        strokeDash=alt.StrokeDash("reading:N", scale=dashes),
    )
)
panels = [
    lines.encode(y=alt.Y(f"{figure}:Q", scale=alt.Scale(zero=False))).properties(
        width=560, height=130
    )
    for figure in ("alignment", "entropy", "running accuracy")
]
alt.vconcat(*panels)

# %%
curves.groupby("reading", sort=False)[["accuracy", "entropy", "alignment"]].mean().round(3)

# %% [markdown]
# A stream of 600 small images on one network does not say which reading is best: differences of a
# point are six images. `docs/stag.md` has the measurements that the default rests on.
