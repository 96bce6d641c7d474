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
# # Your own method
#
# A method for test-time adaptation is a class with a loss. This notebook writes one, runs it in a
# bare loop and with the `Trainer`, and then lets it pass the contract that every method of this
# package passes: reset to the bit, resuming in mid-stream, batches of NaN, half precision and
# more.

# %%
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import altair as alt
import pandas as pd
from IPython.display import display
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import tta_lightning
from tta_lightning import Adapter, Stream, Trainer
from tta_lightning.data import Digits, LabelledImages
from tta_lightning.functional import entropy
from tta_lightning.meta import SourceTraining
from tta_lightning.methods import Source, Tent
from tta_lightning.report import Run, frames, plots
from tta_lightning.rules import SGD, Adam

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Charts become SVG when they are made: they need neither a network nor JavaScript to be seen.
alt.renderers.enable("svg")
alt.theme.enable("tta_lightning")
quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## The method, in 20 lines
#
# Minimising the entropy of each prediction makes a model sure of itself, and nothing keeps it from
# being sure that everything is an 8. So this method asks for two things: low entropy of each
# image's prediction, and high entropy of the mean prediction of the batch.
#
# The base class does the rest: it lets the affine parameters of the normalisation layers move,
# predicts before it learns, asks the rule for the step, resets, and can be saved. Constructor
# arguments that are kept as attributes appear in the manifest of a run.


# %%
class Balanced(Adapter):
    """Be sure of each image, and not of the same class for all.

    L(x) = mean_i H(p_i) - weight * H(mean_i p_i), H in nats.

    Args:
        network: Images [B, 3, H, W] in [0, 1] to logits [B, C].
        rule: How gradients become updates.
        weight: Of the second part.
    """

    def __init__(self, network, rule=None, weight: float = 1.0):
        super().__init__(network, rule)
        self.weight = weight

    def loss(self, out, images):
        """Compute L of a batch, a scalar."""
        # the logarithm of the mean prediction, up to a constant: entropy() takes it as logits
        mean = out.logits.log_softmax(dim=1).logsumexp(dim=0, keepdim=True)
        return entropy(out.logits).mean() - self.weight * entropy(mean).mean()


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
# ## In a bare loop
#
# No trainer is needed: `adapt_step` takes images and returns the predictions of the model as it
# was before it learnt from them. This is what a server would call. The loop goes from the first
# corruption to the second without a reset, because nobody asks for one.

# %%
stream = Stream(
    Digits("test"), corruptions=["contrast", "snow"], severity=3, batch_size=50, limit=500
)
method = Balanced(str(checkpoint), Adam(lr=0.003))
rows = []
for number, batch in enumerate(stream.test_dataloader()):
    logits = method.adapt_step(batch.images)
    right = (logits.argmax(dim=1) == batch.labels).float().mean()
    rows.append({"batch": number, "loss": float(method.report.loss), "accuracy": float(right)})
method.reset()  # bit for bit the source model again
curve = pd.DataFrame(rows).melt("batch")
alt.Chart(curve).mark_line(point=True).encode(
    x="batch:Q", y=alt.Y("value:Q", title=None), row=alt.Row("variable:N", title=None)
).properties(width=560, height=120).resolve_scale(y="independent")

# %% [markdown]
# ## With the Trainer, beside others
#
# The same stream for the source model, for Tent and for the new method, the latter two with the
# same rule. The trainer resets the model before each corruption, as the stream's plan says. Every
# run writes its folder, and the figures are made from these folders.

# %%
folder = Path(tempfile.mkdtemp(prefix="own_method_", dir=Path.cwd()))
methods = {"source": Source, "tent": Tent, "balanced": Balanced}
for name, make in methods.items():
    rule = () if make is Source else (Adam(lr=0.003),)
    Trainer(run_dir=folder / name, **quiet).adapt(make(str(checkpoint), *rule), datamodule=stream)
runs = [Run.load(folder / name) for name in methods]
plots.running_accuracy(frames.curves(runs))

# %% [markdown]
# Which classes gained by the new method, and which lost:

# %%
plots.class_change(frames.per_class(runs[-1], runs[0]))

# %% [markdown]
# ## The contract
#
# In the repository a new method becomes a row of `METHODS` in `tests/test_adapter.py`:
#
# ```python
# METHODS = {
#     ...
#     "balanced": lambda network: Balanced(network, Adam(lr=0.01)),
# }
# ```
#
# Then `pytest tests/test_adapter.py -k balanced` runs each check of the class `TestContract` on
# it, with batch, group and layer normalisation. Here the very same checks are called without
# pytest's command. They are part of the repository, not of the installed package, so this needs an
# installation as `make setup` makes it.

# %%
repository = Path(tta_lightning.__file__).parents[1]
if not (repository / "tests" / "test_adapter.py").is_file():
    raise FileNotFoundError(
        f"{repository} has no tests/test_adapter.py. The contract is part of the repository: "
        "clone it and install it with `make setup`."
    )
sys.path.insert(0, str(repository))
from tests.test_adapter import NORMS, TestContract  # noqa: E402


def variants(check):
    """List the further arguments that pytest would give to a check."""
    marks = getattr(check, "pytestmark", [])
    return [{m.args[0]: value} for m in marks for value in m.args[1]] or [{}]


def verdict(check, make, norm):
    """Run a check of the contract on a method; say `passed`, or what failed."""
    for arguments in variants(check):
        try:
            check(TestContract(), make, norm, **arguments)
        except Exception as error:
            return f"failed: {type(error).__name__}"
    return "passed"


def contract(make):
    """Run the whole contract: a row a check, a column a kind of normalisation."""
    checks = {n: c for n, c in vars(TestContract).items() if n.startswith("test_")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batches of NaN are warned of, as they should be
        return pd.DataFrame(
            {norm: {n[5:]: verdict(c, make, norm) for n, c in checks.items()} for norm in NORMS}
        )


results = contract(lambda network: Balanced(network, Adam(lr=0.01)))
assert (results == "passed").all(axis=None), results
display(results)

# %% [markdown]
# ## A contract that can be broken
#
# This variant lowers its weight from batch to batch, and counts the batches in a plain attribute.
# Nobody resets that, nobody saves it, and a batch that was not learnt from is counted as well. The
# place for such a number is a buffer or `self.memory`.


# %%
class Forgetful(Balanced):
    """As Balanced, with a state that the base class does not know of."""

    def loss(self, out, images):
        """Compute L with a weight that falls."""
        self.weight *= 0.9
        return super().loss(out, images)


results = contract(lambda network: Forgetful(network, SGD(lr=0.01)))
failed = results[(results != "passed").any(axis=1)]
assert len(failed), "the contract should have noticed"
display(failed)
