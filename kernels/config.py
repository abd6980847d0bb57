"""Tiles by kernel, bottleneck width and element size: the only place where tuning is written down.

A row is chosen by R_PAD (R padded to a power of two), by the bytes of an element of A and B, and by
whether there are enough rows to fill a GPU with large blocks. `TILES` serves every GPU from sm_80
on, and AMD's with `compiler_options`; `TUNED` has what was measured to be faster on some.
`python -m bench gates` compiles all of it and shows registers, spills and shared memory. Why the
tiles are what they are: README.md beside this file.
"""

from dataclasses import dataclass, replace

MAX_R = 256

# Below this many rows, blocks of 64 rows or more would leave a third of 132 multiprocessors idle.
MANY_ROWS = 8192

# Programs that K3 aims for: two for each of an H100's 132 multiprocessors. A constant, not a
# property of the device: where tiles are the same, sums have the same order, hence the same bits.
WEIGHT_PROGRAMS = 264


@dataclass(frozen=True)
class Tile:
    """BM rows and BN columns a step, warps of a program, stages of its software pipeline.

    registers: how many of them a thread may have on NVIDIA, where the compiler's own choice is so
    few, for the sake of one more program, that it spills. residual: how the 16-bit residual of an
    adapter comes to the sum, "added" or "multiplied" with the unit matrix (`parts.plus_base`).
    spills: how many the gates let pass, of a tile that was measured to be faster in spite of them,
    or where no other was found.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    registers: int | None = None
    residual: str = "added"
    spills: int = 0


# (few rows, many rows) for each kernel, by R_PAD and bytes of an element. "forward" and "backward"
# are K1 and K2 with vector operands, "…_matrix" with K, which takes registers and shared memory.
TILES: dict[str, dict[tuple[int, int], tuple[Tile, Tile]]] = {
    "project": {
        (16, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (128, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
        (256, 2): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (256, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    },
    "forward": {
        (16, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(32, 64, 4, 3, 112), Tile(128, 64, 8, 3)),
        (128, 2): (Tile(32, 64, 4, 2), Tile(64, 64, 8, 2)),
        (256, 2): (Tile(32, 64, 8, 2, 160), Tile(32, 64, 8, 2, 160)),
        (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (64, 4): (Tile(32, 32, 8, 2, 96), Tile(32, 32, 8, 2, 96)),
        (128, 4): (Tile(32, 32, 8, 2, 160), Tile(32, 32, 8, 2, 160)),
        (256, 4): (Tile(16, 32, 8, 1, 240), Tile(16, 32, 8, 1, 240)),
    },
    "forward_matrix": {
        (16, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (128, 2): (Tile(32, 32, 4, 2), Tile(64, 64, 8, 2)),
        (256, 2): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (64, 4): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        (128, 4): (Tile(16, 32, 4, 2, 128), Tile(16, 32, 4, 2, 128)),
        (256, 4): (Tile(16, 32, 8, 2), Tile(16, 32, 8, 2)),
    },
    "backward": {
        (16, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
        (128, 2): (Tile(16, 64, 4, 2), Tile(64, 64, 8, 2)),
        (256, 2): (Tile(16, 64, 4, 2, 255), Tile(16, 64, 4, 2, 255)),
        (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2, 128), Tile(32, 32, 4, 2, 128)),
        (64, 4): (Tile(32, 32, 8, 2, 96), Tile(32, 32, 8, 2, 96)),
        (128, 4): (Tile(16, 64, 8, 2, 128), Tile(16, 64, 8, 2, 128)),
        (256, 4): (Tile(16, 32, 8, 1, 255), Tile(16, 32, 8, 1, 255)),
    },
    "backward_matrix": {
        (16, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(32, 64, 4, 3), Tile(64, 64, 8, 3)),
        (128, 2): (Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        (256, 2): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        (16, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (64, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (128, 4): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        (256, 4): (Tile(16, 64, 8, 1), Tile(16, 64, 8, 1)),
    },
    "vectors": {
        (16, 2): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        (32, 2): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        (64, 2): (Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        (128, 2): (Tile(16, 64, 4, 2), Tile(16, 64, 4, 2)),
        (256, 2): (Tile(16, 64, 8, 2), Tile(16, 64, 8, 2)),
        (16, 4): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        (32, 4): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        (64, 4): (Tile(16, 32, 4, 2, 64), Tile(16, 32, 4, 2, 64)),
        (128, 4): (Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
        (256, 4): (Tile(16, 32, 8, 2, 128), Tile(16, 32, 8, 2, 128)),
    },
    # BN × BN of K's C × C columns a program, BM rows a step
    "matrices": {
        (16, 2): (Tile(64, 16, 4, 2), Tile(64, 16, 4, 2)),
        (32, 2): (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        (64, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (128, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (256, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (16, 4): (Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)),
        (32, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (128, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (256, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    },
    "weights": {
        (16, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        (32, 2): (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        (64, 2): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        (128, 2): (Tile(32, 64, 4, 3), Tile(64, 128, 8, 2)),
        (256, 2): (Tile(32, 64, 8, 2, 160), Tile(32, 64, 8, 2, 160)),
        (16, 4): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        (32, 4): (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        (64, 4): (Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
        (128, 4): (Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        (256, 4): (Tile(16, 32, 8, 2, 128), Tile(16, 32, 8, 2, 128)),
    },
}

# Rows that replace those of TILES, by major compute capability, where a sweep found faster ones and
# they need not fit elsewhere: more stages, and wider steps with few rows, whose pipelines start and
# end more often than they run. Measured on an H200 with 2,000 and 32,768 rows of d = 768: K1 to K3
# from R = 64 on. Not timed: R = 16 and 32, "project", which is the first half of K1, and "vectors",
# all four in the few rows' steps of R = 64 and up (decision 54).
TUNED: dict[int, dict[str, dict[tuple[int, int], tuple[Tile, Tile]]]] = {
    9: {
        "project": {
            (16, 2): (Tile(16, 256, 4, 4), TILES["project"][16, 2][1]),
            (32, 2): (Tile(16, 256, 4, 4), TILES["project"][32, 2][1]),
            (64, 2): (Tile(16, 256, 4, 4), TILES["project"][64, 2][1]),
            (128, 2): (Tile(16, 256, 4, 3), TILES["project"][128, 2][1]),
            (256, 2): (Tile(16, 128, 8, 2), TILES["project"][256, 2][1]),
        },
        "forward": {
            (16, 2): (Tile(16, 256, 4, 4), TILES["forward"][16, 2][1]),
            (32, 2): (Tile(16, 256, 4, 4), TILES["forward"][32, 2][1]),
            (64, 2): (Tile(16, 256, 4, 4), Tile(64, 128, 8, 3)),
            (128, 2): (Tile(16, 256, 4, 3), Tile(64, 64, 4, 4, residual="multiplied")),
            (256, 2): (Tile(16, 128, 8, 2), Tile(32, 64, 8, 3)),
        },
        "backward": {
            (16, 2): (Tile(16, 256, 4, 4), TILES["backward"][16, 2][1]),
            (32, 2): (Tile(16, 256, 4, 4), TILES["backward"][32, 2][1]),
            (64, 2): (Tile(16, 256, 4, 4, 200), Tile(64, 128, 4, 3)),
            (128, 2): (Tile(16, 128, 4, 4), Tile(64, 64, 4, 4, residual="multiplied", spills=450)),
            (256, 2): (Tile(16, 128, 8, 2), Tile(32, 64, 8, 3)),
        },
        "vectors": {
            (16, 2): (Tile(16, 256, 4, 3), Tile(16, 256, 4, 3)),
            (32, 2): (Tile(16, 256, 4, 3), Tile(16, 256, 4, 3)),
            (64, 2): (Tile(16, 256, 4, 3), Tile(16, 256, 4, 3)),
            (128, 2): (Tile(16, 128, 4, 3), Tile(16, 128, 4, 3)),
            (256, 2): (Tile(16, 128, 8, 2), Tile(16, 128, 8, 2)),
        },
        "weights": {
            (16, 2): (Tile(64, 64, 4, 4), TILES["weights"][16, 2][1]),
            (32, 2): (Tile(64, 64, 4, 4), TILES["weights"][32, 2][1]),
            (64, 2): (Tile(64, 64, 4, 4), Tile(32, 128, 8, 3)),
            (128, 2): (Tile(64, 64, 4, 4), Tile(64, 128, 8, 3)),
            (256, 2): (Tile(32, 64, 8, 4), Tile(32, 64, 8, 4)),
        },
    },
}


@dataclass(frozen=True)
class ProductTile(Tile):
    """BK: how far a step goes along the inner width of a product."""

    BK: int = 64


# P3's product by bytes of an element: (few rows, many rows). It steps through the bottleneck as
# through the inner width, so that its registers and shared memory do not grow with R. These fit
# every GPU, the smallest with 99 KB of shared memory a program, and AMD's with 64 KB. In 4 bytes
# some spill, by the compiler's choice; limits of registers that mend those make others spill.
PRODUCTS: dict[int, tuple[ProductTile, ProductTile]] = {
    2: (ProductTile(64, 64, 4, 4, BK=64), ProductTile(128, 128, 8, 3, BK=64)),
    4: (ProductTile(32, 64, 8, 3, spills=4, BK=32), ProductTile(64, 64, 4, 3, spills=2, BK=32)),
}
# Instead, by (major compute capability, bytes of an element): 192 KB of shared memory. Backward,
# with dropout, it has all registers, and of one segment at R = 256 it spills.
LARGE_PRODUCTS: dict[tuple[int | None, int], tuple[ProductTile, ProductTile]] = {
    (9, 2): (PRODUCTS[2][0], ProductTile(128, 256, 8, 4, spills=18, BK=64)),
}

# Where P3 takes less time than torch's product and K1, forward and backward together: by major
# compute capability (the largest D and N, the least M), for 16-bit elements. Measured on an H200 in
# bf16 with 1 of 1 and 2 of 3 segments adapted (docs/decisions.md); elsewhere, in wider layers and
# with a smaller share, where the product decides, torch's is the safe one.
EXTENDS: dict[int, tuple[int, int]] = {9: (1024, MANY_ROWS)}
LEAST_SHARE = 2 / 3  # of the segments

# Where rows make fewer blocks, K1's columns are divided for this many programs, by major compute
# capability: an H100 has so many multiprocessors. Each part makes the bottleneck anew, so results
# do not depend on it. Measured on an H200; elsewhere columns stay whole.
FORWARD_PROGRAMS: dict[int, int] = {9: 132}

# Bytes of an element of A with which, with few rows, K1 makes x_v and K3 sums up its gradient, each
# program anew, instead of launches of their own; by major compute capability. Nowhere: two launches
# of six are saved, and not one was timed on a GPU. {9: 2} is what is to be tried (decision 54).
ALONG: dict[int, int] = {}

# Major compute capabilities on which a kernel is launched while the one before still runs, and
# waits for it by itself (`parts.wait_for_previous`); from 9 on they can. Nowhere: not one launch
# was made so on a GPU. {9} is what is to be tried (decision 58).
OVERLAPS: frozenset[int] = frozenset()

# From so many steps through the rows of a sample on, the gradients of operands go another way: few
# samples are few programs, and one of 32,768 rows took one of them 512 steps, of a second-level
# cache's latency each. Vector operands then have a program a sample, which reads SUMMED elements of
# partial sums at once; K's rows are split, as K3's are. Not where WEIGHT_PROGRAMS are at work
# anyway. Not timed (decision 57).
LONG_VECTORS, LONG_MATRICES = 8, 16
SUMMED = 4096

# K4 has no matrix product, and one row.
ADD = Tile(1, 1024, 4, 1)


def padded(R: int) -> int:
    """The least power of two that is at least R and 16, which products of tiles need."""
    return max(16, 1 << (R - 1).bit_length())


def tile(kernel: str, R_PAD: int, size: int, many: bool, major: int | None = None) -> Tile:
    """The tile of a kernel on a GPU of this major compute capability (None: not NVIDIA's).

    `size` is the bytes of an element of A and B.
    """
    tuned = TUNED.get(major or 0, {}).get(kernel, {})
    return (tuned.get((R_PAD, size)) or TILES[kernel][R_PAD, size])[many]


def parts(major: int | None, blocks: int, steps: int) -> int:
    """In how many parts K1 divides the columns, of so many steps, for so many blocks of rows.

    On a GPU of this major compute capability (None: not NVIDIA's).
    """
    return max(1, min(steps, FORWARD_PROGRAMS.get(major or 0, 1) // max(blocks, 1)))


def image(major: int | None, size: int, many: bool) -> str:
    """Whether x_v and its gradient are made "along" by K1 and K3, or "apart" in other launches."""
    return "along" if not many and ALONG.get(major or 0) == size else "apart"


def overlaps(major: int | None) -> bool:
    """Whether kernels start before the previous one ends, on a GPU of this compute capability."""
    return major in OVERLAPS


def alone(tile: Tile) -> Tile:
    """A tile whose programs never share a multiprocessor: threads may have all registers there are.

    So it is of K1 in parts, where the compiler spilled for the sake of a second program.
    """
    return replace(tile, registers=255)


def product_tile(major: int | None, size: int, many: bool, products: str) -> ProductTile:
    """The tile of P3's product on a GPU of this compute capability (None: not NVIDIA's).

    Under TF32 in one stage, as K3: a transposed operand of 4 bytes is pipelined element by element.
    """
    found = LARGE_PRODUCTS.get((major, size), PRODUCTS[size])[many]
    return replace(found, stages=1) if products == "tf32" else found


def extends(major: int | None, size: int, width: int, share: float, M: int) -> bool:
    """Whether P3 is the faster plan on a GPU of this compute capability (None: not NVIDIA's).

    For M rows, D and N of at most `width`, and this share of the segments adapted.
    """
    if major not in EXTENDS or size != 2 or share < LEAST_SHARE:
        return False
    widest, fewest = EXTENDS[major]
    return width <= widest and fewest <= M


def compiler_options(tile: Tile, backend: str, wait: str = "none") -> dict[str, int]:
    """What the compiler of a backend, "cuda" or "hip", is told of a tile, and of a launch.

    A kernel that waits for the previous one by itself (wait) is launched while that one runs.

    On AMD a warp has 64 threads, so half as many are as many threads. A product and a sum may be
    one instruction, as in all that was measured; unasked, Triton 3.9 warns that 3.10 will not.
    """
    common = {"num_stages": tile.stages, "enable_fp_fusion": True}
    if backend != "cuda":
        return {"num_warps": max(1, tile.warps // 2), **common}
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    early = {} if wait == "none" else {"launch_pdl": True}
    return {"num_warps": tile.warps, **common, **limit, **early}
