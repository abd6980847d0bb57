"""How wide the loads of each `tl.load` of a compiled kernel are, and what each reads.

Triton's own intermediate code says what a load reads: the argument that its pointer comes from, the
tile and its elements. The assembly says how: each instruction follows a `.loc` with the place in
the source that it comes from. The two are joined by that place, which is exact where counting
instructions is not: unrolling, pipelining and vectors of any shape leave it alone.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Place = tuple[str, ...]  # "file:line:column" of the load, then of the call that it was inlined at

NUMBERED = re.compile(r"\bv(\d)")
NVIDIA_LOAD = re.compile(
    r"\bld\.global[\w.:]*?(?:\.v(?P<vector>\d))?\.[a-z](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.shared\.global.*?, 0x(?P<bytes>[0-9a-f]+)\b"
)
AMD_LOAD = re.compile(
    r"\b(?:global|buffer|flat)_load_(?:lds_)?(dword(?:x\d)?|[us]?byte|[us]?short)"
)
AMD_WIDTHS = {
    "byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip


class Load(NamedTuple):
    """All instructions of the loads at one place from one argument.

    Args:
        argument: the kernel's parameter that is read.
        tile: bytes of the smallest tile that is loaded at once, over the threads of a program.
        narrowest: bytes a thread of the narrowest instruction; 0 where none was found.
        place: of the call of tl.load, and of its caller.
    """

    argument: str
    tile: int
    narrowest: int
    place: Place


def loads(compiled: Any, parameters: list[str]) -> list[Load]:
    """The loads of a `CompiledKernel` whose runtime parameters, absent ones left out, are these."""
    widths = dict[Place, int]()
    for place, width in _instructions(compiled.asm):
        widths[place] = min(width, widths.get(place, width))
    threads = compiled.metadata.num_warps * compiled.metadata.target.warp_size
    tiles = dict[tuple[str, Place], int]()
    for argument, size, place in _tiles(compiled.asm["ttir"], parameters):
        tiles[argument, place] = min(size // threads, tiles.get((argument, place), size))
    return [
        Load(argument, size, widths.get(place, 0), place)
        for (argument, place), size in tiles.items()
    ]


READS = ("tt.load", "ttg.async_copy_global_to_local")


def reads(code: str, parameters: list[str]) -> Iterator[tuple[str, str]]:
    """(parameter, line) of each load in Triton's intermediate code, in the order of the text."""
    source: dict[str, str] = {}  # value -> the parameter that a pointer comes from
    for line in code.splitlines():
        if "tt.func" in line:
            names = re.findall(r"(%\w+): ", line)
            source = dict(zip(names, parameters, strict=True))
        for name, start in re.findall(r"(%\w+) = (%\w+)(?=[,)])", line):  # iter_args of a loop
            if start in source:
                source[name] = source[start]
        step = re.match(r"\s*(%\w+)(?::\d+)? = ([\w.]+) (%\w+)", line)
        if step is None or step[3] not in source:
            continue
        if step[2] in READS:
            yield source[step[3]], line
        else:
            source[step[1]] = source[step[3]]


def _tiles(ttir: str, parameters: list[str]) -> Iterator[tuple[str, int, Place]]:
    """(parameter, bytes of the tile, place) of each tt.load, scalars left out."""
    places = _places(ttir)
    for parameter, line in reads(ttir, parameters):
        tile = re.search(r": tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>", line)
        location = re.search(r"loc\((#loc\d*)\)", line)
        if tile is not None and location is not None:
            size = int(tile[2]) // 8
            for extent in tile[1].split("x")[:-1]:
                size *= int(extent)
            yield parameter, size, places(location[1])


def _places(ttir: str) -> Any:
    """From a name of a location, as #loc12, to its place."""
    defined = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def chain(name: str) -> list[str]:
        text = defined[name]
        if call := re.fullmatch(r"callsite\((#loc\d*) at (#loc\d*)\)", text):
            return chain(call[1]) + chain(call[2])
        if named := re.fullmatch(r'".*"\((#loc\d*)\)', text):
            return chain(named[1])
        found = re.fullmatch(r'"(.*)":(\d+):(\d+)', text)
        assert found is not None, text
        file, line, column = found.groups()
        return [f"{file.rpartition('/')[2]}:{line}:{column}"]

    return lambda name: tuple(chain(name)[:2])


def _instructions(asm: dict[str, Any]) -> Iterator[tuple[Place, int]]:
    """(place, bytes a thread) of each load from global memory."""
    code: str = asm["amdgcn"] if "amdgcn" in asm else asm["ptx"]
    files = dict(re.findall(r'^\s*\.file\s+(\d+) .*?"?([\w.]+)"?(?: md5 .*)?$', code, re.MULTILINE))
    place: Place = ()
    inline = False  # the lines of an inline assembly count on from its place
    for line in code.splitlines():
        if "inline asm" in line:
            inline = "begin inline asm" in line
        elif (loc := re.match(r"\s*\.loc\s+\d+ \d+ \d+(.*)", line)) and not inline:
            comment = re.findall(r"[\w.]+:\d+:\d+", loc[1])
            if call := re.search(r"inlined_at (\d+) (\d+) (\d+)", loc[1]):
                comment[1:] = [f"{files[call[1]]}:{call[2]}:{call[3]}"]
            place = tuple(comment[:2])
        elif found := NVIDIA_LOAD.search(line):
            if found["bytes"]:
                yield place, int(found["bytes"], 16)
            else:
                yield place, int(found["vector"] or 1) * int(found["bits"]) // 8
        elif found := AMD_LOAD.search(line):
            yield place, AMD_WIDTHS[found[1]]
