"""The drift and diffusion of an SDE, however they are spelt, and the product of a diffusion with the noise.

noise type   diffusion g        Brownian motion W    g . W
diagonal     shape of y         shape of y           g * W
scalar       (..., d, 1)        (..., 1)             g[..., 0] * W
additive     (..., d, m)        (..., m)             sum_j g[..., j] W_j, with g free of y
general      (..., d, m)        (..., m)             the same
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NOISE_TYPES = ("diagonal", "scalar", "additive", "general")
SDE_TYPES = ("ito", "stratonovich")
NAMES = {
    "drift": "f",
    "diffusion": "g",
    "prior_drift": "h",
    "diffusion_prod": "g_prod",
    "drift_and_diffusion": "f_and_g",
    "drift_and_diffusion_prod": "f_and_g_prod",
}
Field = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class SDE:
    """An SDE  dy = f(t, y) dt + g(t, y) dW  made of plain functions.

    Objects of torchsde (Li, Wong, Chen & Duvenaud 2020) and anything else with these attributes serve as well.

    Args:
        f: the drift, `f(t, y)` shaped like y; t is a 0-d tensor.
        g: the diffusion, `g(t, y)` shaped like y for diagonal noise, else (..., d, m) with m noise channels.
        noise_type: "diagonal" (every entry of y has its own noise), "scalar" (m = 1), "additive" (g does not depend on y)
            or "general".
        sde_type: "stratonovich" or "ito".
        h: the drift of a prior, for `logqp`.

    Raises:
        ValueError: an unknown noise_type or sde_type.
    """

    f: Field
    g: Field
    noise_type: str = "diagonal"
    sde_type: str = "stratonovich"
    h: Field | None = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class Coefficients:
    """An SDE as the rest of the package knows it. `apart` are f and g by themselves, where each can be had cheaply; `owners` are
    what holds the tensors of all of these."""

    f_and_g: Callable[[Tensor, Tensor], tuple[Tensor, Any]]
    apart: tuple[Field, Field] | None
    prior: Field | None
    noise_type: str
    sde_type: str
    owners: tuple[Any, ...]
    product_only: bool = False  # g is then a function v -> g . v
    joint: bool = False  # whether f and g share work

    def product(self, g: Any, v: Tensor) -> Tensor:
        """g . v"""
        if self.product_only:
            return g(v)
        if self.noise_type == "diagonal":
            return g * v
        if self.noise_type == "scalar":
            return g.squeeze(-1) * v
        return torch.matmul(g, v.unsqueeze(-1)).squeeze(-1)


def check_types(sde: Any) -> None:
    """Raise ValueError unless the object has a noise_type and an sde_type that exist."""
    for name, choices in (("noise_type", NOISE_TYPES), ("sde_type", SDE_TYPES)):
        value = getattr(sde, name, None)
        if value not in choices:
            told = f"{name} is {value!r}" if hasattr(sde, name) else f"it has no {name}"
            raise ValueError(
                f"the SDE needs a {name} of {', '.join(map(repr, choices))}, but {told}: set it, or wrap plain functions in "
                f"revsolve.SDE(f, g, {name}=...)."
            )


def coefficients(sde: Any, names: Mapping[str, str] | None, num_channels: int | None, logqp: bool) -> Coefficients:
    """What `sde` offers, under other `names` where given: f and g together, apart, or only their products with noise; and with
    `logqp` the drift of a prior."""
    check_types(sde)
    found = {name: getattr(sde, name) for name in NAMES.values() if getattr(sde, name, None) is not None}
    found |= _renamed(sde, names) if names else {}
    f, g, both, prior = map(found.get, ("f", "g", "f_and_g", "h"))  # type: Any, Any, Any, Any
    if logqp and prior is None:
        raise ValueError("logqp needs the drift of a prior: give the SDE a method h(t, y), or name it in names=.")
    only, joint = False, both is not None
    if not joint:
        if f is None or g is None:
            f, g, only = _from_products(sde, found, num_channels)
        both = lambda t, y: (f(t, y), g(t, y))  # noqa: E731
    apart, prior = (f, g) if f and g else None, prior if logqp else None
    owners = (sde, both, *(apart or ()), *filter(None, [prior]))
    return Coefficients(both, apart, prior, sde.noise_type, sde.sde_type, owners, product_only=only, joint=joint)


def _from_products(sde: Any, found: dict[str, Any], num_channels: int | None) -> tuple[Field, Field, bool]:
    """f, g and whether g stays a product: diagonal and scalar diffusions are their products with ones, others are put together
    from columns where their entries are needed."""
    f: Any = found.get("f")
    both: Any = found.get("f_and_g_prod")
    product, noise = found.get("g_prod"), sde.noise_type
    if not (both or (f and product)):
        raise ValueError(
            f"the SDE, a {type(sde).__name__}, needs a drift and a diffusion: define f and g, f_and_g, f and g_prod, or "
            f"f_and_g_prod (it has {', '.join(found) or 'none of them'}), or say what they are called with names=..."
        )
    num_channels = 1 if noise == "scalar" else num_channels
    if num_channels is None and noise != "diagonal":
        raise ValueError("the number of noise channels is not known from g_prod alone: pass bm, or define g.")
    if product is None:
        product = lambda t, y, v: both(t, y, v)[1]  # noqa: E731
    if f is None:
        f = lambda t, y: both(t, y, y.new_zeros(*y.shape[:-1], num_channels or y.shape[-1]))[0]  # noqa: E731
    if noise == "diagonal":
        return f, lambda t, y: product(t, y, torch.ones_like(y)), False
    if noise == "scalar":
        return f, lambda t, y: product(t, y, torch.ones_like(y[..., :1])).unsqueeze(-1), False
    if "h" in found or (noise, sde.sde_type) == ("general", "ito"):
        return f, lambda t, y: _columns(product, t, y, num_channels or 1), False
    return f, lambda t, y: Product(product, t, y), True


def check_value(what: str, value: Any, y0: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless a value of a coefficient is a tensor of this shape, of the dtype and on the device of the state."""
    if not isinstance(value, Tensor):
        raise TypeError(f"the {what} must be a tensor, but it is a {type(value).__name__}.")
    if tuple(value.shape) != shape:
        raise ValueError(
            f"the {what} must have shape {shape} for y0 of shape {tuple(y0.shape)}, not {tuple(value.shape)}."
        )
    if value.dtype != y0.dtype and not torch.is_autocast_enabled(y0.device.type):
        raise TypeError(
            f"the {what} must have the dtype of y0, {y0.dtype}, but it has {value.dtype}: cast one of them."
        )
    if value.device != y0.device:
        raise ValueError(f"the {what} lies on {value.device}, but y0 on {y0.device}: move one of them.")


def noise_shape(parts: Coefficients, g: Any, y0: Tensor, path: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of W, from the value of g at y0, which is checked; for products that of the path."""
    if parts.product_only:
        channels = path[-1]
        g = g(torch.zeros(*y0.shape[:-1], channels, dtype=y0.dtype, device=y0.device))
        check_value("product of diffusion and noise", g, y0, tuple(y0.shape))
        return *y0.shape[:-1], channels
    if parts.noise_type == "diagonal":
        check_value("diffusion (diagonal noise)", g, y0, tuple(y0.shape))
        return tuple(y0.shape)
    channels = g.shape[-1] if isinstance(g, Tensor) and g.ndim else 1
    if parts.noise_type == "scalar" and channels != 1:
        raise ValueError(
            f"scalar noise has one channel, but g returned shape {tuple(g.shape)}: return (..., d, 1), or set "
            'noise_type = "general".'
        )
    check_value(f"diffusion ({parts.noise_type} noise)", g, y0, (*y0.shape, channels))
    return *y0.shape[:-1], channels


def _renamed(sde: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The methods of an SDE that have other names, by ours."""
    for key, name in names.items():
        if key not in NAMES:
            raise ValueError(f"names has the unknown key {key!r}: its keys are {', '.join(map(repr, NAMES))}.")
        if not hasattr(sde, name):
            raise ValueError(
                f"names says that the {key} is called {name!r}, but the {type(sde).__name__} has none such."
            )
    return {NAMES[key]: getattr(sde, name) for key, name in names.items()}


class Product:
    """A diffusion at one point that is known by its products with noise only: Product(...)(v) = g . v."""

    def __init__(self, product: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> None:
        self.product, self.t, self.y = product, t, y

    def __call__(self, v: Tensor) -> Tensor:
        out = self.product(self.t, self.y, v.clone())  # which may be changed in place
        if out.shape != self.y.shape or out.dtype != self.y.dtype:
            check_value("product of diffusion and noise", out, self.y, tuple(self.y.shape))
        return out

    def detach(self) -> Product:
        """The same diffusion at a point that is cut off from how it was computed."""
        return Product(self.product, self.t, self.y.detach())


def _columns(product: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor, y: Tensor, num_channels: int) -> Tensor:
    """The diffusion itself, (..., d, m): its products with the unit vectors."""
    unit = torch.eye(num_channels, dtype=y.dtype, device=y.device)
    return torch.stack([product(t, y, e.expand(*y.shape[:-1], num_channels).clone()) for e in unit], dim=-1)
