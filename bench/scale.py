"""How routes change the scale of the bottleneck, and what that does to training.

For each route and normalisation, on the demo's questions and image features:

* gain: RMS of z over RMS of x_t, mean over the routed layers, before and during training;
* kick: RMS change of the routed update s·z Bᵀ in one of the first 19 optimiser steps, over the
  RMS of the base's output, at its largest;
* loss and test accuracy at the end.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.results import for_writing, write_whole
from fused_route import Attached, RoutedLinear
from fused_route.reference import grouped
from fused_route.training.demo import compare
from fused_route.training.demo.features import CACHE_DIR
from fused_route.training.demo.models import VqaClassifier, load_encoder
from fused_route.training.demo.task import encoder_directory
from fused_route.training.demo.vision import load_efficientnet_lite0


@dataclass
class Run:
    """One route trained for some steps."""

    route: str
    normalize: str
    rank: int
    lr: float
    steps: int
    gain: list[float] = field(default_factory=list)
    x_v: list[float] = field(default_factory=list)
    kick: float = 0.0
    loss: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    seconds: float = 0.0


@contextmanager
def inputs_of(attached: Attached) -> Iterator[dict[str, Tensor]]:
    """The hidden states that each routed layer meets in the forwards of this block."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0].detach())

    handles = [
        layer.register_forward_pre_hook(watch(name)) for name, layer in attached.layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def rms(x: Tensor) -> float:
    """√ of the mean square."""
    return float(x.float().square().mean().sqrt())


@torch.no_grad()
def measure(
    model: VqaClassifier, attached: Attached, batch: dict[str, Tensor]
) -> tuple[float, float, dict[str, Tensor], float]:
    """(gain, RMS of x_v, update of each layer, RMS of the bases' outputs) on one batch."""
    with inputs_of(attached) as inputs:
        model.eval()(**batch)
    gains, x_vs, bases, updates = [], [], [], {}
    with model.context.using(batch["features"]):
        for name, layer in attached.layers.items():
            assert isinstance(layer, RoutedLinear)
            x_t, z = inputs[name] @ layer.A.T, inputs[name] @ layer.A.T
            if layer.routing.route.takes != "nothing":
                x_v = layer.context.get(layer.d, name).x_r @ layer.A.T
                operand = layer.routing.operand(grouped(x_v, 1))
                z = layer.routing.mix(grouped(x_t, 1), operand).squeeze(1)
                x_vs.append(rms(x_v))
            gains.append(rms(z) / rms(x_t))
            bases.append(rms(layer.base(inputs[name])))
            updates[name] = layer.alpha / layer.rank * z @ layer.B.T
    mean_x_v = sum(x_vs) / len(x_vs) if x_vs else math.nan
    return sum(gains) / len(gains), mean_x_v, updates, sum(bases) / len(bases)


def train(run: Run, train_split: compare.Split, test_split: compare.Split, seed: int = 0) -> Run:
    """Trains as the demo does, without clipping, and measures along the way."""
    torch.manual_seed(seed)
    arm, settings = compare.Arm(run.route, run.normalize), compare.Settings(rank=run.rank)
    model, attached = compare.build(arm, settings, train_split)
    parameters = list(attached.trainable_parameters())
    optimiser = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
    warm_up = run.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda i: min((i + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * i / run.steps)),
    )
    order = torch.randperm(len(train_split), generator=torch.Generator().manual_seed(seed))
    probe = train_split.batch(order[-64:])
    started, before = time.perf_counter(), None
    for step in range(run.steps):
        if step % (run.steps // 10) == 0 or step < 20:
            gain, x_v, updates, base = measure(model, attached, probe)
            if before is not None and step < 20:
                kick = max(rms(updates[name] - before[name]) for name in updates) / base
                run.kick = max(run.kick, kick)
            before = updates
            run.gain.append(gain)
            run.x_v.append(x_v)
        out = model(**train_split.batch(order[step * 64 : (step + 1) * 64]))
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        schedule.step()
        run.loss.append(float(out["loss"].detach()))
    some = torch.randperm(len(test_split), generator=torch.Generator().manual_seed(0))[:2000]
    right = compare.predict(model, test_split, some) == test_split.labels[some]
    run.accuracy, run.seconds = float(right.float().mean()), time.perf_counter() - started
    return run


VARIANTS = (
    ("add", "none"),
    ("mul", "none"),
    ("gram", "none"),
    ("expand", "none"),
    ("ones", "none"),
    ("add", "unit"),
    ("mul", "unit"),
    ("gram", "unit"),
    ("expand", "unit"),
    ("ones", "unit"),
)

# Sixty steps show whether a route learns or runs away; the demo's setting shows where it gets.
RUNS = [
    Run(route, normalize, rank, lr, 60)
    for rank, lr in ((16, 3e-3), (64, 3e-3), (64, 1e-2))
    for route, normalize in VARIANTS
] + [Run(route, "unit", 8, 3e-3, 300) for route in ("add", "mul", "gram", "expand")]

COLUMNS = ("r", "lr", "steps", "route", "normalize", "gain 0", "gain 19", "gain end", "kick")


def line(run: Run) -> list[str]:
    """A run as a row of the table."""
    gains = [f"{run.gain[i]:.2f}" for i in (0, 19, -1)]
    loss = sum(run.loss[-20:]) / 20
    return [str(run.rank), f"{run.lr:g}", str(run.steps), run.route, run.normalize, *gains,
            f"{run.kick:.2f}", f"{loss:.3f}", f"{run.accuracy:.1%}"]  # fmt: skip


def study(runs: list[Run], out: Path) -> None:
    """Trains every run; prints a row for each as it ends, and writes those so far as JSON.

    Raises:
        ValueError: the file cannot be written: before anything is trained.
    """
    for_writing(out)
    _, tokenizer = load_encoder(encoder_directory(), compare.Settings().layers)
    splits = compare.load_splits(load_efficientnet_lite0(), tokenizer, CACHE_DIR)
    print("| " + " | ".join([*COLUMNS, "loss", "test"]) + " |")
    print("|" + " --- |" * (len(COLUMNS) + 2))
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for i, run in enumerate(runs, 1):
        train(run, *splits)
        print("| " + " | ".join(line(run)) + " |", flush=True)
        write_whole({"versions": versions, "runs": [asdict(run) for run in runs[:i]]}, out)
