"""A CDE over a path far from zero is the same CDE moved in time."""

import pytest
import torch

from revsolve import HermitePath, LinearPath, NaturalCubicPath, cdeint

KNOTS = [0.0, 0.125, 0.375, 1.0]  # sums with the offsets are exact in float64


def solved(path: type, dtype: torch.dtype, method: str, offset: float) -> torch.Tensor:
    """The field knows no time, so that only the steps could differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).to(dtype)
    weight = 0.3 * torch.randn(12, 4, generator=generator, dtype=torch.float64).to(dtype)
    t = [offset, offset + 0.5, offset + 1.0]
    field = lambda t, z: torch.tanh(z @ weight.T).view(2, 4, 3)  # noqa: E731
    return cdeint(path(x, [offset + knot for knot in KNOTS]), field, x.new_ones(2, 4), t, method=method)


@pytest.mark.parametrize("offset", [1e6, 1.7e9])
@pytest.mark.parametrize("method", ["rev_rk4", "reversible_heun", "alf4", "rk4", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:the field receives times in the dtype of the state")  # which this one does not use
@pytest.mark.parametrize("path", [LinearPath, HermitePath, NaturalCubicPath])
def test_a_cde_far_from_zero(path: type, dtype: torch.dtype, method: str, offset: float) -> None:
    # Near 1.7e9 doubles are 2.4e-7 apart, which is 2e-5 of a substep of alf4; adaptive steps have a tolerance of 1e-4.
    tolerance = 1e-5 if dtype == torch.float64 and method != "dopri5" else 1e-4
    torch.testing.assert_close(
        solved(path, dtype, method, offset), solved(path, dtype, method, 0.0), rtol=tolerance, atol=tolerance
    )
