"""Comparison of two result files: known numbers in, exact lines out."""

from pathlib import Path
from typing import Any

import pytest
from measured_records import LARGE, SMALL, Said, failed, record, write

from bench import compare
from bench.compare import noise, verdict
from bench.results import Record
from bench.runs import Time


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

    def both(self, tmp_path: Path, b: list[Record], **about: Any) -> tuple[Path, Path]:
        a = [record(SMALL, p, 100 + i, i) for p in ("fused", "peft") for i in (0, 1)]
        return write(tmp_path / "a.json", a), write(tmp_path / "b.json", b, **about)

    def test_regressions(self, tmp_path: Path, capsys: Said) -> None:
        b = [record(SMALL, "fused", 120), record(SMALL, "peft", 50), record(LARGE, "peft", 1)]
        assert compare.main(*self.both(tmp_path, b)) == 1
        said = capsys.readouterr().out
        slower, faster = (said.index(word) for word in ("\nslower:\n", "\nfaster:\n"))
        change = f"fused  {SMALL.name}  graph both: 100.5 → 120.0 µs (+19.4%, noise 2.4 µs)"
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
