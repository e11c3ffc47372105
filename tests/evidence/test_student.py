"""Student's t: against a table, and against the density integrated by hand."""

import math

import numpy as np
import pytest

from swkernels.evidence.student import coverage, quantile


def test_quantiles_are_those_of_the_tables():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 120: 1.980}
    assert {n: round(quantile(n), 3) for n in known} == known
    assert quantile(3, 0.99) == pytest.approx(5.8409, abs=5e-5)
    assert quantile(10_000) == pytest.approx(1.9602, abs=5e-5)


@pytest.mark.parametrize("degrees", [1, 2, 5, 8])
def test_coverage_is_the_integral_of_the_density(degrees):
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
    x = np.linspace(-1.7, 1.7, 20_001)
    density = scale / math.sqrt(degrees * math.pi) * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    area = float(((density[1:] + density[:-1]) / 2 * np.diff(x)).sum())
    assert coverage(1.7, degrees) == pytest.approx(area, rel=1e-7)
