"""Run every benchmark of this folder and keep what it prints: `make bench`, or `python docs/benchmarks/run.py NAME ...`.

Each script is a program of its own, run on one thread of one processor; its table is written to `results/NAME.txt` below a line
that says when, on what and with which versions; `docs/figures/measured.py` draws some of them. Ratios within a table were
measured in turns; for times, keep the machine quiet. The load before each script is written down too, for one that was not quiet.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = (
    *("overhead", "peers", "compiled", "work_precision", "large_batch", "memory", "sde_speed", "cde_speed", "deq_cost"),
    *("projects", "ensembles", "reversible_rk", "restarts", "sde_restarts", "horizon", "first_choice", "loops"),
    *("cuda_graphs", "gpu_adaptive"),
)
PEERS = ("torch", "torchdiffeq", "torchsde", "torchcde", "torchdeq", "torchode")


def versions() -> str:
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def processor() -> str:
    """The name of the processor, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def run(name: str) -> None:
    """Run one script and keep its table."""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    machine = f"{processor()}, {os.cpu_count()} cores, one thread{load}"
    when = f"{datetime.date.today()}, {machine}, Python {platform.python_version()}"
    command, environment = [sys.executable, str(HERE / f"{name}.py")], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}.py failed:\n{done.stderr}")
    print(done.stdout, flush=True)
    (HERE / "results" / f"{name}.txt").write_text(f"{when}\n{versions()}\n\n{done.stdout}", encoding="utf-8")


def main(names: list[str]) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        run(name)


if __name__ == "__main__":
    main(sys.argv[1:])
