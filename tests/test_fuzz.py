"""Random compositions of everything a solve is made of: whatever is put together, the gradient is that of the direct mode.

Hypothesis prints the failing example and a blob that reproduces it; `pytest --hypothesis-profile=explore` searches at random.
"""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revsolve import Restarts, Tableau, alf, leapfrog, odeint, plain, reversible, reversible_heun
from revsolve.core.coupling import Scheme
from revsolve.schemes.reversible import KAHAN_LI6, SUZUKI4, YOSHIDA4
from revsolve.schemes.tableau import TABLEAUS

NUM_EXAMPLES = 500
# Rounding of a handful of steps, relative to the largest gradient. A coupling of 0.8 multiplies it by 1 / 0.8 ** 24 = 200.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-2}

weights = st.floats(-1.0, 1.0).map(lambda w: round(w, 3))
base = st.sampled_from([name for name in TABLEAUS if name != "dop853"])


@st.composite
def tableaus(draw: st.DrawFn) -> Tableau:
    """Any explicit tableau of order one with up to four stages."""
    rows = [draw(st.lists(weights, min_size=i, max_size=i)) for i in range(draw(st.integers(1, 4)))]
    b = draw(st.lists(weights, min_size=len(rows) - 1, max_size=len(rows) - 1))
    return Tableau(a=rows, b=[*b, 1.0 - sum(b)], c=[sum(row) for row in rows], order=1, name="random")


schemes = st.one_of(
    st.builds(reversible, st.one_of(tableaus(), base.map(TABLEAUS.get)), st.sampled_from([1.0, 0.999, 0.8])),
    st.builds(plain, st.one_of(tableaus(), base.map(TABLEAUS.get))),
    st.sampled_from([reversible_heun(), alf(), alf(0.9), leapfrog()]),
    st.sampled_from([(YOSHIDA4, 4), (SUZUKI4, 4), (KAHAN_LI6, 6)]).map(lambda c: alf(1.0, *c)),
    st.sampled_from([(YOSHIDA4, 4), (SUZUKI4, 4), (KAHAN_LI6, 6)]).map(lambda c: reversible_heun(*c)),
)
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
states = st.recursive(
    shapes,
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, min_size=1),
    max_leaves=4,
)
times = st.lists(st.floats(0.05, 0.6), min_size=1, max_size=3)
restarts = st.sampled_from(["auto", None, 1, 3, Restarts(budget=2), Restarts(growth=5.0, longest=4)])


def filled(shape: Any, dtype: torch.dtype) -> Any:
    """A state of this structure with random numbers that want gradients."""
    if isinstance(shape, dict):
        return {key: filled(inner, dtype) for key, inner in shape.items()}
    if isinstance(shape, list):
        return [filled(inner, dtype) for inner in shape]
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [leaf for inner in (state.values() if isinstance(state, dict) else state) for leaf in leaves(inner)]


def rates(state: Any, t: Tensor, scale: Tensor, total: Tensor) -> Any:
    """A smooth field in which every entry feels every other one."""
    if isinstance(state, dict):
        return {key: rates(inner, t, scale, total) for key, inner in state.items()}
    if isinstance(state, list):
        return [rates(inner, t, scale, total) for inner in state]
    return torch.sin(scale * total + t) - 0.5 * state


def gradients(
    scheme: Scheme, shape: Any, spans: list[float], forward: bool, steps: int, gradient: str, **way: Any
) -> list[Tensor]:
    torch.manual_seed(0)
    state = filled(shape, way["dtype"])
    scale = torch.tensor(0.8, dtype=way["dtype"], requires_grad=True)
    ends = torch.tensor([0.0, *spans], dtype=torch.float64).cumsum(0) * (1 if forward else -1)
    t = ends.requires_grad_()
    field = lambda t, y: rates(y, t, scale, sum(leaf.mean() for leaf in leaves(y)))  # noqa: E731
    options = {"step_size": min(spans) / steps}
    settle = way["restarts"] if scheme.reversible else "auto"
    ys = odeint(field, state, t, method=scheme, options=options, gradient=gradient, restarts=settle)
    return list(torch.autograd.grad(sum(leaf.sin().sum() for leaf in leaves(ys)), [*leaves(state), scale, t]))


@settings(max_examples=NUM_EXAMPLES)
@given(
    schemes, states, times, st.booleans(), st.integers(1, 2), restarts, st.sampled_from(list(TOLERANCE)), st.booleans()
)
def test_whatever_is_put_together_has_the_direct_gradient(
    scheme: Scheme,
    shape: Any,
    spans: list[float],
    forward: bool,
    steps: int,
    restarts: Any,
    dtype: torch.dtype,
    undone: bool,
) -> None:
    gradient = "reversible" if undone and scheme.reversible else "checkpoint"
    way = {"restarts": restarts, "dtype": dtype}
    found = gradients(scheme, shape, spans, forward, steps, gradient, **way)
    wanted = gradients(scheme, shape, spans, forward, steps, "direct", **way)
    size = max(float(x.abs().max()) for x in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    assert worst <= TOLERANCE[dtype] * size
