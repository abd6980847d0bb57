"""`python -m bench generate`: greedy generation with a language model that an image routes.

Language models with random weights generate through their own `generate`, with a cache of keys and
values: the base alone, routed at every step, or with the images folded in. Before any timing each
way's logits, of a prompt and of a decoding step, are held to the float64 truth as the models of
`bench.models` are; and in fp32 a folded model has to choose the unfolded one's tokens.

Eager decoding of a small model on a GPU is the host's time. There one decoding step is also timed
as a CUDA graph, which is what the GPU needs for it.
"""

import gc
import importlib.util
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import protocol
from bench.families import MODELS
from bench.measure import MOST_OF_A_MODEL, one_line
from bench.memory import size
from bench.models import disagreement
from bench.operands import DTYPES
from bench.providers import obstacle
from bench.results import FOLDER, begun, environment, for_writing, path_for, write_whole
from bench.runners import Runner, Start, Task, held
from bench.subject import Subject
from bench.tables import Table, markdown, number
from fused_route.checks import finite, one_of, whole

WAYS = {
    "frozen": "base alone",
    "reference": "routed, eager torch",
    "fused": "routed, kernels",
    "folded": "image folded in",
    "peft": "LoRA by PEFT, no image",
}
# LoRA first: what a budget leaves out is the adapters.
ORDER = ("qkv", "linear", "adapter")
ROUTED = ("reference", "fused", "folded")
ROUTES = ("add", "mul", "gram", "expand")  # affine in the text: those that fold
DECODERS = [name for name, model in MODELS.items() if model.family.task == "token"]
NAMES = {"model": DECODERS, "host": ORDER, "route": ROUTES, "dtype": tuple(DTYPES)}
ROUNDS = 3
CHECKED = 16  # new tokens that are compared in fp32
GRAPH_SECONDS = 0.1
SPENT = "the budget was spent"
# What is measured where nothing is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"model": ["gpt2", "gpt2-medium"], "dtype": ["bf16"], "new": 64},
    "cpu": {"model": ["gpt2"], "dtype": ["fp32"], "new": 16},
}


@dataclass
class Row:
    """One way of one task.

    Args:
        task, way: a `Task`, and a key of `WAYS`.
        gate: error of the logits, by that of the reference (at most 2); None: another function.
        same: share of the new tokens that are the reference's, in the task's dtype.
        times: [median, 20 %, 80 %] in µs: "generate", of all new tokens, prompt included; "step",
            of one decoding step at the last token as a CUDA graph.
        samples: how many generations were timed.
        bytes: of parameters, buffers and folded images: "before" folding, "folded", "after".
        absent: why a time was not taken, by its name.
        error: why there are no times at all.
    """

    task: dict[str, Any]
    way: str
    gate: float | None = None
    same: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    samples: int = 0
    bytes: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether a second call would find no more."""
        return self.error is None and SPENT not in self.absent.values()

    def rates(self) -> list[float]:
        """[median, lowest, highest] new tokens a second of the whole batch; [] without a time."""
        tokens = self.task["B"] * self.task["new"]
        middle, low, high = self.times.get("generate", (0.0, 0.0, 0.0))
        return [tokens / t * 1e6 for t in (middle, high, low)] if middle else []


class Gate:
    """What the ways of a task are held to."""

    def __init__(self, start: Start) -> None:
        self.truth = start.runner("reference", torch.float64).logits()
        reference = start.runner("reference")
        self.reference, self.ids = reference.logits(), reference.generated(start.task.new)

    def worst(self, runner: Runner) -> float:
        """The error of a way's logits, by the reference's.

        Raises:
            AssertionError: it is more than the reference's twice.
        """
        worst = disagreement(runner.logits(), self.reference, self.truth)
        if worst > MOST_OF_A_MODEL:
            raise AssertionError(
                f"logits: {worst:.3g} times the reference's error, not {MOST_OF_A_MODEL:g}"
            )
        return worst


def same_tokens_in_fp32(start: Start) -> None:
    """AssertionError where the reference chooses other tokens with images folded in."""
    runner = start.runner("reference", torch.float32)
    new = min(start.task.new, CHECKED)
    expected = runner.generated(new)
    runner.fold(start.task.into)
    if not torch.equal(found := runner.generated(new), expected):
        equal = int((found == expected).sum())
        raise AssertionError(f"in fp32 {equal} of {expected.numel()} tokens are the unfolded ones")


def folding(runner: Runner, into: str, device: torch.device) -> dict[str, int]:
    """Bytes before, while and after images are folded in: counted; on a GPU as it allocates."""
    is_gpu = device.type == "cuda"
    runner.fold(into)()  # what libraries allocate once is then there
    gc.collect()
    before = held(runner.model)
    start = torch.cuda.memory_allocated(device) if is_gpu else before

    def now() -> int:
        taken = torch.cuda.memory_allocated(device) if is_gpu else held(runner.model)
        return before + taken - start

    unfold = runner.fold(into)
    folded = now()
    unfold()
    del unfold  # which holds the folded images
    gc.collect()
    return {"before": before, "folded": folded, "after": now()}


def absent(task: Task, way: str, device: torch.device) -> str | None:
    """Why a way is left out of a task, or None."""
    if way == "peft" and task.host == "adapter":
        return "PEFT has no adapters"
    if way == "peft" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    return obstacle("fused", task.case, device) if way == "fused" else None


def checked(start: Start, gate: Gate, row: Row) -> Runner:
    """A way that is ready to be timed; what its gate found goes into its row.

    Raises:
        AssertionError: it computes something else.
        Exception: whatever else the way stumbles on.
    """
    task, runner = start.task, start.runner(row.way)
    row.bytes = {"before": size([*runner.model.parameters(), *runner.model.buffers()])}
    if row.way == "folded":
        same_tokens_in_fp32(start)
        row.bytes = folding(runner, task.into, start.device)
        runner.fold(task.into)
    if row.way in ROUTED:
        row.gate = gate.worst(runner)
    ids = runner.generated(task.new)  # which also compiles what is compiled
    if row.way in ROUTED:
        row.same = float((ids == gate.ids).double().mean())
    return runner


def timed(
    runners: dict[str, Runner], new: int, clock: protocol.Clock, seconds: float, until: float,
    failed: dict[str, Exception],
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of a generation by each way, which take turns of about seconds/ROUNDS.

    No turn but the first is begun after `until`. A way that raises is put into `failed`.
    """
    found: dict[str, list[float]] = {way: [] for way in runners}
    with protocol.undisturbed():
        for round_ in range(ROUNDS):
            for way in [way for way in runners if way not in failed]:
                if round_ and time.monotonic() > until:
                    break
                calls = int(seconds / ROUNDS / found[way][0]) if round_ else 1
                try:
                    found[way] += [once(runners[way], new, clock) for _ in range(max(1, calls))]
                except Exception as error:  # whatever a way stumbles on is its result
                    failed[way] = error
    return found


def once(runner: Runner, new: int, clock: protocol.Clock) -> float:
    start = clock.mark()
    runner.generated(new)
    stop = clock.mark()
    clock.wait()
    return clock.seconds(start, stop)


def step_in_a_graph(runner: Runner, task: Task) -> list[float]:
    """[median, 20 %, 80 %] µs of a decoding step at the last token, replayed (GPU)."""
    subject = Subject(runner.decoding(task.prompt + task.new), {})
    with torch.no_grad():
        graph = protocol.captured([subject], is_both=False)
    return protocol.summary(protocol.replays(graph, protocol.GpuClock(), GRAPH_SECONDS))


def measure(
    task: Task, device: torch.device, seconds: float, until: float, ways: Iterable[str] = WAYS
) -> list[Row]:
    """A row for every way; one that fails stops no other."""
    rows = {way: Row(asdict(task), way) for way in ways}
    failed, runners = dict[str, Exception](), dict[str, Runner]()
    start = Start(task, device)
    gate = Gate(start)
    for way, row in rows.items():
        if (why := absent(task, way, device)) is not None:
            row.absent["generate"] = why
            continue
        try:
            runners[way] = checked(start, gate, row)
        except Exception as error:  # whatever a way stumbles on is its result
            failed[way] = error
    times = timed(runners, task.new, protocol.clock_of(device), seconds, until, failed)
    for way, reason in failed.items():
        rows[way].error = one_line(reason)
    for way in [way for way in runners if way not in failed]:
        rows[way].times["generate"] = protocol.summary(times[way])
        rows[way].samples = len(times[way])
        if device.type == "cuda":
            _add_step(rows[way], runners[way], task, until)
    return list(rows.values())


def _add_step(row: Row, runner: Runner, task: Task, until: float) -> None:
    if time.monotonic() > until:
        row.absent["step"] = SPENT
        return
    try:
        row.times["step"] = step_in_a_graph(runner, task)
    except Exception as error:  # a step that waits for the GPU has no graph, for example
        row.absent["step"] = one_line(error)


def table(rows: list[Row]) -> Table:
    """A line for each row that has times; a graph's times where there are any."""
    has_steps = any("step" in row.times for row in rows)
    headings = ["", "way", "tokens/s", "20 %", "80 %", "of the base", "same tokens", "gate"]
    lines = [[*headings, *(["step, µs"] if has_steps else []), "MB", "folded", "after"]]
    base = {str(row.task): row.rates() for row in rows if row.way == "frozen"}
    for row in rows:
        numbers: list[float | None] = [*row.rates()]
        numbers.append(row.rates()[0] / base[str(row.task)][0] if str(row.task) in base else None)
        numbers += [row.same, row.gate]
        numbers += [row.times["step"][0] if "step" in row.times else None] if has_steps else []
        sizes = [row.bytes.get(key) for key in ("before", "folded", "after")]
        numbers += [None if x is None else x / 1e6 for x in sizes]
        cells = ["–" if x is None else number(x) for x in numbers]
        lines.append([Task(**row.task).name, WAYS[row.way], *cells])
    return lines


def document(rows: list[Row]) -> str:
    """The table of what was measured, and below it what was not, with the reason."""
    why = []
    for row in rows:
        of = f"{Task(**row.task).name}, {WAYS[row.way]}"
        if row.error:
            why.append(f"{of}: {row.error}.")
        why += [f"{of}, {what}: not measured, {reason}." for what, reason in row.absent.items()]
    shown = [row for row in rows if row.times]
    return "\n\n".join([*([markdown(table(shown))] if shown else []), *dict.fromkeys(why)])


def add_arguments(parser: ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cuda or cpu")
    for name, accepted in NAMES.items():
        parser.add_argument(
            f"--{name}", action="append", help=f"repeatable, of {', '.join(accepted)}"
        )
    parser.add_argument("--batch", type=int, action="append", help="repeatable (default: 1, 8)")
    parser.add_argument("--r", type=int, default=64, help="rank of the bottleneck")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, help="new tokens (default: 64 on a GPU, 16 on a CPU)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of samples for each way")
    parser.add_argument("--budget", type=float, default=3600.0,
                        help="seconds after which no task and no turn is begun")  # fmt: skip
    parser.add_argument("--out", type=Path, help="default: bench/results/generation-….json")


def chosen(arguments: Namespace) -> list[Task]:
    """The tasks that were asked for.

    Raises:
        ValueError: an argument that is not accepted, or hosts that no model has.
    """
    one_of("device", arguments.device, DEFAULTS)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU; use --device cpu")
    for name in ("seconds", "budget"):
        if finite(name, getattr(arguments, name)) <= 0.0:
            raise ValueError(f"{name} must be positive, got {getattr(arguments, name)}")
    defaults = {"host": ORDER, "route": ["mul"], "batch": [1, 8], **DEFAULTS[arguments.device]}
    given = {name: getattr(arguments, name) or value for name, value in defaults.items()}
    if arguments.new is not None:
        given["new"] = arguments.new
    for name, accepted in NAMES.items():
        for value in given[name]:
            one_of(name, value, accepted)
    for name, value, least in (
        *(("batch", batch, 1) for batch in given["batch"]),
        ("r", arguments.r, 1), ("prompt", arguments.prompt, 2), ("new", given["new"], 1),
    ):  # fmt: skip
        whole(name, value, least)
    return _tasks(given, arguments.prompt, arguments.r)


def _tasks(given: dict[str, Any], prompt: int, r: int) -> list[Task]:
    tasks = []
    for dtype, model, host, route, B in product(
        *(given[name] for name in ("dtype", "model", "host", "route", "batch"))
    ):
        if prompt + given["new"] > (most := MODELS[model].positions):
            raise ValueError(
                f"prompt + new must be at most {most}, the positions of {model}; "
                f"got {prompt} + {given['new']}"
            )
        if host in MODELS[model].family.hosts:
            tasks.append(Task(model, host, route, B, dtype, prompt, given["new"], r))
    if not tasks:
        models = ", ".join(given["model"])
        hosts = (host for model in given["model"] for host in MODELS[model].family.hosts)
        accepted = ", ".join(dict.fromkeys(hosts))
        raise ValueError(
            f"host must be one of {accepted} for {models}, got {', '.join(given['host'])}"
        )
    return tasks


def main(arguments: Namespace) -> int:
    """Measures every task, prints a table and writes a file; 1 where a way failed.

    Ways of tasks that the file has already, from the same place, are not measured again.
    """
    tasks, until = chosen(arguments), time.monotonic() + arguments.budget
    device, left = torch.device(arguments.device), list[str]()
    where = environment(device)
    out = for_writing(arguments.out or FOLDER / f"generation-{path_for(where).name}")
    rows = {(str(row["task"]), row["way"]): Row(**row) for row in begun(out, where)}
    done = {key for key, row in rows.items() if row.is_whole}
    todo = [(task, [way for way in WAYS if (str(asdict(task)), way) not in done]) for task in tasks]
    todo = [(task, ways) for task, ways in todo if ways]
    for i, (task, ways) in enumerate(todo, 1):
        for row in _measured(task, ways, device, arguments.seconds, until):
            rows[str(row.task), row.way] = row
            if row.times or row.error:
                said = row.error or f"{number(row.rates()[0])} tokens/s"
                print(f"{task.name}, {WAYS[row.way]}: {said}", flush=True)
        left = [other.name for other, _ in todo[i:]]
        found = [asdict(row) for row in rows.values()]
        about = {"what": "greedy generation", "environment": where, "left": left}
        write_whole({**about, "rows": found}, out)
        if is_lost(device) or time.monotonic() > until:
            break
    print(f"\n{document([*rows.values()])}\n")
    if left:
        print(f"not begun, for the budget or a lost GPU: {', '.join(left)}")
    print(f"next: docs/benchmarks.md says what {out} means")
    return int(any(row.error for row in rows.values()))


def _measured(
    task: Task, ways: list[str], device: torch.device, seconds: float, until: float
) -> list[Row]:
    try:
        return measure(task, device, seconds, until, ways)
    except Exception as error:  # of the task as a whole: too large, most likely
        return [Row(asdict(task), way, error=one_line(error)) for way in ways]


def read(path: Path) -> list[Row]:
    """The rows of a file that `main` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def is_lost(device: torch.device) -> bool:
    """Whether the GPU no longer answers this process."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False
