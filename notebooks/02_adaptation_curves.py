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
# # Adaptation curves: methods in several kinds of streams
#
# A method that gains in one kind of stream may lose in the next. This notebook runs four methods
# on the same images in three orders, and looks at where accuracy went: along the stream, by class,
# against confidence, and against its price.
#
# Every figure comes from run folders, as `tta adapt` writes them too: `Run.load` reads one,
# `tta_lightning.report.frames` makes tidy pandas frames of them, `tta_lightning.report.plots`
# draws these. With folders of your own, start at "Read the runs".

# %%
import html
import logging
import os
import tempfile
from pathlib import Path

import altair as alt
import ipywidgets as widgets
import pandas as pd
from IPython.display import HTML, Markdown, display
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from tta_lightning import Stream, Trainer
from tta_lightning.data import Digits, LabelledImages
from tta_lightning.meta import SourceTraining
from tta_lightning.methods import LAME, MGTTA, Source, Tent
from tta_lightning.report import Run, frames, plots
from tta_lightning.rules import SGD, Adam

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Charts become SVG when they are made: they need neither a network nor JavaScript nor a kernel to
# be seen, and stay in the file when it is saved or exported.
alt.renderers.enable("svg")
alt.theme.enable("tta_lightning")
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
# ## Run
#
# `reset_each_shift` serves one corruption after the other, from the source model each;
# `label_shift` does so too, but one class after the other; `mixed_domains` shuffles all
# corruptions into one stream and never resets. MGTTA runs with plain SGD here, which needs no
# trained rule.

# %%
methods = {
    "source": lambda: Source(str(checkpoint)),
    "tent": lambda: Tent(str(checkpoint), Adam(lr=0.001)),
    "lame": lambda: LAME(str(checkpoint)),
    "mgtta": lambda: MGTTA(str(checkpoint), SGD(lr=0.1), statistics_weight=4.0),
}
scenarios = ["reset_each_shift", "label_shift", "mixed_domains"]
train, test = Digits("train"), Digits("test")
folder = Path(tempfile.mkdtemp(prefix="curves_", dir=Path.cwd()))
for scenario in scenarios:
    for name, make in methods.items():
        stream = Stream(
            test,
            scenario=scenario,
            corruptions=["gaussian_noise", "contrast", "snow"],
            severity=3,
            batch_size=25,
            limit=200,
            clean=train,
        )
        trainer = Trainer(run_dir=folder / scenario / name, logger=False, **quiet)
        trainer.adapt(make(), datamodule=stream)

# %% [markdown]
# ## Read the runs

# %%
runs = {s: [Run.load(folder / s / name) for name in methods] for s in scenarios}
names = list(methods)
table = pd.concat([frames.accuracies(runs[s], names).assign(scenario=s) for s in scenarios])
means = table[table["domain"] == "mean"]
means.pivot(index="name", columns="scenario", values="accuracy").loc[names, scenarios].style.format(
    "{:.1%}"
)

# %%
best = (
    means.pivot(index="scenario", columns="name", values="accuracy").loc[scenarios].idxmax(axis=1)
)
Markdown(
    "Of the runs of this notebook the highest mean accuracy has "
    + ", ".join(f"**{name}** in `{scenario}`" for scenario, name in best.items())
    + ". Six hundred images of one network are a first look, not a ranking."
)

# %% [markdown]
# ## Along the stream
#
# Accuracy since the corruption began. Where a curve falls while the source model's stays,
# adaptation does harm; where it begins to fall late, a reset in time would have helped.

# %%
for scenario in scenarios:
    chart = plots.running_accuracy(frames.curves(runs[scenario], names), names)
    display(chart.properties(title=scenario, height=200))

# %% [markdown]
# The same curves with a choice, for comparing one scenario with the other in place. The figure
# carries all it needs: the choice works in an exported page as well, without a kernel and without
# a network. The figures above are its static form.

# %%
curves = pd.concat([frames.curves(runs[s], names).assign(scenario=s) for s in scenarios])
choice = alt.param(
    name="scenario_shown",
    value=scenarios[0],
    bind=alt.binding_select(options=scenarios, name="scenario "),
)
shown = (
    alt.Chart(curves.round(4))
    .mark_line(strokeWidth=1.6)
    .encode(
        x=alt.X("seen:Q", title="images seen"),
        y=alt.Y("running_accuracy:Q", title="accuracy since the segment began")
        .axis(format="%")
        .scale(domain=[0, 1]),
        color=alt.Color("name:N", sort=names, scale=alt.Scale(range=list(plots.COLOURS)))
        .title(None)
        .legend(orient="bottom"),
        detail="visit:N",
        tooltip=["name:N", "segment:N", "seen:Q", alt.Tooltip("running_accuracy:Q", format=".1%")],
    )
)
shown = shown.add_params(choice).transform_filter("datum.scenario == scenario_shown")
page = shown.properties(width=640, height=240).to_html(inline=True)
# In a frame of its own, so that the libraries inside disturb nothing around it.
HTML(
    '<div><iframe title="accuracy along the stream, by scenario" width="860" height="390" '
    f'style="border: 0" srcdoc="{html.escape(page)}"></iframe></div>'
)

# %% [markdown]
# ## One run, closely
#
# What a run predicts as its stream goes on, how sure it is, and which classes gained or lost
# against the source model. With a running kernel the two lists choose the run; below them are the
# figures of one choice for those who read without one.


# %%
def over_time(scenario, method):
    """Draw what a run predicts, and its entropy, along the stream."""
    run = runs[scenario][names.index(method)]
    title = f"{method}, {scenario}"
    return plots.over_time(frames.over_time(run, bins=24)).properties(title=title)


def classes(scenario, method):
    """Draw what each class gained or lost."""
    run, source = runs[scenario][names.index(method)], runs[scenario][0]
    return plots.class_change(frames.per_class(run, source)).properties(
        title=f"{method}, {scenario}"
    )


def look(scenario, method):
    """Show a run."""
    display(over_time(scenario, method), classes(scenario, method))


_ = widgets.interact(look, scenario=scenarios, method=names[1:])

# %%
over_time("label_shift", "tent")

# %%
over_time("label_shift", "lame")

# %% [markdown]
# Which classes gained, which died:

# %%
for method in names[1:]:
    display(classes("reset_each_shift", method))

# %% [markdown]
# ## Is it as sure as it is right?
#
# A calibrated model lies on the diagonal. Below it a model is surer than it is right, which is
# what minimising the entropy of predictions can do to it.

# %%
plots.reliability(frames.reliability(runs["mixed_domains"], names), names)

# %% [markdown]
# ## What it costs
#
# Milliseconds an image on this machine, on a logarithmic scale, against the mean accuracy. Forward
# and backward passes do not depend on the machine.

# %%
cost = frames.cost(runs["reset_each_shift"], names)
plots.cost(cost, names)

# %%
cost[["name", "forwards", "backwards", "images_per_second"]].round(2)

# %% [markdown]
# `chart.save("figure.pdf")` writes any of these figures for a paper. `tta report
# FOLDER/mixed_domains -o report.html` makes one page of the runs of a scenario.
