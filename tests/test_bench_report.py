"""Report and figures of result files: known numbers in, exact cells out."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from measured_records import (
    CEILINGS,
    ENVIRONMENT,
    LARGE,
    SMALL,
    STEP,
    Loader,
    Said,
    failed,
    record,
    write,
)
from PIL import Image

from bench import figures, formula, report
from bench.cases import AROUND, SCALING, Case, op
from bench.results import Record, Results
from bench.runs import Run, Time, load


@pytest.fixture
def run(tmp_path: Path) -> Loader:
    """Records as a run that was read back."""
    return lambda *records, **more: load(write(tmp_path / "a.json", list(records), **more))


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 µs for all operations at `CEILINGS`, and 2 GB moved by fused."""
    moved = {"fused": {"both": 2e9}}
    monkeypatch.setattr(formula, "moved", lambda case, provider: moved.get(provider))
    monkeypatch.setattr(formula, "floor_seconds", lambda *a: 7.5e7 / a[2] + 2e10 / a[3])


class TestProcesses:
    def test_median_of_medians_and_spread(self, run: Loader) -> None:
        found = run(*(record(SMALL, "fused", us, i) for i, us in enumerate((100, 90, 130))))
        time = found.time(SMALL, "fused", "graph", "both")
        assert time == Time(100, 90, 130, 99, 101, 3)
        assert time.spread == 0.4 and time.cell() == "100 ±40%" and time.cell(1000) == "0.100 ±40%"
        one = run(record(SMALL, "fused", 100)).time(SMALL, "fused", "graph", "both")
        assert one and one.spread is None and one.cell() == "100"

    def test_the_worst_gate_and_every_error_stay(self, run: Loader) -> None:
        good = [record(SMALL, "fused", 100, i, gate=gate) for i, gate in enumerate((0.5, 1.5))]
        found = run(*good, failed(SMALL, "fused", "lost")).at(SMALL, "fused")
        assert found and found.gate == 1.5 and found.errors == {"lost": 1} and found.processes == 3
        assert found.times["graph", "both"].processes == 2

    def test_silence_is_an_error(self, run: Loader) -> None:
        found = run(record(SMALL, "fused", 1, times={})).at(SMALL, "fused")
        assert found and list(found.errors) == ["no times, and no error"]


@pytest.mark.usefixtures("floor")
class TestTables:
    def three(self, run: Loader, **more: Any) -> Run:
        """Reference and fused of two cases, fused in two processes, a third that fails."""
        return run(
            record(SMALL, "reference", 240, bytes={"saved": 4e6, "peak": 8e6}, launches=[6, 15]),
            record(SMALL, "fused", 99, 0, bytes={"saved": 1e6, "moved": 2.5e9}, kernels=6),
            record(SMALL, "fused", 101, 1, bytes={"saved": 1e6, "moved": 2.5e9}, kernels=6),
            failed(SMALL, "compile", "boom | <bang>\nat length"),
            record(LARGE, "reference", 5_000), **more,
        )  # fmt: skip

    def test_time(self, run: Loader) -> None:
        found = self.three(run)
        cases, names = found.cases("op"), ["reference", "fused", "compile"]
        assert found.providers(cases) == names
        assert report.time_table(found, cases, "both", names) == [
            ["case", "timing", *names, "floor (modelled)", "fused: of floor"],
            ["mul M2000", "graph", "240", "100 ±2.0%", "error", "50.0", "50%"],
            ["mul M32768", "graph", "5,000", "–", "–", "50.0", "–"],
        ]
        halves = report.time_table(found, cases, "forward", names)
        assert halves[1] == ["mul M2000", "graph", "120", "50.0 ±2.0%", "error", "50.0", "100%"]

    @pytest.mark.parametrize("ceilings", [{}, {**CEILINGS, "dtype": "float32"}])
    def test_no_floor_without_the_dtype_s_ceilings(self, run: Loader, ceilings: Any) -> None:
        found = self.three(run, ceilings=ceilings)
        heads = report.time_table(found, found.cases("op"), "both", ["fused"])[0]
        assert heads == ["case", "timing", "fused"] and "floor" in report.unmeasured(found)

    def test_the_reference_stands_against_the_floor_without_fused(self, run: Loader) -> None:
        found = run(record(SMALL, "reference", 200))
        table = report.time_table(found, [SMALL], "both", ["reference"])
        assert table[0][-1] == "reference: of floor" and table[1][-1] == "25%"

    def test_who_has_no_record_has_no_column(self, tmp_path: Path, capsys: Said) -> None:
        """A provider that some case has keeps its column of that host alone."""
        found = [record(SMALL, name, 100) for name in ("reference", "fused")]
        found += [record(STEP, name, 100) for name in ("reference", "frozen")]
        missing = {SMALL.name: ["peft", "frozen"], STEP.name: ["peft", "compile"]}
        path = tmp_path / "a.json"
        Results(ENVIRONMENT, CEILINGS, found, missing).write(path)
        report.main([path])
        page, said = (tmp_path / "a" / "report.md").read_text(), capsys.readouterr().out
        line = "Left out, without a record, 2 providers: peft, compile."
        assert line in page and line in said
        read = load(path)
        assert read.providers([SMALL]) == ["reference", "fused"]
        assert [row[1] for row in report.model_table(read, [STEP], "graph")[1:]] == [
            "reference", "frozen",
        ]  # fmt: skip
        assert f"| {SMALL.name} | peft, frozen |" in page

    def test_speedup(self, run: Loader) -> None:
        found = self.three(run)
        table = report.speedup_table(found, found.cases("op"), "both", ["fused", "compile"])
        rows = [["mul M2000", "graph", "2.40×", "–"], ["mul M32768", "graph", "–", "–"]]
        assert table == [["case", "timing", "fused", "compile"], *rows]

    def test_differences_that_are_not_positive_have_no_ratio(self, run: Loader) -> None:
        passes = {"graph": {"backward": [-1.0, -2.0, 1.0], "both": [5.0, 5.0, 5.0]}}
        found = run(record(SMALL, "reference", 1, times=passes))
        table = report.time_table(found, [SMALL], "backward", ["reference"])
        assert table[1][2:] == ["-1.00", "50.0", "–"]

    def test_memory(self, run: Loader) -> None:
        assert report.memory_table(self.three(run), [SMALL], ["reference", "fused"]) == [
            ["case", "", "reference", "fused"],
            ["mul", "peak MB", "8.00", "–"],
            ["", "saved MB", "4.00", "1.00"],
            ["", "launches, f + b", "6 + 15", "–"],
            ["", "device kernels", "–", "6"],
            ["", "GB moved", "–", "2.50"],
            ["", "GB moved (modelled)", "–", "2.00"],
        ]

    def test_steps(self, run: Loader) -> None:
        found = run(
            record(STEP, "reference", 20_000), record(STEP, "fused", 10_000, bytes={"peak": 3e9}),
            failed(STEP, "compile", "boom"), record(STEP, "frozen", 8_000),
        )  # fmt: skip
        assert report.model_table(found, [STEP], "graph")[1:] == [
            ["gpt2 qkv mul", "reference", "20.0", "100,000", "1.00×", "2.50×", "–", "–"],
            ["", "fused", "10.0", "200,000", "2.00×", "1.25×", "3,000", "–"],
            ["", "compile", "error", "–", "–", "–", "–", "–"],
            ["", "frozen", "8.00", "250,000", "2.50×", "1.00×", "–", "–"],
        ]

    def test_cost_of_routes(self, run: Loader) -> None:
        def of(route: str, case: Case, us: float, provider: str = "fused") -> Record:
            return record(replace(case, route=route), provider, us)

        found = run(
            of("none", SMALL, 100), of("mul", SMALL, 110), of("gram", SMALL, 150),
            of("none", LARGE, 1000), of("mul", LARGE, 1300), of("mul", SMALL, 500, "reference"),
            of("none", SMALL, 50, "frozen"), of("mul", SMALL, 50, "frozen"),
        )  # fmt: skip
        assert report.route_table(found) == [
            ["", "host", "provider", "timing", "mul", "gram"],
            ["op", "adapter", "fused", "graph", "1.20× (1.10–1.30)", "1.50×"],
        ]

    def test_gates(self, run: Loader) -> None:
        found = run(
            record(SMALL, "reference", 1), record(SMALL, "fused", 1, gate=0.5),
            record(LARGE, "fused", 1, gate=2.25), record(SMALL, "compile", 1, gate=1.0),
            record(SMALL, "compile", 1, 1, gate=float("nan")),
        )  # fmt: skip
        assert report.gate_table(found)[1:] == [
            ["reference", "–", "–", "0 of 1"],
            ["fused", LARGE.name, "2.25 (over 2)", "2 of 2"],
            ["compile", SMALL.name, "inf (over 2)", "1 of 1"],
        ]

    def test_errors_and_absent_timings(self, run: Loader, capsys: Said) -> None:
        absent = {"graph": "it synchronises"}
        steps = [record(STEP, "fused", 1, absent=absent), record(SMALL, "fused", 1, absent=absent)]
        found = run(*steps, failed(SMALL, "peft", "e" * 400))
        assert report.error_table(found)[1:] == [[SMALL.name, "peft", "1 of 1", "e" * 300 + "…"]]
        assert report.absence_table(found)[1:] == [["graph", "it synchronises", "fused", "2 cases"]]
        report.print_short(found)
        assert "no graph time: fused, 2 cases: it synchronises\n" in capsys.readouterr().out

    def test_page(self, run: Loader, tmp_path: Path, capsys: Said) -> None:
        assert report.main([self.three(run).path]) == 0
        page = (tmp_path / "a" / "report.md").read_text()
        for line in (
            "| ceilings | copy 3,000 GB/s, bf16 matmul 800 TFLOP/s |",
            "| driver | 570.1 |",
            "| versions | python 3.11.9, torch 2.14.1 |",
            "| processes of a case | 1 to 2 |",
            "Not measured: times by wall, times by kernels.",
            "All rows: op adapter d768 r64 Nv1 p0 bf16.",
            "| mul M2000 | graph | 240 | 100 ±2.0% | error | 50.0 | 50% |",
            "<details><summary>forward</summary>",
            f"| {SMALL.name} | compile | 1 of 1 | boom \\| &lt;bang> at length |",
            "![Time of operations, forward + backward](times.png)",
        ):
            assert line in page
        said = capsys.readouterr().out
        assert "\x1b" not in said and "error: compile, 1 cases: boom | <bang> at length" in said
        assert said.splitlines()[-1] == f"next: read {tmp_path / 'a' / 'report.md'}"

    def test_several_files_keep_apart(self, tmp_path: Path) -> None:
        one = [record(SMALL, "fused", 10)]
        files = [write(tmp_path / name, one, device=name) for name in ("one", "two")]
        report.main(files, tmp_path / "out")
        page = (tmp_path / "out" / "report.md").read_text()
        assert "## one, commit" in page and "## two, commit" in page and "(2-times.png)" in page

    def test_cpu_says_what_it_cannot(self, run: Loader) -> None:
        said = report.unmeasured(run(record(SMALL, "reference", 1), ceilings={}, kind="cpu"))
        assert "no GPU kernels to measure: fused was not timed" in said and "no floor" in said

    @pytest.mark.parametrize("package", ["rich", "matplotlib"])
    def test_without_a_package(
        self, run: Loader, package: str, monkeypatch: pytest.MonkeyPatch, capsys: Said
    ) -> None:
        path = self.three(run).path
        monkeypatch.setitem(sys.modules, package, None)
        report.main([path])
        page = (path.with_suffix("") / "report.md").read_text()
        assert ("None: the package matplotlib is missing." in page) == (package == "matplotlib")
        row = ["mul", "M2000", "graph", "240", "100", "error", "2.40×", "50%"]
        assert row in [line.split() for line in capsys.readouterr().out.splitlines()]

    def test_refuses(self, run: Loader, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="files: none given"):
            report.main([])
        with pytest.raises(ValueError, match=r"out .*a\.json cannot be written"):
            report.main([self.three(run).path], tmp_path / "a.json")


def assert_drawn(path: Path) -> None:
    """A valid PNG on no ground, 1600 pixels wide, with something on it; text is grey."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels.shape[1] == 1600
    solid = pixels[..., 3] > 250
    assert 0.002 < solid.mean() < 0.6 and (pixels[solid][:, :3] == 0x80).all(-1).sum() > 1000


class TestFigures:
    def test_every_provider_has_a_look_of_its_own(self) -> None:
        from bench.providers import PROVIDERS

        on_request = {"fused-p1", "fused-along", "fused-overlapped", "fused-serial"}
        assert set(figures.LOOKS) == set(PROVIDERS) - on_request
        assert len({figures.look(name)[1:] for name in PROVIDERS}) == len(PROVIDERS)
        assert figures.look("new") == figures.look("new")

    @pytest.mark.parametrize("axis", SCALING)
    def test_curves(self, axis: str, run: Loader, tmp_path: Path) -> None:
        cases = [replace(AROUND, **change) for change in reversed(SCALING[axis])]
        other = replace(AROUND, dtype="fp32", d=640, S=3)  # belongs to no curve
        found = run(*(record(c, p, 9 + i) for p in ("fused", "new") for i, c in enumerate(cases)),
                    record(other, "fused", 5))  # fmt: skip
        assert figures.curves(found) == {axis: [cases[::-1]]}
        figures.scaling(found, axis, [cases[::-1]], tmp_path / "curve.png")
        assert_drawn(tmp_path / "curve.png")

    def test_a_curve_has_three_points(self, run: Loader) -> None:
        two = [record(replace(AROUND, r=r), "fused", 1) for r in (8, 16)]
        third = replace(AROUND, r=32)
        assert figures.curves(run(*two, failed(third, "fused", "boom"))) == {}
        assert list(figures.curves(run(*two, record(third, "fused", 1)))) == ["r"]

    def test_bars(self, run: Loader, tmp_path: Path) -> None:
        cases = [op(h, "mul", 768, 64, M) for h in ("adapter", "qkv") for M in (2_000, 10_240)]
        larger = [replace(case, dropout=0.1, S=9999) for case in cases]
        found = run(*(record(c, p, c.M) for c in cases + larger for p in ("fused", "reference")),
                    record(STEP, "reference", 9e4), failed(LARGE, "fused", "boom"))  # fmt: skip
        assert figures.handful(found, ("op",)) == cases
        captions = figures.draw(found, tmp_path, "x-")
        assert list(captions) == ["x-times.png", "x-models.png"]
        assert_drawn(tmp_path / "x-times.png")
        assert_drawn(tmp_path / "x-models.png")

    def test_a_bar_that_has_no_such_time_says_so(self, run: Loader, tmp_path: Path) -> None:
        """A provider that waits for the GPU has no graph: left out it would seem not measured."""
        from matplotlib.figure import Figure

        found = run(
            record(SMALL, "reference", 240), record(SMALL, "fused", 100),
            record(SMALL, "published", 1, times={"wall": {"both": [500.0] * 3}}),
            failed(SMALL, "compile", "boom"),
        )  # fmt: skip
        drawn = []
        with mock.patch.object(figures, "_bars", side_effect=lambda *given: drawn.append(given)):
            figures.bars(found, [SMALL], tmp_path / "a.png")
        axes = Figure().subplots()
        figures._bars(axes, *drawn[0][1:])
        assert [text.get_text() for text in axes.texts] == ["240", "100", "no graph time"]
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["reference", "fused", "published"]

    def test_most_providers_then_a_graph_s_time(self, run: Loader) -> None:
        wall = {"both": [1.0, 1.0, 1.0]}
        found = run(
            record(SMALL, "fused", 1, times={"wall": wall, "graph": wall}),
            record(LARGE, "fused", 1, times={"graph": wall, "wall": wall}),
            record(LARGE, "compile", 1, times={"wall": wall}),
            failed(STEP, "fused", "boom"),
        )
        taken = [figures.timing(found, [case]) for case in (SMALL, LARGE, STEP)]
        assert taken == ["graph", "wall", None]
        assert found.timings([LARGE], "both") == ["wall", "graph"]

    def test_refuse_nothing(self, run: Loader, tmp_path: Path) -> None:
        found = run(failed(SMALL, "fused", "boom"))
        assert figures.draw(found, tmp_path) == {}
        with pytest.raises(ValueError, match="cases is empty"):
            figures.bars(found, [], tmp_path / "a.png")
        with pytest.raises(ValueError, match="groups is empty"):
            figures.scaling(found, "r", [], tmp_path / "a.png")

    def test_labels_name_what_differs(self) -> None:
        shared = "op adapter d768 r64 Nv1 p0 bf16"
        assert figures.labels([SMALL, LARGE]) == (["mul M2000", "mul M32768"], shared)
        assert figures.labels([SMALL, replace(SMALL, S=50, T=40)])[0] == ["mul T50", "mul T40"]
