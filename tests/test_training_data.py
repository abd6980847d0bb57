"""Data set, image encoder and feature cache of the demo."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fused_route.training.data import easy_vqa
from fused_route.training.data.images import load_image
from fused_route.training.demo import vision
from fused_route.training.demo.features import encode_images
from fused_route.training.demo.vision import VisionTower
from fused_route.training.files import atomic_file

WIDTH = 3


class MeanColour(nn.Module):
    """Features (B, 3): mean of each channel. `calls` counts batches; `failing` raises at that."""

    def __init__(self, failing: int | None = None) -> None:
        super().__init__()
        self.calls, self.failing = 0, failing

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.failing:
            raise KeyboardInterrupt
        return batch.mean((2, 3))


class Divided(MeanColour):
    """Features that are infinite."""

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward(batch) / 0


def shard(features: Tensor) -> Callable[[Path], object]:
    """Puts other features into a shard, all else as it was."""

    def replace(path: Path) -> None:
        with safe_open(path, "pt") as file:
            told, digests = file.metadata(), file.get_tensor("digests").clone()
        save_file({"features": features, "digests": digests}, path, told)

    return replace


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"no features at all"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "dtype": shard(torch.zeros(5, 1, WIDTH, dtype=torch.float64)),
    "fewer": shard(torch.zeros(4, 1, WIDTH)),
    "width": shard(torch.zeros(5, 1, WIDTH + 1)),
    "dimensions": shard(torch.zeros(5, WIDTH)),
}


def tower(model: nn.Module | None = None, name: str = "mean-colour") -> VisionTower:
    def pixels(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    return VisionTower(model or MeanColour(), pixels, name, WIDTH)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (4, 4), (i, 10 * i, 255 - i)).save(path)
    return paths


@pytest.fixture(scope="module")
def splits() -> tuple[easy_vqa.Questions, easy_vqa.Questions]:
    return easy_vqa.load("train"), easy_vqa.load("test")


class TestEasyVqa:
    def test_size(self, splits: tuple[easy_vqa.Questions, easy_vqa.Questions]) -> None:
        for part, questions, images in zip(splits, (38_575, 9_673), (4_000, 1_000), strict=True):
            assert len(part.texts) == len(part.answers) == len(part.image_ids) == questions
            assert set(part.image_ids) <= set(range(images))
        types = Counter(map(easy_vqa.answer_type, splits[1].answers))
        assert types["yes/no"] == 7_136 and set(types) == set(easy_vqa.ANSWER_TYPES)

    def test_answer_labels_are_those_of_the_data(
        self, splits: tuple[easy_vqa.Questions, easy_vqa.Questions]
    ) -> None:
        labels = easy_vqa.answer_labels()
        assert labels == sorted(set(splits[0].answers)) and len(labels) == 13
        assert set(splits[1].answers) <= set(labels)

    @pytest.mark.parametrize(("split", "number"), [("train", 4_000), ("test", 1_000)])
    def test_image_paths(self, split: easy_vqa.Split, number: int) -> None:
        paths = easy_vqa.image_paths(split)
        assert [int(path.stem) for path in paths] == list(range(number))
        assert load_image(paths[-1]).size == (64, 64)

    def test_missing_image_id(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("easy_vqa.get_test_image_paths", lambda: {0: "0.png", 2: "2.png"})
        with pytest.raises(ValueError, match="lacks image 1"):
            easy_vqa.image_paths("test")

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "easy_vqa", None)
        with pytest.raises(ValueError, match=r"easy-vqa is missing.*demo-packages\.txt"):
            easy_vqa.load("test")

    def test_baselines(self, splits: tuple[easy_vqa.Questions, easy_vqa.Questions]) -> None:
        train, test = splits
        majority = easy_vqa.majority_baseline(train, test)
        question_only = easy_vqa.question_only_baseline(train, test)
        assert set(majority) == {"yes"}
        by_type = easy_vqa.accuracy_by_type(majority, test.answers)
        assert by_type["all"] == pytest.approx(0.373, abs=0.001)
        assert by_type["shape"] == by_type["colour"] == 0
        by_type = easy_vqa.accuracy_by_type(question_only, test.answers)
        assert by_type["all"] == pytest.approx(0.670, abs=0.001)

    def test_question_only_on_ties_and_unseen_texts(self) -> None:
        train = easy_vqa.Questions(["a", "b", "b", "b"], ["no", "red", "no", "yes"], [0] * 4)
        test = easy_vqa.Questions(["b", "a", "new"], ["red", "no", "no"], [0] * 3)
        assert easy_vqa.question_only_baseline(train, test) == ["red", "no", "no"]

    def test_accuracy_by_type(self) -> None:
        truth = ["yes", "no", "circle", "red", "blue"]
        accuracy = easy_vqa.accuracy_by_type(["yes", "red", "circle", "red", "no"], truth)
        assert accuracy == {"all": 0.6, "yes/no": 0.5, "shape": 1.0, "colour": 0.5}
        with pytest.raises(ValueError, match="1 predictions for 2"):
            easy_vqa.accuracy_by_type(["yes"], ["yes", "no"])
        with pytest.raises(ValueError, match="'seven'"):
            easy_vqa.accuracy_by_type(["yes"], ["seven"])


class TestVision:
    def test_load_image_refuses_in_one_line(self, tmp_path: Path) -> None:
        text, cut = tmp_path / "text.png", tmp_path / "cut.png"
        text.write_text("no image")
        Image.effect_noise((64, 64), 50).save(cut)
        cut.write_bytes(cut.read_bytes()[:1000])
        for path in (tmp_path / "absent.png", tmp_path, text, cut):
            with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
                load_image(path)
            assert "\n" not in str(caught.value)

    def test_load_image_converts(self, tmp_path: Path) -> None:
        Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
        Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
        assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
        assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)

    def test_efficientnet(self) -> None:
        encoder = vision.load_efficientnet_lite0()
        assert encoder.width == 1280 and "579344248a93e230" in encoder.name
        encoder.model.train()
        image = encoder.transform(load_image(easy_vqa.image_paths("test")[0]))
        assert image.shape == (3, 128, 128) and image.mean().item() == pytest.approx(
            0.9105, abs=2e-4
        )
        features = encoder.encode(torch.stack([image, image * 0]))
        assert features.shape == (2, 1280) and features.dtype == torch.float32
        assert not features.requires_grad
        # of weights that name coffee, cat, tripod and palace in photographs
        assert features[0].mean().item() == pytest.approx(0.1987, abs=1e-3)
        assert features[0].max().item() == pytest.approx(3.7678, abs=1e-2)
        assert features[0].argmax().item() == 468

    @pytest.mark.parametrize(
        "file",
        [
            {"_a.weight": torch.ones(2)},
            {"_a.weight": torch.ones(2), "_a.bias": torch.ones(3)},
            {"_a.bias": torch.ones(2), "_a.weight": torch.ones(2)},
        ],
        ids=["number", "shape", "order"],
    )
    def test_other_weights(self, file: dict[str, Tensor]) -> None:
        model = {"a.weight": torch.zeros(2), "a.bias": torch.zeros(2)}
        with pytest.raises(ValueError, match=r"net\.pth holds"):
            vision.in_order(file, model, Path("net.pth"))

    def test_weights_that_are_none(self, tmp_path: Path) -> None:
        path = tmp_path / "net.pth"
        with pytest.raises(ValueError, match="does not exist"):
            vision.load_efficientnet_lite0(path)
        path.write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"net\.pth cannot be read"):
            vision.load_efficientnet_lite0(path)


class TestFeatures:
    def test_miss_then_hit(
        self, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = MeanColour()
        first = encode_images(tower(model), images, tmp_path / "c", batch_size=2)
        assert model.calls == 3 and "not cached" in capsys.readouterr().err
        np.testing.assert_array_equal(first, [(i, 10 * i, 255 - i) for i in range(5)])
        assert first.dtype == np.float32
        second = encode_images(tower(model), images, tmp_path / "c", batch_size=2)
        assert model.calls == 3 and ": cached in" in capsys.readouterr().err
        np.testing.assert_array_equal(second, first)
        torch.from_numpy(second).zero_()
        assert encode_images(tower(model), images, tmp_path / "c")[1, 1] == 10

    def test_only_what_is_new_is_encoded(self, images: list[Path], tmp_path: Path) -> None:
        def calls(paths: list[Path], name: str = "mean-colour") -> int:
            model = MeanColour()
            found = encode_images(tower(model, name), paths, tmp_path / "c", batch_size=1)
            assert found.tolist() == [np.array(load_image(path))[0, 0].tolist() for path in paths]
            return model.calls

        assert calls(images[:3]) == 3
        assert calls(images) == 2, "other images"
        assert calls(images[::-1]) == 0
        assert calls(images, "other") == 5, "another tower"
        Image.new("RGB", (4, 4), (1, 2, 3)).save(images[3])
        assert calls(images) == 1, "other contents"

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_cache_is_made_again(
        self, images: list[Path], tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        good = encode_images(tower(), images, tmp_path / "c")
        [path] = tmp_path.glob("c/*/*.safetensors")
        DAMAGE[damage](path)
        capsys.readouterr()
        again = encode_images(tower(), images, tmp_path / "c")
        np.testing.assert_array_equal(again, good)
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith(str(path))
        assert said[0].endswith(f"set aside as {path.name}.damaged")
        assert said[1].startswith("features of 5 images: 5 not cached yet")

    def test_an_interruption_loses_no_batch(self, images: list[Path], tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            encode_images(tower(MeanColour(failing=2)), images, tmp_path / "c", batch_size=2)
        kinds = {path.suffix for path in tmp_path.glob("c/**/*") if path.is_file()}
        assert kinds - {".json"} == {".safetensors"}, "nothing half written"
        model = MeanColour()
        encode_images(tower(model), images, tmp_path / "c", batch_size=1)
        assert model.calls == 3

    def test_atomic_file_keeps_the_old(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(RuntimeError), atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

    def test_refusals(self, images: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="paths is empty"):
            encode_images(tower(), [], tmp_path)
        with pytest.raises(ValueError, match=r"absent\.png"):
            encode_images(tower(), [tmp_path / "absent.png"], tmp_path)
        with pytest.raises(ValueError, match=r"\(5, 1, 48\); expected \(5, Nv, 3\)"):
            encode_images(tower(nn.Flatten()), images, tmp_path)
        with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
            encode_images(tower(), images, tmp_path, batch_size=0)
        nowhere = tower(Divided())
        with pytest.raises(ValueError, match=r"features of .*0\.png are not finite"):
            encode_images(nowhere, images, tmp_path)
