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
# # Quickstart: a timm model and a folder of images
#
# You have a timm model with weights of your own, and a folder of images that look unlike those it
# was trained on. This notebook adapts the one to the other, without a label: it looks at the
# predictions, saves the adapted weights, and loads them into plain timm.

# %%
import json
import logging
import os
import tempfile
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
import timm
import torch
from IPython.display import Markdown
from lightning.pytorch import seed_everything
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.utils import make_grid

from tta_lightning import Stream, Trainer
from tta_lightning.callbacks import AdaptedWeights
from tta_lightning.data import Digits, LabelledImages, UnlabelledImages
from tta_lightning.data.corruptions import corrupt
from tta_lightning.meta import SourceTraining
from tta_lightning.methods import BNStats, Source, Tent
from tta_lightning.report import Run, frames, plots
from tta_lightning.rules import Adam

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Charts become SVG when they are made: they need neither a network nor JavaScript to be seen.
alt.renderers.enable("svg")
alt.theme.enable("tta_lightning")
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
folder = Path(tempfile.mkdtemp(prefix="quickstart_", dir=Path.cwd()))

# %% [markdown]
# ## Stand-ins for your model and your images
#
# You have these already; skip to the next section with your own. So that the notebook runs without
# a download, a small timm model (`test_resnet`, timm's own for tests) learns digits, and its
# weights are saved as timm's `state_dict`. It is trained once, and lies in `networks/`, or where
# the environment variable `TTA_NOTEBOOK_NETWORKS` says.

# %%
networks = Path(os.environ.get("TTA_NOTEBOOK_NETWORKS", "networks"))
weights = networks / "test_resnet_digits.safetensors"
if not weights.is_file():
    seed_everything(0, verbose=False)
    training = SourceTraining(
        {"spec": "timm:test_resnet", "pretrained": False, "num_classes": 10}, lr=0.003
    )
    Trainer(run_dir=False, max_epochs=4, enable_checkpointing=False, logger=False, **quiet).fit(
        training,
        datamodule=LabelledImages(
            Digits("train"), batch_size=100, crop_padding=2, image_size=32, crop_pct=1.0
        ),
    )
    networks.mkdir(parents=True, exist_ok=True)
    save_file(training.network.network.state_dict(), weights)

# %% [markdown]
# The folder holds 600 digits in fog, as PNG files, in no order. What they show is put aside:
# nothing below uses it but the last section, which asks whether all this was worth it.

# %%
digits = Digits("test")
images = folder / "images"
images.mkdir()
labels = {}
for number, index in enumerate(np.random.default_rng(0).permutation(len(digits))[:600]):
    name = f"{number:04d}.png"
    Image.fromarray(corrupt(digits.load(index), "fog", 1, index=index)).save(images / name)
    labels[name] = int(digits.labels[index])


def read(path):
    """Read an image file as [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


files = sorted(images.glob("*.png"))
grid = make_grid(torch.stack([read(file) for file in files[:24]]), nrow=12, padding=2)
Image.fromarray((grid.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).resize((816, 140), 0)

# %% [markdown]
# ## Adapt
#
# A network is a timm name and a weight file. Tent predicts each batch and then makes the entropy
# of these predictions smaller. `AdaptedWeights` saves the network in the end. The images have 32
# pixels, as those of the training had; without `image_size` they would be resized to what timm
# records for the model.
#
# Two more runs to compare with: the model as it is, and `BNStats`, which takes the statistics of
# each batch as Tent does, and learns nothing.

# %%
network = {"spec": "timm:test_resnet", "weights": str(weights), "num_classes": 10}
stream = Stream(UnlabelledImages(images), batch_size=50, image_size=32, crop_pct=1.0)
Trainer(run_dir=folder / "tent", callbacks=[AdaptedWeights()], **quiet).adapt(
    Tent(network, Adam(lr=0.001)), datamodule=stream
)
Trainer(run_dir=folder / "source", **quiet).adapt(Source(network), datamodule=stream)
Trainer(run_dir=folder / "bnstats", **quiet).adapt(BNStats(network), datamodule=stream)
sorted(path.name for path in (folder / "tent").iterdir() if path.is_file())

# %% [markdown]
# The same from the command line:
#
# ```sh
# tta adapt -c configs/adapt/image_folder.yaml --data.source.root images \
#   --model.network "{spec: timm:test_resnet, weights: model.safetensors, num_classes: 10}" \
#   --model.rule Adam --model.rule.lr 0.001 --data.batch_size 50 \
#   --data.image_size 32 --data.crop_pct 1.0
# ```
#
# ## Look at the predictions
#
# A row an image, in the order in which they were served. The prediction of an image was made
# before the model learnt from it.

# %%
tent, source, bnstats = (Run.load(folder / name) for name in ("tent", "source", "bnstats"))
tent.predictions[["path", "prediction", "confidence", "entropy", "batch"]].head(8).round(3)

# %% [markdown]
# ## Entropy over time
#
# Without labels this is what can be watched: how unsure the model is (entropy in nats), as the
# stream goes on.

# %%
plots.running_accuracy(frames.curves([source, bnstats, tent]))

# %% [markdown]
# Low entropy alone is no good sign: a model that predicts one class for everything is sure, too.
# So look at what it predicts. First the model as it is, then the adapted one: a row a class,
# brighter where it is predicted more often.

# %%
plots.prediction_histogram(frames.over_time(source, bins=12))

# %%
plots.prediction_histogram(frames.over_time(tent, bins=12))

# %% [markdown]
# ## The adapted weights in plain timm
#
# `adapted.safetensors` is a state dict under timm's own names. Its metadata say what images are to
# be normalised with. From here on nothing of this package is used.

# %%
adapted = folder / "tent" / "adapted.safetensors"
with safe_open(adapted, "pt") as file:
    metadata = file.metadata()
pd.Series(metadata, name="value").to_frame()


# %%
def predictions(path):
    """Predict all images with plain timm: classes [N]."""
    model = timm.create_model("test_resnet", num_classes=10)
    timm.models.load_checkpoint(model, str(path))
    mean, std = (torch.tensor(json.loads(metadata[name])).view(3, 1, 1) for name in ("mean", "std"))
    batch = torch.stack([(read(file) - mean) / std for file in files])
    with torch.inference_mode():
        return model.eval()(batch).argmax(dim=1)


agreement = tent.predictions.set_index("path")["prediction"].loc[[file.name for file in files]]
same = (predictions(adapted).numpy() == agreement.to_numpy()).mean()
Markdown(
    f"Plain timm with the adapted weights predicts {same:.0%} of the images as the run did. It "
    "need not be all: the run predicted each batch with statistics of its own, and early ones with "
    "a model that had learnt less."
)

# %% [markdown]
# ## Was it worth it?
#
# Only now the labels come out.

# %%
truth = np.array([labels[file.name] for file in files])


def right(run):
    """Return the fraction of right predictions of a run."""
    return float((run.predictions["path"].map(labels) == run.predictions["prediction"]).mean())


results = pd.Series(
    {
        "the model as it is": right(source),
        "with statistics of each batch": right(bnstats),
        "while it adapts": right(tent),
        "plain timm, weights as they were": float((predictions(weights).numpy() == truth).mean()),
        "plain timm, adapted weights": float((predictions(adapted).numpy() == truth).mean()),
    },
    name="accuracy",
)
results.to_frame().style.format("{:.1%}")

# %%
batch, learnt = (results.iloc[n] - results.iloc[n - 1] for n in (1, 2))
Markdown(
    f"Of the difference {batch:+.1%} are the statistics of each batch, and {learnt:+.1%} what Tent "
    "learnt: with batch normalisation the former are most of it in a stream as short as this."
)

# %% [markdown]
# With images and a model of your own and no labels you will not have this table. What to watch
# instead, and how to have a run that goes wrong taken back, is in `docs/safety.md`.
