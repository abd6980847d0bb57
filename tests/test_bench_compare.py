"""Comparison of two result files: known numbers in, exact lines out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measured_records import LARGE, SMALL, Said, failed, record, write

from bench import compare
from bench.compare import noise, verdict
from bench.results import FOLDER, Record
from bench.runs import Time, load


def time(median: float, spread: float = 0, band: float = 0) -> Time:
    """µs: the processes' medians, and the 20 and 80 % points, lie so far apart."""
    s, b = spread / 2, band / 2
    return Time(median, median - s, median + s, median - b, median + b, 3)


class TestCompare:
    @pytest.mark.parametrize(
        ("a", "b"),
        [
            ({"spread": 8}, {}), ({}, {"spread": 8}), ({"band": 8}, {}), ({}, {"band": 8}),
            ({"spread": 8, "band": 3}, {"spread": 2, "band": 5}),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize(
        ("median", "said"),
        [(108, "same"), (108.5, "slower"), (92, "same"), (91.5, "faster"), (100, "same")],
    )
    def test_the_widest_range_is_the_threshold(
        self, a: dict[str, float], b: dict[str, float], median: float, said: str
    ) -> None:
        before, after = time(100, **a), time(median, **b)
        assert noise(before, after) == 8 and verdict(before, after) == said

    @pytest.mark.parametrize(
        ("median", "said"), [(103, "same"), (103.1, "slower"), (97, "same"), (96.9, "faster")]
    )
    def test_of_one_process_a_few_percent_are_none(self, median: float, said: str) -> None:
        """Nor are they where every process took one number, and all the same."""
        one = replace(time(100, band=0.2), processes=1)
        assert verdict(one, time(median, band=0.2)) == said
        assert verdict(time(100, band=0.2), replace(time(median), processes=1)) == said
        assert verdict(time(100), time(median)) == said
        assert verdict(time(100, spread=0.2), time(median)) != "same"  # several say how far

    @pytest.mark.parametrize(("backward", "said"), [(55, "same"), (56, "slower")])
    def test_a_difference_has_the_noise_of_both(
        self, backward: float, said: str, tmp_path: Path
    ) -> None:
        """The backward pass of a graph is both, 2 µs wide, less forward, 3 µs wide."""

        def three(median: float) -> Any:
            passes = {"both": [100.0, 99.0, 101.0], "forward": [50.0, 48.5, 51.5]}
            passes["backward"] = [median] * 3
            return [record(SMALL, "fused", 1, i, times={"graph": passes}) for i in range(2)]

        a = load(write(tmp_path / "a.json", three(50)))
        b = load(write(tmp_path / "b.json", three(backward)))
        (found,) = [change for change in compare.changes(a, b) if change.which == "backward"]
        assert (found.noise, found.verdict) == (5.0, said)

    @pytest.mark.parametrize(
        ("commits", "left_out"),
        [
            (("bf837d1", "d5c1a69a"), True), (("d5c1a69a", "475a242a"), True),
            (("475a242", "bf837d1"), False), (("d5c1a69a", "968f2f71"), False),
            (("d5c1a69a", "bf837d1a+0123ab"), False),
        ],
    )  # fmt: skip
    def test_kernels_without_copies_are_compared_with_no_others(
        self, commits: tuple[str, str], left_out: bool, tmp_path: Path, capsys: Said
    ) -> None:
        times = {"kernels": {"both": [1.0] * 3}, "wall": {"both": [1.0] * 3}}
        found = [record(SMALL, "fused", 1, times=times)]
        a, b = (write(tmp_path / f"{c}.json", found, commit=c) for c in commits)
        assert compare.main(a, b) == 0
        said = capsys.readouterr().out
        assert ("kernels are left out" in said) == left_out
        assert f"Of {1 if left_out else 2} times in both" in said

    def test_the_published_files_have_no_noise_for_a_regression(self, capsys: Said) -> None:
        a, b = (FOLDER / f"nvidia-h200-{c}.json" for c in ("475a242", "bf837d1"))
        assert compare.main(a, b) == 1
        said = capsys.readouterr().out
        slower = said[said.index("\nslower:\n") : said.index("\nfaster:\n")].splitlines()[2:]
        percents = [float(re.findall(r"\(\+([\d.]+)%", line)[0]) for line in slower if line]
        assert 0 < len(percents) < 10 and min(percents) > 3

    def both(self, tmp_path: Path, b: list[Record], **about: Any) -> tuple[Path, Path]:
        a = [record(SMALL, p, 100 + i, i) for p in ("fused", "peft") for i in (0, 1)]
        return write(tmp_path / "a.json", a), write(tmp_path / "b.json", b, **about)

    def test_regressions(self, tmp_path: Path, capsys: Said) -> None:
        b = [record(SMALL, "fused", 120), record(SMALL, "peft", 50), record(LARGE, "peft", 1)]
        assert compare.main(*self.both(tmp_path, b)) == 1
        said = capsys.readouterr().out
        slower, faster = (said.index(word) for word in ("\nslower:\n", "\nfaster:\n"))
        change = f"fused  {SMALL.name}  graph both: 100.5 → 120.0 µs (+19.4%, noise 3.0 µs)"
        assert slower < said.index(change) < faster
        assert f"only in {tmp_path / 'b.json'}:\n  {LARGE.name}: peft\n" in said
        assert "only in " + str(tmp_path / "a.json") not in said
        assert "Of 4 times in both: 2 slower, 2 faster, 0 same; 0 failed." in said
        assert "Some times are of one process" in said
        assert said.splitlines()[-1].startswith("next: measure both again")

    def test_the_same_is_no_regression(self, tmp_path: Path, capsys: Said) -> None:
        a, b = self.both(tmp_path, [record(SMALL, "fused", 101)], driver="580.2")
        assert compare.main(a, b) == 0
        said = capsys.readouterr().out
        assert "driver: 570.1 → 580.2" in said and "slower:" not in said
        assert f"only in {a}:\n  {SMALL.name}: peft\n" in said
        assert said.splitlines()[-1] == f"next: python -m bench report {b}"

    def test_what_fails_now_is_a_regression(self, tmp_path: Path, capsys: Said) -> None:
        b = [failed(SMALL, "fused", "boom"), record(SMALL, "peft", 100)]
        assert compare.main(*self.both(tmp_path, b)) == 1
        assert f"failed:\n  fused  {SMALL.name}: boom\n" in capsys.readouterr().out

    def test_a_missing_timing_is_listed(self, tmp_path: Path, capsys: Said) -> None:
        more: Any = {"times": {"wall": {"both": [1.0] * 3}}, "absent": {"graph": "it synchronises"}}
        b = [record(SMALL, "fused", 9, **more), record(SMALL, "peft", 100)]
        assert compare.main(*self.both(tmp_path, b)) == 0
        line = f"{SMALL.name}: graph both, graph forward of fused (it synchronises)"
        assert line in capsys.readouterr().out

    def test_devices_differ(self, tmp_path: Path) -> None:
        a, b = self.both(tmp_path, [record(SMALL, "fused", 100)], device="B")
        with pytest.raises(ValueError, match=r"was measured on A GPU, .* on B: "):
            compare.main(a, b)
        assert compare.main(a, b, force=True) == 0

    def test_nothing_in_common(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no provider and case in common"):
            compare.main(*self.both(tmp_path, [record(LARGE, "fused", 100)]))
