"""The launches of a layer: kernels with their constants and tiles, grids, and argument order."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .dropout import threshold
from .fusion import Fusion
from .layout import layout_of
from .sizes import Sizes, Sums, Wanted, cdiv

Given = tuple[Tensor | None, ...]

# Plans keep what follows from the numbers of rows and samples; emptied when full.
MOST_SIZES = 1024


@cache
def kernels() -> Any:
    """The kernels by name, imported when first needed: `import fused_route` needs no Triton."""
    from .kernels import backward, config, extended, forward, launch, operands, weights

    return SimpleNamespace(
        project=forward.project,
        forward=forward.routed_forward,
        bottleneck=forward.routed_bottleneck,
        extended=extended.extended_product,
        backward=backward.routed_backward,
        vectors=operands.vector_gradient,
        matrices=operands.matrix_gradient,
        weights=weights.weight_partials,
        add=weights.add_partials,
        config=config,
        Launch=launch.Launch,
    )


def is_many(M: int) -> bool:
    """Whether M rows fill a GPU with large blocks."""
    return bool(kernels().config.MANY_ROWS <= M)


@cache
def major_of(device: torch.device) -> int | None:
    """Major compute capability of an NVIDIA GPU; None for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0]


def chosen_plan(f: Fusion, A: Tensor, N: int, M: int) -> str:
    """What the plan "auto" is for M rows and segments of N columns."""
    width, share = max(A.shape[1], N), len(f.segments) / f.of
    extends = kernels().config.extends
    is_faster = extends(major_of(A.device), A.element_size(), width, share, M)
    return "p3" if f.base == "frozen" and is_faster else "p1"


def _tiles(mix: str, R_PAD: int, size: int, many: bool, major: int | None) -> dict[str, Any]:
    """The tile of each kernel but K0."""
    tile = kernels().config.tile
    suffix = "_matrix" if mix == "matrix" else ""
    found = {
        name: tile(name, R_PAD, size, many, major) for name in ("vectors", "matrices", "weights")
    }
    for name in ("forward", "backward"):
        found[name] = tile(name + suffix, R_PAD, size, many, major)
    found["bottleneck"] = found["forward"]
    return found


class Plan:
    """The kernels of one Fusion at one set of widths and dtypes, for few or for many rows.

    Args:
        f: what is the same for all calls.
        D, N, R: input width, columns of an adapted segment, bottleneck columns.
        dtype, x_dtype: of A and B, and of x.
        many: whether there are enough rows to fill a GPU with large blocks.
        major: compute capability of the GPU; None: tiles that fit any.
    """

    def __init__(
        self,
        f: Fusion,
        D: int,
        N: int,
        R: int,
        dtype: torch.dtype,
        x_dtype: torch.dtype,
        many: bool,
        major: int | None,
    ) -> None:
        self.f, self.D, self.N, self.R, self.x_dtype, self.major = f, D, N, R, x_dtype, major
        self.g = len(f.segments)
        R_PAD = kernels().config.padded(R)
        self.tiles = _tiles(f.mix, R_PAD, dtype.itemsize, many, major)
        self.product_tile = kernels().config.product_tile(major, dtype.itemsize, many, f.products)
        along = kernels().config.image(major, dtype.itemsize, many) == "along"
        self.is_along = f.image == "owned" and along
        # How a kernel waits for the one launched before it: whatever that is, or late, which takes
        # that one to be the plan's own, K0 before K1 and `vectors` before K3.
        self.wait = "first" if kernels().config.overlaps(major) else "none"
        self.late = "none" if self.wait == "none" else "late"
        bottleneck = {"D": D, "R": R, "R_PAD": R_PAD}
        self.to_segments = {"D": D, "N": N, "LDY": f.of * N, "R": R, "R_PAD": R_PAD}
        mix = {"MIX": f.mix, "U": f.u, "W": f.w, "FIRST": f.first, "G": f.groups}
        mix |= {"ACTIVATION": f.activation}
        # By the rows that are projected: x_r has one a sample, x one a token.
        self.projects = {
            (stream, rows_many): self._launch(
                "project",
                {**bottleneck, "STREAM": i},
                kernels().config.tile("project", R_PAD, dtype.itemsize, rows_many, major),
            )
            for i, stream in enumerate(("x_h", "x_r"))
            for rows_many in (False, True)
        }
        self._launch_routed({**self.to_segments, "SEGMENTS": f.segments, **mix}, x_dtype == dtype)
        wait = self.late if f.image == "owned" else self.wait  # P3 has K0 always
        self.bottleneck = self._launch("bottleneck", {**bottleneck, **mix}, wait=wait)
        row_block = {"ROW_BLOCK": self.tiles["backward"].BM}
        by_pairs = {**bottleneck, **row_block}
        self.vectors = self._launch("vectors", {**by_pairs, "PAIRS": 1})
        at_once = kernels().config.SUMMED // R_PAD
        self.vectors_of_one = self._launch("vectors", {**by_pairs, "PAIRS": at_once})
        matrices = {"G": f.groups, "R": R, "FIRST": f.first}
        self.matrices = self._launch("matrices", matrices)
        self.matrices_in_splits = self._launch("matrices", matrices)  # writes fp32 in any dtype
        self.dropout = (threshold(f.p), 1.0 / (1.0 - f.p))
        self._products: dict[tuple[str, str], Any] = {}
        self._weight_kernels: dict[tuple[Wanted, bool], tuple[Any, Any, tuple[int, ...]]] = {}
        self._sizes: dict[tuple[int, int, int], Sizes] = {}
        self._sums: dict[tuple[object, ...], Sums] = {}

    def _launch_routed(self, constants: dict[str, Any], same_dtype: bool) -> None:
        """K1, whole and with its columns in parts, and K2.

        A residual is multiplied in 16 bits alone, where that is exact, and without dropout: an
        infinity that is dropped from x must not reach other columns.
        """
        exact = same_dtype and self.f.base == "residual" and self.f.p == 0.0
        exact = exact and self.x_dtype.itemsize == 2
        base = {
            name: {"BASE": self.tiles[name].residual if exact else "added"}
            for name in ("forward", "backward")
        }
        behind_K0 = self.f.image == "owned" and not self.is_along
        wait = self.late if behind_K0 else self.wait
        forward = {**constants, **base["forward"]}
        whole, parts = {**forward, "COLUMNS": "whole"}, {**forward, "COLUMNS": "parts"}
        self.forward = self._launch("forward", whole, wait=wait)
        alone = kernels().config.alone(self.tiles["forward"])
        self.forward_in_parts = self._launch("forward", parts, alone, wait)
        self.backward = self._launch("backward", {**constants, **base["backward"]})

    def _launch(
        self, name: str, constants: dict[str, Any], tile: Any = None, wait: str | None = None
    ) -> Any:
        tile = tile or self.tiles[name]
        chosen = {"PRECISION": self.f.products, "BM": tile.BM, "BN": tile.BN}
        constants = {**constants, **chosen, "WAIT": wait or self.wait}
        return kernels().Launch(getattr(kernels(), name), tile, constants)

    def _extended(self, direction: str, layout: str) -> Any:
        """P3's product, "forward" or "backward", with a weight (of·N, D) in this layout."""
        key = (direction, layout)
        if key not in self._products:
            self._products[key] = self._make_product(*key)
        return self._products[key]

    def _make_product(self, direction: str, layout: str) -> Any:
        of, D, N, R, tile = self.f.of, self.D, self.N, self.R, self.product_tile
        by_row, by_column = (D, 1) if layout == "rows" else (1, of * N)
        if direction == "backward":
            widths = {"K": of * N, "N": D, "OF": 1, "SEGMENTS": (0,)}
            rank, strides = R, {"SWK": by_row, "SWN": by_column, "SFC": D, "SFN": 1}
        else:
            widths = {"K": D, "N": N, "OF": of, "SEGMENTS": self.f.segments}
            rank = R // self.g
            strides = {"SWK": by_column, "SWN": by_row, "SFC": 1, "SFN": rank}
        step = min(kernels().config.padded(rank), tile.BK)
        constants = {**widths, "RANK": rank, "LDN": R, "RANK_STEP": step, **strides}
        constants |= {"PRECISION": self.f.products, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
        constants["WAIT"] = self.wait
        return kernels().Launch(kernels().extended, tile, constants)

    def extended_product(
        self,
        direction: str,
        wide: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        narrow: Tensor,
        factor: Tensor,
        out: Tensor,
        seed: Tensor | None,
        scale: float,
    ) -> None:
        """P3's product, "forward" y = x Wᵀ + bias + s · z Bᵀ, or
        "backward" dx = dy W + keep ∘ (dx_t A) / (1 − p): out of wide, narrow and factor.
        """
        layout = layout_of(weight)
        assert layout is not None
        launch, tile, M = self._extended(direction, layout), self.product_tile, narrow.shape[0]
        columns, of = (self.D, 1) if direction == "backward" else (self.N, self.f.of)
        grid = (cdiv(M, tile.BM) * of * cdiv(columns, tile.BN), 1, 1)
        tensors = (wide, weight, bias, narrow, factor, out, seed)
        launch((bias is None, seed is None), grid, tensors, (M, self.dropout[0], scale))

    def sizes(self, M: int, S: int, longest: int) -> Sizes:
        """What follows from M rows of S samples; longest is 0 where they are not packed."""
        found = self._sizes.get((M, S, longest))
        if found is not None:
            return found
        if len(self._sizes) >= MOST_SIZES:
            self._sizes.clear()
        T = longest or M // max(S, 1)
        grids = []
        for name in ("forward", "backward"):
            BM = self.tiles[name].BM
            by_sample = (S, cdiv(T, BM), 1)  # no block holds rows of two samples
            grids.append(by_sample if self.f.mix == "matrix" else (cdiv(M, BM), 1, 1))
        pairs = cdiv(cdiv(M, self.tiles["backward"].BM) + S, 4) * 4  # the second starts aligned
        blocks, of_sample, _ = grids[0]
        steps = cdiv(self.N, self.tiles["forward"].BN)
        parts = kernels().config.parts(self.major, blocks * of_sample, steps)
        forward_grid, rows = (blocks, of_sample, parts), (M, T, *self.dropout)
        config = kernels().config
        is_long = T >= config.LONG_VECTORS * self.tiles["backward"].BM
        is_long = is_long and S <= config.WEIGHT_PROGRAMS
        splits = self._splits(S, T)
        made = Sizes(M, S, T, pairs, is_long, splits, forward_grid, grids[0], grids[1], rows)
        self._sizes[M, S, longest] = made
        return made

    def routed_forward(
        self, sizes: Sizes, stored: tuple[bool, bool], tensors: Given, s: float
    ) -> None:
        """K1, its columns in parts where there are few rows; stored: whether x_t and x_v are."""
        grid = sizes.forward_grid
        launch = self.forward if grid[2] == 1 else self.forward_in_parts
        launch(stored, grid, tensors, (*sizes.rows, s))

    def project(
        self,
        x: Tensor,
        A: Tensor,
        b_A: Tensor | None,
        seed: Tensor | None,
        out: Tensor,
        stream: str,
    ) -> None:
        """K0: out (M, R) = x̂ Aᵀ + b_A."""
        M = out.shape[0]
        launch = self.projects[stream, is_many(M)]
        grid = (cdiv(M, launch.tile.BM), 1, 1)
        launch(None, grid, (x, A, b_A, seed, out), (M, *self.dropout))

    def vector_gradients(
        self,
        sizes: Sizes,
        partial: Tensor,
        out: Tensor,
        A: Tensor,
        dx_r: Tensor | None,
        seed: Tensor | None,
        offsets: Tensor | None,
    ) -> None:
        """out (·, S, R) from K2's partial sums (·, pairs, R); dx_r = D ∘ (out A)."""
        S = sizes.S
        blocks = S if sizes.is_long else cdiv(S, self.tiles["vectors"].BM)
        launch = self.vectors_of_one if sizes.is_long else self.vectors
        tensors, numbers = (partial, out, A, dx_r, seed, offsets), (S, sizes.T, sizes.pairs)
        launch(dx_r is None, (blocks, partial.shape[0], 1), tensors, (*numbers, *self.dropout))

    def matrix_gradients(
        self,
        sizes: Sizes,
        x_t: Tensor,
        dz: Tensor,
        dK: Tensor,
        row_sample: Tensor | None,
        offsets: Tensor | None,
    ) -> None:
        """dK (S, G, C, C) from x_t and dz (M, R)."""
        T, splits, BM = sizes.T, sizes.splits, self.tiles["matrices"].BM
        grid = (sizes.S * splits, self.f.groups, self._matrix_tiles)
        numbers = (T, cdiv(cdiv(T, splits), BM) * BM, splits)
        if splits == 1:
            self.matrices(None, grid, (x_t, dz, dK, row_sample, offsets), numbers)
        else:
            partial = dK.new_empty(splits, *dK.shape, dtype=torch.float32)
            launch = self.matrices_in_splits
            launch(None, grid, (x_t, dz, partial, row_sample, offsets), numbers)
            dK.copy_(partial.sum(0))

    @property
    def _matrix_tiles(self) -> int:
        """Programs of K's gradient for each sample and group."""
        return cdiv(self.R // self.f.groups, self.tiles["matrices"].BN) ** 2

    def _splits(self, S: int, T: int) -> int:
        """In how many parts K's gradient takes a sample's rows: as K3, of four steps at least."""
        config, step = kernels().config, self.tiles["matrices"].BM
        if step * config.LONG_MATRICES > T:
            return 1
        programs = max(S, 1) * self.f.groups * self._matrix_tiles
        return max(1, min(config.WEIGHT_PROGRAMS // programs, cdiv(T, 4 * step)))

    def sums(self, sizes: Sizes, wanted: Wanted, has_x_r: bool) -> Sums:
        """K3 and K4 for these rows and gradients."""
        key = (sizes.M, sizes.S, wanted, has_x_r)
        found = self._sums.get(key)
        if found is not None:
            return found
        if len(self._sums) >= MOST_SIZES:
            self._sums.clear()
        config, tile = kernels().config, self.tiles["weights"]
        partials, add, lengths = self._weights(wanted, has_x_r and not self.is_along)
        up = wanted.B or wanted.b_B
        A_blocks = cdiv(self.D, tile.BN) if wanted.A else int(wanted.b_A)
        blocks = A_blocks + (self.g * cdiv(self.N, tile.BN) if up else 0)
        rows = max(sizes.M, sizes.S if has_x_r else 0)  # more samples: most are without a row
        splits = max(1, min(config.WEIGHT_PROGRAMS // blocks, cdiv(rows, 4 * tile.BM)))
        rows_per_split = cdiv(cdiv(rows, splits), tile.BM) * tile.BM
        splits = cdiv(sizes.M, rows_per_split)
        visual = cdiv(sizes.S, rows_per_split) if has_x_r else 0
        made = Sums(
            (splits + visual) * (lengths[0] + lengths[2]) + splits * (lengths[1] + lengths[3]),
            partials,
            (blocks, splits + visual, 1),
            (sizes.M, sizes.S, sizes.T, rows_per_split, splits, visual, *self.dropout),
            add,
            (sum(cdiv(length, config.ADD.BN) for length in lengths), 1, 1),
            (splits, visual),
        )
        self._sums[key] = made
        return made

    def _weights(self, wanted: Wanted, behind_dx_v: bool) -> tuple[Any, Any, tuple[int, ...]]:
        """K3 and K4 for the wanted gradients, and the lengths of dA, dB, db_A and db_B.

        behind_dx_v: whether K3 follows the kernel that made dx_v, and is given that.
        """
        key = (wanted, behind_dx_v)
        if key not in self._weight_kernels:
            self._weight_kernels[key] = self._make_weights(*key)
        return self._weight_kernels[key]

    def _make_weights(self, wanted: Wanted, behind_dx_v: bool) -> tuple[Any, Any, tuple[int, ...]]:
        config = kernels().config
        lengths = {
            "A_SIZE": self.R * self.D if wanted.A else 0,
            "B_SIZE": self.N * self.R if wanted.B else 0,
            "b_A_SIZE": self.R if wanted.b_A else 0,
            "b_B_SIZE": self.g * self.N if wanted.b_B else 0,
        }
        rank = {"RANK_PAD": config.padded(self.R // self.g), "SEGMENTS": self.f.segments}
        want = {f"WANT_{name}": getattr(wanted, name) for name in ("A", "b_A", "B", "b_B")}
        # Where K3 does not need it, the same for few and many rows: they may share the kernel.
        row_block = {"ROW_BLOCK": self.tiles["backward"].BM if self.is_along else 1}
        constants = {**self.to_segments, **rank, **row_block, **want}
        wait = self.late if behind_dx_v else self.wait
        partials = self._launch("weights", constants, wait=wait)
        add = {**lengths, "BLOCK": config.ADD.BN, "WAIT": self.wait}
        add = kernels().Launch(kernels().add, config.ADD, add)
        return partials, add, tuple(lengths.values())

    def weight_gradients(self, sums: Sums, tensors: Given, outputs: Given, s: float) -> None:
        """K3 with (x, dx_t, x_r, dx_v, its partial sums, A, dx_r, dy, z, seed, offsets, workspace),
        then K4 to (dA, db_A, dB, db_B).
        """
        absent = (tensors[3] is None, tensors[4] is None, tensors[6] is None)
        sums.partials(absent, sums.partials_grid, tensors, sums.partials_numbers)
        sums.add(None, sums.add_grid, (tensors[-1], *outputs), (*sums.add_numbers, s))
