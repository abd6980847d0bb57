"""One tile on trial: what is compiled of it, run with it, and timed."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from bench import tile_trials
from bench.offline.gate_cases import HEAVIEST, layers_of, unique
from bench.tile_trials import Cell, Job
from fused_route.kernels import config
from fused_route.kernels.config import Tile

CELL = Cell("forward", 64, "bf16")
OTHER = replace(CELL.present[0], BM=64)


@pytest.mark.parametrize(("capability", "chip"), [(80, 80), (87, 86), (90, 90), (121, 120)])
def test_an_unknown_gpu_is_held_to_the_one_below(capability: int, chip: int) -> None:
    assert tile_trials.nearest_chip(capability) == chip
    with pytest.raises(ValueError, match="sm_75"):
        tile_trials.nearest_chip(75)


@pytest.mark.parametrize("kernel", config.TILES)
def test_the_gates_compile_what_they_do_for_the_table(kernel: str) -> None:
    cell = Cell(kernel, 64, "bf16")
    few = cell.present[0]
    ours = {case[1:] for case in tile_trials.cases(Job(cell, few, 80, "row"), "few")}
    x_t = "recomputed" if kernel == "project" else "saved"
    theirs = unique(layers_of(HEAVIEST, 768, "bf16", x_t=x_t), (80,))
    same = {
        case[1:]
        for case in theirs
        if case.layer.R == 64
        and case.layer.rows == "few"
        and case.specialisation.tile == few  # not that of a chip with a row of its own
        and tile_trials.key_of(case.specialisation.function.__name__, case.specialisation.values)
        == kernel
    }
    assert same and same <= ours


def test_another_tile_holds_only_inside() -> None:
    before = config.TILES
    with tile_trials.overridden(CELL, OTHER):
        assert config.tile("forward", 64, 2, True) == OTHER
        assert config.tile("forward", 64, 4, True) != OTHER
        assert config.tile("forward", 128, 2, True) != OTHER
    assert config.TILES is before


def test_the_sums_of_the_image_are_launched_where_they_are_timed() -> None:
    with mock.patch.object(config, "ALONG", {9: 2}):
        with tile_trials.overridden(CELL, OTHER):
            assert config.image(9, 2, False) == "along"
        with tile_trials.overridden(Cell("vectors", 64, "bf16"), OTHER):
            assert config.image(9, 2, False) == "apart"


def test_a_kernel_that_is_timed_starts_when_the_one_before_has_ended() -> None:
    with mock.patch.object(config, "OVERLAPS", frozenset({9})):
        assert config.overlaps(9)
        with tile_trials.overridden(CELL, OTHER):
            assert not config.overlaps(9)


def test_copies_share_what_the_arguments_share() -> None:
    x, y = torch.zeros(64), torch.zeros(8)
    made = tile_trials.copies((None, (1, 1, 1), (x, None, x, y), (3,)), cached=1000)
    assert len(made) == -(-2 * 1000 // (x.nbytes + y.nbytes))
    for absent, grid, (one, none, same, other), numbers in made:
        assert (absent, grid, none, numbers) == (None, (1, 1, 1), None, (3,))
        assert one is same and one.data_ptr() != x.data_ptr() and other is not one
    assert len(tile_trials.copies((None, (1,), (y,), ()), cached=2**30)) == 64


def test_a_time_is_a_replay_divided_by_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU: a graph of 4 launches that takes 2 ms takes 500 µs a launch."""
    launched = []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 2.0)
    for name, value in {
        "get_device_properties": lambda: SimpleNamespace(L2_cache_size=1024),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: nullcontext(),
        "Event": lambda enable_timing: event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def launch(*given: Any) -> None:
        launched.append(given)

    given = (None, (1, 1, 1), (torch.zeros(128),), ())
    assert tile_trials.replayed(launch, given) == [500.0] * 3  # type: ignore[arg-type]
    assert len(launched) == 4 and len({g[2][0].data_ptr() for g in launched}) == 4


@pytest.mark.compile
def test_the_gate_compiles() -> None:
    cell = Cell("vectors", 16, "bf16")
    assert tile_trials.first_faults(Job(cell, cell.present[0], 90)) == []
    faults = tile_trials.first_faults(Job(CELL, Tile(16, 16, 8, 2), 80))
    for rows in ("few", "many"):
        assert any(f"{rows}: 80 rank1 d=768 bf16: x_ptr read" in fault for fault in faults)
    assert tile_trials.faulty_rows(faults) == {"few", "many"}


@pytest.mark.compile
def test_the_tables_own_tiles_are_sound_for_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On compute capability 9, where the two of R = 128 run kernels that do not do the same."""
    monkeypatch.setattr(tile_trials, "major_of", lambda device: 9)
    cell = Cell("forward", 128, "bf16")
    for rows, tile in zip(tile_trials.ROWS, cell.present, strict=True):
        assert rows not in tile_trials.faulty_rows(tile_trials.first_faults(Job(cell, tile, 90)))


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", config.TILES)
def test_results_and_launches_are_of_the_tile(kernel: str) -> None:
    cell, tile = Cell(kernel, 16, "fp32"), Tile(16, 16, 4, 1)
    assert tile not in cell.present
    tile_trials.agree(cell, tile, (2, 9, 32), "cpu")
    launch, (_, grid, tensors, _) = tile_trials.captured(cell, tile, 2, 9, 32, "cpu")
    assert launch.tile == tile and 0 not in grid and tensors[0] is not None
