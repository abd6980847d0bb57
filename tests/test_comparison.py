"""fused-route compare: what a file may say, whole comparisons, killed ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from experiments import refused, run, save_all, written
from PIL import Image

from fused_route.training.comparison import plan, work
from fused_route.training.comparison.plan import Comparison, read_comparison
from fused_route.training.comparison.results import arms_of
from fused_route.training.comparison.runs import Runs, _tried

pytestmark = pytest.mark.usefixtures("without_java")


ARMS: dict[str, Any] = {"none": {"adapter.route": "none"}, "mul": {"adapter.route": "mul"}}
GOOD: dict[str, Any] = {"recipe": "easy-vqa", "arms": ARMS}


class TestPlan:
    @pytest.mark.parametrize(
        ("told", "says"),
        [
            ({"recipe": ""}, "recipe must be a name"),
            ({"arms": {}}, "arms must be a mapping of two"),
            ({"arms": {"none": {}}}, "arms must be a mapping of two"),
            ({"arms": [1, 2]}, "arms must be a mapping of two"),
            ({"arms": {"none": {}, "a/b": {}}}, "got 'a/b'"),
            ({"arms": {"none": {}, "..": {}}}, "got '..'"),
            ({"arms": {"none": {}, "None": {}}}, "upper and lower case"),
            ({"arms": {"none": {}, "a": None}}, "arms: a must be a mapping of settings"),
            ({"arms": {"none": {}, "a": {"seed": 1}}}, "seed is each run's own: use seeds"),
            ({"arms": {"none": {}, "a": {"data_seed": 1}}}, "a sets data_seed"),
            ({"overrides": {"training.output_dir": "x"}}, "use --out"),
            ({"overrides": 3}, "overrides must be a mapping"),
            ({"baseline": "plain"}, "baseline must be one of the arms none, mul; got 'plain'"),
            ({"seeds": []}, "seeds is empty"),
            ({"seeds": 3}, "seeds must be a list of numbers, got 3"),
            ({"seeds": [0, 0]}, "seeds has 0 twice"),
            ({"seeds": [-1]}, "seeds must be a whole number of at least 0, got -1"),
            ({"seeds": [1.5]}, "seeds must be a whole number"),
            ({"split": None}, "split must be a name"),
            ({"rates": [1e-3]}, "rates has one, 0.001"),
            ({"rates": ["1e-3", "x"]}, "rates must be a finite number, got 'x'"),
            ({"rates": [0, 1]}, "rates must be greater than 0, got 0"),
            ({"rates": [1e-3, 1e-2], "arms": {"none": {}, "a": {"lr": 1}}}, "a sets training.lear"),
        ],
    )
    def test_refuses(self, told: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=re.escape(says)):
            Comparison(**{**GOOD, **told})

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("recipe: easy-vqa\n", "arms is missing"),
            ("arms: {}\n", "recipe is missing"),
            (
                "recipe: a\narms: {}\nseed: 1\n",
                "seed is no key of a comparison; did you mean seeds",
            ),
            ("recipe: a\nrecipe: b\n", "'recipe' is there twice"),
        ],
    )
    def test_refuses_files(self, tmp_path: Path, text: str, says: str) -> None:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=re.escape(says)):
            read_comparison(tmp_path / "c.yaml")

    def test_text_is_a_rate_and_recipes_are_beside_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").touch()
        told = {**GOOD, "recipe": "r.yaml"}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(told) + "rates: [1e-3, 0.01]\n")
        found = read_comparison(tmp_path / "c.yaml")
        assert found.recipe == str(tmp_path / "r.yaml") and found.rates == (1e-3, 1e-2)

    @pytest.mark.parametrize("name", plan.shipped())
    def test_what_comes_with_the_package(self, name: str) -> None:
        found = plan.recipes(read_comparison(name), ["--steps", "3"])
        assert [recipe.adapter.route for recipe in found.values()] == ["none", "add", "mul", "gram"]
        assert {recipe.training["max_steps"] for recipe in found.values()} == {3}

    def test_an_arm_is_named_where_its_setting_is_refused(self) -> None:
        told = Comparison(**{**GOOD, "arms": {**ARMS, "odd": {"adapter.route": "fly"}}})
        with pytest.raises(ValueError, match=r"arm 'odd': .*fly"):
            plan.recipes(told)

    def test_splits_without_answers_are_refused(self, folder: Path) -> None:
        told: dict[str, Any] = {
            "arms": ARMS,
            "recipe": str(written(folder, "roberta", "lora", "split")),
        }
        with pytest.raises(ValueError, match="has no answers to score"):
            plan.recipes(Comparison(**told, split="test-dev"))
        with pytest.raises(ValueError, match="needs a validation split"):
            plan.recipes(
                Comparison(**told, rates=(0.1, 0.2), overrides={"tasks.vqa.validation": None})
            )
        with pytest.raises(ValueError, match="rates needs evaluations to choose by"):
            plan.recipes(
                Comparison(**told, rates=(0.1, 0.2), overrides={"training.eval_strategy": "no"})
            )

    def test_what_is_set_for_all(self, folder: Path) -> None:
        """By whole names and as understood; the command line counts before the file."""
        told = Comparison(
            recipe=str(written(folder, "roberta", "lora", "all")),
            arms={**ARMS, "slow": {"lr": 1e-4}},
            overrides={"lr": "1e-3", "rank": 2, "training.max_steps": 4},
        )
        line = ["--steps", "3", "--dropout=0.5", "--training.lr_scheduler_kwargs", '{"power": 2}']
        made = plan.recipes(told, line)
        common, own = plan.told_settings(told, made, line)
        assert common == {
            "adapter.r": 2,
            "training.max_steps": 3,
            "adapter.dropout": 0.5,
            "training.lr_scheduler_kwargs.power": 2,
        }
        rate = "training.learning_rate"
        assert own == {
            "none": {"adapter.route": "none", rate: 1e-3},
            "mul": {"adapter.route": "mul", rate: 1e-3},
            "slow": {rate: 1e-4},
        }
        alike = replace(told, arms=ARMS)
        made = plan.recipes(alike)
        assert plan.told_settings(alike, made).common[rate] == 1e-3
        chosen = replace(alike, rates=(1e-3, 1e-2))
        assert rate not in plan.told_settings(chosen, made).common
        whole = ["--adapter", '{"route": "gram", "r": 3, "target_modules": ["query"]}']
        common, own = plan.told_settings(alike, plan.recipes(alike, whole), whole)
        assert common["adapter.r"] == 3 and "adapter.route" not in common
        assert [of["adapter.route"] for of in own.values()] == ["none", "mul"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("compared"))


def file(folder: Path, name: str, **told: Any) -> Path:
    """A comparison of two arms and two seeds, a few steps each."""
    content = {
        "recipe": str(written(folder, "roberta", "lora", "compared")),
        "arms": ARMS,
        "seeds": [0, 1],
        "overrides": {
            "training.max_steps": 4, "training.save_strategy": "steps", "training.save_steps": 2,
            "training.eval_steps": 2, "training.learning_rate": 0.05,
        },
        **told,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def records(out: Path) -> dict[str, int]:
    """When each run's record was written, by arm and seed."""
    found = sorted(out.glob(f"runs/*/*/{work.RECORD}"))
    return {str(p.parent.relative_to(out / "runs")): p.stat().st_mtime_ns for p in found}


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[Path, Path]:
    """(file, results) of a comparison."""
    told = file(folder, "done")
    assert run("compare", told, "--out", folder / "done") == 0
    return told, folder / "done"


class TestCompare:
    def test_results(self, done: tuple[Path, Path]) -> None:
        found = json.loads((done[1] / "results.json").read_text())
        none, mul = found["arms"]
        assert none["difference"] is None and none["flags"] == mul["flags"] == []
        scores = [r["score"] for r in found["runs"] if r["arm"] == "mul"]
        assert mul["score"]["mean"] == pytest.approx(np.mean(scores))
        assert mul["score"]["sd"] == pytest.approx(np.std(scores, ddof=1))
        difference = mul["score"]["mean"] - none["score"]["mean"]
        assert mul["difference"]["mean"] == pytest.approx(difference)
        assert mul["score"]["mean"] > 0
        assert mul["difference"]["low"] <= difference <= mul["difference"]["high"]
        assert mul["trainable"] == none["trainable"] and mul["steps"] == [4]
        assert [step for step, _ in mul["curve"]] == [2, 4]
        for record in found["runs"]:
            assert record["seconds"] > 0 and record["peak_mib"] > 50
            assert record["memory"] == "CPU, resident" and record["versions"]["torch"]

    def test_items_have_the_score_as_their_mean(self, done: tuple[Path, Path]) -> None:
        place = done[1] / "runs" / "mul" / "seed-1"
        items = json.loads((place / work.ITEMS).read_text())["vqa"]
        record = json.loads((place / work.RECORD).read_text())
        assert record["score"] == pytest.approx(np.mean(list(items.values())))
        assert not list((place / work.TRAIN).glob("checkpoint-*"))

    def test_a_difference_is_that_of_the_items(
        self, done: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = shutil.copytree(done[1], tmp_path / "out")
        place = out / "runs" / "mul" / "seed-1" / work.ITEMS
        items = json.loads(place.read_text())["vqa"]
        right = dict.fromkeys(items, 1.0)
        place.write_text(json.dumps({"vqa": right}))
        before = records(out)
        assert run("compare", done[0], "--out", out) == 0 and records(out) == before
        _, mul = json.loads((out / "results.json").read_text())["arms"]
        files = [out / "runs" / "none" / f"seed-{seed}" / work.ITEMS for seed in (0, 1)]
        theirs = [json.loads(file.read_text())["vqa"] for file in files]
        first = json.loads((place.parent.parent / "seed-0" / work.ITEMS).read_text())["vqa"]
        each = [(first[k] + 1.0) / 2 - (theirs[0][k] + theirs[1][k]) / 2 for k in items]
        assert mul["difference"]["mean"] == pytest.approx(np.mean(each)) and np.mean(each) > 0.1
        assert mul["difference"]["low"] < np.mean(each) < mul["difference"]["high"]
        assert mul["items"] == len(items) and mul["shared"] == [0, 1]

    def test_an_interval_of_items_whose_images_are_gone(self, done: tuple[Path, Path]) -> None:
        comparison = read_comparison(done[0])
        made = plan.recipes(comparison)
        runs = Runs(comparison, made, plan.told_settings(comparison, made), done[1])
        whole = arms_of(runs)[1]
        assert runs.images is not None and not whole.flags and whole.difference is not None
        for name in list(runs.images["vqa"])[:2]:
            del runs.images["vqa"][name]
        less = arms_of(runs)[1]
        assert less.flags == ("interval by items, not images: 2 of them are no more in the data",)
        assert less.difference is not None and less.difference.mean == whole.difference.mean

    def test_report(self, done: tuple[Path, Path]) -> None:
        text = (done[1] / "report.md").read_text()
        for told in ("| none |", "| mul |", "± ", "2 seeds", "10,000 paired", "vqa_accuracy"):
            assert told in text, told
        for picture in ("learning_curves.png", "differences.png"):
            assert f"({picture})" in text
            with Image.open(done[1] / picture) as image:
                assert image.width > 600

    def test_what_is_done_is_skipped(
        self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = records(done[1])
        (done[1] / "runs" / "mul" / "seed-1" / work.RECORD).unlink()
        assert run("compare", done[0], "--out", done[1]) == 0
        after = records(done[1])
        assert {key for key in before if before[key] != after[key]} == {"mul/seed-1"}
        out = capsys.readouterr().out.splitlines()
        assert out[-1].startswith("next: fused-route predict --adapter")
        picture = next((done[1].parent / "data" / "vqav2").rglob("*.jpg"))
        adapter = done[1] / "runs" / "mul" / "seed-0" / "train"
        asked = ["--image", picture, "--question", "what is it?"]
        assert run("predict", "--adapter", adapter, *asked) == 0

    def test_seeds_and_arms_decide_alone(self, done: tuple[Path, Path]) -> None:
        """A run is that of `fused-route train` with its settings."""
        place = done[1] / "runs" / "mul" / "seed-1"
        told = yaml.safe_load(done[0].read_text())
        settings = [f"--{k}={v}" for k, v in told["overrides"].items()]
        alone = done[1].parent / "alone"
        given = [*settings, "--route=mul", "--seed=1", f"--out={alone}"]
        assert run("train", told["recipe"], *given) == 0
        trained = json.loads((alone / "scores.json").read_text())
        record = json.loads((place / work.RECORD).read_text())
        assert record["validation"] == trained["validation"]

    def test_other_settings_in_the_folder_are_refused(
        self, done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = refused(capsys, "compare", done[0], "--out", done[1], "--eval_steps", "1")
        assert "training.eval_steps is 2 there, 1 here" in line
        line = refused(capsys, "compare", done[0], "--out", done[1].parent)
        assert "holds other files" in line
        assert "--arm 'add'" in refused(capsys, "compare", done[0], "--arm", "add")
        assert "use seeds" in refused(capsys, "compare", done[0], "--seed", "3")

    @pytest.mark.parametrize("place", ["runs/mul/seed-1", "rates/mul/0.05"])
    def test_what_is_trained_alone_is_of_its_settings_too(
        self, place: str, done: tuple[Path, Path], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Killed between training and scoring, or while rates are tried."""
        held = (done[1] / "runs" / "mul" / "seed-1" / work.TRAINED).read_text()
        seed = {} if place.startswith("runs") else {"seeds": [1, 0], "rates": [0.05, 0.1]}
        told = tmp_path / "c.yaml"
        told.write_text(yaml.safe_dump({**yaml.safe_load(done[0].read_text()), **seed}))
        out = tmp_path / "out"
        (out / place).mkdir(parents=True)
        (out / "comparison.json").write_text("{}")
        (out / place / work.TRAINED).write_text(held)
        line = refused(capsys, "compare", told, "--out", out, "--steps", "3")
        assert f"{place} is a run of other settings (training.max_steps is 4 there, 3" in line

    def test_what_is_trained_is_not_scored_for_other_settings(
        self, done: tuple[Path, Path]
    ) -> None:
        made = plan.recipes(read_comparison(done[0]), ["--steps", "3"])
        given = Runs(read_comparison(done[0]), made, plan.Told({}, {}), done[1])
        with pytest.raises(ValueError, match="max_steps is 4 there, 3 here"):
            work._run(given.job("run", "mul", 1))
        tried = replace(given.job("train", "mul", 1, 0.05), folder=given.folder("mul", 1))
        with pytest.raises(ValueError, match="max_steps is 4 there, 3 here"):
            _tried(tried)

    def test_dry_run(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arms = {**ARMS, "wide": {"adapter.r": 8}, "lost": {"adapter.target_modules": ["nowhere"]}}
        told = file(folder, "dry", arms=arms)
        assert run("compare", told, "--out", tmp_path / "dry", "--dry-run") == 0
        captured = capsys.readouterr()
        assert "flag: wide: other number of parameters" in captured.err
        assert "flag: lost: would fail: " in captured.err and "nowhere" in captured.err
        assert "8 runs" in captured.out and not (tmp_path / "dry").exists()
        assert captured.out.splitlines()[-1].startswith("next: fused-route compare")


def test_a_failing_arm_does_not_stop_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "lost": {"adapter.target_modules": ["nowhere"]},
        "none": {"adapter.route": "none"},
        "wide": {"adapter.r": 8, "training.max_steps": 2},
        "wild": {"training.learning_rate": 1e30},
    }
    told, out = file(folder, "failing", arms=arms, seeds=[3]), tmp_path / "out"
    assert run("compare", told, "--out", out) == 1
    assert set(records(out)) == {"none/seed-3", "wide/seed-3"}
    captured = capsys.readouterr()
    assert "failed: lost:" in captured.err and "failed: wild, seed 3: training div" in captured.err
    assert captured.out.splitlines()[-1] == f"next: fused-route compare {told} --out {out}"
    found = json.loads((out / "results.json").read_text())
    assert {failed["arm"] for failed in found["failed"]} == {"lost", "wild"}
    lost, _, wide, _ = found["arms"]
    assert "nowhere" in lost["flags"][0]
    assert wide["flags"][0].startswith("other number of parameters") and len(wide["flags"]) == 2
    assert wide["flags"][1] == "other steps: 2 against 4"
    assert "flag: wide: other steps: 2 against 4" in captured.err
    assert "other steps: 2 against 4" in (out / "report.md").read_text()


def test_rates_are_chosen_for_each_arm(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, out = file(folder, "rates", rates=[1e-3, 1e30], seeds=[0]), tmp_path / "out"
    assert run("compare", told, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())
    for arm in found["arms"]:
        assert arm["rate"] == 1e-3 and arm["rates"]["1e+30"] is None
        assert arm["rates"]["0.001"] is not None
    assert {r["settings"]["training.learning_rate"] for r in found["runs"]} == {1e-3}
    assert not (out / "rates" / "mul" / "0.001").exists()  # it is the first seed's run
    before = records(out)
    assert run("compare", told, "--out", out) == 0 and records(out) == before
    for path in before:  # the rate stays that of the settings it was chosen with
        (out / "runs" / path / work.RECORD).unlink()
        (out / "runs" / path / work.TRAINED).unlink()
    line = refused(capsys, "compare", told, "--out", out, "--steps", "3")
    assert "rates/none is a run of other settings (training.max_steps is 4 there, 3" in line


def test_rates_chosen_by_the_loss(folder: Path, tmp_path: Path) -> None:
    """Shown as it is, with what the command line set."""
    told, out = file(folder, "losses", rates=[1e-3, 1e-2], seeds=[0]), tmp_path / "out"
    given = ["--select", "loss", "--steps", "2", "--rank", "2"]
    assert run("compare", told, "--out", out, *given) == 0
    text = (out / "report.md").read_text()
    for line in ('| select | "loss" |', "| training.max_steps | 2 |", "| adapter.r | 2 |"):
        assert line in text
    assert "| training.learning_rate |" not in text  # each arm has its own
    assert len(re.findall(r"\| loss [0-9]\.[0-9]{4} ", text)) == 4
    found = json.loads((out / "results.json").read_text())
    assert found["common"]["adapter.r"] == 2
    assert {r["settings"]["adapter.r"] for r in found["runs"]} == {2}


def test_rates_without_an_evaluation_fail_their_arm(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, out = file(folder, "late", rates=[1e-3, 1e-2], seeds=[0]), tmp_path / "out"
    for _ in range(2):
        assert run("compare", told, "--out", out, "--steps", "2", "--eval_delay", "9") == 1
        said = capsys.readouterr().err
        assert "no evaluation to choose a rate by: see training.eval_steps and eval_del" in said
        assert "Traceback" not in said


def test_a_killed_comparison_goes_on(folder: Path, tmp_path: Path) -> None:
    told, out = file(folder, "killed"), tmp_path / "out"
    command = [sys.executable, "-m", "fused_route.training", "compare", str(told)]
    started = subprocess.Popen(
        [*command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not records(out) and time.monotonic() < end:
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = records(out)
    assert before and len(before) < 4
    again = time.monotonic() + 20
    while time.monotonic() < again and _at_work(out):
        time.sleep(0.1)
    assert run("compare", told, "--out", out) == 0
    after = records(out)
    assert len(after) == 4 and {key: after[key] for key in before} == before
    shutil.rmtree(out)


def _at_work(out: Path) -> bool:
    """Whether a process of a run is alive still."""
    return any(_target(path).startswith(str(out)) for path in Path("/proc").glob("[0-9]*/fd/1"))


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
