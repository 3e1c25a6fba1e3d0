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

from revsolve.core.arithmetic import plus

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
    """What the rest of the package knows of an SDE. `apart` are f and g by themselves, where each can be had cheaply."""

    f_and_g: Callable[[Tensor, Tensor], tuple[Tensor, Any]]
    apart: tuple[Field, Field] | None
    prior: Field | None
    noise_type: str
    sde_type: str
    product_only: bool = False  # g is then a function v -> g . v
    joint: bool = False  # whether f and g share work

    @property
    def diagonal(self) -> bool:
        return self.noise_type == "diagonal"


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


def coefficients(sde: Any, names: Mapping[str, str] | None, num_channels: int | None) -> Coefficients:
    """What `sde` offers, under other `names` where given: f and g together, apart, or only their products with noise."""
    check_types(sde)
    spelt = _spelling(sde, names)
    found = {ours: getattr(sde, name) for ours, name in spelt.items() if getattr(sde, name, None) is not None}
    f, g, both = found.get("f"), found.get("g"), found.get("f_and_g")
    kind = (sde.noise_type, sde.sde_type)
    prior = found.get("h")
    if both is not None:
        return Coefficients(both, (f, g) if f and g else None, prior, *kind, joint=True)
    if f is not None and g is not None:
        return Coefficients(lambda t, y: (f(t, y), g(t, y)), (f, g), prior, *kind)
    product = _noise_product(found)
    if product is None or not (f or "f_and_g_prod" in found):
        raise ValueError(
            f"the SDE, a {type(sde).__name__}, needs a drift and a diffusion: define f and g, f_and_g, f and g_prod, or "
            f"f_and_g_prod (it has {', '.join(found) or 'none of them'}), or say what they are called with names=..."
        )
    num_channels = 1 if sde.noise_type == "scalar" else num_channels
    if num_channels is None and sde.noise_type != "diagonal":
        raise ValueError("the number of noise channels is not known from g_prod alone: pass bm, or define g.")
    drift = f or _drift_of(found["f_and_g_prod"], num_channels)
    return _from_products(drift, product, prior, kind, num_channels)


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


def contraction(noise_type: str, product_only: bool) -> Callable[[Any, Tensor], Tensor]:
    """g . v as a function of g and v."""
    if product_only:
        return lambda g, v: g(v)
    if noise_type == "diagonal":
        return torch.mul
    if noise_type == "scalar":
        return lambda g, v: g.squeeze(-1) * v
    return lambda g, v: torch.matmul(g, v.unsqueeze(-1)).squeeze(-1)


def increment(noise_type: str, product_only: bool) -> Callable[[Tensor, Any, Any, Tensor], Tensor]:
    """f h + g . dW as a function of f, h, g and dW, in as few kernels as there are. h is a number, or one for each sample."""
    if noise_type == "diagonal" and not product_only:
        return lambda f, h, g, dW: torch.addcmul(f * h, g, dW)
    if noise_type == "scalar" and not product_only:
        return lambda f, h, g, dW: torch.addcmul(f * h, g.squeeze(-1), dW)
    multiply = contraction(noise_type, product_only)

    def general(f: Tensor, h: Any, g: Any, dW: Tensor) -> Tensor:
        noise = multiply(g, dW)
        return torch.addcmul(noise, f, h) if isinstance(h, Tensor) else plus(noise, f, h)

    return general


def _spelling(sde: Any, names: Mapping[str, str] | None) -> dict[str, str]:
    spelt = {ours: ours for ours in NAMES.values()}
    for key, name in (names or {}).items():
        if key not in NAMES:
            raise ValueError(f"names has the unknown key {key!r}: its keys are {', '.join(map(repr, NAMES))}.")
        if not hasattr(sde, name):
            raise ValueError(
                f"names says that the {key} is called {name!r}, but the {type(sde).__name__} has none such."
            )
        spelt[NAMES[key]] = name
    return spelt


def _noise_product(found: Mapping[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """g_prod(t, y, v) from whichever of the methods exists."""
    if "g_prod" in found:
        return found["g_prod"]
    both = found.get("f_and_g_prod")
    return None if both is None else lambda t, y, v: both(t, y, v)[1]


def _drift_of(both: Callable[..., Any], num_channels: int | None) -> Field:
    return lambda t, y: both(t, y, y.new_zeros(*y.shape[:-1], num_channels or y.shape[-1]))[0]


def _from_products(
    f: Field,
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    prior: Field | None,
    kind: tuple[str, str],
    num_channels: int | None,
) -> Coefficients:
    """Diagonal and scalar diffusions are their products with ones; others stay products, unless their entries are needed."""
    entries_needed = kind == ("general", "ito") or prior is not None
    only = kind[0] in ("additive", "general") and not entries_needed

    def g(t: Tensor, y: Tensor) -> Any:
        if kind[0] == "diagonal":
            return product(t, y, torch.ones_like(y))
        if kind[0] == "scalar":
            return product(t, y, torch.ones_like(y[..., :1])).unsqueeze(-1)
        return Product(product, t, y) if only else _columns(product, t, y, num_channels or 1)

    return Coefficients(lambda t, y: (f(t, y), g(t, y)), (f, g), prior, *kind, product_only=only)


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
