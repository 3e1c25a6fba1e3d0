"""Loops of one block or of many: exact, as the schemes say, in memory that does not grow with their length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revsolve import ReconstructionWarning, RevLoop, reversible_loop
from revsolve.backends.inductor.programs import PROGRAMS
from tests.fixed_points.cells import difference
from tests.memory import most_held

EXACT = 1e-12
SCHEMES = ["coupling", "midpoint", "momentum", "relaxation"]
TWO_STEP = SCHEMES[:3]


@pytest.fixture(autouse=True)
def _double(float64: None) -> None: ...


class Block(nn.Module):
    """What a residual block adds: tanh(A x + b + step / 10), with A of spectral norm `norm`; perhaps with dropout."""

    def __init__(self, norm: float = 0.5, dropout: float = 0.0) -> None:
        super().__init__()
        self.map, self.dropout = nn.Linear(6, 6), nn.Dropout(dropout)
        with torch.no_grad():
            self.map.weight.mul_(norm / torch.linalg.matrix_norm(self.map.weight, 2))

    def forward(self, x: Tensor, step: int) -> Tensor:
        return self.dropout(torch.tanh(self.map(x) + 0.1 * step))


def blocks_of(shared: bool, num_steps: int, **options: Any) -> tuple[Any, int | None]:
    torch.manual_seed(0)
    if shared:
        return Block(**options), num_steps
    return nn.ModuleList(Block(**options) for _ in range(num_steps)), None


def gradients(blocks: Any, num_steps: int | None, x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(1)
    y = reversible_loop(blocks, x, num_steps=num_steps, **options)
    return list(torch.autograd.grad((y.square() + y).sum(), [*blocks.parameters(), x]))


@pytest.mark.parametrize("shared", [True, False], ids=["one", "each"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 33, 300])
@pytest.mark.parametrize("norm", [0.1, 1.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(scheme: str, norm: float, num_steps: int, shared: bool) -> None:
    blocks, count = blocks_of(shared, num_steps, norm=norm)
    x = torch.randn(3, 6, requires_grad=True)
    found, unrolled = (gradients(blocks, count, x, scheme=scheme, gradient=g) for g in ("reversible", "direct"))
    assert difference(found, unrolled) < EXACT


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.99])
def test_gradients_for_every_momentum(momentum: float) -> None:
    blocks, count = blocks_of(True, 100)
    x, options = torch.randn(3, 6, requires_grad=True), {"scheme": "momentum", "momentum": momentum}
    found, unrolled = (gradients(blocks, count, x, gradient=g, **options) for g in ("reversible", "direct"))
    assert difference(found, unrolled) < EXACT


@pytest.mark.parametrize(
    "options", [{"save_at": 5}, {"save_at": [0, 3, 19, 20]}, {"noise": "solve"}, {"noise": "step"}]
)
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_with_dropout_and_states_on_the_way(scheme: str, gradient: str, options: dict[str, Any]) -> None:
    blocks, count = blocks_of(False, 20, dropout=0.2)
    x = torch.randn(3, 6, requires_grad=True)
    found, unrolled = (gradients(blocks, count, x, scheme=scheme, gradient=g, **options) for g in (gradient, "direct"))
    assert difference(found, unrolled) < EXACT


def by_hand(blocks: Any, x: Tensor, scheme: str, previous: Tensor | None = None) -> list[Tensor]:
    """The states, by the recursions of the papers."""
    states = [x if previous is None else previous, x]
    v = states[1] - states[0]
    for n, block in enumerate(blocks):
        f = block(states[-1], step=n)
        if scheme == "momentum":
            v = 0.9 * v + 0.1 * f
            states.append(states[-1] + v)
        elif scheme == "midpoint" and n == 0 and previous is None:
            states.append(x + f)
        else:
            states.append(states[-2] + {"coupling": 1, "midpoint": 2}[scheme] * f)
    return states[1:]


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("scheme", TWO_STEP)
def test_values_are_those_of_the_papers(scheme: str, moving: bool) -> None:
    blocks, _ = blocks_of(False, 9)
    x, previous = torch.randn(3, 6), torch.randn(3, 6) if moving else None
    found = reversible_loop(blocks, x, scheme=scheme, previous=previous, save_at=[*range(10)])
    torch.testing.assert_close(found, torch.stack(by_hand(blocks, x, scheme, previous)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradient", ["reversible", "direct"])
def test_two_streams_of_a_revnet(gradient: str) -> None:
    blocks, _ = blocks_of(False, 8)
    first, second = (torch.randn(3, 6, requires_grad=True) for _ in range(2))
    inputs = [*blocks.parameters(), first, second]
    a, b = first, second
    for n in range(0, 8, 2):
        a = a + blocks[n](b, step=n)
        b = b + blocks[n + 1](a, step=n + 1)
    streams = reversible_loop(blocks, second, previous=first, scheme="coupling", save_at=[7, 8], gradient=gradient)
    torch.testing.assert_close(streams, torch.stack([a, b]), rtol=0, atol=1e-13)
    found, expected = (torch.autograd.grad(out.square().sum(), inputs) for out in (streams, torch.stack([a, b])))
    assert difference(found, expected) < EXACT


@pytest.mark.parametrize("scheme", ["coupling", "midpoint"])
def test_a_pretrained_residual_stack(scheme: str) -> None:
    branches, _ = blocks_of(False, 6)
    stack = [lambda x, step, f=f: x + f(x, step=step) for f in branches]
    x = torch.randn(3, 6)
    found, expected = (
        reversible_loop(blocks, x, scheme=scheme, residual=residual)
        for blocks, residual in ((stack, True), (branches, False))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("last_steps", [1, 4, 12, 50])
@pytest.mark.parametrize("shared", [True, False], ids=["one", "each"])
@pytest.mark.parametrize("scheme", TWO_STEP)
def test_gradients_of_the_last_steps(scheme: str, shared: bool, last_steps: int) -> None:
    blocks, count = blocks_of(shared, 12)
    each = [blocks] * 12 if shared else list(blocks)
    x, cut = torch.randn(3, 6), max(0, 12 - last_steps)
    with torch.no_grad():
        early = by_hand(each[:cut], x, scheme)
    shifted = [lambda x, step, f=f: f(x, step=step + cut) for f in each[cut:]]
    expected = by_hand(shifted, early[-1], scheme, early[-2] if cut else None)[-1]
    found = reversible_loop(blocks, x, num_steps=count, scheme=scheme, last_steps=last_steps)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    parameters = list(blocks.parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in (found, expected)]
    filled = [[torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gs, strict=True)] for gs in grads]
    assert difference(*filled) < EXACT


def test_evaluations() -> None:
    calls: list[int] = []

    def block(x: Tensor, step: int) -> Tensor:
        calls.append(step)
        return 0.1 * torch.tanh(x)

    x = torch.randn(3, 6, requires_grad=True)
    result = reversible_loop(block, x, num_steps=9, full_output=True)
    assert calls == [*range(9)]
    result.z.sum().backward()
    assert calls[9:] == [*reversed(range(9))]
    assert (result.num_steps, result.stats.num_evaluations, result.stats.num_backward_evaluations) == (9, 9, 9)


def test_higher_derivatives() -> None:
    x = torch.randn(3, requires_grad=True)
    f = lambda x: reversible_loop(lambda x: 0.3 * torch.sin(x), x, num_steps=10).sum()  # noqa: E731
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_per_sample_gradients(scheme: str) -> None:
    block, xs = Block(), torch.randn(4, 6)

    def loss(x: Tensor) -> Tensor:
        return reversible_loop(block, x, num_steps=6, scheme=scheme).square().sum()

    leaf = xs.clone().requires_grad_()
    expected = torch.autograd.grad(loss(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(xs), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pair_dtype", [None, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_blocks_under_autocast(scheme: str, pair_dtype: torch.dtype | None) -> None:
    """The gradient is that of the same loop unrolled; without the cache of autocast, which would add up gradients in bfloat16."""
    blocks, count = blocks_of(False, 32)
    blocks, x = blocks.float(), torch.randn(3, 6, dtype=torch.float32, requires_grad=True)
    options = {"scheme": scheme, "pair_dtype": pair_dtype}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found, unrolled = (gradients(blocks, count, x, gradient=g, **options) for g in ("reversible", "direct"))
    assert difference(found, unrolled) < 1e-3


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize(("scheme", "most"), [("midpoint", 1.3), ("coupling", 1.3), ("momentum", 1.6)])
def test_memory_does_not_grow_with_the_number_of_blocks(scheme: str, most: float) -> None:
    """But by the gradients of the blocks' parameters and one stored pair every 32 steps."""

    def peak(num_blocks: int) -> int:
        blocks = nn.ModuleList(Wide() for _ in range(num_blocks)).float()
        x = torch.randn(4096, 16, dtype=torch.float32)
        return most_held(lambda: reversible_loop(blocks, x, scheme=scheme).square().mean().backward())

    assert peak(64) < most * peak(4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_steps_are_the_eager_ones(scheme: str) -> None:
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    x, made = torch.randn(3, 6, requires_grad=True), len(PROGRAMS.known)
    loops = [RevLoop(block, 9, scheme=scheme, compile=how) for how in ({"backend": "eager"}, False)]
    found, eager = (torch.autograd.grad(loop(x).square().sum(), [x, *block.parameters()]) for loop in loops)
    assert difference(found, eager) < EXACT
    assert len(PROGRAMS.known) > made


def trained(model: nn.Module, x: Tensor, target: Tensor, iterations: int) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(iterations):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.branch(x)


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [({}, 40.0, 2.5), ({"scheme": "momentum", "momentum": 0.1}, 2.0, 1.0)],
    ids=["midpoint", "momentum"],
)
def test_a_pretrained_stack_is_fine_tuned(options: dict[str, Any], first: float, last: float) -> None:
    """Bounds of the loss, in multiples of what the plain stack had reached, when it is wrapped and 150 iterations later.

    Blocks that differ make the midpoint form, y[n-1] + 2 f(y[n]) for y[n] + f(y[n]), another function; with little momentum the
    stack remains nearly what it was, and is soon better than before.
    """
    torch.manual_seed(0)
    stack = nn.Sequential(*(Residual() for _ in range(6)))
    x = torch.randn(256, 8)
    target = torch.roll(torch.sin(2 * x), 1, 1)
    before = trained(stack, x, target, 300)
    after = trained(RevLoop([*stack], residual=True, **options), x, target, 150)
    assert before[-1] < 0.2 * before[0]
    assert after[0] < first * before[-1]
    assert after[-1] < last * before[-1]


def test_pytrees() -> None:
    x = {"a": torch.randn(2, 3, requires_grad=True), "b": torch.randn(2, requires_grad=True)}
    f = lambda x: {"a": 0.1 * torch.tanh(x["a"] + x["b"][:, None]), "b": 0.1 * x["a"].mean(1)}  # noqa: E731
    found, unrolled = (
        torch.autograd.grad(
            sum(y.square().sum() for y in reversible_loop(f, x, num_steps=20, gradient=g).values()), list(x.values())
        )
        for g in ("reversible", "direct")
    )
    assert difference(found, unrolled) < EXACT


def test_the_module() -> None:
    loop = RevLoop([Block() for _ in range(5)], scheme="momentum", momentum=0.8, save_at=2)
    x = torch.randn(3, 6)
    assert loop(x).shape == (3, 3, 6)
    assert len(list(loop.parameters())) == 10
    assert not loop.last.z.requires_grad
    assert "momentum=0.8" in repr(loop)
    shared = RevLoop(Block(), 4)
    torch.testing.assert_close(shared(x, num_steps=7), reversible_loop(shared.blocks, x, num_steps=7), rtol=0, atol=0)


def test_blocks_that_differ_when_repeated_are_found_out() -> None:
    drawn = iter(torch.randn(1000).tolist())
    y = reversible_loop(lambda x: torch.tanh(x) * next(drawn), torch.ones(3, requires_grad=True), num_steps=8)
    with pytest.warns(ReconstructionWarning, match=r"anchor_every=1.*make sure that the field is deterministic"):
        y.sum().backward()


def plain(x: Tensor) -> Tensor:
    return 0.1 * x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: reversible_loop([plain, plain], x, num_steps=3), ValueError, "num_steps=3 does not match 2 blocks"),
        (lambda x: reversible_loop(plain, x), ValueError, "num_steps must say how often"),
        (lambda x: reversible_loop(plain, x, num_steps=0), ValueError, "num_steps must be a whole number"),
        (lambda x: reversible_loop([plain, plain], x, compile=True), ValueError, "compile= is for one block without"),
        (lambda x: reversible_loop(Block(), x, num_steps=2, compile=True), ValueError, "compile= is for one block"),
        (lambda x: reversible_loop([], x), TypeError, "blocks must be callable"),
        (lambda x: reversible_loop([plain, 3], x), TypeError, "blocks must be callable"),
        (lambda x: reversible_loop(3, x, num_steps=2), TypeError, "blocks must be callable"),
        (lambda x: reversible_loop(plain, x, num_steps=2, scheme="revnet"), ValueError, "scheme must be one of"),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, scheme="momentum", momentum=1.0),
            ValueError,
            r"momentum must lie in \(0, 1\), but it is 1.0",
        ),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, scheme="momentum", momentum=-0.1),
            ValueError,
            r"momentum must lie in \(0, 1\)",
        ),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, scheme="relaxation", beta=1.0),
            ValueError,
            "beta must not be 1",
        ),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, scheme="relaxation", previous=x),
            ValueError,
            "previous= has no meaning for scheme='relaxation'",
        ),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, previous=x[:1]),
            ValueError,
            r"previous must return the shape of x, \(2, 3\), but it returned \(1, 3\)",
        ),
        (
            lambda x: reversible_loop(plain, x, num_steps=2, previous=x.float()),
            TypeError,
            "previous must return the dtype of x",
        ),
        (lambda x: RevLoop(plain, 4)(x, num_steps=0), ValueError, "num_steps must be a whole number of at least 1"),
        (
            lambda x: reversible_loop([plain, lambda x: x[:1]], x),
            ValueError,
            r"a block must return the shape of x, \(2, 3\), but it returned \(1, 3\)",
        ),
        (lambda x: reversible_loop([plain, lambda x: x.float()], x), TypeError, "a block must return the dtype of x"),
        (lambda x: reversible_loop(plain, x, num_steps=4, noise="block"), ValueError, "noise must be one of"),
        (lambda x: reversible_loop(plain, x, num_steps=4, gradient="one"), ValueError, "gradient must be one of"),
        (
            lambda x: reversible_loop(plain, x, num_steps=4, last_steps=2, save_at=1),
            ValueError,
            "save_at asks for step 1, which is not one of the last 2 of 4",
        ),
        (lambda x: reversible_loop(lambda x: 1e300 * x, x, num_steps=4), RuntimeError, "not finite after step"),
        (lambda x: RevLoop(plain, 4, schema="momentum"), TypeError, "RevLoop has no keyword 'schema'"),
    ],
)
def test_refusals(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(2, 3, requires_grad=True))


@pytest.mark.parametrize("way", [{"previous": True}, {"gradient": "truncated"}, {"gradient": "one_step"}])
@pytest.mark.parametrize("scheme", TWO_STEP)
def test_loops_that_start_moving_within_torch_func(scheme: str, way: dict[str, Any]) -> None:
    """Per-sample gradients are those of one sample after the other."""
    weight, x = torch.randn(6, 6) / 3, torch.randn(3, 6)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        given = {**way, "previous": 0.9 * x} if "previous" in way else way
        block = lambda x: torch.tanh(x @ weight)  # noqa: E731
        return reversible_loop(block, x, num_steps=7, scheme=scheme, **given).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
    leaf = weight.clone().requires_grad_()
    wanted = torch.stack([torch.autograd.grad(loss(leaf, row), leaf)[0] for row in x])
    assert difference([found], [wanted]) < EXACT


class DropPath(nn.Module):
    """Stochastic depth: a block that is left out for some samples, here by torch.rand."""

    def __init__(self, block: nn.Module, drop_prob: float) -> None:
        super().__init__()
        self.block, self.drop_prob = block, drop_prob

    def forward(self, x: Tensor) -> Tensor:
        value = self.block(x)
        return value * (torch.rand(len(x), 1) >= self.drop_prob) if self.drop_prob else value


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize("kind", ["stochastic depth", "dropout"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_which_the_first_draws_nothing(scheme: str, kind: str, gradient: str) -> None:
    if kind == "dropout":
        blocks = nn.ModuleList([Block(), Block(), Block(dropout=0.5), Block(dropout=0.5)])
    else:
        blocks = nn.ModuleList(DropPath(nn.Linear(6, 6), 0.2 * n) for n in range(5))
    found = []
    for way in (gradient, "direct"):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        y = reversible_loop(blocks, x, scheme=scheme, gradient=way)
        found.append([y, torch.rand(2), *torch.autograd.grad(y.square().sum(), [x, *blocks.parameters()])])
    assert difference(*found) < EXACT


@pytest.mark.parametrize("first", ["plain", "normalised"])
def test_blocks_with_buffers_of_their_own_are_those_of_a_plain_loop(first: str) -> None:
    """Each block is used once, so that what spectral normalisation keeps is advanced once, as by hand."""
    norm = torch.nn.utils.parametrizations.spectral_norm

    def made() -> nn.ModuleList:
        torch.manual_seed(0)
        blocks = [nn.Sequential(norm(nn.Linear(6, 6)), nn.Tanh()) for _ in range(4)]
        return nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if first == "plain" else blocks[0], *blocks[1:]]
        )

    x, found = torch.randn(3, 6), []
    for plain in (False, True):
        blocks, y, v = made(), x, torch.zeros_like(x)
        for block in blocks if plain else ():
            v = block(y) - v
            y = y + v
        y = y if plain else reversible_loop(blocks, x, scheme="coupling")
        found.append([y, *torch.autograd.grad(y.square().sum(), blocks.parameters()), *blocks.buffers()])
    assert difference(*found) < EXACT


def test_a_block_with_buffers_that_comes_in_late_and_again_is_refused() -> None:
    normalised = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Tanh())
    with pytest.raises(RuntimeError, match=r"changes buffers \(_u, _v\) by t = 3\.0"):
        reversible_loop([Block(), normalised, normalised], torch.randn(3, 6))
