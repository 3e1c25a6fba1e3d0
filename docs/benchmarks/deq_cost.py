"""What a reversible equilibrium costs beside torchdeq's: `python docs/benchmarks/deq_cost.py`.

Time: a training gradient of an implicit ResNet cell (32 channels, 8 x 8, batch 64, float32, one thread), 12 iterations, that
is 24 evaluations forward for every contender; the lowest tenth of the processor times of 40 rounds in which all take turns.
"Bare cell" is the evaluations alone: 24 without a graph, and 24 with their vector-Jacobian products. Error: of the gradient,
against that of the exact fixed point.

Memory: the most that torch holds at once over forward and backward of one loss, and the numbers that autograd saves in between.
Neither depends on the machine. Once for the cell on CIFAR-shaped states; once, per image, for the whole network of the paper
(`notebooks/recipes/cifar10.py`, a quarter of its channels, 8 evaluations in each of its four equilibria), as in the request for
reversible equilibria in torchdeq: in float32, and as CUDA's autocast to bfloat16 has it, with group norms in float32.
"""

import functools
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contest import start, tiny
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchdeq import get_deq

import revsolve.torchdeq  # noqa: F401 (registers the core)
from revsolve import fixed_point

Contender = Callable[[nn.Module, Tensor], Tensor]  # cell, x -> z

CHANNELS, EVALUATIONS = 32, 24
BATCH, SIZE, ROUNDS = (2, 3, 1) if tiny() else (64, 8, 40)
MEMORY_BATCH, MEMORY_SIZE = (2, 3) if tiny() else (64, 32)
NETWORK_EVALUATIONS, NETWORK_BATCHES = 8, (4, 8)
RECIPE = Path(__file__).parents[2] / "notebooks" / "recipes" / "cifar10.py"


def ours(evaluations: int = EVALUATIONS, **options: Any) -> Contender:
    return lambda cell, x: fixed_point(cell, torch.zeros_like(x), args=x, tol=0, max_steps=evaluations // 2, **options)


def core(name: str, evaluations: int = EVALUATIONS, **keys: Any) -> Contender:
    deq = get_deq(core=name, f_tol=0.0, b_tol=0.0, f_max_iter=evaluations, b_max_iter=evaluations, **keys)
    return lambda cell, x: deq(lambda z: cell(z, x), torch.zeros_like(x))[0][-1]


CONTENDERS: dict[str, Contender] = {
    "fixed_point, beta 0.5": ours(beta=0.5),
    "fixed_point, beta 0.8": ours(beta=0.8),
    "the same, float32 pair": ours(beta=0.8, pair_dtype=torch.float32),
    "the same, unrolled": ours(beta=0.8, gradient="direct"),
    "torchdeq, reversible": core("reversible", beta=0.8, on_failure="ignore"),
    "torchdeq, one step": core("sliced"),
    "torchdeq, phantom 5": core("sliced", grad=5, tau=0.5),
    "torchdeq, phantom 12": core("sliced", grad=12, tau=0.5),
    "torchdeq, ift": core("sliced", ift=True),
}
IN_NETWORK: dict[str, Contender] = {
    "fixed_point, beta 0.75": ours(NETWORK_EVALUATIONS, beta=0.75),
    "fixed_point, beta 0.8": ours(NETWORK_EVALUATIONS, beta=0.8),
    "the same, unrolled": ours(NETWORK_EVALUATIONS, beta=0.8, gradient="direct"),
    "torchdeq, one step": core("sliced", NETWORK_EVALUATIONS),
    "torchdeq, ift": core("sliced", NETWORK_EVALUATIONS, ift=True),
    "torchdeq, phantom 5": core("sliced", NETWORK_EVALUATIONS, grad=5, tau=0.5),
    "torchdeq, phantom 8": core("sliced", NETWORK_EVALUATIONS, grad=8, tau=0.5),
}


class Cell(nn.Module):
    """norm(relu(z / 4 + x + norm(conv(norm(relu(conv(z))))) / 4)), an implicit ResNet cell that contracts."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(channels // 16, channels) for _ in range(3)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        first, second, last = self.norms
        return last(torch.relu(0.25 * z + x + 0.25 * second(self.outer(first(torch.relu(self.inner(z)))))))


def gradient(name: str, cell: Cell, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss(CONTENDERS[name](cell, x)), [*cell.parameters(), x]))


def loss(z: Tensor) -> Tensor:
    """A component in a random direction: the norm of z tells nothing, for the cell normalises it."""
    return (z * direction(z.shape).to(z)).mean()


@functools.cache
def direction(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def bare(cell: Cell, x: Tensor) -> None:
    z, inputs = torch.zeros_like(x), [*cell.parameters(), x]
    with torch.no_grad():
        for _ in range(EVALUATIONS):
            z = cell(z, x)
    ones = torch.ones_like(z)
    for _ in range(EVALUATIONS):
        leaf = z.detach().requires_grad_()
        torch.autograd.grad(cell(leaf, x), [leaf, *inputs], ones)


def milliseconds(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The lowest tenth of each one's processor times; they take turns, and other programs can only lengthen them."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            begin = time.process_time()
            call()
            taken[name].append(1e3 * (time.process_time() - begin))
    return {name: sorted(times)[len(times) // 10] for name, times in taken.items()}


def vector(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def exact(cell: Cell, x: Tensor) -> Tensor:
    """The gradient at the fixed point itself, by implicit differentiation in float64."""
    wide = Cell().double()
    wide.load_state_dict(cell.state_dict())
    x = x.detach().double().requires_grad_()
    options = {"b_tol": 1e-11, "b_max_steps": 300}
    z = fixed_point(wide, torch.zeros_like(x), args=x, method="anderson", tol=1e-11, max_steps=300, options=options)
    return vector(list(torch.autograd.grad(loss(z), [*wide.parameters(), x])))


def numbers_saved(name: str, cell: Cell, x: Tensor) -> int:
    """How many float32 numbers autograd saves for the backward pass besides parameters and x."""
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = CONTENDERS[name](cell, x)
    own = {t.untyped_storage().data_ptr() for t in [*cell.parameters(), x]}
    del z
    return sum(t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in own)


def megabytes(run: Callable[[], object]) -> float:
    """The most that torch's allocator holds at once for the run, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    held, most = 0, 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


class Using(nn.Module):
    """A cell, and how its equilibrium is found."""

    def __init__(self, cell: nn.Module, solve: Contender) -> None:
        super().__init__()
        self.cell, self.solve = cell, solve

    def forward(self, x: Tensor) -> Tensor:
        return self.solve(self.cell, x)


class WideGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)


def megabytes_an_image(solve: Contender, autocast: bool) -> float:
    """Of the whole network: what four more images add, so that weights do not count."""
    recipe = runpy.run_path(str(RECIPE))
    model = recipe["network"](recipe["Settings"](channels=(32, 64, 64, 32)))
    for module in list(model.modules()):
        if hasattr(module, "equilibrium"):
            module.equilibrium = Using(module.equilibrium.f, solve)
        elif isinstance(module, nn.GroupNorm):
            module.__class__ = WideGroupNorm
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step(batch: int) -> None:
        images, labels = torch.randn(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    few, many = (megabytes(functools.partial(step, batch)) for batch in NETWORK_BATCHES)
    return (many - few) / (NETWORK_BATCHES[1] - NETWORK_BATCHES[0])


def main() -> None:
    start()
    cell, x = Cell(), torch.randn(BATCH, CHANNELS, SIZE, SIZE, requires_grad=True)
    truth = exact(cell, x)
    images = torch.randn(MEMORY_BATCH, CHANNELS, MEMORY_SIZE, MEMORY_SIZE, requires_grad=True)
    direction(images.shape)  # drawn before memory is counted
    calls: dict[str, Callable[[], object]] = {"bare cell": lambda: bare(cell, x)}
    for name in CONTENDERS:
        calls[name] = functools.partial(gradient, name, cell, x)
    taken = milliseconds(calls)
    print(f"{'':<26}{'ms':>8}{'of bare':>9}{'error':>10}{'saved':>12}{'peak MB':>9}")
    print(f"{'bare cell':<26}{taken['bare cell']:>8.0f}{1.0:>9.2f}")
    for name in CONTENDERS:
        error = ((vector(gradient(name, cell, x)) - truth).norm() / truth.norm()).item()
        peak = megabytes(functools.partial(gradient, name, cell, images))
        row = f"{taken[name]:>8.0f}{taken[name] / taken['bare cell']:>9.2f}{error:>10.1e}{numbers_saved(name, cell, x):>12,}"
        print(f"{name:<26}{row}{peak:>9.0f}", flush=True)
    print(f"\n{'whole network, MB an image':<26}{'float32':>9}{'bfloat16':>10}")
    for name, solve in () if tiny() else IN_NETWORK.items():
        wide, narrow = (megabytes_an_image(solve, autocast) for autocast in (False, True))
        print(f"{name:<26}{wide:>9.2f}{narrow:>10.2f}", flush=True)


if __name__ == "__main__":
    torch.ones(
        2**22
    )  # malloc, having seen this freed, keeps what is freed later, as in any program with data of this size
    main()
