"""Fields that keep, change or hide something: compiled, their gradient is right or they are refused, and nothing that a recording
made stays with the user."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from revsolve import CompilationError, odeint
from revsolve.backends.inductor.torch_internals import is_fake
from tests.backends.test_compiled import compiles
from tests.equations import worst_difference

RECORDED = {"backend": "eager"}
EXACT = 1e-12
D = torch.float64
SETTINGS: dict[str, Any] = {"method": "rev_heun2", "options": {"step_size": 0.1}}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*weight_norm.*"),
]


class Product(torch.autograd.Function):
    """w tanh(y), with an attribute of ctx."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, y: Tensor, power: float) -> Tensor:
        ctx.save_for_backward(w, y)
        ctx.power = power
        return w * torch.tanh(y) * power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        w, y = ctx.saved_tensors
        th = torch.tanh(y)
        return grad * th * ctx.power, grad * w * (1 - th * th) * ctx.power, None


class Later(torch.autograd.Function):
    """w * w * y, in the form with setup_context, with a tensor as attribute of ctx."""

    @staticmethod
    def forward(w: Tensor, y: Tensor) -> Tensor:
        return w * w * y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.w, ctx.y = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * grad * ctx.w * ctx.y, grad * ctx.w * ctx.w


@torch.library.custom_op("revsolve_tests::scaled_sin", mutates_args=())
def scaled_sin(w: Tensor, y: Tensor) -> Tensor:
    return w * torch.sin(y)


@scaled_sin.register_fake
def _(w: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(y)


def _scaled_sin_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    w, y = ctx.saved_tensors
    return grad * torch.sin(y), grad * w * torch.cos(y)


scaled_sin.register_autograd(
    _scaled_sin_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
CACHE: dict[str, Tensor] = {}


class Field(nn.Module):
    """A weight and a network; `kind` says what is done with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.net, self.kind = nn.Parameter(torch.rand(2, dtype=D)), nn.Linear(2, 2).double(), kind
        self.register_buffer("number", torch.zeros((), dtype=D))
        self.register_buffer("scratch", torch.zeros(2, dtype=D))
        self.calls, self.kept, self.table, self.history = 0, None, {}, []  # type: int, Any, dict[Any, Any], list[Any]
        CACHE.clear()
        if kind == "hooked parameter":
            self.w.register_hook(lambda grad: grad)
        if kind == "forward hook":
            self.net.register_forward_hook(lambda module, given, out: self.history.append(out))
        if kind == "backward hook":
            self.net.register_full_backward_hook(lambda module, given, grads: None)
        if kind == "weight_norm":
            parametrizations.weight_norm(self.net)
        if kind == "old weight_norm":
            nn.utils.weight_norm(self.net)
        if kind == "orthogonal":
            parametrizations.orthogonal(self.net)
        if kind == "spectral_norm in eval":
            parametrizations.spectral_norm(self.net).eval()
        if kind == "scripted":
            self.net = torch.jit.script(self.net)
        if kind == "traced":
            self.net = torch.jit.trace(self.net, torch.ones(2, dtype=D))
        self.eval()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return getattr(self, self.kind.replace(" ", "_"), self.plain)(t, y)

    def plain(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.net(y)) * self.w

    def autograd_function(self, t: Tensor, y: Tensor) -> Tensor:
        return Product.apply(self.w, y, 0.5)

    def setup_context(self, t: Tensor, y: Tensor) -> Tensor:
        return Later.apply(self.w, y)

    def function_of_hooked_parameter(self, t: Tensor, y: Tensor) -> Tensor:
        return Later.apply(self.w, y)

    def custom_op(self, t: Tensor, y: Tensor) -> Tensor:
        return scaled_sin(self.w, y)

    def kept_weight(self, t: Tensor, y: Tensor) -> Tensor:
        self.kept = torch.nn.functional.softplus(self.w) if self.kept is None else self.kept
        return torch.tanh(self.kept * y)

    def weight_in_a_dict(self, t: Tensor, y: Tensor) -> Tensor:
        self.table["w"] = self.table["w"] if "w" in self.table else self.w.exp()
        return torch.tanh(self.table["w"] * y)

    def weight_in_a_global(self, t: Tensor, y: Tensor) -> Tensor:
        CACHE["w"] = CACHE["w"] if "w" in CACHE else self.w.exp()
        return torch.tanh(CACHE["w"] * y)

    def kept_constant(self, t: Tensor, y: Tensor) -> Tensor:
        self.kept = torch.eye(2, dtype=D) if self.kept is None else self.kept
        return torch.tanh(y @ self.kept) * self.w

    def kept_result(self, t: Tensor, y: Tensor) -> Tensor:
        self.kept = self.plain(t, y)
        return self.kept

    def history_of_results(self, t: Tensor, y: Tensor) -> Tensor:
        self.history.append(self.plain(t, y))
        return self.history[-1]

    def results_by_number(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.table[self.calls] = {"k": [self.plain(t, y)]}
        return self.table[self.calls]["k"][0]

    def counter(self, t: Tensor, y: Tensor) -> Tensor:
        self.number += 1
        return self.plain(t, y)

    def new_counter(self, t: Tensor, y: Tensor) -> Tensor:
        self.number = self.number + 1
        return self.plain(t, y)

    def counter_by_view(self, t: Tensor, y: Tensor) -> Tensor:
        self.scratch[0] += 1
        return self.plain(t, y)

    def preallocated(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            torch.mul(y, 2.0, out=self.scratch)
        return self.scratch * self.w

    def data(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y * self.w) + self.w.data

    def generator(self, t: Tensor, y: Tensor) -> Tensor:
        return self.plain(t, y) + torch.rand(2, dtype=D, generator=torch.Generator().manual_seed(0))


KINDS = [
    "plain",
    "autograd function",
    "setup context",
    "custom op",
    "scripted",
    "traced",
    "weight_norm",
    "orthogonal",
    "spectral_norm in eval",
    "hooked parameter",
    "function of hooked parameter",
    "forward hook",
    "backward hook",
    "kept constant",
    "history of results",
    "results by number",
    "new counter",
    "data",
]
KEPT = ["kept weight", "weight in a dict", "weight in a global", "kept result", "old weight_norm"]
REFUSED = ["counter", "counter by view", "preallocated", "generator"]


def gradients(field: Field, **solve: Any) -> dict[str, Tensor]:
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    y = odeint(field, y0, [0.0, 1.0], **SETTINGS, **solve)[-1]
    inputs = {"y0": y0, **dict(field.named_parameters())}
    found = torch.autograd.grad(y.square().sum(), list(inputs.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(inputs, found, strict=True))


@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_eager_solve(kind: str, mode: str) -> None:
    field = Field(kind)
    wanted = gradients(Field(kind), gradient="direct")
    assert worst_difference(gradients(field, compile=RECORDED, gradient=mode), wanted)[0] < EXACT
    assert worst_difference(gradients(field, compile=RECORDED, gradient=mode), wanted)[0] < EXACT  # it is as it was


def or_refused(field: Field, **solve: Any) -> dict[str, Tensor] | None:
    try:
        return gradients(field, compile=RECORDED, **solve)
    except CompilationError:
        return None


@compiles
@pytest.mark.parametrize("mode", ["reversible", "checkpoint"])
@pytest.mark.parametrize("kind", KEPT)
def test_the_gradient_through_what_was_kept_is_right_or_refused(kind: str, mode: str) -> None:
    wanted = gradients(Field(kind), gradient="direct")
    got = or_refused(Field(kind), gradient=mode) or wanted
    assert worst_difference(got, wanted)[0] < EXACT


@compiles
@pytest.mark.parametrize("kind", REFUSED)
def test_a_field_whose_state_or_gradient_a_program_would_miss_is_refused(kind: str) -> None:
    field = Field(kind)
    with pytest.raises((CompilationError, ValueError), match="compile="):
        gradients(field, compile=RECORDED)


@compiles
@pytest.mark.parametrize("kind", [*KINDS, *KEPT, *REFUSED])
def test_no_tensor_without_numbers_stays(kind: str) -> None:
    field = Field(kind)
    try:
        gradients(field, compile=RECORDED)
    except (CompilationError, ValueError):
        assert kind in [*KEPT, *REFUSED]
    held = [*vars(field).values(), *field.buffers(), *CACHE.values(), *field.history]
    assert not any(map(is_fake, held)) and "Fake" not in repr((held, field.table))
