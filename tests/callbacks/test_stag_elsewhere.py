"""STAG where it does not belong, and what its report leaves out."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.loops.test_adaptation import quiet
from tests.networks import make_network, sharp_network
from tests.streams import make_stream
from tta_lightning.callbacks import STAG
from tta_lightning.contract import StepReport
from tta_lightning.errors import InputError
from tta_lightning.meta import SourceTraining
from tta_lightning.methods import Tent
from tta_lightning.models import find_head
from tta_lightning.rules import SGD


class EverySecondStep(Tent):
    """Computes its loss and its terms for each batch, and moves for every second."""

    batches = 0

    def descend(self, loss):
        self.batches += 1
        return super().descend(loss) if self.batches % 2 else StepReport(reason="not this time")


def test_two_of_them_are_refused():
    adapter = Tent(make_network("gn"), SGD(lr=0.1))
    with pytest.raises(InputError, match="2 STAG callbacks, each of which would add its loss"):
        quiet(STAG(1.0), STAG(3.0)).adapt(adapter, datamodule=make_stream())
    assert adapter.terms == []
    with pytest.raises(InputError, match=r"STAG\{'weight': 1.0.* was given twice"):
        quiet(STAG(1.0), STAG(1.0))


def test_training_refuses_it():
    with pytest.raises(InputError, match="STAG acts while a model adapts"):
        quiet(STAG(), max_epochs=1).fit(SourceTraining(make_network("gn")), *2 * [DataLoader([0])])


def test_passes_that_led_to_no_step_are_not_counted(monkeypatch):
    seen = []
    add = STAG.on_adapt_batch_end

    def spy(self, trainer, adapter, *rest):
        add(self, trainer, adapter, *rest)
        seen.append((adapter.report.updated, float(self.term.alignment)))

    monkeypatch.setattr(STAG, "on_adapt_batch_end", spy)
    adapter = EverySecondStep(make_network("gn"), SGD(lr=0.1))
    results = quiet(STAG()).adapt(adapter, datamodule=make_stream())
    counted = [alignment for updated, alignment in seen if updated]
    assert len(counted) == len(seen) / 2 == 3
    assert results["stag"]["alignment"] == pytest.approx(sum(counted) / 3, abs=1e-6)


def test_reversed_classes_have_the_numbers_of_the_network():
    network = sharp_network("gn").float()
    weight = find_head(network).module.weight
    weight.data[6] = 0.5 * weight.data[8]
    adapter = Tent(network, SGD(lr=0.1))
    adapter.restrict_classes([8, 6, 2])
    stream = DataLoader([(torch.rand(3, 32, 32), 0)] * 4, batch_size=2)
    with pytest.warns(UserWarning, match=r"1 of 3 classes .* \(class 6\)"):
        quiet(STAG()).adapt(adapter, stream)
