"""What restarts know of the field: its fastest modes, found without a call more, and how many steps they may be followed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import method_names, odeint
from revsolve.core.tape import Memo
from revsolve.restarts.spectrum import AMPLIFIED, FAITHFUL, Spectrum
from revsolve.schemes.names import scheme

SPECTRA = {
    "decay": [-170.0, -100.0, -1.0],
    "growth": [5.0, -4.0, 0.1],
    "rest": [-50.0, 0.0, 0.0],
}
STIFF_CELLS = 50
NO_FIELD: Any = None


class Linear:
    """y' = matrix y"""

    is_rate = True

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def value(self, t: float, x: Tensor) -> Tensor:
        return self.matrix @ x

    def control(self, t: float, t0: float, t1: float) -> float:
        return t1 - t0

    def product(self, value: Tensor, control: float) -> tuple[Tensor, float]:
        return value, control


def found(matrix: Tensor, num_products: int) -> tuple[complex, ...]:
    spectrum = Spectrum(scheme("rev_rk4"), Memo(Linear(matrix)))
    for n in range(num_products):
        spectrum.look(float(n), torch.ones(len(matrix), dtype=matrix.dtype))
    return spectrum.rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_fastest_mode_is_found(name: str, dtype: torch.dtype) -> None:
    """Of a matrix that is not normal; after eight products, within the margin that `reach` allows for."""
    rates = torch.tensor(SPECTRA[name], dtype=dtype)
    basis = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.2, 0.0, 1.0]], dtype=dtype)
    got = found(basis @ rates.diag() @ torch.linalg.inv(basis), 8)
    assert min(abs(rate - SPECTRA[name][0]) for rate in got) < 0.1 * abs(SPECTRA[name][0])


def test_a_rotation_is_a_complex_pair() -> None:
    """y'' = -100 y in y and y', whose lengths differ tenfold: a single product would say anything from 1 to 100."""
    got = found(torch.tensor([[0.0, 1.0], [-100.0, 0.0]], dtype=torch.float64), 3)
    assert sorted(rate.imag for rate in got) == pytest.approx([-10.0, 10.0])
    assert [rate.real for rate in got] == pytest.approx([0.0, 0.0], abs=1e-9)


def test_four_products_know_a_diffusion() -> None:
    ones = torch.ones(STIFF_CELLS - 1, dtype=torch.float64)
    matrix = torch.diag(ones, 1) + torch.diag(ones, -1) - 2 * torch.eye(STIFF_CELLS, dtype=torch.float64)
    assert 3.4 < -min(rate.real for rate in found(matrix, 4)) <= 4.0


@pytest.mark.parametrize("method", [name for name in method_names() if scheme(name).reversible])
def test_the_reach_shrinks_with_the_rate(method: str) -> None:
    spectrum, reached = Spectrum(scheme(method), NO_FIELD), []
    spectrum.rounding = 1e-16
    for rate in (0.01, 0.1, 0.3, 1.0, 1.7, 100.0):
        spectrum.rates = (complex(-rate),)
        reached.append(spectrum.reach(1.0))
    assert reached == sorted(reached, reverse=True)
    assert reached[0] > 60
    assert reached[-1] == 1


def test_decays_and_growths_end_segments_sooner_where_rounding_is_coarse() -> None:
    reached = []
    for rounding in (1e-16, 1e-7):
        spectrum = Spectrum(scheme("rev_rk4"), NO_FIELD)
        spectrum.rates, spectrum.rounding = (0.1 + 0j, 0.1j), rounding
        reached.append(spectrum.reach(1.0))
    fine, coarse = reached
    assert coarse < fine
    assert coarse == pytest.approx(math.log(max(AMPLIFIED, FAITHFUL / 1e-7)) / 0.12, abs=1)


def test_nothing_is_known_of_a_field_without_a_derivative() -> None:
    memo = Memo(Linear(torch.eye(2)))
    memo.term.value = lambda t, x: torch.ones(2)  # type: ignore[method-assign]
    spectrum = Spectrum(scheme("alf"), memo)
    spectrum.look(0.0, torch.zeros(2))
    assert spectrum.rates == ()


def test_looking_leaves_no_traces() -> None:
    """The user's random state, gradients of parameters and buffers, and the number of calls, are as without."""
    torch.manual_seed(0)
    calls: list[int] = []
    layer = nn.Linear(3, 3).double()
    layer.register_forward_hook(lambda *_: calls.append(1))
    y0 = torch.ones(3, dtype=torch.float64)
    before = torch.random.get_rng_state()
    solved = odeint(
        lambda t, y: layer(y), y0, torch.tensor([0.0, 1.0]), method="alf", options={"step_size": 0.01}, full_output=True
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None for p in layer.parameters())
    assert solved.stats.num_restarts > 0
    assert len(calls) == solved.stats.num_evaluations == 100 + solved.stats.num_restarts + 1
