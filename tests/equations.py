"""Fields that depend on something in every way a field can, and the gradients of their solutions with respect to all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revsolve import odeint

FORWARD = (0.0, 0.4, 0.55, 1.3)
BACKWARD = (1.0, 0.8, 0.3, -0.2)


@dataclass(frozen=True)
class Equation:
    """y' = func(t, y, *args), and the tensors, by name, that its solution depends on."""

    func: Callable[..., Any]
    y0: Any
    args: tuple[Any, ...]
    inputs: dict[str, Tensor]


class Network(nn.Module):
    """A field with parameters, two of which it does not use."""

    def __init__(self, size: int = 3, width: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, size))
        self.unused = nn.Linear(size, size)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * torch.cos(t) - 0.5 * y


# Three samples: different lengths, one backwards, one that waits.
TIMES_OF_EACH = ((0.0, 1.0, 0.2), (0.5, 0.8, 0.2), (1.3, 0.1, 0.9), (1.4, -0.3, 0.9))


def times_of_each() -> Tensor:
    return torch.tensor(TIMES_OF_EACH, dtype=torch.float64, requires_grad=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def with_module() -> Equation:
    """Module parameters, an argument, a closed-over leaf and a closed-over intermediate result, and the time."""
    field, y0, rate, bias, code = Network().double(), leaf(2, 3), leaf(), leaf(3), leaf(3)
    encoded = torch.sin(2 * code)

    def func(t: Tensor, y: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        return field(t, y) + encoded * bias - arguments["rate"] ** 2 * y

    named = dict(field.net.named_parameters())
    return Equation(func, y0, ({"rate": rate},), {"y0": y0, "rate": rate, "bias": bias, "code": code, **named})


def with_pytree() -> Equation:
    """A dictionary of real and complex tensors of several shapes."""
    matrix, spin, rate = leaf(3, 3), leaf(2, dtype=torch.complex128), leaf()
    y0 = {"a": leaf(2, 3), "b": (leaf(2, dtype=torch.complex128), leaf())}

    def func(t: Tensor, y: Any) -> Any:
        a, (b, c) = y["a"], y["b"]
        return {"a": torch.tanh(a @ matrix) * c, "b": (spin * b * torch.sin(t) + a.sum(), rate * b.abs().sum() - c)}

    inputs = {"a": y0["a"], "b": y0["b"][0], "c": y0["b"][1], "matrix": matrix, "spin": spin, "rate": rate}
    return Equation(func, y0, (), inputs)


def with_complex() -> Equation:
    """A complex state and a complex parameter."""
    y0, spin = leaf(4, dtype=torch.complex128), leaf(4, dtype=torch.complex128)
    return Equation(lambda t, y: 1j * spin * y / (1 + y.abs() ** 2) + torch.cos(t), y0, (), {"y0": y0, "spin": spin})


def with_scalar() -> Equation:
    """A state without dimensions; the field does not depend on the time."""
    y0, rate = leaf(), leaf()
    return Equation(lambda t, y, rate: torch.sin(rate * y) - y, y0, (rate,), {"y0": y0, "rate": rate})


EQUATIONS = {"module": with_module, "pytree": with_pytree, "complex": with_complex, "scalar": with_scalar}


def loss_of(ys: Any) -> Tensor:
    """A weighted sum over all outputs, in which no two entries count the same."""
    parts = [torch.view_as_real(y) if y.is_complex() else y for y in tree_leaves(ys)]
    return sum((torch.linspace(0.3, 1.7, y.numel(), dtype=y.dtype).view(y.shape) * y).sum() for y in parts)


def gradients(equation: Equation, times: tuple[float, ...], **solve: Any) -> dict[str, Tensor]:
    """The gradient of the loss with respect to every input and to the times."""
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    inputs = {**equation.inputs, "t": t}
    loss = loss_of(odeint(equation.func, equation.y0, t, args=equation.args, **solve))
    found = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Relative to b; that of what is not a number is infinite, so that no comparison passes it over."""
    return 0.0 if torch.equal(a, b) else float(((a - b).norm() / b.norm()).nan_to_num(nan=torch.inf))


def worst_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient, and whose it is."""
    return max((relative_difference(got[name], wanted[name]), name) for name in wanted)
