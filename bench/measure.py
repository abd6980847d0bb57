"""One case in one process: the gate, then every timing and count of every provider."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import models, protocol, providers
from bench.cases import Case
from bench.correct import Gate
from bench.offline.count_launches import count, saved_bytes
from bench.operands import Operands
from bench.results import Record
from bench.subject import Subject


@dataclass(frozen=True)
class Settings:
    """How a case is measured.

    Args:
        device: of the tensors.
        seconds: of samples for each provider and timing, at least about.
        process: number of this process among those that repeat the run.
    """

    device: torch.device
    seconds: float = 0.5
    process: int = 0


def measure(case: Case, names: list[str], settings: Settings) -> list[Record]:
    """A record for each provider; one that fails has its error and does not stop the others."""
    makers = makers_of(case, names, settings)
    records, subjects = [], dict[str, Subject]()
    for name, maker in makers.items():
        record = Record(case.name, case.to_json(), name, settings.process)
        records.append(record)
        try:
            record.gate = maker.gate()
            subjects[name] = maker.make(0)
        except Exception as error:  # whatever a provider stumbles on is its result
            record.error = _one_line(error)
    clock = protocol.clock_of(settings.device)
    try:
        times = protocol.wall(subjects, clock, settings.seconds)
    except Exception as error:
        for record in records:
            record.error = record.error or _one_line(error)
        return records
    for record in records:
        if record.error is None:
            passes = times[record.provider]
            record.times["wall"] = {key: protocol.summary(v) for key, v in passes.items()}
            _count(record, subjects[record.provider])
            if settings.device.type == "cuda":
                _on_gpu(record, subjects[record.provider], makers[record.provider], settings)
    return records


def makers_of(case: Case, names: list[str], settings: Settings) -> dict[str, "Maker"]:
    """The providers that have this case, of those named."""
    torch.compiler.reset()  # what was compiled for another case, of which compilers keep few
    return (_operation if case.kind == "op" else _model)(case, names, settings)


@dataclass(frozen=True)
class Maker:
    """A provider of one case: what its gate finds, and a subject for each of several input sets."""

    gate: Callable[[], float | None]
    make: Callable[[int], Subject]


def _operation(case: Case, names: list[str], settings: Settings) -> dict[str, Maker]:
    """The providers that have this operation; the gate's operands are without dropout."""
    checked = Operands.of_case(replace(case, dropout=0.0), settings.device)
    gate = Gate(checked)

    def maker(name: str) -> Maker:
        make = providers.PROVIDERS[name].make
        return Maker(
            lambda: gate.worst(name, make(checked).results()),
            lambda i: make(Operands.of_case(case, settings.device, seed=i)),
        )

    return {
        name: maker(name)
        for name in names
        if providers.obstacle(name, case, settings.device) is None
    }


def _model(case: Case, names: list[str], settings: Settings) -> dict[str, Maker]:
    """The providers that have this layer or step."""
    device, exact = settings.device, replace(case, dropout=0.0)
    known: dict[str, dict[str, torch.Tensor]] = {}

    def gate(name: str) -> float | None:
        if name in ("peft", "frozen"):  # other functions
            return None
        if not known:
            known["truth"] = models.truth(exact, device)
            known["reference"] = models.subject(exact, "reference", device).results()
        actual = models.subject(exact, name, device).results()
        worst = models.disagreement(actual, known["reference"], known["truth"])
        if worst > MOST_OF_A_MODEL:
            raise AssertionError(
                f"{worst:.3g} times the reference's error, not {MOST_OF_A_MODEL:g}"
            )
        return worst

    offered = [name for name in names if name in models.WAYS]
    if providers.obstacle("fused", case, device) is not None:
        offered = [name for name in offered if name != "fused"]
    if case.host == "adapter":
        offered = [name for name in offered if name != "peft"]
    return {
        name: Maker(partial(gate, name), lambda _, name=name: models.subject(case, name, device))  # type: ignore[misc]
        for name in offered
    }


MOST_OF_A_MODEL = 2.0  # whole-tensor norms of all gradients


def _count(record: Record, subject: Subject) -> None:
    """Saved bytes, and launches where nothing is compiled: a compiler's code hides its own."""
    subject.forget()
    record.bytes["saved"] = saved_bytes(subject.forward, exclude=subject.live)
    if providers.PROVIDERS.get(record.provider, providers.PROVIDERS["compile"]).compiles:
        return
    y: list[torch.Tensor] = []
    parts = [
        count(lambda: y.append(subject.forward())),
        count(lambda: y[0].backward(subject.dy)),
    ]
    record.launches = [sum(part.counts.values()) for part in parts]
    subject.forget()


def _on_gpu(record: Record, subject: Subject, maker: Maker, settings: Settings) -> None:
    """Peak memory, the graph's and the profiler's times."""
    record.bytes["peak"] = protocol.peak_bytes(subject)
    try:
        seconds, number = protocol.kernels(subject)
        record.times["kernels"] = {"both": protocol.summary([seconds])}
        record.kernels = number
    except Exception as error:
        record.absent["kernels"] = _one_line(error)
    if subject.finish is not None:
        record.absent["graph"] = "a step is measured as it is run"
        return
    try:
        own = sum(t.numel() * t.element_size() for t in subject.live)
        passes = protocol.graph(maker.make, protocol.input_sets(own), settings.seconds)
        record.times["graph"] = {key: protocol.summary(v) for key, v in passes.items()}
    except Exception as error:  # one that synchronises cannot be captured
        torch.cuda.synchronize()
        record.absent["graph"] = _one_line(error)


def _one_line(error: Exception) -> str:
    """An error as a cell of a table shows it."""
    text = str(error).strip().splitlines() or [""]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text[0]} ({where.filename.rpartition('/')[2]}:{where.lineno})"
