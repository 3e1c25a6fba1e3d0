"""A reversible equilibrium language model on WikiText-103, as in McCallum, Arora & Foster (2025, arXiv 2509.12917).

    python notebooks/recipes/wikitext103.py DATA [--run FOLDER] [--device cuda] [--gradient truncated]

DATA holds train.bin and val.bin: token numbers of the GPT-2 tokenizer, one after another, as unsigned 16-bit integers; or it is a
text, whose bytes are then the tokens. The run's folder gets a log and checkpoints, from which the same command goes on. One
block, z + Attention(LayerNorm(z + x)), then + MLP(LayerNorm(.)), iterated 4 steps (8 evaluations) with beta = 0.5; 94 million
parameters and a perplexity of about 23 in the paper, which has not been repeated here.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from runs import log, resume, save
from torch import Tensor, nn
from tqdm import tqdm

from revsolve import RevDEQ


@dataclass(frozen=True)
class Settings:
    """Those of the paper; tests shrink them."""

    vocabulary: int = 50304
    width: int = 768
    heads: int = 12
    length: int = 448
    batch: int = 32
    steps: int = 4
    beta: float = 0.5
    gradient: str = "reversible"  # or any other word of `fixed_point`, to compare with
    bfloat16: bool = True  # what the block computes in
    learning_rate: float = 3e-4
    iterations: int = 80_000
    window: int = 200  # iterations over which the loss is averaged before the learning rate is judged


class Block(nn.Module):
    """The map whose fixed point is sought: z, x -> z', all of shape (batch, length, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        parts = self.project(self.norms[0](z + x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)  # (batch, heads, length, width / heads)
        z = z + self.merge(attended.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norms[1](z))


class LanguageModel(nn.Module):
    """Embeddings, the equilibrium of one block, and an untied head."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.tokens = nn.Embedding(settings.vocabulary, settings.width)
        self.positions = nn.Embedding(settings.length, settings.width)
        block = Block(settings.width, settings.heads)
        self.equilibrium = RevDEQ(
            block, beta=settings.beta, tol=0.0, max_steps=settings.steps, gradient=settings.gradient
        )
        self.head = nn.Linear(settings.width, settings.vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the token after each."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.equilibrium(x))


def texts(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The tokens to train with and those held out: of train.bin and val.bin, or bytes of a text, a tenth held out."""
    if data.is_dir():
        train, held_out = (np.memmap(data / name, dtype=np.uint16, mode="r") for name in ("train.bin", "val.bin"))
        return train, held_out
    tokens = np.fromfile(data, dtype=np.uint8).astype(np.uint16)
    return tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]


def batches(data: np.ndarray, settings: Settings, device: torch.device) -> Tensor:
    """Random stretches of the text, (batch, length + 1)."""
    starts = torch.randint(len(data) - settings.length, (settings.batch,)).tolist()
    rows = [torch.from_numpy(data[s : s + settings.length + 1].astype(np.int64)) for s in starts]
    return torch.stack(rows).to(device)


def loss_of(model: LanguageModel, tokens: Tensor, bfloat16: bool) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(data: Path, run: Path, settings: Settings, device: torch.device) -> list[float]:
    """Train from where the run's last checkpoint is, and log the perplexity on text held out; the losses of its iterations."""
    text, held_out = texts(data)
    torch.manual_seed(5678)
    model = LanguageModel(settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    parts = {"model": model, "optimizer": optimizer, "plateau": plateau}
    first, losses = resume(run, device, **parts), []  # type: int, list[float]
    for n in tqdm(range(first + 1, settings.iterations + 1), desc="training"):
        optimizer.zero_grad()
        loss = loss_of(model, batches(text, settings, device), settings.bfloat16)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if n % settings.window == 0:
            recent = losses[-settings.window :]
            plateau.step(sum(recent) / len(recent))
            with torch.no_grad():
                perplexity = loss_of(model, batches(held_out, settings, device), settings.bfloat16).exp().item()
            log(run, iteration=n, loss=sum(recent) / len(recent), perplexity=perplexity)
            save(run, n, **parts)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path, default=Path("build/wikitext103"))
    parser.add_argument("--gradient", default="reversible")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    arguments = parser.parse_args()
    train(arguments.data, arguments.run, replace(Settings(), gradient=arguments.gradient), arguments.device)
