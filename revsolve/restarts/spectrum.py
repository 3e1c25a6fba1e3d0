"""What the field would do to a perturbation: its fastest modes, and for how many steps a scheme stands them.

A mode that the solution does not contain shows neither in y nor in z, but a gradient asks for it. So some restarts take one
vector-Jacobian product of an evaluation that they make anyway: a step of power iteration on the transposed Jacobian.
"""

from __future__ import annotations

import cmath
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from revsolve.core.arithmetic import Time
from revsolve.core.coupling import Scheme, State, advance, schedule, scheduled
from revsolve.core.tape import Memo, vector_jacobian_product

SEED = 31_415  # of the first direction: the same in every solve, and apart from the user's random state
PARALLEL = 1e-3  # 1 - cos^2 of the angle below which two directions are taken for one
SMALLEST, LARGEST, PER_OCTAVE, NUM_ANGLES = 1 / 16, 8.0, 4, 13  # the |h * rate| tabulated, and angles: decay to growth
FARTHEST = 256  # steps
MARGIN = 1.2  # power iteration sees the fastest mode from below
LASTING = 1.1  # how far the parasitic part may carry a mode that the method itself lets last
AMPLIFIED = 4.0  # how far perturbations of y and z may grow; more than that costs accuracy (docs/exactness.md)
TRIPLED = 3.0  # how far, where z is of lower order than y
FAITHFUL = 4e-7  # what rounding may grow to by undoing: gradients in float32 are to be within 1e-4 of those of direct
OFTEN, SELDOM = 4, 128  # steps from one product to the next, at least and at most
CALM = 0.25  # of the time in which the fastest mode changes by a factor e may pass without one
STEADY = 0.2  # a product that changes what is known by less than this share
PATIENCE = 4  # makes the pause to the next one so many times as long


class Spectrum:
    """Power iteration, one product at some restarts. The two latest directions tell two rates, which may be a complex pair.

    In their span, the Jacobian is the matrix of least squares: for a symmetric one, these are two steps of Lanczos' method.
    """

    def __init__(self, scheme: Scheme, memo: Memo) -> None:
        self.scheme, self.memo = scheme, memo
        self.rates: tuple[complex, ...] = ()
        self.fastest = 0.0  # the largest of them in size
        self.latest: Tensor | None = None  # both of length 1; the product of `before` is stretch * latest
        self.before: Tensor | None = None
        self.stretch, self.cosine = 0.0, 1.0  # the cosine is that of the angle between the two
        self.rounding = 1.0
        self.calm = 0  # steps in which the fastest mode hardly changes anything
        self.latest_at, self.pause = 0, 0  # the steps at the latest product, and from there to the next

    def follow(self, n: int, t: Time, y: Tensor, h: float, hint: bool) -> int:
        """The reach for steps of length h, after a product at (t, y), where n steps end, if it is time for one. A gap that ended
        a segment early is a hint that the field has changed."""
        if self.memo.is_rate and n >= self.latest_at + (OFTEN if hint else self.pause):
            known = self.fastest
            self.look(t, y)
            steady = abs(self.fastest - known) <= STEADY * known
            self.calm = min(int(CALM / abs(h * self.fastest)), SELDOM) if self.fastest else 0
            self.pause = max(min(PATIENCE * self.pause, SELDOM) if steady else OFTEN, self.calm)
            self.latest_at = n
        return self.reach(h)

    def look(self, t: Time, y: Tensor) -> None:
        """Take the product of the latest direction and the Jacobian of the term at (t, y), and learn from it; one device read.
        The memo keeps the value at (t, y), unless gradients are recorded."""
        if self.latest is None:
            self.latest, self.rounding = _some_direction(y), torch.finfo(y.dtype).eps
        v, (leaf, value) = self.latest, self.memo.recorded(t, y)
        if not value.requires_grad:
            return
        cotangent = (torch.view_as_complex(v) if value.is_complex() else v).to(value.dtype)
        (w,) = vector_jacobian_product((value,), (leaf,), (cotangent,))
        if w is not None:
            w = (torch.view_as_real(w) if w.is_complex() else w).detach().to(v.dtype)
            before, flat = v if self.before is None else self.before, w.flatten()
            products = torch.dot(before.flatten(), flat), torch.dot(v.flatten(), flat), torch.dot(flat, flat)
            self._learn(w, *torch.stack(products).tolist())

    def _learn(self, product: Tensor, before_product: float, latest_product: float, square: float) -> None:
        if not 0.0 < square < math.inf:
            self.rates, self.fastest, self.before = (), 0.0, None
            return
        size, cosine, apart = math.sqrt(square), self.cosine, 1.0 - self.cosine**2
        if self.before is None or apart < PARALLEL:
            self.rates = (complex(latest_product, math.sqrt(max(square - latest_product**2, 0.0))),)
        else:
            onto_before = (before_product - cosine * latest_product) / apart
            onto_latest = (latest_product - cosine * before_product) / apart
            root = cmath.sqrt(onto_latest**2 / 4 + onto_before * self.stretch)
            self.rates = (onto_latest / 2 + root, onto_latest / 2 - root)
        self.fastest = max(map(abs, self.rates))
        self.before, self.latest = self.latest, product / size
        self.stretch, self.cosine = size, latest_product / size

    def reach(self, h: float) -> int:
        """For how many steps of length h from a restart the modes are amplified no more than they may be: by the scheme, and by
        undoing it, which amplifies rounding errors."""
        faithful, longest = math.log(max(AMPLIFIED, FAITHFUL / self.rounding)), FARTHEST
        for rate in self.rates:
            z = MARGIN * h * rate
            if abs(z.real) * longest > faithful:
                longest = int(faithful / abs(z.real))
            longest = min(longest, _reach(self.scheme, z))
        return max(1, longest)


def _some_direction(y: Tensor) -> Tensor:
    real = torch.view_as_real(y.detach()) if y.is_complex() else y
    v = torch.rand(real.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float32, device="cpu") - 0.5
    return (v / v.norm()).to(real.device, torch.promote_types(real.dtype, torch.float32))


def _reach(scheme: Scheme, z: complex) -> int:
    size, angle = abs(z), abs(cmath.phase(-z)) / math.pi * (NUM_ANGLES - 1)
    if not SMALLEST * SMALLEST < size <= LARGEST:  # outside the table; also NaN
        return FARTHEST if size <= SMALLEST else 1
    row = max(0, math.ceil(PER_OCTAVE * math.log2(size / SMALLEST)))
    reached = min(_table(scheme)[row][column] for column in (math.floor(angle), math.ceil(angle)))
    return max(1, min(FARTHEST, int(reached * max(1.0, SMALLEST / size))))  # slower modes take longer, in proportion


@cache
def _table(scheme: Scheme) -> list[list[int]]:
    """The reach for h * rate of each size and angle: how long from a restart y' = rate * y is at most what it was, or hardly
    more than the method itself, restarted at every step, makes of it.

    Where the parasitic part is of lower order than the error, it must not even grow much.
    """
    kind: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    sizes = SMALLEST * 2.0 ** torch.arange(0, math.log2(LARGEST / SMALLEST) + 1e-9, 1 / PER_OCTAVE, **kind)
    z = -sizes[:, None] * torch.exp(1j * torch.linspace(0, math.pi, NUM_ANGLES, **kind))
    step, state = _amplification(scheme, z)
    rough = scheme.defect_order < scheme.order and not scheme.has_velocity  # z errs more than y, which y must not see
    allowed = TRIPLED if rough else AMPLIFIED if scheme.defect_order <= scheme.order else math.inf
    rows = 2 if rough else 1  # those of y, and of z
    power, base = torch.eye(2, dtype=z.dtype, device=z.device), (step @ state)[..., 0, 0].abs()
    natural, within, reached = torch.ones_like(base), torch.ones_like(base, dtype=torch.bool), torch.zeros_like(base)
    for _ in range(FARTHEST):
        power, natural = step @ power, natural * base
        within &= (power @ state)[..., 0, 0].abs() <= (LASTING * natural).clamp(min=1.0)
        within &= power[..., :rows, :].abs().amax((-2, -1)) <= allowed * natural.clamp(min=1.0)
        reached += within
    return [[int(n) for n in row] for row in reached.cummin(0).values.tolist()]


def _amplification(scheme: Scheme, z: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of length 1 does to (y, z), (..., 2, 2), and what a restart makes of y = 1, (..., 2, 1)."""
    memo, one, zero = Memo(_Linear(z)), torch.ones_like(z), torch.zeros_like(z)
    columns = []
    unit: tuple[State, State] = (one, zero), (zero, one)
    for pair in unit:
        for move in schedule(scheme, (0.0, 1.0), memo.additive):
            pair = advance(move, pair, memo)
        columns.append(torch.stack(pair, -1))
    restarted: State = (one,)
    for update in scheme.restart:
        restarted = advance(scheduled(update, 0.0, 1.0), restarted, memo)
    y, other = restarted
    return torch.stack(columns, -1), torch.stack((y, other), -1).unsqueeze(-1)


class _Linear:
    """y' = rate * y for many rates at once."""

    additive = True

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate

    def value(self, t: Time, x: Tensor) -> Tensor:
        return self.rate * x

    def control(self, t: Time, t0: Time, t1: Time) -> Time:
        return t1 - t0

    def product(self, value: Tensor, control: Time) -> tuple[Tensor, Time]:
        return value, control
