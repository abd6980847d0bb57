"""What is measured: cases, and the named grids of them.

A case is an operation by itself ("op"), one layer of a language model ("layer"), or a whole
training step of a vision-language model ("step"). Its name holds all its sizes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from fused_route.checks import one_of

KINDS = ("op", "layer", "step")
HOSTS = ("adapter", "linear", "qkv")
ROUTES = (
    "none", "add", "mul", "gram", "expand", "gram_relu", "ones", "ones_relu",
)  # fmt: skip
FEATURES = ("computed", "cached")

# Rows M = S samples × T tokens: of captions (40 × 50) and questions (512 × 20), as published; and
# of batches that fill a GPU.
BATCHES = {2_000: (40, 50), 10_240: (512, 20), 32_768: (512, 64), 131_072: (1024, 128)}


@dataclass(frozen=True)
class Case:
    """One measurement's sizes.

    Args:
        kind: of `KINDS`.
        host: of `HOSTS`: an adapter; a linear layer with LoRA; a fused query-key-value projection
            d → 3d with LoRA on query and value.
        route, r, dropout: of the bottleneck.
        d: width; of a layer or step, the language model's own.
        S, T, Nv: samples, text tokens and visual tokens a sample.
        dtype: of parameters and activations.
        model: of a layer or step, a key of `bench.families.MODELS`.
        layers: of the model; 0: as many as its size has.
        features: of `FEATURES`: a step's image features are "computed" by its vision model in every
            step, or given to it as from a cache ("cached"), without a vision model.

    Raises:
        ValueError: features that do not exist, or cached ones of what is no step.
    """

    kind: str
    host: str
    route: str
    d: int
    r: int
    S: int
    T: int
    Nv: int = 1
    dropout: float = 0.0
    dtype: str = "bf16"
    model: str = ""
    layers: int = 0
    features: str = "computed"

    def __post_init__(self) -> None:
        one_of("features", self.features, FEATURES)
        if self.features != "computed" and self.kind != "step":
            raise ValueError(
                f"features must be computed unless kind is step; got {self.features!r} of kind "
                f"{self.kind!r}"
            )

    @property
    def M(self) -> int:
        """Rows of text."""
        return self.S * self.T

    @property
    def name(self) -> str:
        """All of it: op/adapter/mul/d768/r64/M2000/T50/Nv1/p0/bf16."""
        parts = [self.kind, *([self.model] if self.model else []), self.host, self.route]
        parts += [f"d{self.d}", f"r{self.r}", f"M{self.M}", f"T{self.T}", f"Nv{self.Nv}"]
        parts += [f"L{self.layers}"] if self.layers else []
        parts += [f"p{self.dropout:g}", self.dtype]
        # Only where cached: results from before there was a choice keep their names.
        return "/".join([*parts, *([self.features] if self.features != "computed" else [])])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def op(host: str, route: str, d: int, r: int, M: int, **more: Any) -> Case:
    """An operation on M rows of `BATCHES`."""
    S, T = BATCHES[M]
    return Case("op", host, route, d, r, S, T, **more)


# (width, heads, layers) of the language models, and what is adapted in each: bench/families.py.
WIDTHS = {
    "gpt2": 768, "gpt2-medium": 1024, "roberta-base": 768, "roberta-large": 1024, "bart-base": 768,
}  # fmt: skip


def step(model: str, host: str, route: str, r: int, M: int, **more: Any) -> Case:
    """A training step with M rows of text; "qkv" where the model has a fused projection."""
    S, T = BATCHES[M]
    return Case("step", host, route, WIDTHS[model], r, S, T, model=model, **more)


def full() -> Iterator[Case]:
    """Everything the suite is made for: hours."""
    for host, route, d, r, M, p in product(
        HOSTS, ROUTES[:5], (768, 1024), (16, 64, 128, 256), BATCHES, (0.0, 0.1)
    ):
        yield op(host, route, d, r, M, dropout=p)
    for host, route in product(HOSTS, ROUTES[5:]):
        yield op(host, route, 768, 64, 32_768)
    for host, Nv in product(HOSTS, (50, 197)):
        yield op(host, "gram", 768, 64, 10_240, Nv=Nv)
    for model, host in MODEL_HOSTS:
        for M in (2_000, 10_240):
            yield replace(step(model, host, "mul", 64, M), kind="layer", layers=1)
        yield step(model, host, "mul", 64, 2_000)
        yield step(model, host, "mul", 64, 2_000, features="cached")


MODEL_HOSTS = (
    ("gpt2", "qkv"), ("gpt2", "adapter"), ("gpt2-medium", "qkv"), ("roberta-base", "linear"),
    ("roberta-base", "adapter"), ("roberta-large", "linear"), ("bart-base", "linear"),
    ("bart-base", "adapter"),
)  # fmt: skip


def headline() -> Iterator[Case]:
    """Sixteen operations and one step, for one GPU in minutes.

    Every host at both ends of M with the smaller and the larger sizes, `mul` and `gram` in turn.
    """
    for host, (d, r), M in product(HOSTS, ((768, 64), (1024, 128)), (2_000, 32_768)):
        yield op(host, "mul", d, r, M)
    for host in HOSTS:
        yield op(host, "gram", 768, 64, 32_768)
    yield op("adapter", "gram", 1024, 128, 2_000)
    yield step("gpt2", "qkv", "mul", 64, 2_000)


def models() -> Iterator[Case]:
    """One layer and one step of each model."""
    for model, host in MODEL_HOSTS:
        yield replace(step(model, host, "mul", 64, 2_000), kind="layer", layers=1)
        yield step(model, host, "mul", 64, 2_000)


def steps() -> Iterator[Case]:
    """A step of each family, with cached features and with computed ones.

    Cached ones come first, since most of a step with computed ones is the vision model's.
    """
    hosts = (("gpt2", "qkv"), ("roberta-base", "linear"), ("bart-base", "linear"))
    for features, (model, host) in product(("cached", "computed"), hosts):
        yield step(model, host, "mul", 64, 2_000, features=features)


def long() -> Iterator[Case]:
    """As many rows in few samples, down to one: of vector operands, and of a matrix one."""
    for (S, T), host in product(((16, 2048), (4, 8192), (1, 32_768)), ("adapter", "linear")):
        for route, Nv in (("mul", 1), ("gram", 50)):
            yield Case("op", host, route, 768, 64, S, T, Nv)


def cpu() -> Iterator[Case]:
    """The paper's captioning shape in fp32, every host with every route, for a CPU in minutes."""
    for host, route in product(HOSTS, ROUTES):
        yield op(host, route, 768, 64, 2_000, dtype="fp32")
    for host in HOSTS:
        yield op(host, "mul", 768, 64, 2_000, dtype="fp32", dropout=0.1)
    small = Case("layer", "linear", "mul", 768, 64, 8, 20, dtype="fp32", model="roberta-base")
    yield replace(small, layers=1)


def smoke() -> Iterator[Case]:
    """Every kind of case in sizes that Triton's interpreter runs in seconds."""
    for host, route in product(HOSTS, ("mul", "gram")):
        yield Case("op", host, route, 32, 8, 2, 6, dtype="fp32")
    yield Case("op", "adapter", "gram", 32, 8, 2, 6, Nv=3, dropout=0.1, dtype="fp32")
    yield Case("layer", "qkv", "mul", 32, 4, 2, 5, dtype="fp32", model="tiny", layers=1)
    yield Case("step", "qkv", "mul", 32, 4, 2, 5, dtype="fp32", model="tiny", layers=2)


AROUND = Case("op", "adapter", "mul", 768, 64, 512, 20)  # the middle of every scaling curve
# What a scaling curve varies, from the middle: axis -> values of the case.
SCALING: dict[str, list[dict[str, Any]]] = {
    "M": [{"S": S} for S in (4, 16, 64, 256, 1024, 4096)],
    "r": [{"r": r} for r in (4, 8, 16, 32, 64, 128, 256)],
    "Nv": [{"Nv": Nv, "route": "gram"} for Nv in (1, 2, 8, 32, 128, 256)],
    "d": [{"d": d} for d in (256, 512, 768, 1024, 2048, 4096)],
    "layers": [
        {"kind": "layer", "model": "roberta-base", "host": "linear", "S": 40, "T": 50, "layers": L}
        for L in (1, 2, 4, 8, 12)
    ],
}


def scaling() -> Iterator[Case]:
    """One curve for each axis, for an adapter and a linear layer."""
    for axis, values in SCALING.items():
        for host in ("adapter", "linear"):
            for change in values:
                yield replace(AROUND, **{"host": host, **change})
            if axis == "layers":
                break


def cpu_scaling() -> Iterator[Case]:
    """The same with a sixteenth of the rows, and without the ends, in fp32."""
    for case in scaling():
        if case.M <= 16_384 and case.d <= 1024 and case.layers <= 4:
            yield replace(case, S=max(1, case.S // 16), dtype="fp32")


GRIDS = {
    "headline": headline, "full": full, "models": models, "steps": steps, "scaling": scaling,
    "long": long, "cpu": cpu, "cpu-scaling": cpu_scaling, "smoke": smoke,
}  # fmt: skip


def grid(name: str, patterns: list[str] | None = None) -> list[Case]:
    """The cases of a grid whose names match one of the patterns, each once.

    Raises:
        ValueError: no such grid, or a pattern that no case matches.
    """
    if name not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
    cases = list(dict.fromkeys(GRIDS[name]()))
    if patterns:
        of = {p: {case for case in cases if fnmatchcase(case.name, p)} for p in patterns}
        if without := [p for p, found in of.items() if not found]:
            raise ValueError(f"case: none of grid {name!r} matches {' or '.join(without)}")
        cases = [case for case in cases if any(case in found for found in of.values())]
    return cases


def share(text: str) -> tuple[int, int]:
    """i/n as (i, n): every n-th case from the i-th.

    Raises:
        ValueError: something else, or no i from 0 to n − 1.
    """
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise ValueError(f"share must be i/n with i from 0 to n - 1, got {text!r}")
    return int(first), int(of)
