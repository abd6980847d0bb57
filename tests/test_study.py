"""The study: its comparisons are fair, its page says what is published, a slice of it runs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.study import __main__ as command
from bench.study import run as running
from bench.study.folders import made_once
from bench.study.page import TABLES, arm_of, by_seed, language_prior, published, tables
from bench.study.publish import RESULTS_FOLDER, SCORES, publish
from bench.study.run import COMPARISONS, STUDY, comparison_file, trainings
from bench.study.text import write_text_model
from bench.study.vit import CLASSES, image_labels, write_vit
from fused_route import ROUTES
from fused_route.training.comparison.plan import read_comparison, recipes
from fused_route.training.comparison.results import unequal
from fused_route.training.comparison.statistics import differences, grouped, paired_bootstrap
from fused_route.training.comparison.work import budget
from fused_route.training.data import easy_vqa
from fused_route.training.experiment.folder import PLACES, settings_of
from fused_route.training.experiment.recipe import Recipe, default

ROOT = Path(__file__).parent.parent
MOST = 240  # trainings
SHIPPED = tuple(ROUTES)  # before other tests add routes of their own
CENTRE = STUDY / "comparisons" / "centre.yaml"
UNEQUAL = {"full + mul", "cross-attention patches"}  # and flagged as such


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def told(name: str) -> dict[str, Recipe]:
    return recipes(read_comparison(comparison_file(name)))


class TestPlan:
    def test_there_are_240_trainings_at_most(self) -> None:
        assert sum(trainings(read_comparison(comparison_file(n))) for n in COMPARISONS) <= MOST
        assert {f.stem for f in (STUDY / "comparisons").glob("*.yaml")} == set(COMPARISONS)

    @pytest.mark.parametrize("name", COMPARISONS)
    def test_arms_differ_in_what_they_are_named_for_alone(self, name: str) -> None:
        found = told(name)
        first = next(iter(found.values()))
        for arm, recipe in found.items():
            words = arm.replace(" + ", " ").split()
            assert recipe.training == first.training, arm
            assert recipe.tasks == first.tasks
            same = replace(recipe.adapter, route="none", normalize="none")
            assert same == replace(first.adapter, route="none", normalize="none"), arm
            assert recipe.adapter.projector == "frozen" and recipe.projector_init == "pca"
            assert (recipe.adapter.normalize == "unit") == ("unit" in words), arm
            assert (recipe.model.features == "tokens") == ("patches" in words), arm
            assert ("ViT" in words) == recipe.model.vision.endswith("vit"), arm
            before = recipe.model.visual_tokens == "before"
            assert before == (name == "prefix" or "prefix" in words), arm
            assert recipe.control == "none" or recipe.control == words[-1], arm
            assert (recipe.method == "full") == ("full" in words), arm
            assert (recipe.method == "cross-attention") == ("cross-attention" in words), arm
            assert recipe.adapter.route == "none" or recipe.adapter.route in words, arm
        assert len(read_comparison(comparison_file(name)).seeds) == 3

    def test_controls_have_the_rates_that_their_routes_took(self) -> None:
        took = {arm["name"]: arm["rate"] for arm in RESULTS["centre"]["arms"]}
        for arm, recipe in told("controls").items():
            own = arm.removesuffix(f" {recipe.control}")
            assert recipe.training["learning_rate"] == took[own]

    def test_every_route_is_there_with_and_without_a_prefix(self) -> None:
        for name, place in (("centre", "none"), ("prefix", "before")):
            plain = [
                recipe.adapter.route
                for recipe in told(name).values()
                if recipe.model.visual_tokens == place
                and recipe.model.features == "pooled"
                and recipe.adapter.normalize == "none"
                and recipe.method == "routed"
                and recipe.model.vision.startswith("packaged/")
            ]
            assert sorted(plain) == sorted(SHIPPED)

    def test_nothing_is_chosen_by_what_is_reported(self) -> None:
        for name in COMPARISONS:
            for recipe in told(name).values():
                (task,) = recipe.tasks.values()
                assert len({task.train, task.validation, task.test}) == 3

    def test_the_splits_share_no_image(self) -> None:
        from fused_route.training.data.layouts import LAYOUTS

        layout = LAYOUTS["easy_vqa"]
        assert layout.home is not None
        home = layout.home()
        images, ids = [], []
        for split in ("fit", "validation", "test"):
            rows = list(layout.splits[split].rows(home, "train"))
            images.append({image for row in rows for image in row["images"]})
            ids.append({row["id"] for row in rows})
        for sets in (images, ids):
            assert not sets[0] & sets[1] and not sets[1] & sets[2] and not sets[0] & sets[2]

    def test_arms_have_as_many_parameters(self, tmp_path: Path) -> None:
        """Of the centre, where the ViT is that of EfficientNet: theirs is made in minutes."""
        text = write_text_model(tmp_path / "text", 1)
        found: dict[str, dict[str, Any]] = {}
        small = [f"--model.language={text}", "--tasks.vqa.limit=50", f"--cache={tmp_path}"]
        arms = {
            name: recipe
            for file in ("centre", "ceiling")
            for name, recipe in recipes(read_comparison(comparison_file(file)), small).items()
        }
        for name in ("none", "mul", "gram unit", "cross-attention patches", "full + mul"):
            found[name] = budget(arms[name])
        for name, spent in found.items():
            assert bool(unequal([spent], [found["none"]])) == (name in UNEQUAL), name


class TestParts:
    def test_a_folder_is_whole_or_not_there(self, tmp_path: Path) -> None:
        def killed(folder: Path) -> None:
            (folder / "half").touch()
            raise RuntimeError("killed")

        def filled(folder: Path) -> None:
            assert list(folder.iterdir()) == []  # what the killed one left is gone
            (folder / "last").touch()

        with pytest.raises(RuntimeError, match="killed"):
            made_once(tmp_path / "a", "last", killed)
        assert not (tmp_path / "a").exists()
        assert made_once(tmp_path / "a", "last", filled) == tmp_path / "a"
        made_once(tmp_path / "a", "last", killed)  # it is there
        assert {path.name for path in tmp_path.iterdir()} == {"a", ".a.lock"}
        with pytest.raises(ValueError, match="without other"):
            made_once(tmp_path / "a", "other", filled)

    def test_labels_are_what_answers_tell(self) -> None:
        questions = easy_vqa.Questions(["q"] * 4, ["red", "yes", "circle", "teal"], [0, 0, 2, 2])
        labels = image_labels(questions)
        assert labels["colour"].tolist() == [CLASSES["colour"].index(c) if c else -100
                                             for c in ("red", "", "teal")]  # fmt: skip
        assert labels["shape"].tolist() == [-100, -100, CLASSES["shape"].index("circle")]

    def test_the_text_model_is_the_packages_first_layers(self, tmp_path: Path) -> None:
        from transformers import AutoModel

        from fused_route.training.demo.task import encoder_directory

        kept = AutoModel.from_pretrained(write_text_model(tmp_path / "text", 2)).state_dict()
        whole = AutoModel.from_pretrained(encoder_directory()).state_dict()
        assert {n for n in kept if ".layer." in n} == {
            n for n in whole if ".layer.0." in n or ".layer.1." in n
        }
        assert all(torch.equal(t, whole[n]) for n, t in kept.items() if "pooler" not in n)

    def test_a_comparison_that_there_is_not(self) -> None:
        with pytest.raises(ValueError, match="centre"):
            comparison_file("center")

    def test_a_failed_comparison_is_said_and_the_others_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(running, "EVERY", 0.1)
        recipe = STUDY / "recipe.yaml"
        files = {"rank-4": tmp_path / "none.yaml", "rank-64": tmp_path / "again.yaml"}
        files["rank-64"].write_text(f"recipe: {recipe}\narms: {{none: {{}}, a: {{rank: x}}}}\n")
        files["rank-4"].write_text(f"recipe: {recipe}\narms: {{none: {{}}, a: {{}}}}\nseeds: [a]\n")
        monkeypatch.setattr(running, "comparison_file", files.__getitem__)
        monkeypatch.setattr(running, "read_comparison", lambda f: read_comparison(CENTRE))
        assert running.run(("rank-4", "rank-64", "rank-4"), 1, tmp_path) == 2
        said = capsys.readouterr().err
        for name in files:
            assert f"{name} ended with status 2: see {tmp_path / name}.log" in said
            assert "fused-route: error" in (tmp_path / f"{name}.log").read_text()

    def test_the_vit_is_saved_as_transformers_loads_it(self, tmp_path: Path) -> None:
        from transformers import AutoModel

        out = write_vit(tmp_path / "vit", epochs=1, fit=64, images=80)
        tower = AutoModel.from_pretrained(out)
        assert set(json.loads((out / "accuracy.json").read_text())) == set(CLASSES)
        assert tower(pixel_values=torch.zeros(1, 3, 64, 64)).pooler_output.shape == (1, 384)


PAGE = ROOT / STUDY / "README.md"
RESULTS = published(ROOT / RESULTS_FOLDER)
ROW = re.compile(r"(?P<number>[−+]?\d+\.\d) \[(?P<comparison>[\w-]+): (?P<arm>[^\]]+)\]")


def cited() -> list[tuple[str, str, str]]:
    """Numbers of the page with the row that each is of."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    return [(m["number"], m["comparison"], m["arm"]) for m in ROW.finditer(text)]


class TestPublished:
    def test_all_of_it_is(self) -> None:
        assert set(RESULTS) == set(COMPARISONS)
        for name, found in RESULTS.items():
            comparison = read_comparison(comparison_file(name))
            assert not found["failed"]
            assert len(found["runs"]) == len(comparison.arms) * len(comparison.seeds)
            assert found["comparison"]["arms"] == comparison.arms
            recipes_of = told(name)
            for run in found["runs"]:
                asked, had = settings_of(recipes_of[run["arm"]]), run["settings"]
                free = {"training.seed", *(["training.learning_rate"] if comparison.rates else [])}
                for key in asked.keys() - free:
                    same = had.get(key, default(key)) == asked[key]
                    assert same or PLACES.fullmatch(key), (name, run["arm"], key)

    def test_the_tables_are_those_of_the_results(self) -> None:
        written = (ROOT / STUDY / TABLES).read_text(encoding="utf-8")
        assert written == tables(RESULTS, RESULTS_FOLDER)

    @pytest.mark.parametrize(("number", "comparison", "arm"), cited())
    def test_every_number_of_the_page_is_a_rows(
        self, number: str, comparison: str, arm: str
    ) -> None:
        """A signed one is a difference to the baseline, another a score, times 100."""
        found = arm_of(RESULTS, comparison, arm)
        signed = number[0] in "+−"
        value = 100 * found["difference" if signed else "score"]["mean"]
        assert f"{value:{'+' if signed else ''}.1f}".replace("-", "−") == number

    def test_controls_know_no_more_than_the_questions_give_away(self) -> None:
        """In no run; below is what training to it has cost."""
        prior = language_prior()["all"]
        for run in RESULTS["controls"]["runs"]:
            assert run["score"] < prior + 0.005, (run["arm"], run["seed"])

    def test_the_page_has_no_other_numbers(self) -> None:
        """A decimal outside of code and links is a row's, or the language prior's."""
        assert len(cited()) > 20
        text = ROW.sub("", PAGE.read_text(encoding="utf-8"))
        text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
        prior = {f"{100 * value:.1f}" for value in language_prior().values()}
        assert set(re.findall(r"\d+\.\d+", text)) <= prior

    @pytest.mark.parametrize("name", RESULTS)
    def test_differences_follow_from_the_items(self, name: str) -> None:
        """From items.npz alone, as anyone would."""
        found = RESULTS[name]
        items = np.load(ROOT / RESULTS_FOLDER / name / SCORES)
        (task,) = {key.split("/")[1] for key in items if key.startswith("ids/")}
        ids = items[f"ids/{task}"].tolist()

        asked = easy_vqa.load("test").image_ids
        vqa = {f"test-{number}": str(image) for number, image in enumerate(asked)}
        of = {task: vqa if task == "vqa" else {key: key for key in ids}}

        def runs(arm: str) -> list[dict[str, dict[str, float]]]:
            keys = [f"{arm}/seed-{seed}/{task}" for seed in found["comparison"]["seeds"]]
            return [{task: dict(zip(ids, items[key].tolist(), strict=True))} for key in keys]

        base = runs(found["comparison"]["baseline"])
        for arm in found["arms"]:
            ours = runs(arm["name"])
            for seed, run in enumerate(ours):
                score = np.mean(list(run[task].values()))
                (record,) = (
                    r for r in found["runs"] if (r["arm"], r["seed"]) == (arm["name"], seed)
                )
                assert score == pytest.approx(record["score"], abs=1e-6)
            if arm["difference"] is not None:
                again = paired_bootstrap(differences(ours, base), grouped(ours[0], of))
                assert again._asdict() == pytest.approx(arm["difference"], abs=1e-5)
                by = np.mean(by_seed(found, arm["name"]))
                assert by == pytest.approx(arm["difference"]["mean"], abs=1e-6)


@pytest.mark.slow
def test_a_slice_of_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and models as the study prepares them, fewer steps: routing sees the image, plain LoRA
    and a control end at what the questions give away."""
    text = write_text_model(tmp_path / "text")
    steps = 300
    settings = {
        "model.language": str(text), "cache": str(tmp_path / "cache"),
        "training.learning_rate": 3e-3, "training.max_steps": steps,
        "training.eval_steps": steps, "training.save_steps": steps,
    }  # fmt: skip
    arms = {
        "none": {"adapter.route": "none"},
        "mul": {"adapter.route": "mul"},
        "mul shuffled": {"adapter.route": "mul", "control": "shuffled"},
    }
    file = tmp_path / "centre.yaml"
    file.write_text(
        json.dumps(
            {
                "recipe": str(ROOT / STUDY / "recipe.yaml"),
                "seeds": [0],
                "overrides": settings,
                "arms": arms,
            }
        )
    )
    monkeypatch.setattr(running, "comparison_file", lambda name: file)
    assert running.run(("centre",), 1, tmp_path / "runs") == 0
    assert running.run(("centre",), 1, tmp_path / "runs") == 0  # nothing is left to do
    (folder,) = publish(("centre",), tmp_path / "runs", tmp_path / "results")
    found = {"centre": json.loads((folder / "results.json").read_text())}
    score = {arm: arm_of(found, "centre", arm)["score"]["mean"] for arm in arms}
    prior = 0.67
    assert score["none"] < prior + 0.01 and score["mul shuffled"] < prior + 0.01
    assert score["mul"] > prior + 0.04


def test_the_command_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run", lambda names, jobs: 0)
    assert command.main(["run", "--only", "rank-4"]) == 0
    assert "next: python -m bench.study publish" in capsys.readouterr().out
