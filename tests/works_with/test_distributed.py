"""DistributedDataParallel and FSDP2 train to the parameters of one process; checkpointed and accumulated gradients."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.front_doors import DOORS, difference, gradients, make_net, make_y0

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.distributed warns of itself when it is imported
    from tests.training import CASES, GRADIENTS, Flow, Model, alone, batches, in_two_processes, train, whole

SAME = 1e-12  # relative, after 5 steps: gradients are summed in another order
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


two_gpus = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=two_gpus)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, in all cases one after another: starting processes is what takes time."""
    return in_two_processes(tmp_path_factory.mktemp("processes"), request.param)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_front_door_trains_to_the_same_parameters(found: Any, kind: str, door: str) -> None:
    wanted = alone(Model(door))
    assert max(difference(process[f"{kind} {door}"], wanted) for process in found) < SAME


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_gradient_trains_to_the_same_parameters(found: Any, kind: str, gradient: str) -> None:
    wanted = alone(Model(gradient=gradient))
    assert max(difference(process[f"{kind} {gradient}"], wanted) for process in found) < SAME


WRAPPED = ["ddp unused", "ddp no_sync", "fsdp beside", "fsdp accumulated", "fsdp inside direct"]


@pytest.mark.parametrize("case", WRAPPED)
def test_ways_to_wrap_a_model_train_to_the_same_parameters(found: Any, case: str) -> None:
    wanted = alone(Model())
    assert max(difference(process[case], wanted) for process in found) < SAME


def test_ddp_around_the_field_alone(found: Any) -> None:
    assert difference(found[0]["ddp inside"], alone(Flow())) < SAME


def test_fsdp_modules_inside_the_field_are_refused(found: Any) -> None:
    assert "the field calls an FSDP module (FSDPNet)" in found[0]["fsdp inside"]
    assert "shard the module whose forward calls the solver" in found[0]["fsdp inside"]


def test_fsdp_modules_inside_the_field_are_good_for_inference(found: Any) -> None:
    assert difference(found[0]["fsdp inside inference"], [Model()(batches()[0])]) < SAME


def test_every_case_is_asked_for() -> None:
    asked = {f"{kind} {name}" for kind in ("ddp", "fsdp") for name in (*DOORS, *GRADIENTS)}
    assert {*asked, *WRAPPED, "ddp inside", "fsdp inside", "fsdp inside inference"} == set(CASES)


@pytest.mark.parametrize("door", DOORS)
def test_accumulated_gradients_are_those_of_the_whole_batch(door: str) -> None:
    model = Model(door)
    train(model, batches(), pieces=2)
    assert difference(whole(model), alone(Model(door))) < SAME


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("gradient", GRADIENTS)
@every_door
def test_activation_checkpointing_around_a_solve(
    door: Any, gradient: str, reentrant: bool, device: torch.device
) -> None:
    net, y0 = make_net(lambda: torch.nn.Dropout(0.5), device=device), make_y0(device=device)

    def solve(field: Any, y0: Tensor, **settings: Any) -> Tensor:
        return checkpoint(lambda y: door(field, 2 * y, **settings), y0, use_reentrant=reentrant)

    def plainly(field: Any, y0: Tensor, **settings: Any) -> Tensor:
        return door(field, 2 * y0, **settings)

    torch.manual_seed(1)
    solve(net, y0, gradient=gradient).square().sum().backward()
    found = [y0.grad, *(p.grad for p in net.parameters())]
    assert difference(found, gradients(plainly, net, y0, gradient=gradient)) < SAME


@every_door
def test_saved_tensors_may_live_elsewhere(door: Any, device: torch.device) -> None:
    net, y0 = make_net(device=device), make_y0(device=device)
    wanted = gradients(door, net, y0)
    with torch.autograd.graph.save_on_cpu():
        assert difference(gradients(door, net, y0), wanted) == 0.0
