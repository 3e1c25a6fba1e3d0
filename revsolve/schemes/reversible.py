"""Every method as a list of coupling updates. Nothing here knows how to undo or to differentiate a step: the engine does."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from revsolve.core.arithmetic import Scalar, Time, moment
from revsolve.core.coupling import CouplingUpdate, Move, Scheme, over
from revsolve.schemes.increment import FieldValue, OneEvaluation, RungeKutta
from revsolve.schemes.tableau import Tableau

Y, Z = 0, 1
COPY = CouplingUpdate(target=Z, source=Y, keep=0.0, mix=1.0)
HALF_KICK = CouplingUpdate(target=Y, source=Z, gain=0.5, increment=OneEvaluation(0.0))
REFLECT = CouplingUpdate(target=Z, source=Y, keep=-1.0, mix=2.0)
UNREFLECT = CouplingUpdate(target=Y, source=Z, keep=2.0, mix=-1.0)
MEAN = CouplingUpdate(target=Y, source=Z, keep=0.5, mix=0.5)
LEAPS = tuple(CouplingUpdate(target=i, source=1 - i, gain=1.0, increment=OneEvaluation(0.5)) for i in (Y, Z))
CUBE_ROOT = 2 ** (1 / 3)
FOURTH_ROOT = 4 ** (1 / 3)


def halved(fractions: Sequence[float]) -> tuple[float, ...]:
    """Every substep as two halves: one alone reflects z about y, two in a row are near the identity on the whole pair.

    The theory of symmetric compositions asks for that. Single substeps lose an order at every restart, and reach 4 at most.
    """
    return tuple(fraction / 2 for fraction in fractions for _ in range(2))


# Symmetric compositions: fractions of the step that raise a symmetric second-order method to the order given.
THREE_STAGES = (1 / (2 - CUBE_ROOT), -CUBE_ROOT / (2 - CUBE_ROOT), 1 / (2 - CUBE_ROOT))  # Yoshida 1990
_SUZUKI = 1 / (4 - FOURTH_ROOT)
FIVE_STAGES = (_SUZUKI, _SUZUKI, 1 - 4 * _SUZUKI, _SUZUKI, _SUZUKI)  # Suzuki 1990
YOSHIDA4, SUZUKI4 = halved(THREE_STAGES), halved(FIVE_STAGES)
_KAHAN_LI = (0.39216144400731413928, 0.33259913678935943860, -0.70624617255763935981, 0.082213596293550800230)
KAHAN_LI6 = halved((*_KAHAN_LI, 1 - 2 * sum(_KAHAN_LI), *reversed(_KAHAN_LI)))  # Kahan & Li 1997
# Divided differences over more nodes would measure the second-order wobble between substeps, not the error of the step.
ERROR_NODES = 4


def plain(tableau: Tableau) -> Scheme:
    """The Runge-Kutta method itself (Hairer, Norsett & Wanner 1993, II.1): one state, steps that cannot be undone."""
    error = 0.0 if tableau.b_error is None else 1.0
    update = CouplingUpdate(target=Y, source=Y, gain=1.0, increment=RungeKutta(tableau), error=error)
    return Scheme(tableau.name, (update,), (), tableau.order, tableau.error_order)


# The error of a step is carried back along the flow within a segment, so that it grows with the segment's length where the order
# is odd: to 36 times that of `heun3` over 32 steps of a circular orbit, but 1.4 times over 8 (docs/how_to_choose.md).
THIRD_ORDER_LONGEST = 8


def reversible(tableau: Tableau, coupling: float = 1.0) -> Scheme:
    """The reversible pair over any explicit Runge-Kutta method (McCallum & Foster 2024, arXiv 2410.11648).

    With Psi the increment of the method, l the coupling and h the step,

        y1 = l y0 + (1 - l) z0 + Psi_h(t0, z0),    z1 = z0 - Psi_{-h}(t1, y1).

    Order of the method, twice its evaluations. The coupling must lie in (0, 1]; 1 (the default) relies on restarts for
    stability and loses nothing to rounding, smaller values multiply rounding errors by 1/l for every undone step.

    Raises:
        ValueError: the coupling lies outside (0, 1].
    """
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
        gap_order=tableau.order + 1,
        longest=THIRD_ORDER_LONGEST if tableau.order == 3 else None,
    )


def reversible_heun(composition: Sequence[float] = (1.0,), order: int = 2) -> Scheme:
    """Reversible Heun (Kidger, Foster, Li & Lyons 2021, arXiv 2105.13493), or a symmetric composition of it.

        y += f(t0, z) h/2;    z = 2 y - z;    y += f(t1, z) h/2

    One evaluation a step (one a substep when composed): the value at the end is that of the next beginning. Compositions need
    `halved` substeps.

    Raises:
        ValueError: the fractions of the composition do not add up to 1.
    """
    updates = _compose((HALF_KICK, REFLECT, replace(HALF_KICK, increment=OneEvaluation(1.0))), composition)
    weights, nodes = [(a + b) / 2 for a, b in itertools.pairwise([0.0, *composition, 0.0])], _partial_sums(composition)
    for i, error in enumerate(_embedded(weights, nodes)):
        kick = updates[2 * i]
        updates[2 * i] = replace(kick, error=error / (kick.end - kick.start))
    error_order = min(len(composition), ERROR_NODES - 1)
    name = _composed_name("reversible_heun", order)
    gap_order = order + 1 if _is_halved(composition) else 2
    run = functools.partial(_two_step, nodes)
    return Scheme(name, tuple(updates), (COPY,), order, error_order, gap_order=gap_order, run=run)


def _two_step(nodes: Sequence[float], times: Sequence[Time]) -> list[Move]:
    """Reversible Heun over several steps as the leapfrog that z follows: increments t_{n-1} -> t_{n+1} at z_n added to z_{n-1}.

    Between the half kicks at both ends, y is replaced by the z before: one update for each evaluation instead of two.
    """
    t = [moment(t0, t1, c) for t0, t1 in itertools.pairwise(times) for c in nodes[:-1]] + [times[-1]]
    out: list[Move] = [(HALF_KICK, t[0], t[1], t[0]), (REFLECT, t[0], t[1], None)]
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
    `halved` substeps.

    Raises:
        ValueError: eta lies outside (1/2, 1], a composition is damped, or its fractions do not add up to 1.
    """
    if not 0.5 < eta <= 1.0:
        raise ValueError(f"eta must lie in (1/2, 1], but it is {eta!r}: 1.0 is undamped, the default.")
    if len(composition) > 1 and eta != 1.0:
        raise ValueError(f"only the undamped method (eta = 1) gains order by composition, but eta is {eta!r}.")
    drift = CouplingUpdate(Y, Z, mix=0.5, rate=True)
    turn = CouplingUpdate(Z, Y, keep=1.0 - 2.0 * eta, gain=2.0 * eta, increment=OneEvaluation(0.5), rate=True)
    updates = _compose((drift, turn, drift), composition)
    if len(composition) == 1:
        updates = [replace(updates[0], error=-1.0), updates[1], replace(updates[2], error=1.0)]
    else:
        middles = [(a + b) / 2 for a, b in itertools.pairwise(_partial_sums(composition))]
        for i, error in enumerate(_embedded(composition, middles)):
            updates[2 * i + 1] = replace(updates[2 * i + 1], error=error / composition[i])
    start = CouplingUpdate(Z, Y, keep=0.0, gain=1.0, increment=OneEvaluation(0.0), rate=True)
    error_order = max(1, min(len(composition), ERROR_NODES) - 1)
    name = _composed_name("alf", order)
    run = functools.partial(_joined_drifts, updates)
    return Scheme(name, tuple(updates), (start,), order if eta == 1.0 else 1, error_order, staggered=True, run=run)


def _joined_drifts(updates: Sequence[CouplingUpdate], times: Sequence[Time]) -> list[Move]:
    """The updates of several steps; the drift that ends a step and the one that begins the next are one over both spans."""
    out: list[Move] = []
    for t0, t1 in itertools.pairwise(times):
        step = [over(update, t0, t1) for update in updates]
        if out:
            drift, start, _, _ = out.pop()
            step[0] = (drift, start, step[0][2], None)
        out += step
    return out


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
    return Scheme("leapfrog", updates, (start,), 2, None, staggered=True)


@dataclass(frozen=True)
class _Stopping(CouplingUpdate):
    """A relaxation in which a sample that has stopped stays where it is: keep 1, gain 0."""

    moves: Callable[[int], Tensor] | None = (
        None  # 1 for an entry that takes part in the step of this number, 0 for others
    )

    def coefficients(self, t0: Time, t1: Time) -> tuple[Scalar, Scalar, Scalar]:
        assert self.moves is not None
        gain = self.gain * self.moves(int(t0))
        return 1.0 - gain, 0.0, gain


def relaxation(beta: Scalar, moves: Callable[[int], Tensor] | None = None) -> Scheme:
    """The reversible fixed-point iteration of RevDEQ (McCallum, Arora & Foster 2025, arXiv 2509.12917).

        z = (1 - beta) z + beta f(y);    y = (1 - beta) y + beta f(z)

    Two evaluations a step. beta is a number or a tensor that broadcasts against the state; with `moves`, entries where it is
    0 in a step stay as they are.
    """
    if moves is None:
        towards = CouplingUpdate(Z, Y, keep=1.0 - beta, gain=beta, increment=FieldValue())
    else:
        towards = _Stopping(Z, Y, gain=beta, increment=FieldValue(), moves=moves)
    return Scheme("relaxation", (towards, replace(towards, target=Y, source=Z)), (COPY,), order=1)


def _is_halved(composition: Sequence[float]) -> bool:
    return len(composition) % 2 == 0 and composition[::2] == composition[1::2]


def _composed_name(name: str, order: int) -> str:
    return name if order == 2 else f"{name}{order}"


def _compose(base: Sequence[CouplingUpdate], composition: Sequence[float]) -> list[CouplingUpdate]:
    """The same updates over the substeps one after another; two that meet and do the same become one over both spans."""
    updates: list[CouplingUpdate] = []
    for a, b in itertools.pairwise(_partial_sums(composition)):
        for update in base:
            last = updates[-1] if updates else None
            if last is not None and replace(update, start=last.start, end=last.end, increment=last.increment) == last:
                updates[-1] = _joined(last, replace(update, start=a, end=b))
            else:
                updates.append(replace(update, start=a, end=b))
    return updates


def _joined(first: CouplingUpdate, second: CouplingUpdate) -> CouplingUpdate:
    """One update over both spans; an evaluation at the end of the first is that at the start of the second."""
    if first.increment is None:
        return replace(first, end=second.end)
    at = (first.end - first.start) / (second.end - first.start)
    return replace(first, end=second.end, increment=OneEvaluation(at))


def _partial_sums(composition: Sequence[float]) -> list[float]:
    if not math.isclose(sum(composition), 1.0, abs_tol=1e-14):
        raise ValueError(
            f"the fractions of a composition must add up to 1, but {composition} add up to {sum(composition)}."
        )
    return [*(sum(composition[:i]) for i in range(len(composition))), 1.0]


def _embedded(weights: Sequence[float], nodes: Sequence[float]) -> list[float]:
    """Error weights: the multiple of a divided difference over spread nodes that drops one of them from the quadrature."""
    count = min(len(nodes), ERROR_NODES)
    spread = [round(i * (len(nodes) - 1) / (count - 1)) for i in range(count)]
    difference = {i: 1 / math.prod([nodes[i] - nodes[j] for j in spread if j != i]) for i in spread}
    scale = sorted([weights[i] / difference[i] for i in spread], key=abs)[0]  # torch.compile knows no min by key
    return [scale * difference.get(i, 0.0) for i in range(len(nodes))]
