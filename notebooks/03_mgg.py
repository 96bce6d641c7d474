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
# # What the learned optimizer does
#
# MGG ([AAAI 2025](https://arxiv.org/abs/2412.16901)) takes the place of SGD at test time. One tiny
# network with 164 weights serves every scalar parameter by itself: it reads that scalar's momentum
# and gradient, both in units of the gradient's own size, keeps a memory of what it read, and gives
# the next step.
#
# Here such a rule is trained for a small classifier of digits, and then looked at from three
# sides: the curve that it learned, the steps that it takes in a stream, and its memory. In the end
# it runs beside its controls, the sign rule above all.
#
# The training is far shorter than that of `configs/fit/mgg.yaml`; what a rule is worth after the
# full one is measured in `benchmarks/README.md`.

# %%
import logging
import os
from pathlib import Path

import altair as alt
import pandas as pd
import torch
from IPython.display import Markdown
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tta_lightning import Stream, Trainer
from tta_lightning.data import Digits, LabelledImages, ShiftedImages
from tta_lightning.meta import MGGPretraining, SourceTraining
from tta_lightning.methods import MGTTA
from tta_lightning.rules import MGG, SGD, Sign
from tta_lightning.rules.mgg import EPS
from tta_lightning.rules.moments import normalise

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
# ## Train a rule for it
#
# The rule drives MGTTA, whose loss is the entropy of the predictions plus the distance between the
# statistics of the features and those of clean images. It sees 128 digits under four corruptions
# that the stream below does not have, and no label. So that few steps are enough, the corruptions
# come one after the other, each from the source model on, with ten times the published `inner_lr`.

# %%
LR, WEIGHT = 0.01, 4.0  # of the rule when it adapts; of the statistics in the loss of MGTTA

train, test = Digits("train"), Digits("test")
seed_everything(0, verbose=False)
untrained, trained = MGG(lr=LR), MGG(lr=LR)
trained.load_state_dict(untrained.state_dict())
Trainer(run_dir=False, max_epochs=14, limit_val_batches=0, enable_checkpointing=False, **quiet).fit(
    MGGPretraining(
        MGTTA(str(checkpoint), trained, statistics_weight=WEIGHT),
        inner_lr=0.001,
        reset_network=True,
    ),
    datamodule=ShiftedImages(train, severity=5, images=128, batch_size=2, order="separate"),
)

# %% [markdown]
# ## The curve that it learned
#
# What the rule answers at its first step, with the memory that it starts from, to every pair of
# momentum and gradient. The update that is *subtracted*, in units of the learning rate, lies
# between -1 and 1. On the dashed line momentum and gradient cancel: there the sign rule changes
# its mind.

# %%
ticks = torch.linspace(-3, 3, 31)
pairs = torch.cartesian_prod(ticks, ticks)


def answers(rule, name):
    """Ask a rule for its first update u at pairs of momentum and gradient [N, 2]."""
    with torch.no_grad():
        found, _, _ = rule.memory(pairs, *rule.memory.initial_memory(len(pairs)))
    columns = {"momentum": pairs[:, 0], "gradient": pairs[:, 1], "u": torch.tanh(found[:, 0])}
    return pd.DataFrame(columns).astype("float64").round(4).assign(rule=name)


surfaces = pd.concat([answers(untrained, "untrained"), answers(trained, "trained")])
line = pd.DataFrame({"momentum": [-3.0, 3.0], "gradient": [3.0, -3.0]})
squares = (
    alt.Chart()
    .mark_square(size=90, clip=True)
    .encode(
        x=alt.X("momentum:Q", title="normalised momentum"),
        y=alt.Y("gradient:Q", title="normalised gradient"),
        color=alt.Color(
            "u:Q", scale=alt.Scale(scheme="blueorange", domain=[-1, 1]), title="update u"
        ),
    )
)
cancels = (
    alt.Chart(line)
    .mark_line(strokeDash=[4, 3], color="black")
    .encode(x="momentum:Q", y="gradient:Q")
)
panels = [
    (squares.properties(data=part, width=260, height=260, title=str(name)) + cancels)
    for name, part in surfaces.groupby("rule", sort=False)
]
alt.hconcat(*panels)

# %% [markdown]
# ## Updates against gradients
#
# Now in a stream: digits in fog, then with little contrast, then in snow, 20 at a time. This is
# one step of MGTTA taken by hand, so that gradient, update and memory can be kept; `adapt_step`
# does the same.

# %%
stream = Stream(
    test,
    corruptions=["fog", "contrast", "snow"],
    scenario="continual",
    severity=3,
    batch_size=20,
    limit=200,
    clean=train,
)
adapter = MGTTA(str(checkpoint), trained, statistics_weight=WEIGHT)
adapter.prepare(stream.clean_batches())
start = adapter.rule_state["W"].clone()
steps, memories = [], []
for number, batch in enumerate(stream.test_dataloader(), start=1):
    grads = adapter.gradients(adapter.loss(adapter.outputs(batch.images), batch.images))
    state, parameters = adapter.rule_state, adapter.adapted_parameters
    flat = torch.cat([grads[name].flatten() for name in parameters])  # every scalar, in order
    read = normalise(
        flat, state["m"], state["v"], state["step"] + 1, trained.betas, EPS, "published"
    )
    updates, _ = trained.update(grads, state, parameters)
    u = torch.cat([updates[name].flatten() for name in parameters]) / -LR
    adapter.move(grads)
    columns = {"momentum": read.momentum, "gradient": read.gradient, "u": u, "g": flat}
    steps.append(pd.DataFrame(columns).astype("float64").assign(batch=number))
    moved = (adapter.rule_state["W"] - start).flatten(1).norm(dim=1)
    memories.append(pd.DataFrame({"moved": moved}).assign(batch=number))
steps = pd.concat(steps, ignore_index=True)

# %% [markdown]
# Each point is one scalar of the network in one batch. Left of zero the sum of momentum and
# gradient is negative. The grey steps are what the sign rule does with the same sum. A scalar
# whose gradient is exactly zero is left alone, which is the row of points at `u = 0`, where there
# are any.

# %%
shown = steps[steps.batch.isin([2, 10, 30])]
shown = (
    shown.groupby("batch")
    .sample(400, random_state=0)
    .assign(total=lambda rows: (rows.momentum + rows.gradient).clip(-6, 6).round(4))
)
sign = pd.DataFrame({"total": [-6, 0, 0, 6], "u": [-1, -1, 1, 1], "order": range(4)})
points = (
    alt.Chart()
    .mark_circle(size=18, opacity=0.45, color="#0072B2")
    .encode(
        x=alt.X("total:Q", title="momentum + gradient, normalised"),
        y=alt.Y("u:Q", title="update u"),
    )
)
control = alt.Chart(sign).mark_line(color="grey").encode(x="total:Q", y="u:Q", order="order:Q")
panels = [
    control + points.properties(data=part, width=200, height=200, title=f"batch {number}")
    for number, part in shown.groupby("batch")
]
alt.hconcat(*panels)

# %%
alive = steps[steps.g != 0]
agree = (alive.u * (alive.momentum + alive.gradient) > 0).mean()
Markdown(
    f"Of the scalars with a gradient, {agree:.0%} are moved in the direction that the sign rule "
    f"would take. The mean size of an update is {alive.u.abs().mean():.2f} of the largest possible "
    f"one; that of the sign rule is 1."
)

# %% [markdown]
# ## The memory
#
# Every scalar has a memory of its own, a matrix of 8 x 8 numbers and a vector, that a step of
# gradient descent inside the rule changes with every batch. The line is the median over all
# scalars of how far the matrix is from where it started, the band goes from the lowest to the
# highest tenth; the grey lines mark where the corruption changes. Where the memory has come to
# rest, the rule is a fixed function of momentum and gradient; where it moves, the same two numbers
# get another answer than before.

# %%
norms = pd.concat(memories).groupby("batch")["moved"].quantile([0.1, 0.5, 0.9]).unstack()
norms = norms.set_axis(["low", "median", "high"], axis=1).reset_index()
changes = (
    alt.Chart(pd.DataFrame({"batch": [10.5, 20.5]})).mark_rule(color="grey").encode(x="batch:Q")
)
base = alt.Chart(norms).encode(x=alt.X("batch:Q", title="batch"))
band = base.mark_area(opacity=0.3, color="#0072B2").encode(
    y=alt.Y("low:Q", title="distance of the memory from its start"), y2="high:Q"
)
(band + base.mark_line(color="#0072B2").encode(y="median:Q") + changes).properties(
    width=560, height=220
)

# %% [markdown]
# ## Beside its controls
#
# The same loss under other rules, on the same stream, each corruption from the source model on:
# the rule before its training, the sign of momentum plus gradient, and plain SGD. The learning
# rates are those of `configs/rule/`, chosen on other corruptions. A learned rule that comes out
# where the sign rule does has learned that sign and not more.

# %%
rules = {
    "MGG, trained": trained,
    "MGG, untrained": untrained,
    "sign": Sign(lr=LR),
    "SGD": SGD(lr=0.1),
}
rows = []
for name, rule in rules.items():
    stream = Stream(
        test,
        corruptions=["fog", "contrast", "snow"],
        severity=3,
        batch_size=20,
        limit=200,
        clean=train,
    )
    adapter = MGTTA(str(checkpoint), rule, statistics_weight=WEIGHT)
    results = Trainer(run_dir=False, **quiet).adapt(adapter, datamodule=stream)
    rows += [{"rule": name, **segment} for segment in results["segments"]]
table = pd.DataFrame(rows)
bars = (
    alt.Chart(table)
    .mark_bar()
    .encode(
        x=alt.X("rule:N", sort=list(rules), title=None),
        y=alt.Y("accuracy:Q", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("rule:N", sort=list(rules), scale=alt.Scale(scheme="cividis"), legend=None),
    )
)
bars.properties(width=130, height=200).facet(
    column=alt.Column("segment:N", sort=["fog-3", "contrast-3", "snow-3"], title=None)
)

# %%
wide = table.pivot(index="rule", columns="segment", values="accuracy").loc[list(rules)]
wide.assign(mean=wide.mean(axis=1)).round(3)
