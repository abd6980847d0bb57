"""The search for tiles: its log, its choice, and how a tile is judged; never its times."""

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import tile_trials, tune
from bench.offline.gate_cases import RANKS
from bench.tile_trials import Cell, Job, Verdicts
from bench.tune import Log, Record, Tools
from fused_route.kernels import config
from fused_route.kernels.config import Tile

CELL = Cell("forward", 64, "bf16")
FEW, MANY = CELL.present
OTHER = replace(FEW, BM=64)
CELLS = [CELL, Cell("weights", 16, "bf16")]
CHIP = 90


class Fake:
    """Tools that count what they are asked; times by tile, 10 µs unless told."""

    def __init__(self) -> None:
        self.times: dict[Tile, float] = {}
        self.bad: dict[tuple[Tile, str], str] = {}  # (tile, dtypes): what the gates say
        self.wrong: set[Tile] = set()
        self.asked: Counter[tuple[str, Cell, Tile]] = Counter()

    def gate(self, jobs: Sequence[Job]) -> Verdicts:
        for job in jobs:
            self.asked[f"gate {job.dtypes}", job.cell, job.tile] += 1
            fault = self.bad.get((job.tile, job.dtypes))
            yield [] if fault is None else [fault]

    def agree(self, cell: Cell, tile: Tile) -> None:
        self.asked["agree", cell, tile] += 1
        if tile in self.wrong:
            raise AssertionError("dB: 3 times eager's error")

    def timer(self, cell: Cell, tile: Tile) -> tune.Times:
        assert self.asked["agree", cell, tile], "timed before its results were compared"
        assert self.asked["gate own", cell, tile], "timed before it was compiled"
        self.asked["time", cell, tile] += 1
        median = self.times.get(tile, 10.0)
        return {rows: [median, median, median] for rows in ("few", "many")}

    @property
    def tools(self) -> Tools:
        return Tools(self.gate, self.agree, self.timer)


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tune.jsonl"


def record(tile: Tile, few: float, many: float, spread: float = 0.0) -> Record:
    times = {"few": few, "many": many}
    ranges = {rows: [t, t * (1 - spread / 2), t * (1 + spread / 2)] for rows, t in times.items()}
    return Record(Job(CELL, tile, CHIP), [], ranges)


class TestCandidates:
    @pytest.mark.parametrize("kernel", config.TILES)
    def test_of_every_cell(self, kernel: str) -> None:
        for (R_PAD, size), own in config.TILES[kernel].items():
            cell = Cell(kernel, R_PAD, "bf16" if size == 2 else "fp32")
            assert cell.present == own
            found = tune.candidates(cell)
            assert 10 < len(found) == len(set(found)) <= 40
            assert found[: len(set(own))] == list(dict.fromkeys(own))
            for tile in found:
                for number in (tile.BM, tile.BN, tile.warps):
                    assert number & (number - 1) == 0
                assert tile.BM >= 16 <= tile.BN

    @pytest.mark.parametrize("cell", [Cell("forward", 128, "bf16"), Cell("weights", 64, "bf16")])
    def test_around_the_tiles_of_the_gpu_at_hand(
        self, cell: Cell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tile_trials, "major_of", lambda device: 9)
        own = config.TUNED[9][cell.kernel][cell.R_PAD, 2]
        found = tune.candidates(cell)
        assert tuple(found[:2]) == own and all(tile.spills == 0 for tile in found[2:])
        assert {tile.residual for tile in found} == {tile.residual for tile in own}

    def test_all_cells_take_turns(self) -> None:
        jobs = tune.jobs(CELLS, CHIP)
        assert [job.cell for job in jobs[:4]] == CELLS * 2
        assert len(jobs) == len(set(jobs)) == 80


class TestSweep:
    def test_a_second_run_skips_what_the_log_has(self, fake: Fake, path: Path) -> None:
        wanted = tune.jobs(CELLS, CHIP)
        calls = iter(range(6))
        tune.sweep(wanted, Log(path, "GPU"), fake.tools, lambda: next(calls) == 5)
        assert len(path.read_text().splitlines()) == 5
        tune.sweep(wanted, Log(path, "GPU"), fake.tools)
        assert len(path.read_text().splitlines()) == len(wanted)
        assert {(cell, tile) for _, cell, tile in fake.asked} == {job[:2] for job in wanted}
        assert all(n == 1 for (what, *_), n in fake.asked.items() if what == "time")
        before = fake.asked.total()
        tune.sweep(wanted, Log(path, "GPU"), fake.tools)
        assert fake.asked.total() == before

    def test_a_line_cut_off_by_a_kill_costs_that_line(self, fake: Fake, path: Path) -> None:
        wanted = tune.jobs([CELL], CHIP)[:3]
        tune.sweep(wanted, Log(path, "GPU"), fake.tools)
        path.write_bytes(path.read_bytes()[:-20])
        log = Log(path, "GPU")
        assert log.done() == set(wanted[:2])
        tune.sweep(wanted, log, fake.tools)
        assert Log(path, "GPU").done() == set(wanted)
        assert Log(path, "GPU").records == log.records

    def test_what_fails_is_not_timed_and_not_chosen(self, fake: Fake, path: Path) -> None:
        wanted = tune.jobs([CELL], CHIP)
        fake.times = {job.tile: 1.0 + i for i, job in enumerate(reversed(wanted))}
        fake.bad[wanted[-1].tile, "own"] = "2 spills"
        fake.wrong.add(wanted[-2].tile)
        log = Log(path, "GPU")
        tune.sweep(wanted, log, fake.tools)
        for job in wanted[-2:]:
            assert not fake.asked["time", CELL, job.tile]
        faults = {record.job.tile: record.faults for record in log.records}
        assert faults[wanted[-1].tile] == ["2 spills"]
        assert faults[wanted[-2].tile] == ["AssertionError: dB: 3 times eager's error"]
        assert tune.choose(log.records) == {CELL: (wanted[-3].tile, wanted[-3].tile)}

    def test_what_breaks_the_gpu_is_put_down_and_left_out(self, fake: Fake, path: Path) -> None:
        def breaks(cell: Cell, tile: Tile) -> tune.Times:
            raise RuntimeError("illegal memory access")

        wanted = tune.jobs([CELL], CHIP)[:2]
        with pytest.raises(RuntimeError, match="illegal"):
            tune.sweep(wanted, Log(path, "GPU"), replace(fake.tools, timer=breaks))
        log = Log(path, "GPU")
        assert log.done() == {wanted[0]} and "illegal" in log.records[0].faults[0]
        tune.sweep(wanted, log, fake.tools)
        assert not fake.asked["time", CELL, wanted[0].tile]

    def test_memory_that_is_short_is_not_the_tiles_fault(self, fake: Fake, path: Path) -> None:
        def full(cell: Cell, tile: Tile) -> tune.Times:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            tune.sweep(tune.jobs([CELL], CHIP), Log(path, "GPU"), replace(fake.tools, timer=full))
        assert not path.exists()


class TestLog:
    def test_other_devices_and_other_kernels_are_left_alone(self, fake: Fake, path: Path) -> None:
        tune.sweep(tune.jobs([CELL], CHIP)[:2], Log(path, "GPU"), fake.tools)
        assert Log(path, "other GPU").records == []
        line = json.loads(path.read_text().splitlines()[0])
        with path.open("a") as file:
            file.write(json.dumps(line | {"code": "older", "R_PAD": 128}) + "\n")
        assert len(Log(path, "GPU").records) == 2

    def test_without_a_device_the_file_must_name_one(self, fake: Fake, path: Path) -> None:
        wanted = tune.jobs([CELL], CHIP)[:1]
        with pytest.raises(ValueError, match=r"must hold records of one GPU .* got none"):
            Log(path, None)
        tune.sweep(wanted, Log(path, "GPU"), fake.tools)
        assert Log(path, None).device == "GPU"
        tune.sweep(wanted, Log(path, "other"), fake.tools)
        with pytest.raises(ValueError, match="got GPU, other"):
            Log(path, None)


class TestChoice:
    def test_the_fastest_for_few_and_for_many_rows(self) -> None:
        records = [record(FEW, 10.0, 99.0), record(MANY, 12.0, 80.0), record(OTHER, 8.0, 90.0)]
        assert tune.choose(records) == {CELL: (OTHER, MANY)}

    @pytest.mark.parametrize(("time", "spread"), [(9.8, 0.0), (9.0, 0.2), (10.0, 0.0)])
    def test_a_gain_within_the_spread_changes_nothing(self, time: float, spread: float) -> None:
        records = [record(FEW, 10.0, 10.0, spread), record(OTHER, time, 99.0)]
        assert tune.choose([*records, record(MANY, 99.0, 10.0)]) == {CELL: (FEW, MANY)}

    def test_a_fault_with_few_rows_says_nothing_of_many(self) -> None:
        """As of a tile for many rows that spills in the kernel of few, which does more."""
        records = [record(FEW, 10.0, 99.0), record(OTHER, 5.0, 95.0)]
        present = record(MANY, 4.0, 80.0)._replace(faults=["few: 90 rank1 d=768 bf16: 14 spills"])
        assert tune.choose([*records, present]) == {CELL: (OTHER, MANY)}
        gone = present._replace(faults=[*present.faults, "many: 90 rank1 d=768 bf16: 2 spills"])
        assert tune.choose([*records, gone]) == {CELL: (OTHER, OTHER)}

    def test_a_present_tile_is_replaced_only_if_measured_or_unsound(self) -> None:
        assert tune.choose([record(OTHER, 1.0, 1.0)]) == {CELL: (FEW, MANY)}
        unsound = Record(Job(CELL, FEW, CHIP), ["2 spills"], {})
        assert tune.choose([record(OTHER, 1.0, 1.0), unsound]) == {CELL: (OTHER, MANY)}
        assert tune.choose([unsound]) == {CELL: (FEW, MANY)}

    def test_a_winner_must_pass_with_all_dtypes_of_its_row(self, fake: Fake, path: Path) -> None:
        wanted = tune.jobs(CELLS, CHIP)
        first, second, third = [job.tile for job in wanted if job.cell == CELL][-3:]
        fake.times = {first: 5.0, second: 6.0, third: 7.0}
        fake.bad = {(first, "row"): "90: 2 spills"}
        log = Log(path, "GPU")
        tune.sweep(wanted, log, fake.tools)
        chosen, left = tune.confirmed(log, CELLS, fake.tools)
        assert left == 0 and chosen[CELL] == (second, second)
        assert fake.asked["gate row", CELL, first] == fake.asked["gate row", CELL, second] == 1
        assert not fake.asked["gate row", CELL, third]
        tune.confirmed(Log(path, "GPU"), CELLS, fake.tools)
        assert fake.asked["gate row", CELL, second] == 1

    def test_without_time_to_compile_it_no_tile_enters(self, fake: Fake, path: Path) -> None:
        log = Log(path, "GPU")
        for each in (record(FEW, 9.0, 99.0), record(MANY, 99.0, 9.0), record(OTHER, 5.0, 5.0)):
            log.add(each)
        assert tune.confirmed(log, [CELL], fake.tools, lambda: True) == ({CELL: (FEW, MANY)}, 1)
        assert tune.confirmed(log, [CELL], fake.tools) == ({CELL: (OTHER, OTHER)}, 0)


def test_rows_are_printed_as_they_stand_in_the_table() -> None:
    source = Path(config.__file__).read_text()
    kept = {
        cell: cell.present
        for kernel in config.TILES
        for numbers in ("bf16", "fp32")
        for cell in (Cell(kernel, R, numbers) for R in RANKS)
    }
    for line in tune.table(kept).splitlines():
        assert line in source.splitlines()
    assert len(tune.table(kept).splitlines()) == len(kept) + 2 * len(config.TILES)


class TestMain:
    def test_says_that_it_needs_a_gpu(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for out in (None, path):
            with pytest.raises(ValueError, match="tune needs a GPU and torch finds none"):
                tune.main(Namespace(out=out))

    def test_chooses_from_a_log_without_one(
        self,
        fake: Fake,
        path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        fake.times = {OTHER: 5.0}
        assert OTHER in tune.candidates(CELL)
        tune.sweep(tune.jobs([CELL], CHIP), Log(path, "GPU"), fake.tools)
        assert tune.main(Namespace(out=path, kernels=["forward"]), fake.tools) == 0
        printed = capsys.readouterr().out.splitlines()
        other = tune.written(OTHER)
        assert f"        (64, 2): ({other}, {other})," in printed
        gain = f"forward (64, 2) few: {tune.written(FEW)} 10.0 µs, {other} 5.0 µs"
        assert gain in printed
        assert printed[-1].startswith("next: these rows")

    def test_stops_when_the_time_is_over(
        self,
        fake: Fake,
        path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
        monkeypatch.setattr(tune, "chip_of", lambda: CHIP)
        monkeypatch.setattr(tile_trials, "major_of", lambda device: 9)
        some = Namespace(kernels=["weights"], ranks=[16], out=path, budget=1e-9)
        assert tune.main(some, fake.tools) == 0 and not path.exists()
        assert "40 tiles are left" in capsys.readouterr().out.splitlines()[-1]
        some.budget, some.out = None, None
        monkeypatch.setattr(tune, "FOLDER", path.parent)
        assert tune.main(some, fake.tools) == 0
        assert len((path.parent / "tune-nvidia-h100.jsonl").read_text().splitlines()) == 40

    def test_options_name_the_cells(self) -> None:
        parser = ArgumentParser()
        tune.add_arguments(parser)
        assert len(tune.named(parser.parse_args([]))) == len(config.TILES) * len(RANKS)
        given = [
            "--kernels",
            "weights",
            "forward",
            "--ranks",
            "64",
            "--numbers",
            "fp32",
            "--out",
            "x",
            "--budget",
            "3",
        ]
        arguments = parser.parse_args(given)
        assert tune.named(arguments) == [Cell("weights", 64, "fp32"), Cell("forward", 64, "fp32")]
        assert (arguments.out, arguments.budget) == (Path("x"), 3.0)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"kernels": ["gemm"]}, "kernels must be of .* got 'gemm'"),
            ({"ranks": [16, 48]}, "ranks must be of .* got 48"),
            ({"numbers": "int8"}, "numbers must be of .* got 'int8'"),
            ({"budget": 0.0}, "budget must be seconds greater than 0"),
        ],
    )
    def test_refuses(self, given: dict[str, object], message: str, path: Path) -> None:
        path.parent.mkdir()
        path.touch()
        with pytest.raises(ValueError, match=message):
            tune.main(Namespace(out=path, **given))


@pytest.mark.parametrize(("tile", "text"), [
    (Tile(1, 2, 3, 4), "Tile(1, 2, 3, 4)"), (Tile(1, 2, 3, 4, 128), "Tile(1, 2, 3, 4, 128)"),
    (Tile(1, 2, 3, 4, None, "multiplied"), 'Tile(1, 2, 3, 4, residual="multiplied")'),
    (Tile(1, 2, 3, 4, 9, spills=8), "Tile(1, 2, 3, 4, 9, spills=8)"),
])  # fmt: skip
def test_tiles_are_written_as_the_table_has_them(tile: Tile, text: str) -> None:
    assert tune.written(tile) == text
