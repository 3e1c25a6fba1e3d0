"""Outputs up to a time do not depend on what comes after it, to the last bit; nor do restarts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revsolve import BrownianPath, Restarts, cdeint, method_names, odeint, sdeint
from revsolve.paths.control import LinearPath
from revsolve.schemes.names import scheme
from revsolve.sde.methods import sde_method_names

STEP, NUM_STEPS, BATCH, SIZE = 0.1, 40, 3, 2
TIMES = [STEP * n for n in range(NUM_STEPS + 1)]
SPANS = {name: [c for update in scheme(name).updates for c in (update.start, update.end)] for name in method_names()}
# A composition with a negative substep looks a little ahead of its own step.
REVERSIBLE = [
    name for name in method_names() if scheme(name).reversible and 0.0 <= min(SPANS[name]) <= max(SPANS[name]) <= 1.0
]
ADDITIVE = ("rev_euler", "rev_shark", "rev_sra1")  # for noise that does not depend on the state
STOCHASTIC = [name for name in sde_method_names() if name.startswith("rev") and name not in ADDITIVE]
DOORS = {"odeint": REVERSIBLE, "cdeint": REVERSIBLE, "sdeint": STOCHASTIC}


def switched(t: Tensor, s: float, before: Any, after: Any) -> Tensor:
    """What comes before and after time s. Times on the grid may differ from s by a rounding."""
    return torch.where(torch.as_tensor(t) > s + STEP / 100, after, before)


def outputs(
    door: str, method: str, y0: Tensor, s: float, rate: float, after: float, every: int, **given: Any
) -> Tensor:
    """The solution of an equation that decays at this rate up to time s, and at the rate `after` from then on."""
    times = TIMES[::every]

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(3 * y.flip(-1)) - switched(t, s, rate, after) * y

    if door == "odeint":
        options = {"step_size": STEP}
        return odeint(drift, y0, torch.tensor(times, dtype=torch.float64), method=method, options=options, **given)
    if door == "sdeint":
        noise = BrownianPath(
            0.0, TIMES[-1], tuple(y0.shape), seed=7, dtype=y0.dtype, grid=TIMES, levy_area="space-time"
        )
        terms = drift, lambda t, y: 0.2 * torch.cos(y) * switched(t, s, 1.0, after)
        return sdeint(terms, y0, torch.tensor(times, dtype=torch.float64), noise, method=method, dt=STEP, **given)
    knots = torch.tensor(TIMES, dtype=torch.float64)
    data = torch.sin(3 * knots) + switched(knots, s, 0.0, after)
    x = torch.stack([knots, data], -1).to(y0).expand(len(y0), -1, 2)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([torch.sin(3 * y.flip(-1)) - rate * y, torch.cos(y)], -1)

    path, options = LinearPath(x, knots), {"step_size": STEP}
    return cdeint(path, field, y0, times, method=method, options=options, **given).movedim(-2, 0)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    door = draw(st.sampled_from(sorted(DOORS)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    y0 = torch.randn(BATCH, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return {
        "door": door,
        "method": draw(st.sampled_from(DOORS[door])),
        "y0": y0,
        "rate": draw(st.sampled_from([0.0, 1.0, 3.0, 9.0])),
        "every": draw(st.sampled_from([1, 4, 10])),
        "restarts": draw(st.sampled_from(["auto", Restarts(growth=0.5), Restarts(longest=7)])),
    }


def violated(case: dict[str, Any], num_before: int, after: float, **given: Any) -> bool:
    """Whether what follows so many steps changes an output up to there."""
    s, places = TIMES[num_before], num_before // case["every"] + 1
    with torch.no_grad():
        kept, changed = (outputs(**case, s=s, after=rate, **given) for rate in (case["rate"], after))
    return not torch.equal(kept[:places], changed[:places])


@settings(max_examples=50)
@given(case=cases(), num_before=st.integers(1, NUM_STEPS - 1), after=st.sampled_from([-0.5, 2.0, 8.0]))
def test_what_follows_changes_nothing_before(case: dict[str, Any], num_before: int, after: float) -> None:
    assert not violated(case, num_before, after)


@pytest.mark.slow
@settings(max_examples=20)
@given(
    case=cases().filter(lambda case: case["method"] != "rev_slowrk"),
    num_before=st.integers(1, NUM_STEPS - 1),
    after=st.sampled_from([2.0, 8.0]),
)
def test_what_follows_changes_nothing_before_where_steps_are_compiled(
    case: dict[str, Any], num_before: int, after: float
) -> None:
    assert not violated(case, num_before, after, compile={"backend": "eager"})
