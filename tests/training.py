"""The same training in one process and in several, which import it from here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.front_doors import BATCH, DOORS, SIZE, make_net

WORLD, STEPS = 2, 5


LONG_STEPS: dict[str, dict[str, Any]] = {
    "odeint": {"options": {"step_size": 0.5}},
    "sdeint": {"dt": 0.5, "noise": 0.0},  # one process draws other noise for its batch than two for theirs
    "cdeint": {"options": {"step_size": 0.5}},
    "fixed_point": {},
}


def home() -> str:
    """Where this process has its models and its data."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


class Model(nn.Module):
    """A solve between two linear maps."""

    def __init__(self, door: str = "odeint", **settings: Any) -> None:
        super().__init__()
        self.field, self.door, self.settings = make_net(), DOORS[door], {**LONG_STEPS[door], **settings}
        self.encoder, self.head = nn.Linear(SIZE, SIZE).double(), nn.Linear(SIZE, 1).double()
        self.to(home())

    def forward(self, x: Tensor) -> Tensor:
        out = self.door(self.field, self.encoder(x), **self.settings)
        return self.head(out.reshape(-1, *x.shape)[-1])


class Flow(Model):
    """The solve alone, so that all parameters are those of the field."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.encoder, self.head = nn.Identity(), nn.Identity()


def batches() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randn(STEPS, WORLD * BATCH, SIZE, dtype=torch.float64, generator=generator)
    return numbers.to(home())


def train(model: nn.Module, data: Tensor, pieces: int = 1, waiting: Callable[[], Any] = nullcontext) -> None:
    """A step of SGD a batch; each batch in so many pieces, all but the last of them within `waiting`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        *first, last = batch.chunk(pieces)
        for piece in first:
            with waiting():
                (model(piece).square().mean() / pieces).backward()
        (model(last).square().mean() / pieces).backward()
        optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    """The parameters, gathered from all processes."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def alone(model: nn.Module) -> list[Tensor]:
    train(model, batches())
    return whole(model)


def mine() -> Tensor:
    """The part of the batches that this process sees."""
    return batches().chunk(WORLD, dim=1)[dist.get_rank()]


def with_ddp(model: nn.Module, **settings: Any) -> list[Tensor]:
    train(DistributedDataParallel(model, **settings), mine())
    return whole(model)


def with_no_sync(model: nn.Module) -> list[Tensor]:
    parallel = DistributedDataParallel(model)
    train(parallel, mine(), pieces=2, waiting=parallel.no_sync)
    return whole(model)


def with_ddp_inside() -> list[Tensor]:
    model = Flow()
    model.field = DistributedDataParallel(model.field)
    train(model, mine())
    return whole(model)


def sharded(model: Model, *parts: str) -> Model:
    mesh = init_device_mesh(next(model.parameters()).device.type, (WORLD,))
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh)
    return model


def with_fsdp(model: Model, *parts: str) -> list[Tensor]:
    train(sharded(model, *parts), mine())
    return whole(model)


def with_fsdp_accumulated() -> list[Tensor]:
    model = sharded(Model(), "")

    class Waiting:
        def __enter__(self) -> None:
            model.set_requires_gradient_sync(False)

        def __exit__(self, *error: object) -> None:
            model.set_requires_gradient_sync(True)

    train(model, mine(), pieces=2, waiting=Waiting)
    return whole(model)


def refusal() -> str:
    model = sharded(Model(), "field", "")
    try:
        model(mine()[0])
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def inference_inside_fsdp() -> list[Tensor]:
    model = sharded(Model(), "field", "")
    with torch.no_grad():
        return [model(batches()[0])]


GRADIENTS = ("reversible", "checkpoint", "direct")
CASES: dict[str, Callable[[], Any]] = {
    **{f"ddp {door}": lambda door=door: with_ddp(Model(door)) for door in DOORS},
    **{f"ddp {gradient}": lambda gradient=gradient: with_ddp(Model(gradient=gradient)) for gradient in GRADIENTS},
    "ddp unused": lambda: with_ddp(Model(), find_unused_parameters=True),
    "ddp no_sync": lambda: with_no_sync(Model()),
    "ddp inside": with_ddp_inside,
    **{f"fsdp {door}": lambda door=door: with_fsdp(Model(door), "") for door in DOORS},
    **{f"fsdp {gradient}": lambda gradient=gradient: with_fsdp(Model(gradient=gradient), "") for gradient in GRADIENTS},
    "fsdp beside": lambda: with_fsdp(Model(), "encoder", "head", ""),
    "fsdp accumulated": with_fsdp_accumulated,
    "fsdp inside direct": lambda: with_fsdp(Model(gradient="direct"), "field", ""),
    "fsdp inside": refusal,
    "fsdp inside inference": inference_inside_fsdp,
}


SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # FSDP of older releases asks the CPU's streams for it


class Found(dict[str, Any]):
    """What a process found, by the names of the cases that this release of torch can run."""

    def __missing__(self, name: str) -> Any:
        pytest.skip(f"this release of torch does not run {name} here")


def in_this_process(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    runs = SHARDS_ON_CPU or backend == "nccl"
    found = {name: case() for name, case in CASES.items() if runs or not name.startswith("fsdp")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_two_processes(folder: Path, backend: str) -> list[dict[str, Any]]:
    """What each of two processes found in each of the cases; with "nccl" each has a GPU of its own."""
    spawn(in_this_process, args=(str(folder), backend), nprocs=WORLD)
    return [Found(torch.load(folder / f"{rank}.pt", map_location="cpu")) for rank in range(WORLD)]
