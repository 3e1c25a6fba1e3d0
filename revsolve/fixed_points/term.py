"""The term of an iteration: the value of f itself, which may depend on the number of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revsolve.core.arithmetic import Time
from revsolve.prepare.state import Packing


class ValueTerm:
    """The value of the f of each step, in `dtype`, whatever those of the pair and of f are.

    fs: one for all steps, or one for every step. one_draw: random numbers are drawn once a solve, not anew in every step.
    name: of an f, in messages. residual: an f adds its value to its input.
    """

    def __init__(
        self,
        fs: Sequence[Callable[..., Any]],
        args: Any,
        packing: Packing,
        dtype: torch.dtype,
        *,
        num_steps: int,
        one_draw: bool,
        name: str = "f",
        residual: bool = False,
    ) -> None:
        self.fs = [(f, takes_step(f)) for f in fs]
        self.arguments = args if isinstance(args, tuple) else (args,)
        self.packing, self.dtype, self.last, self.one_draw = packing, dtype, num_steps - 1, one_draw
        self.name, self.residual, self.alike = name, residual, False

    def value(self, t: Time, x: Tensor) -> Tensor:
        state, (f, numbered) = self.unpack(x), self.fs[0]
        n = (
            min(int(t), self.last) if numbered or len(self.fs) > 1 else 0
        )  # it is also asked at the end of the last step
        if len(self.fs) > 1:
            f, numbered = self.fs[n]
        out = f(state, *self.arguments, step=n) if numbered else f(state, *self.arguments)
        if not (self.alike and out.shape == state.shape and out.dtype == state.dtype):
            self.packing.check_like(out, self.name)
            self.alike = self.packing.lone  # so that two comparisons tell, which are much faster
        out = self.packing.pack(out)
        return (out - self.packing.pack(state) if self.residual else out).to(self.dtype)

    def control(self, t: Time, t0: Time, t1: Time) -> float:
        return 1.0

    def product(self, value: Tensor, control: float) -> tuple[Tensor, float]:
        return value, control

    def unpack(self, y: Tensor) -> Any:
        """The state in the dtypes that it was given in."""
        return self.packing.unpack(y.to(self.packing.dtypes[0]) if self.packing.lone else y)


def takes_step(f: Callable[..., Any]) -> bool:
    """Whether f has a parameter named `step`."""
    f = f.forward if isinstance(f, nn.Module) else f
    if torch.compiler.is_dynamo_compiling():  # which knows no signatures
        code = getattr(f, "__code__", None)
        return code is not None and "step" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return "step" in inspect.signature(f).parameters
    except (TypeError, ValueError):  # some callables have no signature
        return False
