"""A reversible loop through many small transformer blocks beside plain backpropagation: `python docs/benchmarks/loops.py`.

Blocks of width 32 with four heads on 64 tokens, float32, one thread; medians of processor time of a training gradient, in turns.
"Again, block by block" is what any gradient takes that evaluates each block once more, without an engine around it.
"""

import torch
import torch.nn.functional as F
from contest import milliseconds, start, tiny
from torch import Tensor, nn

from revsolve import reversible_loop

BLOCKS, WIDTH, HEADS, TOKENS = (2, 8, 2, 4) if tiny() else (64, 32, 4, 64)
BATCHES, ROUNDS = (2,) if tiny() else (8, 64), 7


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.project, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = self.merge(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return attended + self.mlp(self.norms[1](x + attended))


def plain(blocks: nn.ModuleList, x: Tensor) -> None:
    blocks.zero_grad()
    for block in blocks:
        x = x + block(x)
    x.square().mean().backward()


def reversible(blocks: nn.ModuleList, x: Tensor) -> None:
    blocks.zero_grad()
    reversible_loop(blocks, x).square().mean().backward()


def again(blocks: nn.ModuleList, x: Tensor) -> None:
    blocks.zero_grad()
    inputs = []
    with torch.no_grad():
        for block in blocks:
            inputs.append(x)
            x = x + block(x)
    grad = 2 * x / x.numel()
    for block in reversed(blocks):
        leaf = inputs.pop().detach().requires_grad_()
        (block(leaf) + leaf).backward(grad)
        grad = leaf.grad


def main() -> None:
    start()
    blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
    print("| batch | plain, ms | reversible loop | again, block by block |\n|---|---|---|---|")
    for batch in BATCHES:
        x = torch.randn(batch, TOKENS, WIDTH)
        ways = {way.__name__: lambda way=way, x=x: way(blocks, x) for way in (plain, reversible, again)}
        once, *others = milliseconds(ways, ROUNDS).values()
        print(f"| {batch} | {once:.0f} | " + " | ".join(f"{ms / once:.2f}" for ms in others) + " |", flush=True)


if __name__ == "__main__":
    main()
