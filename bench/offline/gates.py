"""The gates: every kernel that the library launches, compiled for GPUs that are not here.

Each case (`gate_cases`) is one specialisation on one chip. It must compile; spill nothing, or no
more than `most_spills` lets pass; fit into the shared memory of the chip at least once; make its
products of bf16, fp16 and TF32 with matrix instructions; read matrices 16 bytes at a time wherever
their rows begin at multiples of 16 bytes (`narrow`); use no atomics; and, launched early, wait
before it reads what the kernel before it writes (`waits`).
"""

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import triton
from tqdm import tqdm

from bench.offline.ahead_of_time import Resources, compiled_for, resources
from bench.offline.gate_cases import ROW_KERNELS, Case, all_cases, name_of, quick_cases
from bench.offline.load_widths import Load, loads
from bench.offline.specialisations import Specialisation
from bench.offline.waits import too_early
from fused_route.kernels.config import compiler_options

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
# What kernels of rows may spill where autocast leaves hidden states in fp32 beside weights in 16
# bits: their tiles are chosen for hidden states of 16 bits, of which a thread holds twice as many.
MOST_MIXED_SPILLS = 48
# What K1 may spill while it makes x_v, which is a trial with the tiles of K1 alone.
MOST_SPILLS_ALONG = 18
# What may spill besides, with other versions of Triton than 3.8: with 3.6 one row of the selection
# that `make test` compiles; with 3.9, whose assembler gives registers otherwise, 76 of the 6,847
# cases there were then, and one since. No GPU has told what that costs (docs/decisions.md, 56). By
# kernel, chip, and whether hidden states are in fp32 beside 16 bits.
SEEN_BEFORE: dict[tuple[str, int | str, bool], int] = {("weight_partials", 100, False): 6}
SEEN_LATER: dict[tuple[str, int | str, bool], int] = {
    ("project", 90, False): 2, ("routed_forward", 90, False): 18,
    ("routed_forward", 100, False): 6, ("routed_bottleneck", 90, False): 2,
    ("routed_bottleneck", 100, False): 2, ("routed_backward", 80, False): 3,
    ("routed_backward", 90, False): 17, ("routed_backward", 100, False): 2,
    ("matrix_gradient", 90, False): 4, ("vector_gradient", 90, False): 3,
    ("weight_partials", 80, False): 18,
    ("extended_product", 120, False): 2,
    ("routed_forward", 90, True): 90, ("routed_backward", 90, True): 50,
    ("vector_gradient", 90, True): 2,
}  # fmt: skip
# What reads dx_t 4 bytes at a time with 3.6, of that selection: kernel, chip, numbers, R.
NARROW_BEFORE = {("weight_partials", 100, "fp32", 32)}
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
BESIDES = SEEN_LATER if VERSION >= (3, 9) else SEEN_BEFORE if VERSION < (3, 8) else {}
NARROW = NARROW_BEFORE if VERSION < (3, 8) else set()

# As many bytes as the hidden states, and read from device memory: no tile may be too small.
LARGE = ("x_ptr", "x_r_ptr", "dy_ptr", "base_ptr", "wide_ptr")
# Biases, a seed, codes of rows, offsets of samples: read once a program, or once a column block.
VECTORS = ("b_A_ptr", "b_B_ptr", "bias_ptr", "seed_ptr", "row_sample_ptr", "offsets_ptr")


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
    yield from too_early(specialisation, compiled.asm)


def narrow_loads(specialisation: Specialisation, compiled: Any) -> Iterator[str]:
    """Every load of a compiled kernel that is narrower than it must be."""
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
    backend = "cuda" if isinstance(case.arch, int) else "hip"
    options = compiler_options(s.tile, backend, s.values["WAIT"])
    try:
        compiled = compiled_for(s.function, s.types, s.values, case.arch, **options)
    except Exception as error:  # whatever the compiler stumbles on is a finding
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        return Finding(case, None, [f"does not compile: {type(error).__name__}: {lines[-1]}"])
    seen = resources(compiled)
    found = list(faults(s, compiled, seen, most_spills(case, besides)))
    if (name_of(case), case.arch, case.layer.numbers, case.layer.R) not in NARROW:
        found += narrow_loads(s, compiled)
    return Finding(case, seen, found)


def most_spills(case: Case, besides: Mapping[tuple[str, int | str, bool], int]) -> int:
    """How many of them are no fault."""
    name, most = name_of(case), case.specialisation.tile.spills
    is_mixed = case.layer.numbers == "amp"
    if is_mixed and name in ROW_KERNELS:
        most = max(most, MOST_MIXED_SPILLS)
    if name == "routed_forward" and case.specialisation.types["x_r_ptr"] is not None:
        most = max(most, MOST_SPILLS_ALONG)
    return most + besides.get((name, case.arch, is_mixed), 0)


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
