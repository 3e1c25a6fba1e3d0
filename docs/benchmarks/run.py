"""Run every benchmark of this folder and keep what it prints: `make bench`, or `python docs/benchmarks/run.py NAME ...`.

Each script is a program of its own, run on one thread; its table is written to `results/NAME.txt` below a line that says when, on
what and with which versions.
"""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = ("torch", "torchdiffeq", "torchsde", "torchcde", "torchdeq")


def versions() -> str:
    found = []
    for name in PEERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def main(names: list[str]) -> None:
    scripts = [HERE / f"{name}.py" for name in names] or sorted(p for p in HERE.glob("*.py") if p.name != "run.py")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script in scripts:
        print(f"== {script.stem}", flush=True)
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise SystemExit(f"{script.name} failed:\n{done.stderr}")
        print(done.stdout, flush=True)
        machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
        when = f"{datetime.date.today()}, {machine}, Python {platform.python_version()}"
        (results / f"{script.stem}.txt").write_text(f"{when}\n{versions()}\n\n{done.stdout}")


if __name__ == "__main__":
    main(sys.argv[1:])
