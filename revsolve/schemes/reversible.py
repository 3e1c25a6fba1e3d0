"""Every method as a list of coupling updates. Nothing here knows how to undo or to differentiate a step: the engine does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from revsolve.core.arithmetic import Scalar, Time, moment
from revsolve.core.coupling import CouplingUpdate, Increment, ScheduledUpdate, Scheme, scheduled
from revsolve.schemes.composition import ERROR_NODES, compose, embedded_weights, partial_sums
from revsolve.schemes.increment import Given, OneEvaluation, RungeKutta
from revsolve.schemes.tableau import Tableau, as_tableau

Y, Z = 0, 1
ZERO = Given()
COPY = CouplingUpdate(target=Z, source=Y, keep=0.0, mix=1.0)
HALF_KICK = CouplingUpdate(target=Y, source=Z, gain=0.5, increment=OneEvaluation(0.0))
REFLECT = CouplingUpdate(target=Z, source=Y, keep=-1.0, mix=2.0)
UNREFLECT = CouplingUpdate(target=Y, source=Z, keep=2.0, mix=-1.0)
MEAN = CouplingUpdate(target=Y, source=Z, keep=0.5, mix=0.5)
DIFFERENCE = CouplingUpdate(target=Z, source=Y, keep=-1.0, mix=1.0)
LEAPS = tuple(CouplingUpdate(target=i, source=1 - i, gain=1.0, increment=OneEvaluation(0.5)) for i in (Y, Z))


def plain(tableau: Tableau | str) -> Scheme:
    """The Runge-Kutta method itself (Hairer, Norsett & Wanner 1993, II.1): one state, steps that cannot be undone."""
    tableau = as_tableau(tableau)
    error = 0.0 if tableau.b_error is None else 1.0
    update = CouplingUpdate(target=Y, source=Y, gain=1.0, increment=RungeKutta(tableau), error=error)
    adaptive = tableau.error_order is not None
    return Scheme(tableau.name, (update,), (), tableau.order, tableau.error_order, adaptive=adaptive)


# The error of a step is carried back along the flow within a segment, so that it grows with the segment's length where the order
# is odd: to 36 times that of `heun3` over 32 steps of a circular orbit, but 1.4 times over 8 (docs/how_to_choose.md).
ODD_ORDER_LONGEST = 8


def reversible(tableau: Tableau | str, coupling: float = 1.0) -> Scheme:
    """The reversible pair over any explicit Runge-Kutta method, or one given by name (McCallum & Foster 2024, arXiv 2410.11648).

    With Psi the increment of the method, l the coupling and h the step,

        y1 = l y0 + (1 - l) z0 + Psi_h(t0, z0),    z1 = z0 - Psi_{-h}(t1, y1).

    Order of the method, twice its evaluations. The coupling must lie in (0, 1]; 1 (the default) relies on restarts for
    stability and loses nothing to rounding, smaller values multiply rounding errors by 1/l for every undone step.

    Raises:
        TypeError: the method is neither a Tableau nor a name.
        ValueError: an unknown name; the coupling lies outside (0, 1].
    """
    tableau = as_tableau(tableau)
    if not 0.0 < coupling <= 1.0:
        raise ValueError(f"coupling must lie in (0, 1], but it is {coupling!r}: 1.0 is the default, papers use 0.999.")
    coupling, increment = float(coupling), RungeKutta(tableau)
    error = 0.0 if tableau.b_error is None else 1.0
    updates = (
        CouplingUpdate(Y, Z, keep=coupling, mix=1.0 - coupling, gain=1.0, increment=increment, error=error),
        CouplingUpdate(Z, Y, gain=-1.0, increment=increment, start=1.0, end=0.0),
    )
    return Scheme(
        f"rev_{tableau.name}",
        updates,
        (COPY,),
        tableau.order,
        tableau.error_order,
        defect_order=tableau.order + 1,
        max_segment=ODD_ORDER_LONGEST if tableau.order in (1, 3) else None,
        adaptive=tableau.error_order is not None,
        parameters=("coupling",),
    )


def reversible_heun(composition: Sequence[float] = (1.0,), order: int = 2) -> Scheme:
    """Reversible Heun (Kidger, Foster, Li & Lyons 2021, arXiv 2105.13493), or a symmetric composition of it.

        y += f(t0, z) h/2;    z = 2 y - z;    y += f(t1, z) h/2

    One evaluation a step (one a substep when composed): the value at the end is that of the next beginning. Compositions need
    `halved` substeps (see `schemes.composition`).

    Raises:
        ValueError: the fractions of the composition do not add up to 1.
    """
    updates = compose((HALF_KICK, REFLECT, replace(HALF_KICK, increment=OneEvaluation(1.0))), composition)
    weights, nodes = [(a + b) / 2 for a, b in itertools.pairwise([0.0, *composition, 0.0])], partial_sums(composition)
    for i, error in enumerate(embedded_weights(weights, nodes)):
        kick = updates[2 * i]
        updates[2 * i] = replace(kick, error=error / (kick.end - kick.start))
    error_order = min(len(composition), ERROR_NODES - 1)
    name = "reversible_heun" if order == 2 else f"reversible_heun{order}"
    halved = composition[::2] == composition[1::2]
    defect_order = order + 1 if halved else 2
    merged = functools.partial(_two_step, nodes)
    return Scheme(name, tuple(updates), (COPY,), order, error_order, defect_order=defect_order, merged=merged)


def _two_step(nodes: Sequence[float], times: Sequence[Time]) -> list[ScheduledUpdate]:
    """Reversible Heun over several steps as the leapfrog that z follows: increments t_{n-1} -> t_{n+1} at z_n added to z_{n-1}.

    Between the half kicks at both ends, y is replaced by the z before: one update for each evaluation instead of two.
    """
    t = [moment(t0, t1, c) for t0, t1 in itertools.pairwise(times) for c in nodes[:-1]] + [times[-1]]
    out: list[ScheduledUpdate] = [(HALF_KICK, t[0], t[1], t[0]), (REFLECT, t[0], t[1], None)]
    first, last = 1, len(t) - 1
    if (last - first) % 2:  # z must end where it began
        out += [(HALF_KICK, t[0], t[2], t[1]), (REFLECT, t[1], t[2], None)]
        first = 2
    out.append((UNREFLECT, t[first - 1], t[first], None))
    out += [(LEAPS[(n - first) % 2], t[n - 1], t[n + 1], t[n]) for n in range(first, last)]
    out.append((MEAN, t[last - 1], t[last], None))
    out.append((HALF_KICK, t[last - 1], t[last], t[last]))
    return out


def alf(eta: float = 1.0, composition: Sequence[float] = (1.0,), order: int = 2) -> Scheme:
    """Asynchronous leapfrog (Zhuang et al. 2021, MALI, arXiv 2102.04668), or a symmetric composition of it.

        y += v h/2;    v = (1 - 2 eta) v + 2 eta f(t + h/2, y);    y += v h/2

    One evaluation a step. The damping eta must lie in (1/2, 1]; 1 (the default) is symmetric and of order 2. Compositions need
    `halved` substeps (see `schemes.composition`).

    Raises:
        ValueError: eta lies outside (1/2, 1], a composition is damped, or its fractions do not add up to 1.
    """
    if not 0.5 < eta <= 1.0:
        raise ValueError(f"eta must lie in (1/2, 1], but it is {eta!r}: 1.0 is undamped, the default.")
    if len(composition) > 1 and eta != 1.0:
        raise ValueError(f"only the undamped method (eta = 1) gains order by composition, but eta is {eta!r}.")
    drift = CouplingUpdate(Y, Z, mix=0.5, rate=True)
    relax = CouplingUpdate(Z, Y, keep=1.0 - 2.0 * eta, gain=2.0 * eta, increment=OneEvaluation(0.5), rate=True)
    updates = compose((drift, relax, drift), composition)
    if len(composition) == 1:
        updates = [replace(updates[0], error=-1.0), updates[1], replace(updates[2], error=1.0)]
    else:
        middles = [(a + b) / 2 for a, b in itertools.pairwise(partial_sums(composition))]
        for i, error in enumerate(embedded_weights(composition, middles)):
            updates[2 * i + 1] = replace(updates[2 * i + 1], error=error / composition[i])
    start = CouplingUpdate(Z, Y, keep=0.0, gain=1.0, increment=OneEvaluation(0.0), rate=True)
    error_order = max(1, min(len(composition), ERROR_NODES) - 1)
    name, own = ("alf", ("eta",)) if order == 2 else (f"alf{order}", ())  # type: str, tuple[str, ...]
    order = order if eta == 1.0 else 1
    return Scheme(name, tuple(updates), (start,), order, error_order, has_velocity=True, parameters=own)


def leapfrog() -> Scheme:
    """The explicit midpoint rule y_{n+1} = y_{n-1} + 2 h f(y_n), written with the velocity v = (y_n - y_{n-1}) / h.

        v = 2 f(t0, y) - v;    y += v h

    One evaluation a step, order 2 on even steps. A restart sets v half a step back, to second order.
    """
    backwards = Tableau(a=((), (1 / 2,)), b=(2.0, -1.0), c=(0.0, 1 / 2), order=1, name="half_step_back")
    updates = (
        CouplingUpdate(Z, Y, keep=-1.0, gain=2.0, increment=OneEvaluation(0.0), rate=True),
        CouplingUpdate(Y, Z, mix=1.0, rate=True),
    )
    start = CouplingUpdate(Z, Y, keep=0.0, gain=1.0, increment=RungeKutta(backwards), rate=True)
    return Scheme("leapfrog", updates, (start,), 2, None, has_velocity=True)


@dataclass(frozen=True)
class _Numbered(CouplingUpdate):
    """An update whose keep and gain are others in every step, `of_step(number)`."""

    of_step: Callable[[int], tuple[Scalar, Scalar]] | None = None

    def coefficients(self, t0: Time, t1: Time) -> tuple[Scalar, Scalar, Scalar]:
        assert self.of_step is not None
        keep, gain = self.of_step(int(t0))
        return keep, self.mix, gain


def relaxation(beta: Scalar, active: Callable[[int], Tensor] | None = None) -> Scheme:
    """The reversible fixed-point iteration of RevDEQ (McCallum, Arora & Foster 2025, arXiv 2509.12917).

        z = (1 - beta) z + beta f(y);    y = (1 - beta) y + beta f(z)

    Two evaluations a step, both at its number. beta is a number or a tensor that broadcasts against the state; with `active`,
    entries where it is 0 in a step stay as they are.
    """
    value = OneEvaluation(0.0)
    update = CouplingUpdate(Z, Y, keep=1.0 - beta, gain=beta, increment=value)
    if active is not None:
        going = lambda n: (1.0 - beta * active(n), beta * active(n))  # noqa: E731
        update = _Numbered(Z, Y, gain=beta, increment=value, of_step=going)
    return Scheme("relaxation", (update, replace(update, target=Y, source=Z)), (COPY,), order=1)


def two_step(name: str, keep: float, gain: float, first_gain: float) -> Scheme:
    """y_{n+1} = y_n + v_{n+1} with v_{n+1} = keep v_n + gain f(y_n), from v_0 = 0; in the step from time 0 with `first_gain`."""
    kick = CouplingUpdate(Z, Y, keep=keep, gain=gain, increment=OneEvaluation(0.0))
    if first_gain != gain:
        started = lambda n: (keep, gain if n else first_gain)  # noqa: E731
        kick = _Numbered(Z, Y, keep=keep, gain=gain, increment=OneEvaluation(0.0), of_step=started)
    updates = (kick, CouplingUpdate(Y, Z, mix=1.0))
    merged = functools.partial(_leaps, updates, gain) if keep == -1.0 else None
    return starting_from(ZERO, Scheme(name, updates, (COPY,), order=1, merged=merged))


def _leaps(updates: Sequence[CouplingUpdate], gain: float, times: Sequence[Time]) -> list[ScheduledUpdate]:
    """The steps of `two_step` with keep = -1 as leaps: with the state before in the place of v, y_{n+1} = y_{n-1} + gain f(y_n).

    That saves a third of the solver's kernels, 2 % of the gradient of 64 small transformer blocks. The first step is as it was,
    so that it is undone from the stored state, and one more where y would not end where it began.
    """
    first = 1 + len(times) % 2
    out = [scheduled(update, *step) for step in itertools.pairwise(times[: first + 1]) for update in updates]
    if first < len(times) - 1:
        leaps = [replace(leap, gain=gain) for leap in LEAPS]
        out.append((DIFFERENCE, times[first], times[first], None))
        out += [(leaps[(n - first + 1) % 2], times[n], times[n + 1], times[n]) for n in range(first, len(times) - 1)]
        out.append((DIFFERENCE, times[-1], times[-1], None))
    return out


def starting_from(increment: Increment, scheme: Scheme) -> Scheme:
    """The scheme with this increment as its z at the start."""
    return replace(scheme, restart=(CouplingUpdate(Z, Y, keep=0.0, gain=1.0, increment=increment),))
