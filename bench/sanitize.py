"""Every kernel once, in small ragged sizes, for NVIDIA's compute-sanitizer; and what it found.

    python -m bench.sanitize                 runs them; status 1 where one did not run, or not well
    python -m bench.sanitize summarise LOG…  counts the records of its logs, ours apart

What the program itself printed under the sanitizer is in LOG, or beside LOG.txt in LOG.log.
`bench/gpu.sh sanitize` does both. Without a sanitizer the program runs too; tests run it without a
GPU, in Triton's interpreter as they repair it.
"""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.cases import share as numbers
from bench.configured import along_with_few_rows, configured
from bench.operands import DTYPES, S_SCALE, Layer, Operands
from fused_route import Routing, RoutingInput, routed_adapter, routed_linear
from fused_route.coverage import device_obstacle
from fused_route.functional import ProductPlan
from fused_route.kernels.launch import Launch

KERNELS = (
    "project", "routed_forward", "routed_bottleneck", "extended_product", "routed_backward",
    "vector_gradient", "matrix_gradient", "weight_partials", "add_partials",
)  # fmt: skip
D, RANK = 72, 12  # no multiples of a tile: every mask matters
LENGTHS = (40, 0, 33, 25)  # of packed samples; two rows of padding follow
P = 0.25
ENDED = "launched: "  # begins the program's last line


@dataclass(frozen=True)
class Case:
    """One layer, forward and backward.

    Args:
        samples, tokens: 4 × 25 = 100 rows, unless sums over rows are to be split.
        modes: of `Routing`.
        is_packed: rows of `LENGTHS`.
        trial: of `TRIALS`.
        plan: of the product with a frozen weight, the same on every GPU.
    """

    layer: Layer
    dtype: str = "bf16"
    samples: int = 4
    tokens: int = 25
    rank: int = RANK
    modes: dict[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    trial: str = ""
    plan: ProductPlan = "p1"

    @property
    def name(self) -> str:
        """What is run, in words."""
        layer = self.layer
        flags = {
            f"Nv={layer.Nv}": layer.Nv > 1, "dropout": layer.dropout > 0.0,
            "recompute": layer.recompute, "dx_r": layer.trains_image, "packed": self.is_packed,
            f"r={self.rank}": self.rank != RANK, self.trial: self.trial != "",
            "P3": self.plan == "p3",
            **{f"{name}={mode}": True for name, mode in self.modes.items()},
        }  # fmt: skip
        told = [text for text, is_so in flags.items() if is_so]
        return " ".join([layer.host, layer.route, self.dtype, *told])


# What is no choice of the library at these sizes: entries of `fused_route.kernels.config`.
TRIALS: dict[str, dict[str, Any]] = {
    "": {},
    "tiles for many rows": {"MANY_ROWS": 1},
    "image along": {"image": along_with_few_rows},
    "long samples": {"LONG_VECTORS": 1, "LONG_MATRICES": 1},
}
UNIT = {"normalize": "unit"}  # u and w are then given to the kernels, not made by them
CASES = (
    Case(Layer("adapter", "none")),
    Case(Layer("adapter", "add", trains_image=True)),
    Case(Layer("adapter", "mul"), is_packed=True),
    Case(Layer("adapter", "gram", dropout=P, trains_image=True)),
    Case(Layer("adapter", "gram", Nv=3), is_packed=True),
    Case(Layer("qkv", "mul", dropout=P, recompute=True)),
    Case(Layer("adapter", "mul"), samples=5, tokens=61, rank=40, trial="tiles for many rows"),
    Case(Layer("adapter", "mul", dropout=P, trains_image=True), trial="image along"),
    Case(Layer("qkv", "gram", trains_image=True), is_packed=True, trial="image along"),
    Case(Layer("qkv", "mul", trains_image=True), samples=2, tokens=150, trial="long samples"),
    Case(Layer("adapter", "gram", Nv=3), "fp32", samples=2, tokens=150, trial="long samples"),
    Case(Layer("linear", "gram"), "fp32", samples=5, tokens=61, modes=UNIT),
    Case(Layer("qkv", "gram", Nv=3, dropout=P), "fp32"),
    Case(Layer("adapter", "gram", trains_image=True), rank=140),  # the loops over a wide bottleneck
    Case(Layer("linear", "mul"), plan="p3"),
    Case(Layer("qkv", "gram", Nv=3, dropout=P), plan="p3"),
)


def result(o: Operands, case: Case) -> Tensor:
    """y by the kernels."""
    layer = o.layer
    x_r: Tensor | RoutingInput = o.x_r
    if case.is_packed:
        rows = [sample for sample, length in enumerate(LENGTHS) for _ in range(length)] + [-1, -1]
        x_r = RoutingInput(o.x_r, sample_index=torch.tensor(rows, device=o.x_r.device))
    shared: dict[str, Any] = {
        "route": Routing(layer.route, **case.modes), "dropout": layer.dropout,
        "recompute": layer.recompute, "impl": "triton",
    }  # fmt: skip
    if layer.host == "adapter":
        return routed_adapter(o.x, o.A, o.B, x_r, b_A=o.b_A, b_B=o.b_B, **shared)
    base: dict[str, Any] = {"weight": o.weight, "bias": o.bias}
    return routed_linear(
        o.x, o.A, o.B, x_r, **base, s=S_SCALE, adapted=o.adapted, of=o.of, plan=case.plan, **shared
    )


def by_elements(a: Tensor, b: Tensor) -> Tensor:
    """a @ b without a product's kernel, summed in float32."""
    wide = a.float().unsqueeze(-1) * b.float().unsqueeze(-3)
    return wide.sum(-2).to(a.dtype).contiguous()


@contextmanager
def seen_products() -> Iterator[None]:
    """torch's products by elementwise kernels.

    On Hopper cuBLAS stores them by TMA, which initcheck does not see: all that kernels then read of
    the frozen base, forward (F.linear) and backward (dy @ weight), it takes to be uninitialised.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = by_elements(x, weight.mT)
        return y if bias is None else y + bias

    with (
        mock.patch.object(torch.nn.functional, "linear", linear),
        mock.patch.object(Tensor, "__matmul__", by_elements),
    ):
        yield


@contextmanager
def launched() -> Iterator[Counter[str]]:
    """How often each kernel is launched in this block."""
    found: Counter[str] = Counter()
    launch = Launch.__call__

    def noted(self: Launch, *given: Any) -> None:
        launch(self, *given)
        found[self.kernel.fn.__name__] += 1

    with mock.patch.object(Launch, "__call__", noted):
        yield found


def faults(case: Case, device: str) -> list[str]:
    """Runs a case; names the results that are not finite."""
    o = Operands(case.layer, case.samples, case.tokens, D, case.rank, DTYPES[case.dtype], device)
    torch.manual_seed(0)  # of dropout
    with configured(**TRIALS[case.trial]):
        results = o.subject(partial(result, case=case)).results()
    if device.startswith("cuda"):
        torch.cuda.synchronize()  # an error belongs to the case that was named last
    return [name for name, value in results.items() if not bool(value.isfinite().all())]


def run(device: str, first: int = 0, step: int = 1) -> int:
    """Runs every step-th case and prints which kernels ran; 1 where a result is not finite.

    Where all cases are run, 1 too where a kernel was not launched.
    """
    status = 0
    with launched() as found, seen_products():
        for case in CASES[first::step]:
            print(case.name, flush=True)
            if bad := faults(case, device):
                print(f"  not finite: {', '.join(bad)}", flush=True)
                status = 1
    print(ENDED + ", ".join(f"{name} {found[name]}" for name in KERNELS if found[name]), flush=True)
    left_out = [name for name in KERNELS if not found[name]]
    if left_out and step == 1:
        print(f"not launched: {', '.join(left_out)}", flush=True)
        status = 1
    return status


# Logs. A record is a line without indentation and the indented ones after it; formats of 2022 to
# 2025: "at kernel+0x10 in file:7", "at 0x10 in file:7:kernel" and "at 0x10 in kernel".
PREFIX = "========="
TOTAL = re.compile(r"^\w+ SUMMARY:")
PLACE = re.compile(
    r"(?:\bat |Device Frame: ?)(?:0x[0-9a-f]+ in (?:\S*:\d+:)?(?P<old>.+)"
    r"|(?P<new>.+?)\+0x[0-9a-f]+)(?: in (?P<file>\S+:\d+))?"
)
HAZARDS = re.compile(r" \[(\d+) hazards?\]")
NO_KERNEL = "(no kernel)"
LAUNCHER = "triton_launcher"  # in the host's stack where a call of the driver fails
A_LAUNCH = "(a launch by Triton)"


class Record(NamedTuple):
    """What the sanitizer says once.

    Args:
        what: its first line, without the place.
        kernel: one of `KERNELS`, or any other's name.
        where: the place as the log has it.
    """

    what: str
    kernel: str
    where: str

    @property
    def is_ours(self) -> bool:
        """Whether a kernel of this project is meant: no others here are written in Python."""
        return self.kernel in (*KERNELS, A_LAUNCH) or ".py:" in self.where


def records(log: str) -> tuple[list[Record], list[str]]:
    """The records of a log, and its summaries: none where the program was cut off."""
    blocks: list[list[str]] = []
    totals: list[str] = []
    for line in log.splitlines():
        if not line.startswith(PREFIX):
            continue  # of the program
        text = line.removeprefix(PREFIX).removeprefix(" ").rstrip()
        if TOTAL.match(text):
            totals.append(text)
        elif text.startswith(" "):
            if blocks:
                blocks[-1].append(text.strip())
        elif text not in ("", "COMPUTE-SANITIZER"):
            blocks.append([text])
    return [record(block) for block in blocks], totals


def record(lines: Sequence[str]) -> Record:
    """One record from its lines; the host's stack says no more than who launched."""
    on_host = ("Saved host backtrace", "Host Frame")
    device = list(takewhile(lambda line: not line.startswith(on_host), lines))
    kernel, where = NO_KERNEL, ""
    for place in filter(None, map(PLACE.search, device)):
        name = HAZARDS.sub("", place["new"] or place["old"]).removesuffix("()").strip()
        if kernel == NO_KERNEL or (name in KERNELS and kernel not in KERNELS):
            kernel = name
        where = where or HAZARDS.sub("", place[0])
    if kernel == NO_KERNEL and any(LAUNCHER in line for line in lines):
        kernel = A_LAUNCH
    return Record(PLACE.sub("", lines[0]).strip(), kernel, where)


def said(log: Path) -> str:
    """What the program printed: into the log, or into a file beside it, or nowhere."""
    beside = log.with_suffix(".log")
    return "\n".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in dict.fromkeys((log, beside))
        if path.exists()
    )


def doubt(printed: str, totals: Sequence[str], beside: str) -> str | None:
    """Why a log does not say all, or None."""
    if not totals:
        return "the sanitizer did not end"
    if not re.search(f"^{ENDED}", printed, re.MULTILINE):
        return f"the program did not end, by this log or {beside}"
    return "records are missing" if any("not printed" in total for total in totals) else None


def summarise(paths: Sequence[Path]) -> int:
    """Prints what logs say by kernel; 1 where they say anything of ours, or do not say all."""
    status = 0
    for path in paths:
        log = path.read_text(encoding="utf-8", errors="replace")
        found, totals = records(log)
        ours = [each for each in found if each.is_ours]
        others = Counter(each.kernel for each in found if not each.is_ours)
        why = doubt(said(path), totals, path.with_suffix(".log").name)
        print("; ".join([
            f"{path.name}: {len(ours)} of ours, {others.total()} of others", *totals,
            *([] if why is None else [why]),
        ]))  # fmt: skip
        for kernel, count in Counter(each.kernel for each in ours).most_common():
            print(f"  {kernel}: {count}")
            same = Counter((each.what, each.where) for each in ours if each.kernel == kernel)
            for (what, where), times in same.most_common(5):
                print(f"    {times} × {what} {where}".rstrip())
        for kernel, count in others.most_common(5):
            print(f"  others: {count} × {kernel[:100]}")
        if ours or why is not None:
            status = 1
    return status


def share(text: str) -> tuple[int, int]:
    """I/N as (I, N)."""
    try:
        return numbers(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def on(device: str) -> str:
    """A device that kernels run on; ValueError otherwise."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cuda or cpu, got {device!r}") from None
    is_lacking = found.type == "cuda" and not torch.cuda.is_available()
    why = "torch sees no GPU" if is_lacking else device_obstacle(found)
    if why is not None:
        raise ValueError(f"device={device!r}, but {why}; TRITON_INTERPRET=1 runs kernels on a CPU")
    return device


def main(given: Sequence[str] | None = None) -> int:
    """Runs the cases, or sums up logs."""
    parser = ArgumentParser(prog="python -m bench.sanitize", description=main.__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--share", type=share, default=(0, 1), metavar="I/N",
        help="case I and every N-th after it: several processes compile sooner",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command")
    logs = commands.add_parser("summarise", help="count the records of logs by kernel")
    logs.add_argument("logs", nargs="+", type=Path, metavar="LOG")
    arguments = parser.parse_args(given)
    try:
        if arguments.command == "summarise":
            return summarise(arguments.logs)
        on(arguments.device)
    except (ValueError, OSError) as error:
        print(f"python -m bench.sanitize: {error}", file=sys.stderr)
        return 2
    return run(arguments.device, *arguments.share)


if __name__ == "__main__":
    sys.exit(main())
