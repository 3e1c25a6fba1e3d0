"""Random compositions of everything a solve is made of: whatever is put together, the gradient is that of the direct mode.

Hypothesis prints the failing example and a blob that reproduces it; `pytest --hypothesis-profile=explore` searches at random.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from revsolve import HermitePath, LinearPath, NaturalCubicPath, cdeint, fixed_point, odeint, sde_method_names, sdeint
from revsolve.core.coupling import Scheme
from revsolve.sde.coefficients import NOISE_TYPES, SDE_TYPES
from revsolve.sde.methods import sde_scheme
from tests.front_doors import DOORS
from tests.fuzzing import LOOSE, TOLERANCE, assert_close, filled, leaves, parts, restarts, schemes, states, times
from tests.hostile import (
    BUFFERS,
    EVERY,
    REASONS,
    Hostile,
    LateOfNormalization,
    OneBuffer,
    Scales,
    caching,
    made,
    start_of,
)
from tests.sde_problems import DIM, NeuralSDE

NUM_EXAMPLES = {"odeint": 380, "hostile": 120, "sdeint": 120, "cdeint": 150, "fixed_point": 150}
reals = st.sampled_from([torch.float64, torch.float32])
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def times_of(spans: list[float], forward: bool = True) -> Tensor:
    """From zero, forward or backward."""
    return torch.tensor([0.0, *spans], dtype=torch.float64).cumsum(0) * (1 if forward else -1)


def mean_of(state: Any) -> Tensor:
    """What every entry feels of all others."""
    return sum((part.mean() for part in parts(state)), start=torch.zeros(()))


def total_of(ys: Any) -> Tensor:
    """A loss that feels every entry."""
    return sum((part.sin().sum() for part in parts(ys)), start=torch.zeros(()))


def mapped(state: Any, field: Callable[[Tensor, Tensor], Tensor], total: Tensor) -> Any:
    """`field(leaf, rate)` of every leaf, the rate being a smooth function of the total, of the kind of the leaf."""
    if isinstance(state, dict):
        return {key: mapped(inner, field, total) for key, inner in state.items()}
    if isinstance(state, list):
        return [mapped(inner, field, total) for inner in state]
    rate = torch.sin(total)
    return field(state, torch.complex(rate, torch.cos(total)) if state.is_complex() else rate)


def of_odeint(
    scheme: Scheme, shape: Any, spans: list[float], forward: bool, steps: int | None, gradient: str, **way: Any
) -> list[Tensor]:
    """By the state, a parameter and the times; `steps` in the shortest span, or None for adaptive ones."""
    torch.manual_seed(0)
    state = filled(shape, way["dtype"])
    scale = torch.tensor(0.8, dtype=way["dtype"].to_real(), requires_grad=True)
    t = times_of(spans, forward).requires_grad_()
    field = lambda t, y: mapped(y, lambda x, rate: rate - 0.5 * x + 0.2 * rate * x, scale * mean_of(y) + t)  # noqa: E731
    chosen: Any = LOOSE if steps is None else {"options": {"step_size": min(spans) / steps}}
    settle = way["restarts"] if scheme.reversible else "auto"
    ys = odeint(field, state, t, method=scheme, gradient=gradient, restarts=settle, **chosen)
    return list(torch.autograd.grad(total_of(ys), [*leaves(state), scale, t]))


@settings(max_examples=NUM_EXAMPLES["odeint"])
@given(
    schemes,
    states,
    times,
    st.booleans(),
    st.sampled_from([1, 2, None]),
    restarts,
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
def test_odeint(
    scheme: Scheme,
    shape: Any,
    spans: list[float],
    forward: bool,
    steps: int | None,
    restarts: Any,
    dtype: torch.dtype,
    undone: bool,
) -> None:
    assume(steps is not None or scheme.error_order is not None)
    assume(steps is not None or getattr(restarts, "budget", None) is None)  # which needs a number of steps
    gradient = "reversible" if undone and scheme.reversible else "checkpoint"
    way = {"restarts": restarts, "dtype": dtype}
    found = of_odeint(scheme, shape, spans, forward, steps, gradient, **way)
    wanted = of_odeint(scheme, shape, spans, forward, steps, "direct", **way)
    assert_close(found, wanted, TOLERANCE[dtype])


def converging(noise_type: str, sde_type: str) -> list[str]:
    """The methods that solve such an SDE."""
    found = []
    for name in sde_method_names():
        with contextlib.suppress(ValueError):
            sde_scheme(name, noise_type, sde_type, None)
            found.append(name)
    return found


equations = st.tuples(st.sampled_from(NOISE_TYPES), st.sampled_from(SDE_TYPES)).flatmap(
    lambda kinds: st.tuples(*map(st.just, kinds), st.sampled_from(converging(*kinds)))
)


def of_sdeint(
    kinds: tuple[str, str, str],
    batch: tuple[int, ...],
    spans: list[float],
    dtype: torch.dtype,
    gradient: str,
    **way: Any,
) -> list[Tensor]:
    """By the state and all parameters."""
    torch.manual_seed(0)
    sde = NeuralSDE(*kinds[:2]).to(dtype)
    y0 = torch.randn(*batch, DIM, dtype=dtype, requires_grad=True)
    ys = sdeint(sde, y0, times_of(spans), method=kinds[2], gradient=gradient, **way)
    return list(torch.autograd.grad(total_of(list(ys)), [y0, *sde.parameters()], materialize_grads=True))


@settings(max_examples=NUM_EXAMPLES["sdeint"])
@given(equations, batches, times, st.integers(1, 4), restarts, reals, st.booleans(), st.booleans(), st.booleans())
def test_sdeint(
    kinds: tuple[str, str, str],
    batch: tuple[int, ...],
    spans: list[float],
    steps: int,
    restarts: Any,
    dtype: torch.dtype,
    undone: bool,
    adaptive: bool,
    logqp: bool,
) -> None:
    scheme = sde_scheme(kinds[2], *kinds[:2], None)
    assume(not adaptive or (scheme.error_order is not None and getattr(restarts, "budget", None) is None))
    way = {"dt": min(spans) / steps, "logqp": logqp and kinds[0] == "diagonal"}
    way |= {"restarts": restarts} if scheme.reversible else {}
    way |= {"adaptive": True, "dt_min": min(spans) / 16, "rtol": 0.1, "atol": 0.1} if adaptive else {}
    gradient = "reversible" if undone and scheme.reversible else "checkpoint"
    found, wanted = (of_sdeint(kinds, batch, spans, dtype, mode, **way) for mode in (gradient, "direct"))
    assert_close(found, wanted, TOLERANCE[dtype])


def of_cdeint(
    kind: Any, batch: tuple[int, ...], places: list[float], dtype: torch.dtype, gradient: str, **way: Any
) -> list[Tensor]:
    """By the state, the data of the path, a parameter, and the times where dX/dt does not jump."""
    torch.manual_seed(0)
    data = torch.randn(*batch, 5, 2, dtype=dtype, requires_grad=True)
    z0 = torch.randn(*batch, 3, dtype=dtype, requires_grad=True)
    scale = torch.tensor(0.8, dtype=dtype, requires_grad=True)
    t = torch.tensor(places, dtype=torch.float64, requires_grad=kind is not LinearPath)
    X = kind(data, torch.tensor([-0.5, 0.3, 0.5, 1.1, 2.0], dtype=dtype))  # substeps may leave the interval of t
    func = lambda t, z: 0.3 * torch.stack([torch.sin(scale * (z.sum(-1, keepdim=True) + z) + t), z.cos()], -1)  # noqa: E731
    zs = cdeint(X, func, z0, t, gradient=gradient, **way)
    wanted = [x for x in (z0, data, scale, t) if x.requires_grad]
    return list(torch.autograd.grad(total_of(zs), wanted, materialize_grads=True))


@settings(max_examples=NUM_EXAMPLES["cdeint"])
@given(
    schemes,
    st.sampled_from([LinearPath, HermitePath, NaturalCubicPath]),
    batches,
    st.lists(st.floats(0.0, 1.5).map(lambda t: round(t, 2)), min_size=2, max_size=4, unique=True).map(sorted),
    st.booleans(),
    st.sampled_from([0.1, 0.3, "knots", "adaptive"]),
    st.sampled_from([None, "derivative", "increment"]),
    restarts,
    reals,
    st.booleans(),
)
def test_cdeint(
    scheme: Scheme,
    kind: Any,
    batch: tuple[int, ...],
    places: list[float],
    forward: bool,
    steps: Any,
    form: str | None,
    restarts: Any,
    dtype: torch.dtype,
    undone: bool,
) -> None:
    assume(not isinstance(steps, str) or getattr(restarts, "budget", None) is None)  # which needs a number of steps
    way: dict[str, Any] = {"method": scheme, "options": {} if form is None else {"form": form}}
    if steps == "adaptive":
        assume(scheme.error_order is not None and form != "increment")
        way |= LOOSE
    else:
        way["options"]["step_size"] = None if steps == "knots" else steps
    way |= {"restarts": restarts} if scheme.reversible else {}
    places = places if forward else places[::-1]
    gradient = "reversible" if undone and scheme.reversible else "checkpoint"
    found, wanted = (of_cdeint(kind, batch, places, dtype, mode, **way) for mode in (gradient, "direct"))
    assert_close(found, wanted, TOLERANCE[dtype])


def of_fixed_point(
    shape: Any, dtype: torch.dtype, beta: float, tensor: bool, gradient: str, **way: Any
) -> list[Tensor]:
    """By the start, a parameter, and beta where that is a tensor."""
    torch.manual_seed(0)
    z0 = filled(shape, dtype)
    scale = torch.tensor(0.8, dtype=dtype.to_real(), requires_grad=True)
    step = torch.tensor(beta, dtype=dtype.to_real(), requires_grad=True) if tensor else beta
    f = lambda z: mapped(z, lambda x, rate: 0.3 * rate + 0.2 * rate * x, scale * mean_of(z))  # noqa: E731
    z = fixed_point(f, z0, beta=step, gradient=gradient, on_failure="ignore", **way)
    inputs = [*leaves(z0), scale, *([step] if tensor else [])]
    return list(torch.autograd.grad(total_of(z), inputs))


@settings(max_examples=NUM_EXAMPLES["fixed_point"])
@given(
    states,
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([0.3, 0.5, 0.8, 1.2]),
    st.booleans(),
    st.sampled_from([0.0, 1e-3]),
    st.integers(1, 12),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["relative", "absolute"]),
    st.booleans(),
)
def test_fixed_point(
    shape: Any,
    dtype: torch.dtype,
    beta: float,
    tensor: bool,
    tol: float,
    max_steps: int,
    anchor_every: int | None,
    residual: str,
    undone: bool,
) -> None:
    way = {"tol": tol, "max_steps": max_steps, "residual": residual}
    gradient, more = ("reversible", {"anchor_every": anchor_every}) if undone else ("checkpoint", {})
    found = of_fixed_point(shape, dtype, beta, tensor, gradient, **way, **more)
    assert_close(found, of_fixed_point(shape, dtype, beta, tensor, "direct", **way), TOLERANCE[dtype])


def of_hostile(
    kind: type[Hostile],
    plain: bool,
    door: str,
    batch: int,
    dtype: torch.dtype,
    gains: list[float],
    again: bool,
    **way: Any,
) -> list[Tensor]:
    """By the start and all parameters, of one solve after another, with an attribute of the field set anew before each."""
    field = made(kind, start_of(batch, dtype), plain)
    start = start_of(batch, dtype).requires_grad_()
    y, inputs = start * field.sizes, [start, *field.parameters()]
    torch.manual_seed(1)
    loss = torch.zeros((), dtype=dtype)
    with caching(field):
        if isinstance(field, OneBuffer):  # which has no gradient, in a plain loop either
            field.requires_grad_(False)
            return [DOORS[door](field, y.detach(), **way)]
        for field.gain in gains:
            ys = DOORS[door](field, y, **way)
            y = ys if door == "fixed_point" else ys[-1]
            loss = loss + (ys / field.sizes).square().sum()
        if not again:
            return list(torch.autograd.grad(loss, inputs, materialize_grads=True))
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), inputs, materialize_grads=True))


@settings(max_examples=NUM_EXAMPLES["hostile"])
@given(
    st.sampled_from(EVERY),
    st.sampled_from(list(DOORS)),
    schemes,
    restarts,
    st.integers(1, 3),
    reals,
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_hostile(
    kind: type[Hostile],
    door: str,
    scheme: Scheme,
    restarts: Any,
    batch: int,
    dtype: torch.dtype,
    gains: list[float],
    undone: bool,
    again: bool,
) -> None:
    """A field that does what fields should not is solved like its plain twin, or refused."""
    assume(kind is not LateOfNormalization or (batch > 1 and len(gains) == 1))  # else torch itself refuses
    settings: dict[str, Any] = {"gradient": "reversible" if undone else "checkpoint"}
    if door == "odeint":
        settings |= {"method": scheme, "gradient": settings["gradient"] if scheme.reversible else "checkpoint"}
    if door != "fixed_point" and (scheme.reversible or door != "odeint"):
        settings["restarts"] = restarts
    wanted = of_hostile(kind, True, door, batch, dtype, gains, again, **{**settings, "gradient": "direct"})
    try:
        found = of_hostile(kind, False, door, batch, dtype, gains, again, **settings)
    except (RuntimeError, ValueError) as refusal:
        with pytest.raises(type(refusal), match=REASONS):
            raise
        assert kind not in (Hostile, Scales, *BUFFERS)
    else:
        assert_close(found, wanted, 100 * TOLERANCE[dtype] if again else TOLERANCE[dtype])
