"""Every kernel that the library launches, compiled for GPUs that are not here: `bench/gates.py`."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest

from bench.configured import configured
from bench.offline import gates
from bench.offline.gate_cases import (
    PRODUCT_CHIPS,
    Case,
    all_cases,
    name_of,
    p3_cases,
    product_cases,
    quick_cases,
    unique,
)
from bench.offline.gates import check, checked, row
from bench.offline.specialisations import Layer, launched_by
from fused_route.kernels import config

pytestmark = pytest.mark.compile

MOST_IN_MAKE_TEST = 220  # in 100 s


def assert_sound(cases: list[Case], cache: str | None = None) -> None:
    failed = [row(finding) for finding in checked(cases, cache=cache) if finding.faults]
    assert not failed, f"{len(failed)} of {len(cases)}:\n" + "\n".join(failed)


def test_a_selection_meets_every_demand() -> None:
    cases = quick_cases()
    assert len(cases) <= MOST_IN_MAKE_TEST
    assert_sound(cases)


def test_the_readme_says_how_many_the_whole_product_is() -> None:
    readme = (Path(config.__file__).parent / "README.md").read_text()
    assert f"the whole product of {len(all_cases()):,} cases" in readme


def test_the_selection_has_every_row_of_the_table() -> None:
    """By kernel, R and tile: what `quick_cases` compiles is all that the tables have."""
    cases = quick_cases()
    found = {
        (name_of(case), s.values.get("MIX") == "matrix", case.layer.R, s.tile)
        for case in cases
        if (s := case.specialisation)
    }
    names = {
        "project": "project", "vectors": "vector_gradient", "matrices": "matrix_gradient",
        "weights": "weight_partials", "forward": "routed_forward", "backward": "routed_backward",
    }  # fmt: skip
    for table in (config.TILES, *config.TUNED.values()):
        for kernel, rows in table.items():
            name, _, matrix = kernel.partition("_")
            for (R, _), tiles in rows.items():
                for tile in tiles:
                    assert (names[name], bool(matrix), R, tile) in found, (kernel, R, tile)
    for pair in (*config.PRODUCTS.values(), *config.LARGE_PRODUCTS.values()):
        for tile in pair:
            kinds = [
                case for case in cases
                if case.specialisation.tile == tile and case.layer.starts == "after"
            ]  # fmt: skip
            directions = {"seed_ptr" in given(case) for case in kinds}
            layouts = {case.layer.by_columns for case in kinds}
            assert len(kinds) == 4 and directions == layouts == {False, True}, tile


def given(case: Case) -> set[str]:
    """The pointers of a case that are not None."""
    return {name for name, kind in case.specialisation.arguments if kind is not None}


def test_the_product_fits_every_gpu_and_the_large_tile_is_for_9x_alone() -> None:
    """The large one is chosen for 9.x alone; on sm_86 it does not fit."""
    chips = {case.arch for case in product_cases("bf16", PRODUCT_CHIPS["bf16"], 256)}
    assert chips == {80, 86, 89, 90, 100, 120, "gfx942"}
    large = set(config.LARGE_PRODUCTS[9, 2]) - set(config.PRODUCTS[2])
    for case in p3_cases():
        assert (case.specialisation.tile in large) <= (case.arch == 90)
    case = next(c for c in quick_cases() if c.specialisation.tile in large)
    assert any("does not fit" in fault for fault in check(case._replace(arch=86)).faults)


def test_the_whole_product_leaves_nothing_in_the_cache_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took 7 GB there."""
    cases = [case for case in quick_cases() if name_of(case) == "add_partials"][:1]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    with (
        mock.patch.object(gates, "all_cases", lambda: cases),
        mock.patch.object(gates, "quick_cases", lambda: cases),
    ):
        assert gates.main(is_quick=False) == 0
        assert not [*tmp_path.iterdir()]
        assert gates.main(is_quick=True) == 0
        assert (tmp_path / ".triton").is_dir()


@pytest.mark.slow
def test_everything_meets_every_demand() -> None:
    with TemporaryDirectory() as cache:
        assert_sound(all_cases(), cache)


@pytest.mark.parametrize(("layer", "kernel", "most"), [
    (Layer("adapter", "rank1", "owned", 128, 768, "bf16", "few"), "routed_forward", (0, 3)),
    (Layer("adapter", "rank1", "along", 128, 768, "bf16", "few"), "routed_forward", (18, 21)),
    (Layer("adapter", "rank1", "along", 128, 768, "bf16", "few"), "routed_backward", (0, 0)),
    (Layer("adapter", "rank1", "owned", 128, 768, "amp", "few"), "routed_forward", (48, 55)),
    (Layer("adapter", "rank1", "owned", 128, 768, "bf16", "many"), "routed_backward", (450, 450)),
])  # fmt: skip
def test_how_much_may_spill(layer: Layer, kernel: str, most: tuple[int, int]) -> None:
    later: dict[tuple[str, int | str, bool], int]
    later = {("routed_forward", 90, False): 3, ("routed_forward", 90, True): 7}
    (case,) = [case for case in unique([layer], (90,)) if name_of(case) == kernel]
    assert (gates.most_spills(case, {}), gates.most_spills(case, later)) == most


def faults_with(kernel: str, tile: config.Tile, layer: Layer, name: str) -> list[str]:
    """What is wrong with one kernel of a layer when it gets another tile."""
    table = {**config.TILES, kernel: dict.fromkeys(config.TILES[kernel], (tile, tile))}
    with configured(TILES=table):
        cases = [Case(layer, s, 80) for s in launched_by(layer) if s.kernel.endswith(f":{name}")]
    return check(cases[0]).faults


BAD: dict[str, tuple[str, config.Tile, Layer, str, str]] = {
    "spills": (
        "backward", config.Tile(128, 64, 4, 2),
        Layer("adapter", "rank1", "operand", 128, 768, "bf16", "many"), "routed_backward", "spills",
    ),
    "shared memory": (
        "weights", config.Tile(128, 256, 8, 4),
        Layer("adapter", "scale", "owned", 64, 768, "fp32", "many"), "weight_partials", "fit",
    ),
    "narrow loads": (
        "forward", config.Tile(16, 16, 8, 2),
        Layer("adapter", "scale", "owned", 16, 768, "bf16", "many"), "routed_forward", "x_ptr read",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("allowed", "passes"), [(0, False), (10, False), (5000, True)])
def test_a_row_says_how_much_it_may_spill(allowed: int, passes: bool) -> None:
    kernel, tile, layer, name, _ = BAD["spills"]
    found = faults_with(kernel, replace(tile, spills=allowed), layer, name)
    assert (not any("spills" in text for text in found)) == passes, found


@pytest.mark.parametrize("what", BAD)
def test_the_gate_sees(what: str) -> None:
    kernel, tile, layer, name, fault = BAD[what]
    found: Any = faults_with(kernel, tile, layer, name)
    assert any(fault in text for text in found), found
