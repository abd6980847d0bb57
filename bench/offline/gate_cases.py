"""What the gates compile: every row of the tile tables, on chips that are not here.

A layer launches kernels, `Case` is one of them on one chip; `all_cases` is the whole product,
`quick_cases` what `make test` has time for.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from bench.offline.specialisations import ROWS, Layer, Specialisation, launched_by

ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, "gfx942")
# Kernels whose threads hold rows of hidden states.
ROW_KERNELS = ("routed_forward", "routed_backward", "weight_partials")
RANKS = (16, 32, 64, 128, 256)
# What registers and shared memory are shortest for, found by compiling all mixes; the others
# follow it in the full product for one chip and dtype.
HEAVIEST = (("adapter", "rank1", "owned"), ("adapter", "rank1", "operand"),
            ("adapter", "matrix", "operand"), ("given_qv", "rank1", "owned"))  # fmt: skip
LIGHTER = (("adapter", "identity", "none"), ("adapter", "shift", "owned"),
           ("adapter", "scale", "owned"), ("given", "shift", "operand"))  # fmt: skip
ALONG = (("adapter", "rank1", "along"), ("given_qv", "rank1", "along"))
LIGHTER_ALONG = (("adapter", "shift", "along"), ("adapter", "scale", "along"))
CHIPS: dict[str, tuple[int | str, ...]] = {
    "bf16": ARCHITECTURES, "fp16": ARCHITECTURES, "amp": (80, 90),
    "fp32": (80, 90, 100), "tf32": (80, 90, 100),
}  # fmt: skip
# P3: the product's tiles grow with neither R nor the mix, and fit every chip; of the other kernels
# K1 up to the bottleneck, and K2 without dx, have no column tiles, but the tiles of K1 and K2.
P3_HEAVIEST = (("frozen", "rank1", "owned"), ("frozen_qv", "rank1", "operand"),
               ("frozen", "matrix", "operand"))  # fmt: skip
P3_ROW_KERNELS = ("routed_bottleneck", "routed_backward")
PRODUCT_CHIPS: dict[str, tuple[int | str, ...]] = {
    "bf16": (*ARCHITECTURES, 86, 89, 120), "fp16": (80, 90),
    "fp32": (80, 90, 100, 120), "tf32": (80, 90, 100, 120),
}  # fmt: skip


class Case(NamedTuple):
    """A specialisation on a chip, and the layer that launches it."""

    layer: Layer
    specialisation: Specialisation
    arch: int | str


def layers_of(
    mixes: Sequence[tuple[str, str, str]],
    d: int,
    numbers: str,
    p: float = 0.1,
    rows: Sequence[str] = ("few", "many"),
    **more: Any,
) -> list[Layer]:
    """One for each host, mix and image, for every R_PAD, with few and many rows."""
    return [
        Layer(host, mix, image, R, d, numbers, amount, p, **more)
        for R in RANKS
        for amount in rows
        for host, mix, image in mixes
    ]


def product_cases(
    numbers: str, chips: Sequence[int | str], R: int, widths: Sequence[int] = (768, 1000)
) -> list[Case]:
    """P3's product, forward with a bias and backward with dropout, of weights by rows, by columns.

    R = 256 takes several steps through the bottleneck; 16 half of one.
    """
    layers = [
        Layer(host, "rank1", "owned", R, d, numbers, rows, plan="p3", by_columns=by_columns)
        for host in ("frozen_qv", "frozen")
        for d in widths
        for rows in ("few", "many")
        for by_columns in (False, True)
    ]
    return [case for case in unique(layers, chips) if name_of(case) == "extended_product"]


def p3_cases() -> list[Case]:
    """The product on all chips; the other kernels that only P3 launches on those of its dtype."""
    cases = []
    for numbers, chips in PRODUCT_CHIPS.items():
        cases += product_cases(numbers, chips, 256) + product_cases(numbers, (90,), 16)
        layers = layers_of(P3_HEAVIEST, 768, numbers, plan="p3")
        others = unique(layers, CHIPS[numbers] if numbers in ("bf16", "fp32") else (90,))
        cases += [case for case in others if name_of(case) in P3_ROW_KERNELS]
    return cases


def name_of(case: Case) -> str:
    """The kernel's own name."""
    return case.specialisation.kernel.partition(":")[2]


def all_cases() -> list[Case]:
    """Every row of the tile table at its heaviest mixes × width × numbers × chip, each once.

    Without dropout tiles go another way, straight from memory to the products: on one chip, but for
    K1 with its columns in parts, which generates without.
    """
    cases = []
    for numbers, d, p in (("bf16", 768, 0.1), ("bf16", 1000, 0.1), ("bf16", 768, 0.0),
                          ("fp16", 768, 0.1)):  # fmt: skip
        cases += unique(layers_of(LIGHTER, d, numbers, p), (90,))
    for numbers in ("bf16", "fp32", "tf32"):
        cases += unique(layers_of(HEAVIEST[2:], 768, numbers, p=0.0), (90,))
    cases += unique(layers_of(HEAVIEST, 768, "amp", p=0.0), CHIPS["amp"])
    for p in (0.0, 0.1):
        cases += unique(layers_of(HEAVIEST, 768, "amp16", p), (90,))
    for numbers, chips in CHIPS.items():
        for d in (768, 1000):
            cases += unique(layers_of(HEAVIEST, d, numbers) + recomputed(d, numbers), chips)
            for p in (0.0, 0.1):
                cases += in_parts(layers_of(HEAVIEST, d, numbers, p, rows=("fewest",)), chips)
    for numbers, d, p in product(("bf16", "fp16", "amp"), (768, 1000), (0.0, 0.1)):
        cases += along(numbers, d, p)
    cases += along("bf16", 768, 0.1, mixes=LIGHTER_ALONG)
    return cases + early("bf16", (90, 100)) + early("fp32", (90,)) + p3_cases()


def along(
    numbers: str,
    d: int,
    p: float,
    ranks: Sequence[int] = RANKS,
    mixes: Sequence[tuple[str, str, str]] = ALONG,
) -> list[Case]:
    """K1 while it makes x_v, whole and in parts, and K3 while it sums up its gradient: on sm_90."""
    layers = layers_of(mixes, d, numbers, p, rows=("fewest", "few"))
    cases = unique([layer for layer in layers if layer.R in ranks], (90,))
    return [case for case in cases if name_of(case) in ("routed_forward", "weight_partials")]


EARLY = (*HEAVIEST, ("adapter", "shift", "owned"), ("adapter", "identity", "none"))


def early(numbers: str, chips: Sequence[int | str]) -> list[Case]:
    """Kernels that start before the one before them ends."""
    p3 = layers_of(P3_HEAVIEST[:1], 768, numbers, plan="p3", starts="early")
    layers = layers_of(EARLY, 768, numbers, rows=tuple(ROWS), starts="early")
    return unique(layers + p3, chips)


def recomputed(d: int, numbers: str) -> list[Layer]:
    """Layers that project all rows again in the backward pass: K0 of many rows."""
    return layers_of(HEAVIEST[:1], d, numbers, x_t="recomputed")


def in_parts(layers: Sequence[Layer], chips: Sequence[int | str]) -> list[Case]:
    """K1 with its columns in parts, of layers with the fewest rows, on the chips that have it."""
    cases = unique(layers, chips)
    return [case for case in cases if case.specialisation.values.get("COLUMNS") == "parts"]


def quick_cases() -> list[Case]:
    """Every row of the tile tables, at each of its mixes once, its chips in turn.

    And K1's columns in parts, at one mix; with hidden states in fp32 beside 16 bits, or, of K3, in
    the other 16 bits, R = 64; with the image made along, R = 64 and 128; and every kernel that
    starts early, once.
    """
    cases = []
    for numbers in ("bf16", "fp32"):
        rows: dict[tuple[Any, ...], dict[int | str, Case]] = {}
        layers = layers_of(HEAVIEST[:3], 768, numbers) + recomputed(768, numbers)
        for case in unique(layers, CHIPS[numbers]):
            s, values = case.specialisation, case.specialisation.values
            is_matrix = values.get("MIX") == "matrix"
            of_long = (values.get("PAIRS"), s.types.get("dK_ptr"))  # samples, another way
            by_chip = rows.setdefault((s.kernel, is_matrix, case.layer.R, s.tile, of_long), {})
            by_chip.setdefault(case.arch, case)
        for i, by_chip in enumerate(rows.values()):
            of_turn = list(by_chip.values())
            cases.append(of_turn[i % len(of_turn)])
    cases += in_parts(layers_of(HEAVIEST[:1], 768, "bf16", rows=("fewest",)), (90,))
    for numbers, kernels in (("amp", ROW_KERNELS), ("amp16", ("weight_partials",))):
        mixed = [Layer("adapter", "rank1", "owned", 64, 768, numbers, rows, 0.0) for rows in ROWS]
        cases += [case for case in unique(mixed, (90,)) if name_of(case) in kernels]
    cases += along("bf16", 768, 0.1, (64, 128)) + quick_p3_cases()
    ways = {(name_of(case), case.specialisation.values["WAIT"]): case
            for case in early("bf16", (90,)) if case.layer.R == 64}  # fmt: skip
    return cases + list(ways.values())


def quick_p3_cases() -> list[Case]:
    """Every tile of the product in both directions and layouts, where shared memory is least."""
    rows: dict[tuple[Any, ...], Case] = {}
    for numbers, chips in (("bf16", (86, 90)), ("fp32", (80,))):
        for case in product_cases(numbers, chips, 256, (768,)):
            s = case.specialisation
            by_columns = s.values["SWN"] == 1
            rows.setdefault((s.tile, s.types["seed_ptr"], by_columns), case)
    return list(rows.values())


def unique(layers: Sequence[Layer], chips: Sequence[int | str]) -> list[Case]:
    """What these layers launch, for these chips, each once."""
    cases: dict[tuple[Specialisation, int | str], Case] = {}
    for layer in layers:
        for chip in chips:
            for s in launched_by(layer, chip // 10 if isinstance(chip, int) else None):
                cases.setdefault((s, chip), Case(layer, s, chip))
    return list(cases.values())
