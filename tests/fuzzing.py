"""What random solves are made of (tests/fuzz/test_fuzz.py): strategies, states of any structure, how gradients compare."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from revsolve import Restarts, Tableau, alf, leapfrog, plain, reversible, reversible_heun
from revsolve.schemes.composition import KAHAN_LI6, SUZUKI4, YOSHIDA4
from revsolve.schemes.tableau import TABLEAUS

# Rounding of a handful of steps, relative to the largest gradient. A coupling of 0.8 multiplies it by 1 / 0.8 ** 24 = 200.
TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 2e-2, torch.complex64: 2e-2}
LOOSE = {"rtol": 1e-2, "atol": 1e-2}  # of adaptive steps: a handful of them

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
    """A state of this structure with random numbers that want gradients; vectors are real even if dtype is not."""
    if isinstance(shape, dict):
        return {key: filled(inner, dtype) for key, inner in shape.items()}
    if isinstance(shape, list):
        return [filled(inner, dtype) for inner in shape]
    real = dtype.is_complex and len(shape) == 1
    return torch.randn(shape, dtype=dtype.to_real() if real else dtype, requires_grad=True)


def leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [leaf for inner in (state.values() if isinstance(state, dict) else state) for leaf in leaves(inner)]


def parts(state: Any) -> list[Tensor]:
    """The leaves as real numbers."""
    return [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in leaves(state)]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """All together: relative to the largest of all gradients."""
    size = max(float(x.abs().max()) for x in wanted)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    assert worst <= tolerance * size
