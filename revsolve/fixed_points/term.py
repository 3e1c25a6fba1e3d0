"""The term of an iteration: the value of f itself, which may depend on the number of the step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revsolve.core.arithmetic import Time
from revsolve.prepare.state import Packing


class ValueTerm:
    """The value of `f(state, n)` in step n, in `dtype`, whatever those of the pair and of f are.

    one_draw: random numbers are drawn once a solve, not anew in every step. name: of f, in messages.
    """

    def __init__(
        self, f: Callable[[Any, int], Any], packing: Packing, dtype: torch.dtype, one_draw: bool = True, name: str = "f"
    ) -> None:
        self.f, self.packing, self.dtype, self.one_draw, self.name = f, packing, dtype, one_draw, name
        self.alike = False

    def value(self, t: Time, x: Tensor) -> Tensor:
        state = self.unpack(x)
        out = self.f(state, int(t))
        if not (self.alike and out.shape == state.shape and out.dtype == state.dtype):
            self.packing.check_like(out, self.name)
            self.alike = self.packing.lone  # so that two comparisons tell, which are much faster
        return self.packing.pack(out).to(self.dtype)

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


def applied(f: Callable[..., Any], arguments: tuple[Any, ...], last: int) -> Callable[[Any, int], Any]:
    """f as a function of the state and of the number of the step, which is at most `last`."""
    return functools.partial(_with_step if takes_step(f) else _without_step, f, arguments, last)


def _with_step(f: Callable[..., Any], arguments: tuple[Any, ...], last: int, z: Any, n: int) -> Any:
    return f(z, *arguments, step=min(n, last))


def _without_step(f: Callable[..., Any], arguments: tuple[Any, ...], last: int, z: Any, n: int) -> Any:
    return f(z, *arguments)
