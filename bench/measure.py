"""One case in one process: the gate, then every timing and count of every provider."""

import traceback
from collections.abc import Callable, Iterator
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


class GpuLost(Exception):
    """A provider broke the GPU for this process: every later call would fail as well."""

    def __init__(self, record: Record) -> None:
        super().__init__(record.error)
        self.record = record


def measure(case: Case, names: list[str], settings: Settings) -> Iterator[Record]:
    """A record for each provider as soon as it is whole; one that fails stops no other.

    Raises:
        GpuLost: with the record of the provider that did it.
    """
    makers = makers_of(case, names, settings)
    records = {name: Record(case.name, case.to_json(), name, settings.process) for name in makers}
    subjects, failed = dict[str, Subject](), dict[str, Exception]()
    for name, maker in makers.items():
        try:
            records[name].gate = maker.gate()
            subjects[name] = maker.make(0)
        except Exception as error:  # whatever a provider stumbles on is its result
            failed[name] = error
            _check_gpu(records[name], error, settings)
    clock = protocol.clock_of(settings.device)
    times = protocol.wall(subjects, clock, settings.seconds, failed)
    for name, first in failed.items():  # in the order of their failures: the first is the culprit
        _check_gpu(records[name], first, settings)
    for name, record in records.items():
        if name in failed:
            record.error = one_line(failed[name])
        else:
            passes = times[name].items()
            record.times["wall"] = {which: protocol.summary(values) for which, values in passes}
            _beside_the_times(record, subjects[name], makers[name], settings)
        yield record


def _check_gpu(record: Record, error: Exception, settings: Settings) -> None:
    """GpuLost where the GPU no longer answers."""
    if settings.device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            record.error = one_line(error)
            raise GpuLost(record) from error


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

    return {name: maker(name) for name in providers.offered(case, names, settings.device)}


def _model(case: Case, names: list[str], settings: Settings) -> dict[str, Maker]:
    """The providers that have this layer or step."""
    device, exact = settings.device, replace(case, dropout=0.0)
    known: dict[str, dict[str, torch.Tensor]] = {}
    passed: dict[str, Subject] = {}

    def gate(name: str) -> float | None:
        if name in ("peft", "frozen"):  # other functions
            return None
        if not known:
            known["truth"] = models.truth(exact, device)
            known["reference"] = models.subject(exact, "reference", device).results()
        gated = models.subject(exact, name, device)
        actual = gated.results()
        worst = models.disagreement(actual, known["reference"], known["truth"])
        if worst > MOST_OF_A_MODEL:
            raise AssertionError(
                f"{worst:.3g} times the reference's error, not {MOST_OF_A_MODEL:g}"
            )
        if exact == case:
            passed[name] = gated
        return worst

    def make(name: str, _: int) -> Subject:
        # The gate's own first: to compile another of a large model takes seconds.
        return passed.pop(name, None) or models.subject(case, name, device)

    return {
        name: Maker(partial(gate, name), partial(make, name))
        for name in providers.offered(case, names, device)
    }


MOST_OF_A_MODEL = 2.0  # whole-tensor norms of all gradients


def _beside_the_times(record: Record, subject: Subject, maker: Maker, settings: Settings) -> None:
    """Counts, and on a GPU memory, the graph's and the profiler's times, each for itself."""

    def saved() -> None:
        subject.forget()
        record.bytes["saved"] = saved_bytes(subject.forward, exclude=subject.live)

    def launches() -> None:
        if record.provider in COUNTABLE:
            record.launches = _launches(subject)

    def peak() -> None:
        record.bytes["peak"] = protocol.peak_bytes(subject)

    def kernels() -> None:
        seconds, record.kernels = protocol.kernels(subject)
        record.times["kernels"] = {"both": protocol.summary([seconds])}

    def graph() -> None:
        if subject.finish is not None:
            record.absent["graph"] = "a step is measured as it is run"
            return
        own = sum(t.numel() * t.element_size() for t in subject.live)
        passes = protocol.graph(maker.make, protocol.input_sets(own), settings.seconds)
        record.times["graph"] = {which: protocol.summary(v) for which, v in passes.items()}

    parts = [saved, launches]
    if settings.device.type == "cuda":
        parts += [peak, kernels, graph]
    for part in parts:
        try:
            part()
        except Exception as error:  # one that waits for the GPU has no graph, for example
            record.absent[part.__name__] = one_line(error)
            _check_gpu(record, error, settings)
        finally:
            subject.forget()


# A compiler's code hides what it launches.
COUNTABLE = {name for name, provider in providers.PROVIDERS.items() if not provider.compiles}


def _launches(subject: Subject) -> list[int]:
    """Of the forward and of the backward pass."""
    y: list[torch.Tensor] = []
    parts = [
        count(lambda: y.append(subject.forward())),
        count(lambda: y[0].backward(subject.dy)),
    ]
    return [sum(part.counts.values()) for part in parts]


def one_line(error: Exception) -> str:
    """An error as a cell of a table shows it."""
    text = str(error).strip().splitlines() or [""]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text[0]} ({where.filename.rpartition('/')[2]}:{where.lineno})"
