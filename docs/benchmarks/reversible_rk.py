"""The tables of McCallum & Foster (arXiv 2410.11648), ours beside theirs: `python docs/benchmarks/reversible_rk.py`.

First the complexity table: the gradient of a solve by midpoint steps of 0.01 through a network 1-10-1, by the reversible pair and
by checkpoints of the plain method, about sqrt(n) of them and fewer. Then an iteration of training on a white dwarf (the equation
of Chandrasekhar, C = 0.001, from 0.5 on): a network 3-10-2 of the state and the time, 1,000 steps of 0.005, the loss over all.
Ours in float32 on one thread: medians of processor time of rounds in which all take turns, eager and compiled; theirs (JAX, XLA)
as published, in milliseconds on their machine, so only ratios compare.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from contest import milliseconds, start, tiny
from torch import Tensor, nn

import revsolve

COUNTS = (4,) if tiny() else (100, 500, 1000)
THEIRS = {  # seconds: the pair; checkpoints, about sqrt(n), 8, 4 and 2 of them
    100: (0.0117, 0.0392, 0.0593, 0.0659, 0.201),
    500: (0.0387, 0.1525, 0.3525, 0.5094, 3.78),
    1000: (0.0726, 0.2957, 0.6318, 1.676, 15.04),
}
DWARF = {  # minutes of 1,000 iterations: the pair, 44 checkpoints
    "euler": (1.52, 5.22),
    "midpoint": (1.74, 5.45),
    "rk4": (2.21, 4.95),
}
ROUNDS = 5
COMPILE: Any = {"backend": "eager"} if tiny() else True
Call = Callable[[], None]


def network(*sizes: int) -> nn.Sequential:
    first, hidden, last = sizes
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


def gradient(net: nn.Module, y0: Tensor, num_steps: int, **settings: Any) -> None:
    options = {"step_size": 0.01, **settings.pop("options", {})}
    y = revsolve.odeint(lambda t, y: net(y), y0, [0.0, num_steps / 100], options=options, **settings)
    torch.autograd.grad(y[-1].square().sum(), list(net.parameters()))


def complexity() -> None:
    """Milliseconds against the number of steps."""
    print("| midpoint, ms | " + " | ".join(f"{n} steps" for n in COUNTS) + " | theirs |")
    print("|---" * (len(COUNTS) + 2) + "|")
    net, y0, found = network(1, 10, 1), torch.ones(1), {}
    for n in COUNTS:
        plain = partial(gradient, net, y0, n, method="midpoint")
        calls: dict[str, Call] = {
            "the pair": partial(gradient, net, y0, n, method="rev_midpoint"),
            "checkpoints, sqrt(n)": plain,
            **{
                f"checkpoints, {c}": partial(plain, options={"checkpoint_every": -(-n // c)}, gradient="checkpoint")
                for c in (8, 4, 2)
            },
            "`reversible_heun`": partial(gradient, net, y0, n, method="reversible_heun"),
            "direct": partial(plain, gradient="direct"),
        }
        if COMPILES:
            calls["the pair, compiled"] = partial(gradient, net, y0, n, method="rev_midpoint", compile=COMPILE)
            calls["checkpoints, sqrt(n), compiled"] = partial(plain, compile=COMPILE)
        for name, ms in milliseconds(calls, ROUNDS).items():
            found.setdefault(name, []).append(ms)
    published = dict(zip(list(found)[:5], zip(*(THEIRS[n] for n in COUNTS if n in THEIRS), strict=True), strict=False))
    for name, row in found.items():
        theirs = ", ".join(f"{1e3 * s:.0f}" for s in published.get(name, ()))
        print(f"| {name} | " + " | ".join(f"{ms:.3g}" for ms in row) + f" | {theirs} |", flush=True)


class Dwarf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(3, 10, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.reshape(1)]))


def chandrasekhar(t: Tensor, y: Tensor) -> Tensor:
    phi, slope = y
    return torch.stack([slope, -2 / t * slope - (phi.square() - 1e-3).clamp(min=0) ** 1.5])


def dwarf_times() -> list[float]:
    return [0.5 + 0.005 * n for n in range(11 if tiny() else 1001)]


def dwarf() -> Tensor:
    """The states at these times, from the series about the centre."""
    start, q = 0.5, 1 - 1e-3
    y0 = torch.tensor([1 - q**1.5 * start**2 / 6, -(q**1.5) * start / 3], dtype=torch.float64)
    return revsolve.odeint(chandrasekhar, y0, dwarf_times(), method="dopri5", rtol=1e-8, atol=1e-10).float()


def iteration(model: Dwarf, states: Tensor, **settings: Any) -> None:
    options = {"step_size": 0.005 * (1 + 1e-6)}
    loss = (revsolve.odeint(model, states[0], dwarf_times(), options=options, **settings) - states).square().mean()
    torch.autograd.grad(loss, list(model.parameters()))


def white_dwarf() -> None:
    print(
        "\n| white dwarf, ms an iteration | the pair | checkpoints | checkpoints / pair | theirs |\n|---|---|---|---|---|"
    )
    model, states = Dwarf(), dwarf()
    for base, published in list(DWARF.items())[:1] if tiny() else DWARF.items():
        kinds: Mapping[str, Mapping[str, Any]] = {
            base: {},
            **({f"{base}, compiled": {"compile": COMPILE}} if COMPILES else {}),
        }
        for name, how in kinds.items():
            calls = {
                method: partial(iteration, model, states, method=method, **how) for method in (f"rev_{base}", base)
            }
            pair, plain = milliseconds(calls, 3).values()
            theirs = "{:.0f}, {:.0f}: {:.2f}".format(*(60 * m for m in published), published[1] / published[0])
            print(f"| {name} | {pair:.3g} | {plain:.3g} | {plain / pair:.2f} | {theirs} |", flush=True)


COMPILES = tiny() or shutil.which("g++") is not None


def main() -> None:
    start()
    complexity()
    white_dwarf()


if __name__ == "__main__":
    main()
