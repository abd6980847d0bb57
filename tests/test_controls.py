"""What a text gets in place of its image, how a projector starts, and full fine-tuning."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
from experiments import recipe, run, save_all, written

from fused_route import VisualProjector
from fused_route.training.data.samples import Samples
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.build import Built, build, parameters
from fused_route.training.experiment.evaluation import evaluate
from fused_route.training.experiment.folder import open_run, save
from fused_route.training.experiment.images import in_place_of
from fused_route.training.experiment.projecting import start_projector
from fused_route.training.experiment.recipe import Recipe
from fused_route.training.experiment.run import encode, open_data
from fused_route.training.experiment.tasks import Rows, open_rows
from fused_route.training.experiment.trainer import ExperimentTrainer
from fused_route.training.experiment.tuning import LANGUAGE
from fused_route.training.projector import fit_projector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("controls"))


def opened(told: Recipe) -> tuple[Built, Any]:
    data = open_data(told)
    torch.manual_seed(0)
    built = build(told, data.answers)
    encode(built, data.images())
    return built, data


class TestControls:
    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_shuffled_images_are_those_of_other_texts(self, folder: Path, split: str) -> None:
        own = getattr(open_data(recipe(folder, "roberta")), split)
        told = recipe(folder, "roberta", "lora", "--control", "shuffled")
        one, again = (getattr(open_data(told), split) for _ in range(2))
        pairs = [(own[i], one[i], again[i]) for i in range(len(own))]
        for a, b, c in pairs:
            assert a["text"] == b["text"] and a["references"] == b["references"]
            assert b["paths"] == c["paths"]
        assert sorted(a["paths"] for a, *_ in pairs) == sorted(b["paths"] for _, b, _ in pairs)
        assert all(a["paths"] != b["paths"] for a, b, _ in pairs)
        assert one[0]["paths"] == one[len(one)]["paths"]  # in another epoch the same

    @pytest.mark.parametrize("often", [1, 4, 7, 50])
    def test_no_text_keeps_its_image(self, often: int) -> None:
        """However often the first of them is there; each is given once, as long as that goes."""
        names = ["a.png"] * often + [f"{n % 3}.png" for n in range(12)]
        rows = datasets.Dataset.from_dict({"images": [[name] for name in names]})
        one, again = (Rows({"vqa": Samples("vqa", rows, Path(), {})}, "shuffled") for _ in "12")
        given = one.shuffled["vqa"]
        assert (given == again.shuffled["vqa"]).all()
        assert all(names[place] != names[other] for place, other in enumerate(given))
        assert (sorted(given) == list(range(len(names)))) == (often <= 12)

    def test_one_image_alone_is_refused(self) -> None:
        rows = datasets.Dataset.from_dict({"images": [["a.png"]] * 3})
        with pytest.raises(ValueError, match=r"all 3 rows of tasks\.vqa have the same images"):
            Rows({"vqa": Samples("vqa", rows, Path(), {})}, "shuffled")

    @pytest.mark.parametrize("source", ["cache", "tower"])
    @pytest.mark.parametrize("control", ["constant", "noise"])
    def test_no_image_reaches_a_batch(self, folder: Path, control: str, source: str) -> None:
        given: list[torch.Tensor] = []
        for reverse in (False, True):
            told = recipe(
                folder, "roberta", "lora", "--control", control, "--features_from", source
            )
            built, data = opened(told)
            rows = [data.train[i] for i in range(6)]
            if reverse:  # the same rows with other images of the same batch
                paths = [row["paths"] for row in rows][::-1]
                rows = [{**row, "paths": path} for row, path in zip(rows, paths, strict=True)]
            batch = built.batches().training(rows)
            given.append(batch["visual_features" if source == "cache" else "pixel_values"])
        torch.testing.assert_close(given[0], given[1])
        assert (given[0] == 1).all() == (control == "constant")

    def test_noise_has_the_batchs_mean_and_deviation_and_is_drawn_by_row_and_seed(self) -> None:
        images = torch.randn(4000, 2, 3) * torch.tensor([0.1, 1.0, 5.0]) + 7
        rows = [{"row": i} for i in range(4000)]
        noise, again, other = (in_place_of(images, "noise", rows, seed) for seed in (0, None, 1))
        torch.testing.assert_close(noise.mean(0), images.mean(0), atol=0.3, rtol=0)
        torch.testing.assert_close(noise.std(0), images.std(0), atol=0, rtol=0.05)
        assert torch.equal(noise, again) and not torch.equal(noise, other)
        flat = torch.stack([images.flatten(), noise.flatten()])
        within = flat.unflatten(1, (4000, 6)) - flat.unflatten(1, (4000, 6)).mean(1, keepdim=True)
        for feature in range(6):
            assert abs(torch.corrcoef(within[:, :, feature])[0, 1]) < 0.1
        alone = in_place_of(images[:1], "noise", rows[:1], 0)  # the mean would be the image
        assert alone.shape == images[:1].shape and float(alone.abs().max()) < 6

    def test_a_run_may_be_scored_without_its_images(self, folder: Path) -> None:
        told = recipe(folder, "roberta", "lora", "--out", str(folder / "runs" / "own"))
        file = folder / "roberta-lora-recipe.yaml"
        assert run("train", file, "--out", told.training["output_dir"]) == 0
        made = Path(told.training["output_dir"])
        built = open_run(made, ["--control", "shuffled"])
        assert built.recipe.control == "shuffled"
        scores, _ = evaluate(made, out=folder / "shuffled", overrides=["--control=shuffled"])
        assert 0.0 <= scores["score"] <= 1.0
        for overrides in ([], ["--control=shuffled"]):  # neither takes the other's place
            evaluate(made, overrides=overrides)
        found = {path.name for path in (made / "best").glob("scores-*.json")}
        assert {
            "scores-test-karpathy-test.json",
            "scores-test-karpathy-test-shuffled.json",
        } <= found


class TestProjector:
    def test_pca_starts_it_from_the_training_images(self, folder: Path) -> None:
        tower = ("--model.vision", "packaged/efficientnet-lite0")
        for init in ("random", "pca"):
            built, data = opened(
                recipe(folder, "roberta", "lora", *tower, "--projector_init", init)
            )
            projector, cache, images = built.tuned.projector, built.cache, data.train.images()
            assert projector is not None and cache is not None
            start_projector(built, images)
            (x_r,) = (x for d, x in projector(cache.batch(images)).items() if d != 1280)
            x_r = x_r.detach().flatten(0, 1)
            centred = float(x_r.mean(0).abs().max()) < 1e-3
            scaled = abs(float(x_r.square().mean()) - 1) < 1e-3
            covariance = x_r.T @ x_r / len(x_r)
            off = (covariance - covariance.diag().diag()).abs().max()
            rotated = float(off / covariance.diag().max()) < 1e-3
            assert centred is scaled is rotated is (init == "pca")

    def test_a_run_keeps_it_and_can_be_asked(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = folder / "runs" / "fitted"
        tower = ("--model.vision", "packaged/efficientnet-lite0", "--model.visual_tokens", "none")
        start = ("--projector_init", "pca", "--projector", "frozen", "--tasks.vqa.limit", "20")
        file = written(folder, "roberta", "lora", "fitted")
        assert run("train", file, *tower, *start, "--out", out) == 0
        built = open_run(out)
        projector, cache = built.tuned.projector, built.cache
        assert projector is not None and cache is not None
        images = open_rows(built.recipe, "train", "train").images()
        (x_r,) = (x for d, x in projector(cache.batch(images)).items() if d != 1280)
        assert float(x_r.detach().square().mean()) == pytest.approx(1.0, rel=1e-3)
        asked = run("predict", "--adapter", out, "--image", images[0], "--question", "what is it?")
        assert asked == 0 and "%" in capsys.readouterr().out

    def test_without_a_projector_nothing_is_done(self, folder: Path) -> None:
        built, data = opened(recipe(folder, "roberta", "lora", "--projector_init", "pca"))
        assert built.tuned.projector is None
        before = {n: p.clone() for n, p in built.model.named_parameters()}
        start_projector(built, data.train.images())
        assert all(torch.equal(p, before[n]) for n, p in built.model.named_parameters())

    @pytest.mark.parametrize(
        ("features", "says"),
        [
            (torch.randn(50, 9), "visual_width"),
            (torch.ones(50, 8), "do not vary"),
            (torch.randn(8), "features must be"),
            (torch.zeros(0, 8), "features is empty"),
        ],
    )
    def test_features_that_cannot_be_fitted_to(self, features: torch.Tensor, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            fit_projector(VisualProjector(8, {4}), [features])

    def test_features_narrower_than_the_layers(self) -> None:
        with pytest.raises(ValueError, match="8 wide and the layers 16"):
            fit_projector(VisualProjector(8, {16}), [torch.randn(50, 8)])

    def test_no_features(self) -> None:
        with pytest.raises(ValueError, match="features is empty"):
            fit_projector(VisualProjector(8, {4}), [])

    def test_parts_give_what_the_whole_does(self) -> None:
        features = torch.randn(300, 8) * 0.1 + torch.arange(8) * 100
        one, other = VisualProjector(8, {4}), VisualProjector(8, {4})
        fit_projector(one, [features])
        fit_projector(other, features.split(70))
        a, b = (projector(features)[4].detach() for projector in (one, other))
        torch.testing.assert_close(a.abs(), b.abs(), atol=2e-2, rtol=1e-2)

    def test_it_needs_the_cache(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="features_from='cache'"):
            recipe(folder, "roberta", "lora", "--projector_init", "pca", "--features_from", "tower")


@pytest.mark.parametrize("language", ["roberta", "gpt2"])
class TestFull:
    def test_every_parameter_of_the_language_model_trains(
        self, language: str, folder: Path
    ) -> None:
        plain, _ = opened(recipe(folder, language))
        full, _ = opened(recipe(folder, language, "lora", "--method", "full"))
        assert all(p.requires_grad for p in full.model.language.parameters())
        trainable, every = parameters(full.model)
        assert parameters(plain.model)[0] < trainable == every

    def test_a_run_is_opened_as_it_was_trained(
        self, language: str, folder: Path, tmp_path: Path
    ) -> None:
        told = recipe(folder, language, "lora", "--method", "full")
        built, _ = opened(told)
        with torch.no_grad():
            for parameter in built.model.language.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save(built, tmp_path / "full")
        again = open_run(tmp_path / "full")
        before = dict(built.model.named_parameters())
        for name, parameter in again.model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    def test_it_trains_and_the_best_comes_back(self, language: str, folder: Path) -> None:
        out = folder / "runs" / f"full-{language}"
        file = written(folder, language, "lora", "full")
        often = ("--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "3")
        given = ("--method", "full", "--select", "loss", "--lr", "1e-2", *often)
        assert run("train", file, *given, "--out", out) == 0
        assert not list(out.rglob("adapter_model.safetensors"))  # alone it would be half of it
        losses = json.loads((out / "scores.json").read_text())["validation"]
        built = open_run(out)
        rows = open_rows(built.recipe, "validation", "train")
        told = arguments_of(built.recipe, validated=True)
        trainer = ExperimentTrainer(built, told, validation=rows)
        assert trainer.loss_on(rows) == pytest.approx(losses["loss"], rel=1e-4)
        before = dict(build(recipe(folder, language), built.answers).model.named_parameters())
        name = next(n for n in before if n.endswith(("word_embeddings.weight", "wte.weight")))
        assert not torch.equal(dict(built.model.named_parameters())[name], before[name])

    def test_a_file_of_another_model_is_refused(
        self, language: str, folder: Path, tmp_path: Path
    ) -> None:
        built, _ = opened(recipe(folder, language, "lora", "--method", "full"))
        save(built, tmp_path / "full")
        before = {n: p.clone() for n, p in built.model.named_parameters()}
        tensors = safetensors.torch.load_file(tmp_path / "full" / LANGUAGE)
        tensors.popitem()
        safetensors.torch.save_file(tensors, tmp_path / "full" / LANGUAGE)
        with pytest.raises(ValueError, match="of another language model"):
            built.tuned.load(tmp_path / "full")
        (tmp_path / "full" / LANGUAGE).unlink()
        with pytest.raises(ValueError, match="cannot be read"):
            built.tuned.load(tmp_path / "full")
        assert all(torch.equal(p, before[n]) for n, p in built.model.named_parameters())
