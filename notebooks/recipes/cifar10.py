"""A multi-scale reversible implicit ResNet on CIFAR-10, after McCallum, Arora & Foster (2025, arXiv 2509.12917).

    python notebooks/recipes/cifar10.py DATA [--run FOLDER] [--device cuda] [--gradient truncated]

DATA is the folder of the Python version of CIFAR-10 (data_batch_1 to data_batch_5 and test_batch). The run's folder gets a log
and checkpoints, from which the same command goes on. Stages of 128, 256, 256 and 128 channels, between them pre-activation
downsampling; in each x + equilibrium(x), of 4 steps with beta = 0.8; 8.9 million parameters (10.3
in the paper, which reports 94.4 %; this has not been repeated here).
"""

import argparse
import pickle
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

    channels: tuple[int, ...] = (128, 256, 256, 128)
    widths: tuple[int, ...] = (1, 3, 3, 1)  # of the cells, in multiples of their channels
    steps: tuple[int, ...] = (4, 4, 4, 4)
    beta: float = 0.8
    gradient: str = "reversible"  # or any other word of `fixed_point`, to compare with
    bfloat16: bool = True  # what the cells compute in
    batch: int = 64
    epochs: int = 100
    learning_rate: float = 3e-4


class Cell(nn.Module):
    """The implicit ResNet cell: z, x -> norm(relu(z + norm(x + conv(norm(relu(conv(z)))))))."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        inner = channels * width
        self.first, self.second = nn.Conv2d(channels, inner, 3, padding=1), nn.Conv2d(inner, channels, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(max(1, c // 16), c) for c in (inner, channels, channels)])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inside, added, out = self.norms
        h = added(x + self.second(inside(torch.relu(self.first(z)))))
        return out(torch.relu(z + h))


class Stage(nn.Module):
    """x + equilibrium(x)."""

    def __init__(self, channels: int, width: int, steps: int, settings: Settings) -> None:
        super().__init__()
        options = {"beta": settings.beta, "gradient": settings.gradient}
        self.equilibrium = RevDEQ(Cell(channels, width), tol=0.0, max_steps=steps, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.equilibrium(x)


def downsample(channels: int, next_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, next_channels, 3, stride=2, padding=1)
    )


def network(settings: Settings) -> nn.Sequential:
    """Images (batch, 3, 32, 32) to logits (batch, 10)."""
    channels = settings.channels
    layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 3, padding=1)]
    for i, (c, width, steps) in enumerate(zip(channels, settings.widths, settings.steps, strict=True)):
        layers += [downsample(channels[i - 1], c)] if i else []
        layers.append(Stage(c, width, steps, settings))
    layers += [
        nn.BatchNorm2d(channels[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels[-1], 10),
    ]
    return nn.Sequential(*layers)


def load(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    """Images (number, 3, 32, 32), normalised, and labels (number,)."""
    images, labels = [], []
    for name in names:
        with (folder / name).open("rb") as file:
            entry = pickle.load(file, encoding="bytes")
        images.append(np.asarray(entry[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(entry[b"labels"]))
    pixels = torch.from_numpy(np.concatenate(images)).float() / 255
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (pixels - mean[:, None, None]) / deviation[:, None, None], torch.from_numpy(np.concatenate(labels)).long()


def augmented(images: Tensor) -> Tensor:
    """A random crop of the padded images, and a flip of a random half of them."""
    row, column = torch.randint(9, (2,)).tolist()
    cropped = F.pad(images, (4, 4, 4, 4))[..., row : row + 32, column : column + 32]
    flip = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flip, cropped.flip(-1), cropped)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    with torch.no_grad():
        hits = [
            (model(x.to(device)).argmax(1).cpu() == y).sum()
            for x, y in zip(images.split(256), labels.split(256), strict=True)
        ]
    model.train()
    return int(torch.stack(hits).sum()) / len(labels)


def train(data: Path, run: Path, settings: Settings, device: torch.device) -> list[float]:
    """Train from where the run's last checkpoint is, and log the accuracy after every epoch; the losses of its iterations."""
    images, labels = load(data, [f"data_batch_{i}" for i in range(1, 6)])
    test = load(data, ["test_batch"])
    torch.manual_seed(5680)
    model = network(settings).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first, losses = resume(run, device, **parts), []  # type: int, list[float]
    for epoch in range(first + 1, settings.epochs + 1):
        batches = torch.randperm(len(labels)).split(settings.batch)
        for chosen in tqdm(batches, desc=f"epoch {epoch}"):
            optimizer.zero_grad()
            x, y = augmented(images[chosen].to(device)), labels[chosen].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        recent = losses[-len(batches) :]
        log(run, epoch=epoch, loss=sum(recent) / len(recent), accuracy=accuracy(model, *test, device))
        save(run, epoch, **parts)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path, default=Path("build/cifar10"))
    parser.add_argument("--gradient", default="reversible")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    arguments = parser.parse_args()
    train(arguments.data, arguments.run, replace(Settings(), gradient=arguments.gradient), arguments.device)
