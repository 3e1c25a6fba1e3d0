"""Numbers kept for the backward pass, by gradient mode: `python docs/benchmarks/memory.py`.

The two problems of McCallum & Foster (arXiv 2410.11648) in their sizes, and a long solve. Counted are the numbers in all storages
that autograd's saved-tensor hooks saw and that are still alive when the loss has been computed, parameters left out.
"""

import itertools
import math
import weakref
from collections.abc import Callable
from functools import partial

import torch
import torchdiffeq
from contest import start, tiny
from torch import Tensor, nn

from revsolve import HermitePath, cdeint, odeint

COUNTS = [4, 8] if tiny() else [100, 1000, 10_000, 100_000]
SAMPLES = 4 if tiny() else 1000


class ConcatSquash(nn.Module):
    """Linear layer whose output is scaled and shifted by functions of time (Grathwohl et al. 2019)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer, self.bias, self.gate = (
            nn.Linear(inputs, outputs),
            nn.Linear(1, outputs, bias=False),
            nn.Linear(1, outputs),
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(1, 1)
        return self.layer(x) * torch.sigmoid(self.gate(t)) + self.bias(t)


class Flow(nn.Module):
    """Field of a continuous normalizing flow in the plane: the state's rate and minus its exact divergence."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = [2, width, width, width, 2]
        self.layers = nn.ModuleList(ConcatSquash(a, b) for a, b in itertools.pairwise(sizes))

    def rate(self, t: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(t, x))
        return self.layers[-1](t, x)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            rate = self.rate(t, x)
            rows = [torch.autograd.grad(rate[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return rate, -(rows[0] + rows[1])


class Control(nn.Module):
    """Field of a neural CDE: hidden 32, channels 4, width 32, depth 4."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(32, 32), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(32, 32 * 4), nn.Tanh())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(z).unflatten(-1, (32, 4))


def numbers_kept(loss: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """What is still alive, of all that was saved, when the loss has been computed."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    saved: list[weakref.ref[Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        alias = x.detach()  # x itself would keep the node alive that keeps x
        saved.append(weakref.ref(alias))
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = loss()
    alive = [x for x in (ref() for ref in saved) if x is not None]
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in alive}
    del value
    return sum(numbers for pointer, numbers in kept.items() if pointer not in known)


def flow_loss(flow: Flow, points: Tensor, steps: int, **settings: str) -> Tensor:
    state = (points, torch.zeros(len(points)))
    x, change = odeint(flow, state, torch.tensor([1.0, 0.0]), options={"step_size": 1 / steps}, **settings)
    return (x[-1].pow(2).sum(-1) / 2 + math.log(2 * math.pi) + change[-1]).mean()


def control_loss(func: Control, path: HermitePath, steps: int, **settings: str) -> Tensor:
    z0 = torch.zeros(64, 32)
    return cdeint(path, func, z0, path.interval, options={"step_size": float(path.interval[1]) / steps}, **settings)[
        :, -1
    ].mean()


def long_loss(net: nn.Module, steps: int, solve: Callable[..., Tensor] = odeint, **settings: str) -> Tensor:
    y0, t, options = torch.ones(16, 8), torch.tensor([0.0, 10.0]), {"step_size": 10 / steps}
    return solve(lambda t, y: net(y), y0, t, options=options, **settings)[-1].mean()


def row(name: str, loss: Callable[..., Tensor], parameters: list[Tensor], base: str, steps: int) -> None:
    few = min(steps, 10)  # direct keeps the same for every step; a hundred steps of the flow would take over 10 GB
    direct = numbers_kept(lambda: loss(few, method=base, gradient="direct"), parameters) * (steps // few)
    checkpoint = numbers_kept(lambda: loss(steps, method=base, gradient="checkpoint"), parameters)
    kept = numbers_kept(lambda: loss(steps, method=f"rev_{base}", gradient="reversible"), parameters)
    print(f"| {name} | {direct:,} | {checkpoint:,} | {kept:,} | {direct / kept:.1f} |", flush=True)


def curves_of(net: nn.Module, counts: list[int]) -> dict[str, list[int]]:
    """Numbers kept against steps; what grows in proportion to the steps ends where 10,000 of them do."""
    ways = {
        "torchdiffeq rk4, backprop": {"solve": torchdiffeq.odeint, "method": "rk4"},
        "rk4, direct": {"method": "rk4", "gradient": "direct"},
        "rk4, checkpoint": {"method": "rk4", "gradient": "checkpoint"},
        "rev_rk4, reversible": {"method": "rev_rk4", "gradient": "reversible"},
    }
    found: dict[str, list[int]] = {}
    for name, way in ways.items():
        within = [n for n in counts if n <= 10_000 or "reversible" in name or "checkpoint" in name]
        found[name] = [
            numbers_kept(partial(long_loss, net, n, **way), list(net.parameters()))  # type: ignore[arg-type]
            for n in within
        ]
    return found


def main() -> None:
    start()
    print("| | direct | checkpoint | reversible | direct / reversible |\n|---|---|---|---|---|")
    flow, points, steps = Flow(), torch.randn(SAMPLES, 2), COUNTS[0]
    row(f"CNF, {steps} dopri5 steps", partial(flow_loss, flow, points), list(flow.parameters()), "dopri5", steps)
    func, path = Control(), HermitePath(torch.randn(64, steps + 1, 4).cumsum(1) / 10)
    name = f"neural CDE, {steps} dopri5 steps"
    row(name, partial(control_loss, func, path), list(func.parameters()), "dopri5", steps)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    found = curves_of(net, COUNTS)
    print("\n| an MLP, rk4 steps | " + " | ".join(f"{n:,}" for n in COUNTS) + " |\n|---|" + "---|" * len(COUNTS))
    for name, kept in found.items():
        cells = [f"{number:,}" for number in kept] + [""] * (len(COUNTS) - len(kept))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
