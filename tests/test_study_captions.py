"""The study's synthetic captions, and the decoder that is trained on their text."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.study import captions
from bench.study.captions import TEMPLATES, Shown, captions_of, shown_in, write_captions
from bench.study.decoder import MADE, train_decoder, word_tokenizer
from fused_route.training.comparison.plan import read_comparison, recipes
from fused_route.training.data import easy_vqa
from fused_route.training.data.easy_vqa import Questions
from fused_route.training.data.samples import Source, open_samples
from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.pretrained import load_language

COMPARISON = (
    Path(__file__).parents[1] / "docs" / "study" / "comparisons" / "synthetic-captions.yaml"
)
NAMES = sorted(easy_vqa.SHAPES | easy_vqa.COLOURS)
WORDS = {word for text in (*TEMPLATES, *NAMES) for word in text.split()}
IMAGES = {"train": 2133, "val": 302, "test": 603}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("study") / "captions")


@pytest.fixture(scope="session")
def entries(written: Path) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = json.loads((written / "dataset_coco.json").read_text())["images"]
    return images


@pytest.fixture(scope="session")
def few(entries: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the captions of some images, and without these."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries[::100]}))
    return folder


@pytest.fixture(scope="session")
def trained(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_decoder(few, tmp_path_factory.mktemp("models") / "decoder", steps=2)


class TestShown:
    def test_an_image_needs_answers_of_both_types(self) -> None:
        told = Questions(
            ["?"] * 7,
            ["circle", "yes", "red", "triangle", "teal", "red", "no"],
            [4, 4, 4, 1, 2, 4, 0],
        )
        assert shown_in(told) == {4: Shown("circle", "red")}

    @pytest.mark.parametrize("answers", [("red", "blue"), ("circle", "triangle")])
    def test_contradictory_answers_are_refused(self, answers: tuple[str, str]) -> None:
        with pytest.raises(ValueError, match=rf"image 7 .*'{answers[0]}' and '{answers[1]}'"):
            shown_in(Questions(["?", "?"], list(answers), [7, 7]))

    def test_captions_name_both_and_differ(self) -> None:
        said = captions_of(Shown("circle", "red"))
        assert len(set(said)) == len(TEMPLATES) == 5
        assert all({"circle", "red"} <= set(caption.split()) for caption in said)
        before = [caption.index("red") < caption.index("circle") for caption in said]
        assert 0 < sum(before) < 5


class TestWriting:
    @pytest.mark.parametrize(("split", "images"), IMAGES.items())
    def test_layout_is_read(self, split: str, images: int, written: Path, tmp_path: Path) -> None:
        source = Source("coco", written)
        read = [
            open_samples(source, f"karpathy-{split}", role=role, cache_dir=tmp_path)
            for role in ("train", "evaluate")
        ]
        assert [len(samples.rows) for samples in read] == [5 * images, images]
        assert all(len(row["references"]) == 5 for row in read[1].rows)

    def test_numbers_are_unique_over_splits(self, entries: list[dict[str, Any]]) -> None:
        images = [entry["cocoid"] for entry in entries]
        sentences = [said["sentid"] for entry in entries for said in entry["sentences"]]
        assert len(set(images)) == len(images) == sum(IMAGES.values())
        assert len(set(sentences)) == len(sentences) == 5 * len(images)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_captions_say_what_answers_told(
        self, split: easy_vqa.Split, entries: list[dict[str, Any]], written: Path
    ) -> None:
        questions, paths = easy_vqa.load(split), easy_vqa.image_paths(split)
        told: defaultdict[bytes, set[str]] = defaultdict(set)
        for answer, image in zip(questions.answers, questions.image_ids, strict=True):
            told[paths[image].read_bytes()].add(answer)
        for entry in [e for e in entries if (e["split"] == "test") == (split == "test")][::400]:
            answers = told[(written / entry["filepath"] / entry["filename"]).read_bytes()]
            for said in entry["sentences"]:
                named = set(said["raw"].split()) & (easy_vqa.SHAPES | easy_vqa.COLOURS)
                assert named == answers - {"yes", "no"} and len(named) == 2

    def test_validation_starts_at_the_number(self, entries: list[dict[str, Any]]) -> None:
        numbers = list(shown_in(easy_vqa.load("train")))
        of = ["val" if number >= captions.HELD_OUT else "train" for number in numbers]
        assert [entry["split"] for entry in entries] == of + ["test"] * IMAGES["test"]

    def test_half_way_leaves_nothing_under_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = shutil.copyfile
        copied: list[Path] = []

        def stopped(source: Path, target: Path) -> None:
            if len(copied) == 3:
                raise KeyboardInterrupt
            copied.append(copy(source, target))

        folder = tmp_path / "captions"
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(shutil, "copyfile", stopped)
            write_captions(folder)
        assert len(copied) == 3 and not folder.exists()
        assert len(list(write_captions(folder).glob("*/*.png"))) == sum(IMAGES.values())

    def test_finished_one_is_left_as_it_is(
        self, written: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(captions, "load", None)
        assert write_captions(written) == written

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").touch()
        with pytest.raises(ValueError, match="is there without dataset_coco"):
            write_captions(tmp_path)


class TestDecoder:
    def test_recipes_load_it_and_it_generates(self, trained: Path) -> None:
        model, tokenizer, new = load_language(str(trained), "decoder")
        assert new == ()
        start = torch.tensor([[tokenizer.bos_token_id]])
        ids = model.generate(start, max_new_tokens=8, do_sample=False)
        said = set(tokenizer.decode(ids[0], skip_special_tokens=True).split())
        assert said and said <= WORDS

    def test_it_says_how_well_it_learned(self, trained: Path) -> None:
        found = json.loads((trained / MADE).read_text())
        assert 1.5 < found["of_frequencies"] < found["held_out"] < 30

    def test_finished_one_is_left_as_it_is(self, trained: Path, tmp_path: Path) -> None:
        assert train_decoder(tmp_path / "nothing", trained) == trained

    def test_seed_decides(self, trained: Path, few: Path, tmp_path: Path) -> None:
        again = train_decoder(few, tmp_path / "same", steps=2)
        other = train_decoder(few, tmp_path / "other", steps=2, seed=1)
        weights = [(f / "model.safetensors").read_bytes() for f in (trained, again, other)]
        assert weights[0] == weights[1] != weights[2]

    def test_words_are_tokens(self) -> None:
        tokenizer = word_tokenizer(["a red circle", "a circle that is red"])
        ids = tokenizer("A red circle, a square").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["a", "red", "circle", "<unk>", "a", "<unk>"]
        assert tokenizer.decode(tokenizer("a red circle").input_ids) == "a red circle"

    @pytest.mark.parametrize("named", ["steps", "seed"])
    def test_numbers_are_checked(self, named: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"{named} must be a whole number"):
            train_decoder(tmp_path, tmp_path / "out", **{named: -1})

    def test_captions_are_needed(self, tmp_path: Path) -> None:
        (tmp_path / "dataset_coco.json").write_text('{"images": []}')
        with pytest.raises(ValueError, match="no caption in karpathy-train"):
            train_decoder(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_comparison_and_its_recipes_are_accepted() -> None:
    found = recipes(read_comparison(COMPARISON))
    assert found["none"].adapter.route == "none"
    for recipe in found.values():
        assert recipe.model.kind == "decoder" and recipe.projector_init == "pca"
        arguments_of(recipe, validated=True)
