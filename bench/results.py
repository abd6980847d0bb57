"""Result files: one JSON for each device and commit, and where it was measured."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.checked import result_file

FOLDER = Path(__file__).parent / "results"
TOP = Path(__file__).parent.parent
PASSES = ("forward", "backward", "both")
# Eager calls with the host's time; replay of a CUDA graph, cold cache; sum of kernels and copies.
TIMINGS = ("wall", "graph", "kernels")


@dataclass
class Record:
    """One provider of one case, measured in one process.

    Args:
        case: as `Case.to_json`; name: `Case.name`.
        provider: of `bench.providers.PROVIDERS`.
        process: its number; medians of several tell how far they spread.
        gate: what the correctness gate found: the worst ratio to eager's error (at most 2).
        times: µs, by timing and pass: [median, 20 %, 80 %]. "backward" of a graph is the
            difference of the other two.
        bytes: "saved" for the backward pass, "peak" above what lived before (GPU), "moved" as
            the profiler counts (GPU).
        launches: of forward and backward pass: aten operations and Triton kernels.
        kernels: device kernels of both passes, as the profiler counts (GPU).
        absent: why a timing was not taken, by its name.
        error: why there are no times at all.
    """

    name: str
    case: dict[str, Any]
    provider: str
    process: int = 0
    gate: float | None = None
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    launches: list[int] | None = None
    kernels: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def of_case(self) -> Case:
        return Case(**self.case)


@dataclass
class Results:
    """What one run measured.

    Args:
        environment: device, driver, versions, commit, date: `environment()`.
        ceilings: "copy" bytes/s, "matmul" FLOP/s of the dtype in "dtype": measured in the run.
        records: in the order measured.
        missing: providers that were asked for and have no record, by the case's name: the time was
            up before them.
    """

    environment: dict[str, Any]
    ceilings: dict[str, Any]
    records: list[Record]
    missing: dict[str, list[str]] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(asdict(self), path)


def for_writing(path: Path) -> Path:
    """A file that is to be written later, with its folder, before anything is measured for it.

    Raises:
        ValueError: a folder has that name, or its own cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={str(path)!r}: its folder cannot be made: {error}") from error
    if path.is_dir():
        raise ValueError(f"out={str(path)!r} must be a file, it is a folder")
    return path


def write_whole(found: dict[str, Any], path: Path) -> None:
    """A JSON file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(path)


def begun(path: Path, where: dict[str, Any], again: str = "") -> list[dict[str, Any]]:
    """The rows of a file that an earlier call left, to go on from; [] where there are none.

    A file of other code, versions or another device is moved aside, so that nothing measured is
    lost; so is one that cannot be read.

    Args:
        where: of this call: "commit", "versions", "device", as in `environment`.
        again: "what" of files that any machine makes again, and that are not kept.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        before, rows = found.get("environment", found), list(found["rows"])
        if all(before.get(key) == where.get(key) for key in ("commit", "versions", "device")):
            return rows
        if found.get("what") == again:
            return []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    set_aside(path, f"{path} is of other code, versions or another device")
    return []


def set_aside(path: Path, why: str) -> None:
    """Gives a file that is to be written another name, and says why and which."""
    names = (path.with_name(f"{path.stem}.before{i}{path.suffix}") for i in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    print(f"{why}: it is {aside.name} now")


def read(path: Path) -> Results:
    """A result file.

    Raises:
        ValueError: not there, damaged, or no result file.
    """
    found = result_file(path)
    try:
        records = [Record(**record) for record in found["records"]]
        for record in records:
            record.of_case()
    except ValueError as error:
        raise ValueError(f"{path} is no result file of python -m bench: {error}") from None
    return Results(found["environment"], found["ceilings"], records, found.get("missing", {}))


def without_time(missing: dict[str, list[str]]) -> list[str]:
    """A line for each provider of `Results.missing`, with the first of its cases."""
    cases: dict[str, list[str]] = {}
    for name, who in missing.items():
        for provider in who:
            cases.setdefault(provider, []).append(name)
    return [
        f"no time was left for {provider} in {len(names)} cases: {', '.join(names[:6])}"
        + (", …" if len(names) > 6 else "")
        for provider, names in cases.items()
    ]


def environment(device: torch.device) -> dict[str, Any]:
    """Where and when: device, driver, versions, commit, date (UTC)."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "kind": "gpu" if on_gpu else "cpu",
        "driver": _driver() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "triton", "transformers", "peft")},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def path_for(environment: dict[str, Any]) -> Path:
    """bench/results/<device>-<commit>.json."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return FOLDER / f"{device}-{environment['commit']}.json"


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists() and (name := re.search(r"model name\s*: (.*)", info.read_text())):
        return name[1]
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return said.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def place(environment: dict[str, Any]) -> str:
    """The device, the code and the versions: records of other places are none of this run."""
    versions = (environment.get("versions") or {}).items()
    told = [f"{name} {version}" for name, version in sorted(versions) if version is not None]
    return " ".join([environment["device"], str(environment.get("commit")), *told])


def _commit() -> str:
    """COMMIT of the environment; or git's short hash, with + and a digest of what differs."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        commit = _git("rev-parse", "--short=8", "HEAD")
        changes = _git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (f"+{sha256(changes.encode()).hexdigest()[:6]}" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(TOP), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
