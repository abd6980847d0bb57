"""The gates: every kernel that the library launches, compiled for GPUs that are not here.

Each case is one specialisation on one chip. It must compile; spill nothing, or no more than
`most_spills` lets pass; fit into the shared memory of the chip at least once; make its products of
bf16, fp16 and TF32 with matrix instructions; read matrices 16 bytes at a time wherever their rows
begin at multiples of 16 bytes (`narrow`); and use no atomics.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from tqdm import tqdm

from bench.offline.ahead_of_time import Resources, compiled_for, resources
from bench.offline.load_widths import Load, loads
from bench.offline.specialisations import ROWS, Layer, Specialisation, launched_by
from fused_route.kernels.config import compiler_options

ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, "gfx942")

# Where a load of a matrix may begin: at multiples of these constants of the kernel, in elements.
STEPS = {
    "x_ptr": ("D",),
    "x_r_ptr": ("D",),
    "dy_ptr": ("LDY", "N"),
    "base_ptr": ("D", "LDY", "N"),
    "A_ptr": ("D",),
    "B_ptr": ("RANK",),
    "x_t_ptr": ("R", "C"),
    "dz_ptr": ("R", "C"),
    "dx_t_ptr": ("R",),
    "dx_v_ptr": ("R",),
    "z_ptr": ("R", "RANK"),
    "u_ptr": ("R",),
    "w_ptr": ("R", "C"),
    "pairs_ptr": ("R",),
    "partial_ptr": ("R", "A_SIZE", "B_SIZE", "b_A_SIZE", "b_B_SIZE"),
    "wide_ptr": ("K",),
    "weight_ptr": ("WEIGHT", "N"),
    "narrow_ptr": ("LDN", "RANK"),
    "factor_ptr": ("FACTOR",),
}
# What these may spill where autocast leaves hidden states in fp32 beside weights in 16 bits: their
# tiles are chosen for hidden states of 16 bits, of which a thread holds twice as many.
ROW_KERNELS = ("routed_forward", "routed_backward", "weight_partials")
MOST_MIXED_SPILLS = 48
# What K1 may spill while it makes x_v, which is a trial with the tiles of K1 alone.
MOST_SPILLS_ALONG = 18
# What may spill besides, with other versions of Triton than 3.8: with 3.6 one row of the selection
# that `make test` compiles; with 3.9, whose assembler gives registers otherwise, 76 of 6,847 cases.
# No GPU has told what that costs (docs/decisions.md, 56). By kernel, chip, and whether hidden
# states are in fp32 beside 16 bits.
SEEN_BEFORE: dict[tuple[str, int | str, bool], int] = {("weight_partials", 100, False): 6}
SEEN_LATER: dict[tuple[str, int | str, bool], int] = {
    ("project", 90, False): 2, ("routed_forward", 90, False): 18,
    ("routed_forward", 100, False): 6, ("routed_bottleneck", 90, False): 2,
    ("routed_bottleneck", 100, False): 2, ("routed_backward", 80, False): 3,
    ("routed_backward", 90, False): 17, ("routed_backward", 100, False): 2,
    ("vector_gradient", 90, False): 3, ("weight_partials", 80, False): 18,
    ("extended_product", 120, False): 2,
    ("routed_forward", 90, True): 90, ("routed_backward", 90, True): 50,
    ("vector_gradient", 90, True): 2,
}  # fmt: skip
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
BESIDES = SEEN_LATER if VERSION >= (3, 9) else SEEN_BEFORE if VERSION < (3, 8) else {}

# As many bytes as the hidden states, and read from device memory: no tile may be too small.
LARGE = ("x_ptr", "x_r_ptr", "dy_ptr", "base_ptr", "wide_ptr")
# Biases, a seed, codes of rows, offsets of samples: read once a program, or once a column block.
VECTORS = ("b_A_ptr", "b_B_ptr", "bias_ptr", "seed_ptr", "row_sample_ptr", "offsets_ptr")


class Case(NamedTuple):
    """A specialisation on a chip, and the layer that launches it."""

    layer: Layer
    specialisation: Specialisation
    arch: int | str


class Finding(NamedTuple):
    """What a case needs, None where it did not compile, and what is wrong with it."""

    case: Case
    resources: Resources | None
    faults: list[str]


def narrow(load: Load, specialisation: Specialisation) -> str | None:
    """Why a load is narrower than it must be, or None.

    A thread reads 16 bytes at once wherever the rows of the matrix, and the places in them where a
    tile may begin, are multiples of 16 bytes; less only of a tile that has less for each thread,
    and none of those of the hidden states' size.
    """
    if load.argument in VECTORS:
        return None
    if load.argument not in STEPS:
        return f"{load.argument} is not in the table of rows"
    values = specialisation.values
    values.setdefault("RANK", values.get("R", 0) // len(values.get("SEGMENTS", (0,))))
    for name, strides in (("WEIGHT", ("SWK", "SWN")), ("FACTOR", ("SFC", "SFN"))):
        values[name] = max(values.get(stride, 0) for stride in strides)  # the other one is 1
    if values.get("MIX", "matrix") == "matrix":
        values["C"] = values.get("R", 0) // values.get("G", 1)
    element = int(str(specialisation.types[load.argument]).lstrip("*bfpi")) // 8
    if any(values.get(name, 0) * element % 16 for name in STEPS[load.argument]):
        return None
    least = 16 if load.argument in LARGE else min(16, load.tile)
    if element == 4 and values.get("R_PAD") == 256:
        least = min(least, 8)  # no tile was found that reads 16 bytes a thread and does not spill
    if load.narrowest >= least:
        return None
    where = " in ".join(load.place)
    return f"{load.argument} read {load.narrowest} bytes at a time instead of {least} ({where})"


def by_scalars(asm: dict[str, Any], seen: Resources) -> int:
    """Products that must be made by matrix instructions and are not: all but IEEE ones of fp32."""
    products = re.findall(r"tt\.dot .*", asm["ttir"])
    if not any("xf32> *" not in product or "tf32" in product for product in products):
        return 0
    return len(re.findall(r"tt\.dot .*parent = #blocked", asm["ttgir"])) or int(seen.matrix == 0)


ALIAS = re.compile(r"(%\w+) = ttg\.memdesc_(?:index|trans) (%\w+)")
SLOTS = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x")
COPIED = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
READ = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+), .*isAsync = true")


def overwritten(ttgir: str, stages: int) -> int:
    """Buffers of a pipelined loop that are filled again while a product may still read them.

    On sm_90 a product ends one step late (Triton waits for all but one), and copies run stages − 1
    steps ahead, so a buffer needs as many slots as there are stages. Triton counts too few for a
    load that something else than the product uses as well.
    """
    source = dict(ALIAS.findall(ttgir))
    slots = {name: int(count) for name, count in SLOTS.findall(ttgir)}

    def buffer(name: str) -> str:
        while name in source:
            name = source[name]
        return name

    copied = {buffer(name) for name in COPIED.findall(ttgir)}
    read = {buffer(name) for pair in READ.findall(ttgir) for name in pair}
    return sum(slots.get(name, stages) < stages for name in copied & read)


def faults(
    specialisation: Specialisation, compiled: Any, seen: Resources, spills: int
) -> Iterator[str]:
    """Everything that a compiled kernel does not meet, of which this many spills are allowed."""
    if seen.spills > spills or (seen.stack and not seen.spills):
        yield f"{seen.spills} spills, {seen.stack} bytes of stack"
    if seen.ctas_per_sm == 0:
        yield f"does not fit: {seen.shared / 1024:.1f} KB shared, {seen.registers} registers"
    if scalar := by_scalars(compiled.asm, seen):
        yield f"{scalar} products without matrix instructions"
    if count := overwritten(compiled.asm["ttgir"], specialisation.tile.stages):
        yield f"{count} buffers overwritten while a product reads them"
    if seen.atomics:
        yield f"{seen.atomics} atomics"
    parameters = [name for name, kind in specialisation.arguments if kind is not None]
    for load in loads(compiled, parameters):
        if (fault := narrow(load, specialisation)) is not None:
            yield fault


def check(case: Case, besides: Mapping[tuple[str, int | str, bool], int] = BESIDES) -> Finding:
    """Compiles a case and says what is wrong with it.

    Args:
        besides: what this version of Triton may spill more, by kernel, chip and mixed dtypes.
    """
    s = case.specialisation
    options = compiler_options(s.tile, "cuda" if isinstance(case.arch, int) else "hip")
    try:
        compiled = compiled_for(s.function, s.types, s.values, case.arch, **options)
    except Exception as error:  # whatever the compiler stumbles on is a finding
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return Finding(case, None, [f"does not compile: {type(error).__name__}: {lines[-1]}"])
    seen = resources(compiled)
    return Finding(case, seen, list(faults(s, compiled, seen, most_spills(case, besides))))


def most_spills(case: Case, besides: Mapping[tuple[str, int | str, bool], int]) -> int:
    """How many of them are no fault."""
    name, most = name_of(case), case.specialisation.tile.spills
    is_mixed = case.layer.numbers == "amp"
    if is_mixed and name in ROW_KERNELS:
        most = max(most, MOST_MIXED_SPILLS)
    if name == "routed_forward" and case.specialisation.types["x_r_ptr"] is not None:
        most = max(most, MOST_SPILLS_ALONG)
    return most + besides.get((name, case.arch, is_mixed), 0)


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

    Of two segments, R = 256 takes several steps through the bottleneck; 16 half of one.
    """
    layers = [
        Layer("frozen_qv", "rank1", "owned", R, d, numbers, rows, plan="p3", by_columns=by_columns)
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
    for numbers, chips in CHIPS.items():
        for d in (768, 1000):
            cases += unique(layers_of(HEAVIEST, d, numbers) + recomputed(d, numbers), chips)
            for p in (0.0, 0.1):
                cases += in_parts(layers_of(HEAVIEST, d, numbers, p, rows=("fewest",)), chips)
    for numbers, d, p in product(("bf16", "fp16", "amp"), (768, 1000), (0.0, 0.1)):
        cases += along(numbers, d, p)
    cases += along("bf16", 768, 0.1, mixes=LIGHTER_ALONG)
    return cases + p3_cases()


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


def recomputed(d: int, numbers: str) -> list[Layer]:
    """Layers that project all rows again in the backward pass: K0 of many rows."""
    return layers_of(HEAVIEST[:1], d, numbers, x_t="recomputed")


def in_parts(layers: Sequence[Layer], chips: Sequence[int | str]) -> list[Case]:
    """K1 with its columns in parts, of layers with the fewest rows, on the chips that have it."""
    cases = unique(layers, chips)
    return [case for case in cases if case.specialisation.values.get("COLUMNS") == "parts"]


def quick_cases() -> list[Case]:
    """At most 200: every row of the tile tables, at each of its mixes once, its chips in turn.

    And K1's columns in parts, at one mix; with hidden states in fp32 beside 16 bits, R = 64; and
    with the image made along, R = 64 and 128.
    """
    cases = []
    for numbers in ("bf16", "fp32"):
        rows: dict[tuple[Any, ...], dict[int | str, Case]] = {}
        layers = layers_of(HEAVIEST[:3], 768, numbers) + recomputed(768, numbers)
        for case in unique(layers, CHIPS[numbers]):
            s, values = case.specialisation, case.specialisation.values
            is_matrix = values.get("MIX") == "matrix"
            by_chip = rows.setdefault((s.kernel, is_matrix, case.layer.R, s.tile), {})
            by_chip.setdefault(case.arch, case)
        for i, by_chip in enumerate(rows.values()):
            of_turn = list(by_chip.values())
            cases.append(of_turn[i % len(of_turn)])
    cases += in_parts(layers_of(HEAVIEST[:1], 768, "bf16", rows=("fewest",)), (90,))
    mixed = [Layer("adapter", "rank1", "owned", 64, 768, "amp", rows, 0.0) for rows in ROWS]
    cases += [case for case in unique(mixed, (90,)) if name_of(case) in ROW_KERNELS]
    return cases + along("bf16", 768, 0.1, (64, 128)) + quick_p3_cases()


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


def _keep_in(cache: str | None) -> None:
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = cache


def checked(cases: Sequence[Case], processes: int = 2, cache: str | None = None) -> list[Finding]:
    """All cases, compiled in this many processes.

    Args:
        cache: a folder for what Triton makes; None: its own, where the next time finds it.
    """
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _keep_in, (cache,)) as pool:
        findings = []
        for finding in tqdm(
            pool.map(check, cases, chunksize=4), total=len(cases), desc="compiling", unit="kernel"
        ):
            findings.append(finding)
            if finding.faults:
                tqdm.write(row(finding))
        return findings


def row(finding: Finding) -> str:
    """One line of the table."""
    case, seen = finding.case, finding.resources
    layer, s = case.layer, case.specialisation
    tile = f"{s.values.get('BM', '')}x{s.values.get('BN', s.values.get('BLOCK'))}"
    numbers = "-" * 6 if seen is None else (
        f"{seen.registers:4} {seen.spills:6} {seen.shared / 1024:7.0f} {seen.ctas_per_sm:5} "
        f"{seen.matrix:6} {seen.wide_loads:6} {sum(seen.narrow_loads.values()):6}"
    )  # fmt: skip
    verdict = "ok" if not finding.faults else "; ".join(finding.faults)
    return (
        f"{s.kernel.partition(':')[2]:17} {layer.mix:8} {layer.R:4} {layer.d:5} {layer.numbers:5} "
        f"{tile:8} {case.arch!s:7} {numbers}  {verdict}"
    )


HEADER = (
    "kernel            mix         R     d dtype tile     chip    regs spills  shared  CTAs "
    "matrix   wide narrow  verdict"
)


def main(is_quick: bool) -> int:
    """Prints the table; 1 where a demand is not met."""
    start = time.perf_counter()
    if is_quick:
        findings = checked(quick_cases())
    else:  # 7 GB that nobody asks for again
        with TemporaryDirectory(prefix="fused-route-gates-") as cache:
            findings = checked(all_cases(), cache=cache)
    print(HEADER)
    for finding in findings:
        print(row(finding))
    failed = [finding for finding in findings if finding.faults]
    seconds = time.perf_counter() - start
    print(f"{len(findings)} compiled in {seconds:.0f} s, {len(failed)} do not meet every demand")
    for finding in failed:
        print(row(finding))
    print("next: change the rows in kernels/config.py" if failed else "next: python -m bench host")
    return int(bool(failed))
