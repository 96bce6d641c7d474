"""The sign rule against moments computed by hand."""

import pytest
import torch

from tta_lightning.errors import InputError
from tta_lightning.rules import Sign


def directions(gradients, scale=1.0, **options):
    """Directions that the rule takes for one scalar, for one gradient after the other."""
    rule = Sign(lr=1.0, **options)
    params = {"a": torch.zeros(1, dtype=torch.float64)}
    state, found = rule.init(params), []
    for gradient in gradients:
        grads = {"a": torch.tensor([scale * gradient], dtype=torch.float64)}
        updates, state = rule.update(grads, state, params)
        found.append(-updates["a"].item())
    return found


def test_equals_the_sign_of_momentum_plus_gradient():
    # normalised, these are 0.742 + 1.411, -0.313 - 1.543, 0.380 + 1.735, 0.379 + 0.242
    assert directions([0.5, -1.0, 2.0, 0.25]) == [1, -1, 1, 1]


def test_momentum_decides_where_the_gradient_is_small():
    # m = 0.271 before, 0.234 after the small gradient; 0.234 / (1 - 0.9^5) = 0.571 > 0.1
    assert directions([1.0, 1.0, 1.0, -0.1]) == [1, 1, 1, 1]
    assert directions([1.0, 1.0, 1.0, -0.8]) == [1, 1, 1, -1]


@pytest.mark.parametrize(("bias_correction", "second"), [("published", -1), ("exact", 1)])
def test_bias_corrections_differ_in_their_exponent(bias_correction, second):
    # m = 0.09 - 0.027 = 0.063; m / (1 - 0.9^3) = 0.232 < 0.27 < 0.332 = m / (1 - 0.9^2)
    assert directions([1.0, -0.27], bias_correction=bias_correction) == [1, second]


def test_equals_moments_computed_by_hand():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, generator=generator, dtype=torch.float64).tolist()
    m = v = 0.0
    expected, against_the_gradient = [], 0
    for t, g in enumerate(gradients, start=1):  # normalised, as MGG reads them
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g * g
        scale = (v / (1 - 0.8 ** (t + 1))) ** 0.5 + 1e-8
        total = m / (1 - 0.7 ** (t + 1)) / scale + g / scale
        expected.append(1.0 if total > 0 else -1.0)
        against_the_gradient += (total > 0) != (g > 0)
    assert against_the_gradient > 0
    assert directions(gradients, momentum=0.7) == expected


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(30, generator=generator, dtype=torch.float64).tolist()
    found = directions(gradients)
    assert {-1.0, 1.0} == set(found)
    assert directions(gradients, scale) == found


def test_every_step_has_the_size_of_the_learning_rate():
    rule = Sign(lr=0.02)
    params = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    grads = {"a": torch.tensor([[1e-3, -5.0, 2.0], [-1.0, 1e4, -0.1]]), "b": torch.tensor(-3.0)}
    updates, _ = rule.update(grads, rule.init(params), params)
    expected = torch.tensor([[-0.02, 0.02, -0.02], [0.02, -0.02, 0.02]])
    assert torch.equal(updates["a"], expected)
    assert torch.equal(updates["b"], torch.tensor(0.02))


def test_a_coordinate_that_never_had_a_gradient_stays():
    assert directions([0.0, 0.0, 1.0, 0.0]) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr = -0.1 is out of range: expected 0 <= lr"),
        ({"momentum": 1.0}, "momentum = 1.0 is out of range"),
        ({"bias_correction": "exakt"}, "Unknown bias correction 'exakt'. Did you mean 'exact'"),
    ],
)
def test_hyper_parameters_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        Sign(**options)
