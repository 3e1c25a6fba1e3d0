"""Solves of a float32 state make nothing in float64 on its device: Apple's GPUs have no such numbers.

The device is a pretended one: `OnDevice` holds a tensor of the CPU and says that it lies on "mps". What is made there, moved
there and computed from what lies there lies there too; in float64 it raises, and so does what mixes it with more than numbers
of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from revsolve import BrownianPath, LinearPath, NaturalCubicPath, cdeint, fixed_point, odeint, odeint_event, sdeint

DEVICE = torch.device("mps")
MOVES = {Tensor.to, Tensor.cpu, torch.as_tensor, torch.asarray}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default}  # by numbers of the CPU, if they lie there
READS = {Tensor.tolist, Tensor.numpy}


class OnDevice(Tensor):
    """A tensor that says it lies on DEVICE."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"a tensor of shape {tuple(inner.shape)} in {inner.dtype} on a device that has none")
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        strangers = [x for x in given if not isinstance(x, OnDevice) and x.ndim and func not in INDEXED]
        assert not strangers, (
            f"{func} takes tensors of two devices, one of shape {tuple(strangers[0].shape)} on the CPU"
        )
        out = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device"):
            return out  # autograd takes the gradient of a number of the CPU there
        made = {id(inner_of(x)): x for x in given}  # what is changed in place is handed on
        return tree_map(
            lambda x: made.get(id(x), x) if not isinstance(x, Tensor) or id(x) in made else OnDevice(x), out
        )


def gradients(outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], create_graph: bool = False) -> Any:
    """torch.autograd.grad, in which modes stay active."""
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        tuple(outputs), tuple(cotangents), create_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )


def inner_of(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


class _Across(torch.autograd.Function):
    """To the device or from there, and gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: bool) -> Tensor:
        ctx.there = there
        return OnDevice(x.detach().clone()) if there else x.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Across.apply(grad, not ctx.there), None


def across(x: Tensor, there: bool) -> Tensor:
    return x if isinstance(x, OnDevice) == there else _Across.apply(x, there)


class Pretending(TorchFunctionMode):
    """Lets tensors be made on DEVICE, and be moved and read from there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in READS:
            return func(inner_of(args[0].detach()), *args[1:], **kwargs)
        if func in MOVES:
            return self.moved(func, args, kwargs)
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        there |= (
            getattr(func, "__name__", "").startswith("new_")
            and isinstance(args[0], OnDevice)
            and "device" not in kwargs
        )
        if there and not getattr(func, "__name__", "").endswith("_like"):
            source = [inner_of(x.detach()) if isinstance(x, OnDevice) else x for x in args]
            return OnDevice(func(*source, **{**kwargs, "device": "cpu"}))
        return func(*args, **{k: v for k, v in kwargs.items() if k != "device" or not there})

    def moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, *rest = args
        to = [kwargs.pop("device", None), *rest, "cpu" if func is Tensor.cpu else None]
        places = [
            x.device if isinstance(x, Tensor) else torch.device(x)
            for x in to
            if isinstance(x, (str, torch.device, Tensor))
        ]
        types = [
            x.dtype if isinstance(x, Tensor) else x
            for x in [*rest, kwargs.get("dtype")]
            if isinstance(x, (torch.dtype, Tensor))
        ]
        if not isinstance(x, Tensor):
            made = torch.tensor(x, dtype=types[0] if types else None, device="cpu")
            return across(made, there=bool(places) and places[0] == DEVICE)
        there = places[0] == DEVICE if places else isinstance(x, OnDevice)
        x = x if there else across(x, there=False)
        x = x.type(types[0]) if types and types[0] != x.dtype else x
        return across(x, there)


def net_on_device() -> nn.Module:
    torch.manual_seed(0)  # a solution of some other networks turns back before the event
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    for part in (net[0], net[2]):
        for name, p in list(part.named_parameters()):
            part._parameters[name] = nn.Parameter(OnDevice(p.detach()))
    return net


NET, Y0 = net_on_device(), OnDevice(torch.ones(3, 2)).requires_grad_()
TIMES = torch.tensor([0.0, 0.4, 1.0])
T, OF_EACH = OnDevice(TIMES), OnDevice(torch.stack([TIMES, TIMES * 0.5, TIMES * 0.7], dim=1))
DATA = OnDevice(torch.randn(3, 5, 2).cumsum(1))
STEPS: dict[str, Any] = {"options": {"step_size": 0.1}}


def field(t: Tensor, y: Tensor) -> Tensor:
    assert y.dtype is torch.float32 and y.device == DEVICE and t.device == DEVICE
    return NET(y) * torch.cos(t).reshape(-1, 1)


def ode(**settings: Any) -> Callable[[], Tensor]:
    return lambda: odeint(field, Y0, **{"t": T, "method": "rev_rk4", **STEPS, **settings})


def sde(**settings: Any) -> Callable[[], Tensor]:
    def solve() -> Tensor:
        path = BrownianPath(0.0, 1.0, (3, 2), seed=1, device=DEVICE, noise_device="cpu", levy_area="space-time")
        return sdeint((field, lambda t, y: 0.3 * torch.sigmoid(NET(y))), Y0, T, dt=0.1, bm=path, **settings)

    return solve


def cde(path: Any, **settings: Any) -> Callable[[], Tensor]:
    func = lambda t, z: NET(z)[..., None] * z[..., None, :]  # noqa: E731
    return lambda: cdeint(path(DATA, OnDevice(torch.linspace(0, 1, 5))), func, Y0, T, **settings)


def event() -> Tensor:
    start = OnDevice(torch.zeros(1))
    stop = lambda t, y: (y - Y0.detach()).square().sum() - 0.1  # noqa: E731
    found, ys = odeint_event(field, Y0, start, event_fn=stop, method="rev_dopri5")
    return found + ys.sum()


def between_the_steps() -> Tensor:
    return odeint(field, Y0, T, method="rev_dopri5", options={"dense": True}, full_output=True).evaluate(T * 0.9)


def deq(**settings: Any) -> Callable[[], Tensor]:
    func = lambda z: 0.5 * torch.tanh(NET(z)) + 0.1 * Y0  # noqa: E731
    return lambda: fixed_point(func, Y0.detach(), max_steps=40, tol=1e-4, **settings)


SOLVES: dict[str, Callable[[], Tensor]] = {
    "fixed steps": ode(),
    "adaptive": ode(method="rev_dopri5", options={}),
    "adaptive checkpoint": ode(method="dopri5", options={}),
    "plain": ode(method="rk4"),
    "direct": ode(gradient="direct"),
    "reversible Heun": ode(method="reversible_heun"),
    "alf4": ode(method="alf4"),
    "moving times": ode(t=OnDevice(TIMES).requires_grad_()),
    "moving times, adaptive": ode(t=OnDevice(TIMES).requires_grad_(), method="rev_dopri5", options={}),
    "times of the CPU": ode(t=TIMES),
    "times in float64 of the CPU": ode(t=TIMES.double()),
    "numbers": ode(t=TIMES.tolist()),
    "no restarts": ode(restarts=None),
    "times of each": ode(t=OF_EACH),
    "times of each, adaptive": ode(t=OF_EACH, method="rev_dopri5", options={}),
    "steps of each": ode(t=OF_EACH, method="rev_dopri5", options={"steps_of_each": True}),
    "between the steps": between_the_steps,
    "event": event,
    "sde": sde(),
    "sde, space-time area": sde(method="rev_slowrk"),
    "sde, midpoint": sde(method="midpoint"),
    "linear path": cde(LinearPath, method="reversible_heun"),
    "cubic path": cde(NaturalCubicPath, method="rev_rk4"),
    "cubic path, adaptive": cde(NaturalCubicPath, method="rev_dopri5"),
    "fixed point": deq(),
    "fixed point, implicit": deq(method="anderson", gradient="implicit"),
}


@pytest.mark.parametrize("solve", SOLVES.values(), ids=SOLVES)
def test_no_float64_on_the_device(solve: Callable[[], Tensor]) -> None:
    with Pretending():
        out = solve()
        loss = out.square().sum()
        grads = gradients([loss], [Y0, *NET.parameters()], [torch.ones_like(loss)])
    assert isinstance(out, OnDevice) and all(isinstance(g, OnDevice) for g in grads)
    assert out.inner.isfinite().all() and all((g.inner != 0).any() for g in grads)


def test_float64_is_refused() -> None:
    with Pretending(), pytest.raises(TypeError, match="a device that has none"):
        Y0.double()
    with Pretending(), pytest.raises(TypeError, match="a device that has none"):
        torch.zeros(3, dtype=torch.float64, device=DEVICE)
