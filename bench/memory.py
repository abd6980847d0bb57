"""`python -m bench memory`: memory of a training step of a large model, by how it is adapted.

Counted without a GPU, on the meta device (`bench.offline.live_bytes`): bytes that autograd saves,
and a *modelled* peak: weights, inputs, the optimiser's state, and the most that operators' results
take at once. On a GPU the same steps run, and the allocator's peak stands beside it.

A step has features of the image (S, 1, 768) given, as a cache of them gives, and a language model
in bf16 without dropout of its own, which learns captions (GPT-2) or answers (RoBERTa).
"""

import gc
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import Case, step
from bench.families import MODELS
from bench.measure import one_line
from bench.models import ANSWERS, Step
from bench.offline.count_launches import saved
from bench.offline.live_bytes import LiveBytes, without_values
from bench.operands import DTYPES
from bench.protocol import clock_of, one_call
from bench.results import FOLDER, begun, environment, for_writing, write_whole
from bench.subject import Subject
from bench.tables import Table, markdown, number
from fused_route import attach

VISUAL_WIDTH = 768
COUNTED = FOLDER / "memory-counted.json"
ONLY_COUNTED = "counted, not measured"


@dataclass(frozen=True)
class Variant:
    """A way to train a model.

    Args:
        says: what it is, in a table.
        way: "frozen", only the model's first norm trains; "routed", `attach`; or "peft".
        settings: of `attach`, or of `get_peft_model`.
        checkpoints: whether activations are checkpointed, one model layer each.
        autocasts: fp32 weights under autocast, instead of weights in the case's dtype.
    """

    says: str
    way: str = "routed"
    settings: tuple[tuple[str, Any], ...] = ()
    checkpoints: bool = False
    autocasts: bool = False


EAGER, P1, P3 = ((("impl", "reference"),), (("impl", "triton"), ("plan", "p1")),
                 (("impl", "triton"), ("plan", "p3")))  # fmt: skip
RECOMPUTE = (("recompute", True),)
VARIANTS = {
    "frozen": Variant("frozen, first norm alone trained", "frozen"),
    "reference": Variant("eager torch", settings=EAGER),
    "peft": Variant("LoRA by PEFT, bf16", "peft", (("autocast_adapter_dtype", False),)),
    "peft-fp32": Variant("LoRA by PEFT, A and B in fp32 (its default)", "peft"),
    "fused": Variant("fused, P1", settings=P1),
    "fused-recompute": Variant("fused, P1, `recompute`", settings=P1 + RECOMPUTE),
    "fused-p3": Variant("fused, P3", settings=P3),
    "fused-p3-recompute": Variant("fused, P3, `recompute`", settings=P3 + RECOMPUTE),
    "reference-checkpoints": Variant("eager torch, checkpointing", "routed", EAGER, True),
    "fused-checkpoints": Variant("fused, P1, checkpointing", "routed", P1, True),
    "fused-autocast": Variant("fused, P1, fp32 under autocast", settings=P1, autocasts=True),
}


def cases() -> Iterator[Case]:
    """The published batches and rank: 40 captions of 50 tokens, 512 questions of 20."""
    for route, p in (("mul", 0.0), ("gram", 0.0), ("mul", 0.1)):
        yield step("gpt2-medium", "qkv", route, 128, 2_000, dropout=p)
        yield step("roberta-large", "linear", route, 128, 10_240, dropout=p)


@dataclass
class Row:
    """One variant of one case, in bytes; None: not counted, or not measured.

    Args:
        case, variant: `Case.to_json`, and a key of `VARIANTS`.
        layers, rest: saved for the backward pass by the adapted layers alone, and otherwise.
        weights: parameters and buffers, what is trained included.
        trained: parameters that are trained; gradients take as much, AdamW's state twice that.
        peak: modelled, of a step after the first.
        measured: the allocator's, on a GPU.
        absent: why there is no count, or no measurement.
    """

    case: dict[str, Any]
    variant: str
    layers: int | None = None
    rest: int | None = None
    weights: int | None = None
    trained: int | None = None
    peak: int | None = None
    measured: int | None = None
    absent: str = ""


class Made(NamedTuple):
    """A training step, the layers that are adapted in it, and the bytes of its weights."""

    subject: Subject
    layers: list[nn.Module]
    weights: int


def made(case: Case, variant: Variant, device: torch.device) -> Made:
    """A training step on a device.

    Raises:
        ValueError: what `attach` or `get_peft_model` refuses.
    """
    model, dtype = MODELS[case.model], DTYPES["fp32" if variant.autocasts else case.dtype]
    with device:
        training = Step(model, case.layers, VISUAL_WIDTH).to(dtype)
        ids = torch.randint(model.vocabulary, (case.S, case.T))
        is_caption = model.family.task == "token"
        labels = ids if is_caption else torch.randint(ANSWERS, (case.S,))
        features = torch.randn(case.S, case.Nv, VISUAL_WIDTH).to(dtype)
        layers, using = _adapted(training, case, variant)
    leaves: dict[str, Tensor] = {n: p for n, p in training.named_parameters() if p.requires_grad}
    kept = [*training.parameters(), *training.buffers()]
    inputs = [features, ids] if is_caption else [features, ids, labels]

    def forward() -> Tensor:
        with using(features), _autocast(variant, device):
            loss: Tensor = training(ids, labels, features)
            return loss

    subject = Subject(forward, leaves, live=[*inputs, *kept])
    if device.type != "meta":
        optimiser = torch.optim.AdamW(leaves.values(), fused=device.type == "cuda")
        subject.finish = lambda: optimiser.step()
    return Made(subject, layers, size(kept))


def _autocast(variant: Variant, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if variant.autocasts else nullcontext()


def _adapted(
    training: Step, case: Case, variant: Variant
) -> tuple[list[nn.Module], Callable[[Tensor], AbstractContextManager[None]]]:
    """The layers that a variant puts into a model, and what gives them the image."""
    model, body, settings = MODELS[case.model], training.body, dict(variant.settings)
    config = model.routed(
        case.host, route=case.route, r=case.r, dropout=case.dropout, visual_width=VISUAL_WIDTH
    )
    if variant.way == "routed":
        attached = attach(body, config, **settings)
        if variant.checkpoints:
            attached.checkpoint_activations()
        return list(attached.layers.values()), attached.using
    if variant.way == "frozen":
        body.requires_grad_(False)
        for name in model.family.first_norms:
            body.get_submodule(name).requires_grad_()
        return [], lambda features: nullcontext()
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    from fused_route.training.baselines import peft_lora

    get_peft_model(body, peft_lora(body, config).config, **settings)
    if settings:  # on the meta device PEFT leaves A and B in fp32 whatever it is told
        body.to(DTYPES[case.dtype])
    layers = [module for module in body.modules() if isinstance(module, LoraLayer)]
    return layers, lambda features: nullcontext()


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that share no memory."""
    return sum(tensor.nbytes for tensor in tensors)


def counted(case: Case, name: str, device: torch.device) -> Row:
    """What a variant takes on this device; with `without_values`, on the meta device."""
    subject, layers, weights = made(case, VARIANTS[name], device)
    by = saved(subject.forward, subject.live, layers)
    with LiveBytes(subject.live) as memory:
        subject.forward().backward()
    trained = size(subject.leaves.values())
    peak = size(subject.live) + 2 * trained + memory.peak
    return Row(case.to_json(), name, *by, weights, trained, peak)


def measured(case: Case, name: str, device: torch.device) -> int:
    """The allocator's peak of a step on a GPU, AdamW's included; after two others."""
    gc.collect()
    torch.cuda.empty_cache()
    subject, clock = made(case, VARIANTS[name], device).subject, clock_of(device)
    for _ in range(2):  # kernels compile, AdamW's state is made
        one_call(subject, clock)
    clock.wait()
    torch.cuda.reset_peak_memory_stats()
    one_call(subject, clock)
    clock.wait()
    return torch.cuda.max_memory_allocated()


def row(case: Case, name: str, device: torch.device) -> Row:
    """A variant, counted; and on a GPU measured."""
    found, on_gpu, why = Row(case.to_json(), name), device.type == "cuda", list[str]()
    major = torch.cuda.get_device_capability(device)[0] if on_gpu else 9
    try:
        if VARIANTS[name].autocasts:
            why.append("not counted: autocast does not know the meta device")
        else:
            with without_values(major):
                found = counted(case, name, torch.device("meta"))
    except Exception as error:  # whatever a variant stumbles on is its result
        why.append(f"not counted: {one_line(error)}")
    try:
        if on_gpu:
            found.measured = measured(case, name, device)
    except Exception as error:
        why.append(f"not measured: {one_line(error)}")
    found.absent = "; ".join(why)
    return found


def is_whole(row: Row, device: torch.device) -> bool:
    """Whether all was counted and measured that can be on this device."""
    is_counted = row.peak is not None or VARIANTS[row.variant].autocasts
    return is_counted and (device.type == "cpu" or row.measured is not None)


def table(rows: list[Row]) -> Table:
    """The rows of one model in MB: a line for each variant, a column for each case."""
    by = {(Case(**row.case), row.variant): row for row in rows}
    of = list(dict.fromkeys(case for case, _ in by))
    labels = [case.route + (f", p = {case.dropout:g}" if case.dropout else "") for case in of]
    columns = [("layers save", "layers", i) for i in range(len(of))]
    columns += [("rest saves", "rest", 0), ("weights", "weights", 0), ("trained", "trained", 0)]
    columns += [("peak", "peak", i) for i in range(len(of))]
    if any(row.measured is not None for row in rows):
        columns += [("measured", "measured", i) for i in range(len(of))]
    several = ("layers", "peak", "measured")
    names = [f"{h}: {labels[i]}" if key in several else h for h, key, i in columns]
    lines = [["", *names]]
    for variant in dict.fromkeys(row.variant for row in rows):
        found = [getattr(by.get((of[i], variant)), key, None) for _, key, i in columns]
        cells = ["–" if x is None else number(x / 1e6) for x in found]
        lines.append([VARIANTS[variant].says, *cells])
    return lines


def document(rows: list[Row]) -> str:
    """A table for each model, and below it what is missing from it, with the reason."""
    parts = []
    for model in dict.fromkeys(row.case["model"] for row in rows):
        own = [row for row in rows if row.case["model"] == model]
        case = Case(**own[0].case)
        parts.append(f"**{model}**, {case.S} × {case.T} tokens, r = {case.r}, {case.dtype}, in MB:")
        parts.append(markdown(table(own), text=1))
        why = {f"{VARIANTS[row.variant].says}: {row.absent}" for row in own if row.absent}
        parts += [f"{reason}." for reason in sorted(why)]
    return "\n\n".join(parts)


def about(device: torch.device) -> dict[str, Any]:
    """What is counted or measured, and the versions that do it; of a GPU which."""
    where = environment(device)
    keys = ("versions", "commit", "date", *(("device", "driver") if device.type == "cuda" else ()))
    what = "counted" if device.type == "cuda" else ONLY_COUNTED
    return {"what": what, **{key: where[key] for key in keys}}


def write(rows: Iterable[Row], where: dict[str, Any], path: Path) -> None:
    """All rows so far, whole or not at all, with what `about` says."""
    write_whole({**where, "rows": [asdict(row) for row in rows]}, path)


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                        help="cpu: counted without a GPU; cuda: measured beside that")  # fmt: skip
    parser.add_argument("--case", metavar="GLOB", default="*", help="cases by name")
    parser.add_argument("--out", type=Path, default=COUNTED)


def main(arguments: Namespace) -> int:
    """Counts every variant of the cases, prints a table and writes a file; 1 where one failed to.

    Rows that the file has already, from the same place, are not made again.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU; use --device cpu")
    device, out = torch.device(arguments.device), for_writing(arguments.out)
    chosen = [case for case in cases() if fnmatchcase(case.name, arguments.case)]
    if not chosen:
        raise ValueError(f"case: none of python -m bench memory matches {arguments.case!r}")
    where = about(device)
    before = [Row(**found) for found in begun(out, where, again=ONLY_COUNTED)]
    rows = {(Case(**found.case).name, found.variant): found for found in before}
    for case, name in product(chosen, VARIANTS):
        key = case.name, name
        if key not in rows or not is_whole(rows[key], device):
            rows[key] = row(case, name, device)
            print(f"{case.name} {name}: {rows[key].peak} {rows[key].measured or ''}", flush=True)
            write(rows.values(), where, out)
    print(f"\n{document([*rows.values()])}\n\nnext: docs/benchmarks.md says what {out} means")
    return int(not all(is_whole(found, torch.device("cpu")) for found in rows.values()))
