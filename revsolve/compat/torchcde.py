"""Controls of other packages, and tuples of controls, behind the interface of `Control`."""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from revsolve.field.functorch import numbers
from revsolve.paths.piecewise import Control, Time, Times, Value, check_inside, number


def as_control(path: Any) -> Control:
    """A `Control` as it is; torchcde's paths, and any object with `evaluate`, `derivative` and `interval` (and, if it has knots,
    `grid_points`), adopted; or all of a tuple or list. Raises TypeError for anything else."""
    if isinstance(path, Control):
        return path
    if isinstance(path, (tuple, list)):
        return TupleControl([as_control(member) for member in path])
    if hasattr(path, "controls"):
        return TupleControl([as_control(member) for member in path.controls])
    lacks = [name for name in ("evaluate", "derivative", "interval") if not hasattr(path, name)]
    if lacks:
        raise TypeError(
            f"a control needs evaluate, derivative and interval, but {type(path).__name__} lacks {', '.join(lacks)}: "
            "make one from data with LinearPath, HermitePath or NaturalCubicPath."
        )
    torchcde = sys.modules.get("torchcde")  # whoever holds one of its paths has imported it
    if torchcde is not None and isinstance(path, (torchcde.CubicSpline, torchcde.LinearInterpolation)):
        return ForeignControl(path, many_times=True, smooth=isinstance(path, torchcde.CubicSpline))
    return ForeignControl(path)


class TupleControl(Control):
    """Several controls over one interval, for a state that is a tuple: every answer is the tuple of theirs."""

    def __init__(self, controls: Sequence[Control]) -> None:
        intervals = [numbers(control.interval) for control in controls]
        if not intervals or any(interval != intervals[0] for interval in intervals):
            raise ValueError(f"a tuple of controls needs one interval, but theirs are {intervals}: cut them to it.")
        self.controls = tuple(controls)
        self.interval = controls[0].interval
        self.grid_points = torch.cat([control.grid_points for control in controls]).unique()
        self.knots = sorted({t for control in controls for t in control.knots})
        self.jump_times = torch.cat([control.jump_times for control in controls]).unique()
        self.jumps = sorted({t for control in controls for t in control.jumps})
        self.tensors = tuple(tensor for control in controls for tensor in control.tensors)

    def evaluate(self, t: Time) -> tuple[Value, ...]:
        return tuple(control.evaluate(t) for control in self.controls)

    def derivative(self, t: Time, *, span: tuple[Time, Time] | None = None) -> tuple[Value, ...]:
        return tuple(control.derivative(t, span=span) for control in self.controls)

    def increment(self, t0: Time, t1: Time) -> tuple[Value, ...]:
        return tuple(control.increment(t0, t1) for control in self.controls)

    def derivatives(self, times: Times, *, spans: tuple[Times, Times] | None = None) -> tuple[Value, ...]:
        return tuple(control.derivatives(times, spans=spans) for control in self.controls)

    def increments(self, grid: Times) -> tuple[Value, ...]:
        return tuple(control.increments(grid) for control in self.controls)


class ForeignControl(Control):
    """A path of another package, seen through its `evaluate`, `derivative` and `interval` (and `grid_points`, if any).

    The earlier end of a span is asked for one ulp later, so that a path that answers with the piece before a knot gives
    the piece after it. With `many_times` it also answers times (n,) at once, as (..., n, channels); unless it is `smooth`, dX/dt
    may jump at every knot.
    """

    def __init__(self, path: Any, *, many_times: bool = False, smooth: bool = False) -> None:
        self.path, self.many_times = path, many_times
        self.interval = path.interval if isinstance(path.interval, Tensor) else _times(*map(float, path.interval))
        self.grid_points = getattr(path, "grid_points", self.interval)
        self.knots = numbers(self.grid_points)
        for i, (before, after) in enumerate(pairwise(self.knots)):
            if not before < after:
                raise ValueError(
                    f"the knots of X must be strictly increasing, but knot {i + 1} at {after} follows knot {i} at {before}: "
                    "sort its data by time."
                )
        self.jump_times = self.grid_points[:0] if smooth else self.grid_points[1:-1]
        self.jumps = [] if smooth else self.knots[1:-1]
        self.tensors = (*path.buffers(), *path.parameters()) if isinstance(path, torch.nn.Module) else ()
        self._ends = number(self.interval[0]), number(self.interval[1])

    def evaluate(self, t: Time) -> Tensor:
        return self._ask(self.path.evaluate, self._inside(t, None))

    def derivative(self, t: Time, *, span: tuple[Time, Time] | None = None) -> Tensor:
        return self._ask(self.path.derivative, self._inside(t, span))

    def increment(self, t0: Time, t1: Time) -> Tensor:
        return self.evaluate(t1) - self.evaluate(t0)

    def derivatives(self, times: Times, *, spans: tuple[Times, Times] | None = None) -> Tensor:
        return self._ask(self.path.derivative, self._inside(times, spans)).movedim(-2, 0)

    def increments(self, grid: Times) -> Tensor:
        return self._ask(self.path.evaluate, self._inside(grid, None)).movedim(-2, 0).diff(dim=0)

    def _inside(self, t: Time | Times, span: tuple[Time | Times, Time | Times] | None) -> Tensor:
        """`t` as a tensor, kept within `span` and moved off its earlier end."""
        t = self._tensor(t)
        if t.device.type == "cpu":
            low, high = t.detach().aminmax()
            check_inside(float(low), float(high), self._ends, t)
        if span is None:
            return t
        one, other = (self._tensor(end).detach() for end in span)
        earlier, later = torch.minimum(one, other), torch.maximum(one, other)
        moved = torch.where(t <= earlier, torch.nextafter(earlier, later), torch.minimum(t, later))
        return t + (moved - t).detach()  # as a function of t still the identity

    def _tensor(self, t: Time | Times) -> Tensor:
        return torch.as_tensor(t, dtype=self.interval.dtype, device=self.interval.device)

    def _ask(self, query: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        if t.ndim == 0 or self.many_times:
            return query(t)
        return torch.stack([query(one) for one in t.unbind()], -2)


def _times(first: float, last: float) -> Tensor:
    """An interval of numbers in torch's default dtype, or in float64 where that could not tell times within it apart."""
    dtype = torch.get_default_dtype()
    coarse = torch.finfo(dtype).eps * max(abs(first), abs(last)) > 1e-4 * (last - first)
    return torch.tensor([first, last], dtype=torch.float64 if coarse else dtype, device="cpu")
