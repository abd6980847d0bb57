"""Whether a compiled kernel that is launched early waits before it touches what it must not.

`fused_route.kernels.parts.wait_for_previous` says where kernels wait. Whether they still do so
when compilers have moved loads about is read from what they make: a load in a loop that is
pipelined comes before a wait inside of it, with Triton up to 3.8 on sm_90.
"""

import re
from collections.abc import Iterator
from typing import Any

from bench.offline.load_widths import reads
from bench.offline.specialisations import Specialisation

WAIT = "griddepcontrol.wait"
IN_TTGIR = re.compile(r"griddepcontrol\.wait|tt\.grid_dependency_wait")  # until 3.8, and from 3.9
START = "griddepcontrol.launch_dependents"
MEMORY = re.compile(r"\b(?:ld|st|red|atom)\.global|\bcp\.(?:async|reduce)")
# What the kernel launched before a late one writes: K0 x_v, which K1 has as u and w; the sums dx_v.
WRITTEN = ("u_ptr", "w_ptr", "dx_v_ptr")


def too_early(specialisation: Specialisation, asm: dict[str, Any]) -> Iterator[str]:
    """Everything that is wrong with how a kernel waits; nothing where its launch waits for it.

    Of a late one its reads of what the kernel before it wrote, up to its first wait; all else of it
    is seen in the interpreter alone (tests/test_overlap.py).
    """
    how = specialisation.values["WAIT"]
    before, wait, _ = asm["ptx"].partition(WAIT) if "ptx" in asm else ("", "", "")
    if how == "none":
        if wait:
            yield "waits, though its launch does"
        return
    if not wait:
        yield "never waits"
        return
    if how == "first":
        if MEMORY.search(before):
            yield "touches memory before it waits"
        if START in before:
            yield "lets the next kernel start before it waits"
    else:
        parameters = [name for name, kind in specialisation.arguments if kind is not None]
        for name in sorted(read_before(asm["ttgir"], parameters) & set(WRITTEN)):
            yield f"reads {name} before it waits"
    if START not in asm["ptx"]:
        yield "never lets the next kernel start"


def read_before(ttgir: str, parameters: list[str]) -> set[str]:
    """The parameters that are read above the first wait, in the order of the text.

    Branches stand one below the other: a wait in one counts for those below it, too.
    """
    return {parameter for parameter, _ in reads(IN_TTGIR.split(ttgir)[0], parameters)}
