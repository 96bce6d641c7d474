"""Every number that a method takes is checked: the error says its name, value and range."""

import inspect
import math

import pytest

from tests.networks import make_network
from tta_lightning import methods
from tta_lightning.errors import InputError
from tta_lightning.methods import MT3
from tta_lightning.models import BYOLHeads
from tta_lightning.rules import SGD

OUT_OF_RANGE = {
    "BNStats": {"alpha": (-0.1, 1.1)},
    "CoTTA": {
        **{"mt": (-0.1, 1.1), "rst": (-0.1, 1.1), "ap": (-0.1, 1.1)},
        **{"n_augmentations": (0,), "seed": (-1,)},
    },
    "DeYO": {
        **{"deyo_margin": (-0.1, math.nan), "margin_e0": (-0.1,), "plpd_threshold": (-1.1, 1.0)},
        **{"patch_len": (1,), "occlusion_size": (0,), "row_start": (-1,), "column_start": (-1,)},
        **{"seed": (-1,)},
    },
    "EATA": {
        **{"e_margin": (-0.1, math.nan), "d_margin": (-0.1,), "fisher_alpha": (-1, math.inf)},
        **{"fisher_samples": (0,)},
    },
    "LAME": {"k": (0, 2.5), "max_steps": (0,)},
    "MEMO": {
        **{"n_augmentations": (0, 1.5), "steps": (0,), "prior_strength": (-1, math.inf)},
        **{"seed": (-1,)},
    },
    "MGTTA": {"statistics_weight": (-1, math.inf)},
    "MT3": {
        **{"steps": (0,), "copies": (0,), "lr": (-0.1,), "in_flight": (0,), "seed": (-1,)},
    },
    "ROID": {
        **{"temperature": (0, -1, math.nan), "momentum_src": (1.1,), "momentum_probs": (-0.1,)},
        **{"seed": (-1,)},
    },
    "RoTTA": {
        **{"memory_size": (0,), "update_frequency": (0,), "nu": (1.1,), "alpha": (-0.1,)},
        **{"lambda_t": (-1,), "lambda_u": (math.inf,), "seed": (-1,)},
    },
    "SAR": {"margin_e0": (-0.1,), "rho": (-0.1, math.nan), "reset_constant": (-0.1,)},
    "T3A": {"filter_k": (0, -2)},
    "TTT": {
        **{"steps": (0,), "copies": (0,), "lr": (-0.1,), "in_flight": (0,), "seed": (-1,)},
    },
}
GIVEN = {"rule": SGD(lr=0.1)}
CASES = [
    pytest.param(method, name, value, id=f"{method}-{name}-{value}")
    for method, names in OUT_OF_RANGE.items()
    for name, values in names.items()
    for value in values
]


def numbers_of(method):
    """The constructor's parameters that are numbers."""
    annotations = {
        name: str(parameter.annotation)
        for name, parameter in inspect.signature(getattr(methods, method)).parameters.items()
    }
    return {name for name, text in annotations.items() if "int" in text or "float" in text}


@pytest.mark.parametrize("method", methods.__all__)
def test_no_number_is_forgotten(method):
    assert numbers_of(method) - {"crop"} == set(OUT_OF_RANGE.get(method, {}))


@pytest.mark.parametrize(("method", "name", "value"), CASES)
def test_a_number_out_of_range(method, name, value):
    make, network = getattr(methods, method), make_network("gn")
    if issubclass(make, MT3):
        network = BYOLHeads(network, hidden=8, projection=6)
    given = {k: v for k, v in GIVEN.items() if k in inspect.signature(make).parameters}
    with pytest.raises(InputError) as raised:
        make(network, **given, **{name: value})
    assert str(raised.value).startswith(f"{name} = {value}")
    assert "expected" in str(raised.value)
