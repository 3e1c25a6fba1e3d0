"""What lets a run be stopped and go on: a checkpoint and a log in its folder, for the recipes beside this file."""

import json
import os
from pathlib import Path
from typing import Any

import torch


def save(folder: Path, step: int, **parts: Any) -> None:
    """Write the states of the parts (model, optimizer, ...) and of the random numbers; a stop while writing loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, "random": torch.get_rng_state(), "parts": states}, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")


def resume(folder: Path, device: torch.device, **parts: Any) -> int:
    """Put the parts back to where the run was; its step, 0 for a new run."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    found = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(found["parts"][name])
    torch.set_rng_state(found["random"].cpu())
    return int(found["step"])


def log(folder: Path, **numbers: float) -> None:
    """Add a line of JSON to the log."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(numbers) + "\n")
