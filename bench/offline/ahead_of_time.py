"""Compile a Triton kernel for a GPU that is not here, and read what it needs and what it does.

    compile_for(
        kernel, {"x": "*bf16", "bias": None, "rows": "i32"}, {"BLOCK": 64}, arch=90
    )

tells the registers, the shared memory, the occupancy, the spills and the widths of the loads. It
cannot tell time, bank conflicts or races. Not in a process with TRITON_INTERPRET=1.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Multiprocessor(NamedTuple):
    """What the resident programs of one NVIDIA SM share, beside its 65536 registers."""

    shared: int  # KB; a program gets at most all but one, and the driver takes one of each program
    threads: int
    ctas: int


# CUDA programming guide, technical specifications per compute capability.
NVIDIA = {
    80: Multiprocessor(164, 2048, 32),
    86: Multiprocessor(100, 1536, 16),
    89: Multiprocessor(100, 1536, 24),
    90: Multiprocessor(228, 2048, 32),
    100: Multiprocessor(228, 2048, 32),
    120: Multiprocessor(100, 1536, 24),
}
AMD = ("gfx942",)
TENSOR_MEMORY = 512  # columns of an SM from compute capability 10.0 on

# The bytes of one thread's load, by the parts of the instruction's name; 4 where none is there.
NVIDIA_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_WIDTHS = {
    "byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """One compiled kernel: its demands, and its instructions counted in the machine code.

    Counts are of instructions in the code, not of executions: a loop body counts once.
    """

    registers: int  # per thread; on AMD vector registers, the accumulators among them
    stack: int  # bytes per thread
    shared: int  # bytes per program
    ctas_per_sm: int  # programs resident on an SM or CU; 0: it cannot be launched
    spills: int  # NVIDIA: loads and stores of local memory; AMD: spilled registers
    matrix: int  # matrix instructions
    wide_loads: int  # from global memory, 16 bytes a thread or more, bulk copies included
    narrow_loads: dict[int, int]  # the other loads: bytes a thread -> count
    atomics: int  # on global memory


def compile_for(*kernel_and_target: Any, **options: Any) -> Resources:
    """The resources of what `compiled_for` makes of the same arguments."""
    return resources(compiled_for(*kernel_and_target, **options))


def compiled_for(
    kernel: Any,
    arguments: Mapping[str, str | None],
    constants: Mapping[str, object],
    arch: int | str,
    num_warps: int = 4,
    num_stages: int = 3,
    **options: object,
) -> Any:
    """The `CompiledKernel` for `arch`, a compute capability (90) or an AMD name ("gfx942").

    `arguments` gives each runtime parameter its type as Triton writes it ("*bf16", "i32", "fp32"),
    or None for a pointer that is not given; `constants` holds the constexpr parameters. Pointers
    are 16-byte aligned and, as the JIT finds on AMD, within 2 GB; nothing is assumed of integers.
    A product and a sum may be one instruction, whatever a version of Triton does by itself.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(f"kernel must be a JITFunction, got {type(kernel).__name__}")
    if arch not in NVIDIA and arch not in AMD:
        raise ValueError(f"arch must be one of {[*NVIDIA, *AMD]}, got {arch!r}")
    names = list(kernel.arg_names)
    given = [*arguments, *constants]
    if sorted(given) != sorted(names):
        raise ValueError(f"arguments and constants must be those of the kernel, {names}: {given}")
    types = {name: arguments.get(name) or "constexpr" for name in names}
    absent = {name: None for name, kind in arguments.items() if kind is None}
    attributes = [["tt.divisibility", 16]] + [["tt.pointer_range", 32]] * (arch in AMD)
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={**constants, **absent},
        attrs={(names.index(n),): attributes for n, kind in types.items() if kind[0] == "*"},
    )
    target = GPUTarget("hip", arch, 64) if arch in AMD else GPUTarget("cuda", arch, 32)
    usual = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    options = {**usual, **options}
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any) -> Resources:
    """The resources of a `CompiledKernel`."""
    return _amd(compiled) if "amdgcn" in compiled.asm else _nvidia(compiled)


def _nvidia(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", cubin.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"\bREG:(\d+) STACK:(\d+)", code)
    assert usage is not None, code[:500]
    registers, stack = int(usage[1]), int(usage[2])
    widths = Counter(
        next((NVIDIA_WIDTHS[part] for part in name.split(".") if part in NVIDIA_WIDTHS), 4)
        for name in re.findall(r"\bLDG(?:STS)?((?:\.\w+)+)", code)
    )
    bulk = len(re.findall(r"\b(?:UTMALDG|UBLKCP)\b", code))
    return Resources(
        registers=registers,
        stack=stack,
        # The 1024 bytes of static shared memory that compute capability 9 shows are the driver's.
        shared=compiled.metadata.shared,
        ctas_per_sm=ctas_on_nvidia(compiled.metadata, registers),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        matrix=len(re.findall(r"\b(?:[A-Z]{1,2}MMA|UTC\w*MMA)\b", code)),
        wide_loads=bulk + sum(n for width, n in widths.items() if width >= 16),
        narrow_loads={width: n for width, n in sorted(widths.items()) if width < 16},
        atomics=len(re.findall(r"\b(?:REDG?|ATOMG?|UTMAREDG|UBLKRED)\b", code)),
    )


def ctas_on_nvidia(metadata: Any, registers: int) -> int:
    """Programs that an SM holds at once; `registers` a thread."""
    sm, warps = NVIDIA[metadata.target.arch], metadata.num_warps
    if warps > 32 or metadata.shared > (sm.shared - 1) * 1024:
        return 0
    # A thread gets registers by 8; each quarter of the SM holds as many warps as the others.
    warps_held = 65536 // (32 * (registers + 7 & ~7)) & ~3
    limits = [
        warps_held // warps,
        sm.shared * 1024 // (metadata.shared + 1024),
        sm.threads // (32 * warps),
        sm.ctas,
    ]
    if columns := getattr(metadata, "tmem_size", 0):
        limits.append(TENSOR_MEMORY // columns)
    return min(limits)


def _amd(compiled: Any) -> Resources:
    code = compiled.asm["amdgcn"]

    def noted(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s*(\d+)", code)), default=0)

    widths: Counter[int] = Counter()
    loads = r"\b(?:global|buffer|flat)_load_(?:lds_)?(dword(?:x\d)?|[us]?byte|[us]?short)"
    for kind in re.findall(loads, code):
        widths[AMD_WIDTHS[kind]] += 1
    return Resources(
        registers=noted("vgpr_count"),
        stack=noted("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        ctas_per_sm=ctas_on_amd(compiled.metadata, noted("vgpr_count")),
        spills=noted("vgpr_spill_count"),  # scalars spill to lanes of vectors, or show as stack
        matrix=len(re.findall(r"\bv_s?mfma", code)),
        wide_loads=sum(n for width, n in widths.items() if width >= 16),
        narrow_loads={width: n for width, n in sorted(widths.items()) if width < 16},
        atomics=len(re.findall(r"\b(?:global|buffer|flat)_atomic_", code)),
    )


def ctas_on_amd(metadata: Any, registers: int) -> int:
    """Programs that a CU of gfx942 holds: 4 SIMDs of 512 registers and 8 waves, 64 KB of LDS."""
    if metadata.num_warps > 16 or metadata.shared > 65536:
        return 0
    waves = min(8, 512 // max(8, registers + 7 & ~7))
    return min(4 * waves // metadata.num_warps, 65536 // max(1, metadata.shared))
