"""Figures, table and report of the demo."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fused_route.training import plots
from fused_route.training.data import easy_vqa
from fused_route.training.demo import figures, report

ARMS = ("none", "mul", "gram (unit)", "mul + prefix")
BASELINES = {"question only": dict.fromkeys(("all", *easy_vqa.ANSWER_TYPES), 0.67)}


def runs(seeds: int = 3) -> Iterator[report.ArmResult]:
    draw = np.random.default_rng(0)
    for seed in range(seeds):
        for arm in ARMS:
            accuracy = dict(zip(("all", *easy_vqa.ANSWER_TYPES), draw.random(4), strict=True))
            curve = [(step, float(draw.random())) for step in (10, 20, 30)]
            settings = (arm.split()[0], "none", "prefix" in arm, seed, 1234, 5.0 + seed)
            yield report.ArmResult(arm, *settings, accuracy, curve, ["yes", "red"])


def assert_drawn(path: Path) -> None:
    """A valid PNG with something on it, and a white rim: nothing runs over the edge."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        pixels = np.array(image.convert("L"))
    assert (pixels < 128).mean() > 0.002
    for rim in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (rim == 255).all()


class TestReport:
    def test_aggregate(self) -> None:
        results = list(runs())
        rows = report.aggregate(results)
        assert [row.name for row in rows] == list(ARMS)
        mul = [r for r in results if r.name == "mul"]
        row = rows[1]
        assert row.results == tuple(mul) and row.trainable == 1234 and row.seconds == 6
        assert row.sd is not None and row.band is not None
        for key in ("all", *easy_vqa.ANSWER_TYPES):
            values = [r.accuracy[key] for r in mul]
            assert row.mean[key] == pytest.approx(np.mean(values))
            assert row.sd[key] == pytest.approx(np.std(values, ddof=1))
        at_step = np.array([[value for _, value in r.curve] for r in mul])
        assert [step for step, _ in row.curve] == [10, 20, 30]
        np.testing.assert_allclose([v for _, v in row.curve], at_step.mean(0))
        np.testing.assert_allclose(row.band, at_step.std(0, ddof=1))

    def test_aggregate_of_one_seed_claims_no_spread(self) -> None:
        assert all(row.sd is row.band is None for row in report.aggregate(list(runs(1))))

    def test_aggregate_refuses_unlike_runs(self) -> None:
        (one, *_), (two, *_) = list(runs(1)), list(runs(1))
        with pytest.raises(ValueError, match="'none' have the same seed"):
            report.aggregate([one, two])
        with pytest.raises(ValueError, match="'none' differ in more than the seed"):
            report.aggregate([one, replace(two, seed=1, trainable=5)])
        with pytest.raises(ValueError, match="'none' differ in more than the seed"):
            report.aggregate([one, replace(two, seed=1, curve=two.curve[:1])])

    def test_print_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        full = [replace(r, accuracy=dict.fromkeys(r.accuracy, 1.0)) for r in runs()]
        named = [replace(r, name="expand (unit) + prefix", trainable=10**6) for r in full[::4]]
        report.print_table(report.aggregate(full + named), BASELINES)
        printed = capsys.readouterr().out
        assert "\x1b" not in printed and max(map(len, printed.splitlines())) <= 100
        for text in (*ARMS, "expand (unit) + prefix", "question only"):
            assert len(re.findall(rf"^{re.escape(text)}  .* \d", printed, re.MULTILINE)) == 1
        assert "100.0 ± 0.0" in printed and "1,000,000" in printed

    def test_write_report(self, tmp_path: Path) -> None:
        rows = report.aggregate(list(runs()))
        image = easy_vqa.image_paths("test")[0]
        question = "does the image not contain a yellow rectangle?"
        example = figures.Example(image, question, "yes", dict.fromkeys(ARMS, "yes"))
        path = report.write_report(tmp_path, rows, BASELINES, {"a|b": "2.15"}, [example] * 4)
        text = path.read_text()
        for row in rows:
            assert row.sd is not None
            cell = f"| {row.name} | {100 * row.mean['all']:.1f} ± {100 * row.sd['all']:.1f} |"
            assert cell in text
        assert "| question only | 67.0 |" in text and r"| a\|b | 2.15 |" in text
        pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
        assert len(pictures) == 3
        for picture in pictures:
            assert_drawn(tmp_path / picture)
        names = {"report.md", "results.json", *pictures}
        assert {file.name for file in tmp_path.iterdir()} == names
        raw = json.loads((tmp_path / "results.json").read_text())
        assert raw["baselines"] == BASELINES and len(raw["results"]) == 12
        assert raw["results"][0]["predictions"] == ["yes", "red"]

    def test_figures_refuse_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="curves is empty"):
            plots.learning_curves({}, tmp_path / "a.png", baselines={})
        with pytest.raises(ValueError, match="rows is empty"):
            figures.accuracy_bars([], tmp_path / "a.png", {})
        with pytest.raises(ValueError, match="examples is empty"):
            figures.answer_grid([], tmp_path / "a.png")
        assert list(tmp_path.iterdir()) == []
