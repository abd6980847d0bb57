"""Parts of the main job: splits, batches, the model, training, folders."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_demo import first, first_images_only, made_up_split
from torch import Tensor

from fused_route import VisualProjector
from fused_route.training.data import easy_vqa
from fused_route.training.data.images import load_image
from fused_route.training.demo import compare
from fused_route.training.demo.models import VqaClassifier, load_encoder
from fused_route.training.demo.task import encoder_directory
from fused_route.training.demo.vision import load_efficientnet_lite0
from fused_route.training.projector import fit_projector


@pytest.mark.parametrize("prefix", [False, True])
def test_padding_does_not_change_a_prediction(prefix: bool) -> None:
    encoder, tokenizer = load_encoder(encoder_directory(), 2)
    model = VqaClassifier(encoder, 5, prefix=prefix).eval()
    short = tokenizer(["what is it?"], return_tensors="pt")
    padded = tokenizer(["what is it?"], return_tensors="pt", padding="max_length", max_length=20)
    features = torch.randn(1, 384)
    one, other = (
        model(tokens["input_ids"], tokens["attention_mask"], features)["logits"]
        for tokens in (short, padded)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_prefix_is_read_by_the_text_and_not_scored_itself() -> None:
    encoder, tokenizer = load_encoder(encoder_directory(), 2)
    model = VqaClassifier(encoder, 5, prefix=True).eval()
    tokens = tokenizer(["what is it?"], return_tensors="pt")
    x_r = torch.randn(1, 384)
    words = encoder.get_input_embeddings()(tokens["input_ids"])
    mask = torch.ones(1, 1 + words.shape[1], dtype=torch.int64)
    with torch.no_grad():
        states = encoder(
            inputs_embeds=torch.cat([x_r.unsqueeze(1), words], 1), attention_mask=mask
        ).last_hidden_state
        expected = model.head(states[:, 1:].mean(1))
        found = model(tokens["input_ids"], tokens["attention_mask"], x_r)["logits"]
    torch.testing.assert_close(found, expected)


def test_splits_are_what_the_data_set_says(small: list[Path]) -> None:
    load, paths = easy_vqa.load, easy_vqa.image_paths
    _, tokenizer = load_encoder(encoder_directory(), 1)
    tower = load_efficientnet_lite0()
    with first_images_only():
        splits = compare.load_splits(tower, tokenizer, small[1])
    names: tuple[easy_vqa.Split, ...] = ("train", "test")
    for name, split in zip(names, splits, strict=True):
        assert split.questions == first(load(name)) and len(split) == len(split.questions.texts)
        labels = easy_vqa.answer_labels()
        assert [labels[i] for i in split.labels.tolist()] == split.questions.answers
        text = tokenizer.decode(split.input_ids[5], skip_special_tokens=True)
        assert text.replace(" ", "") == split.questions.texts[5].replace(" ", "")
        image = int(split.images[5])
        expected = tower.encode(tower.transform(load_image(paths(name)[image])).unsqueeze(0))[0]
        torch.testing.assert_close(split.features[image], expected, rtol=1e-4, atol=1e-4)


def test_every_arm_is_run_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Tensor]] = []
    build = compare.build

    def watch(*arguments: Any) -> Any:
        _, attached = build(*arguments)
        starts.append({name: p.clone() for name, p in attached.tensors().items()})
        raise RuntimeError("seen enough")

    monkeypatch.setattr(compare, "build", watch)
    split = made_up_split()
    for arm in (compare.Arm("mul"), compare.Arm("none", prefix=True)):
        with pytest.raises(RuntimeError, match="seen enough"):
            compare.run_arm(arm, 3, compare.Settings(layers=1), split, split)
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_training_that_diverges_says_so(tmp_path: Path) -> None:
    split = made_up_split()
    settings = compare.Settings(steps=8, batch=2, layers=1, lr=1e30, out=tmp_path)
    model, _ = compare.build(compare.Arm("gram"), settings, split)
    with pytest.raises(ValueError, match=r"lr=1e\+30: training diverged"):
        compare.fit(model, split, split, settings, seed=0)


def test_the_image_reaches_the_answer_only_through_what_an_arm_has() -> None:
    _, tokenizer = load_encoder(encoder_directory(), 1)
    tokens = tokenizer(["is there a circle?", "what is it?"], padding=True, return_tensors="pt")

    def scores(arm: compare.Arm, features: Tensor) -> Tensor:
        torch.manual_seed(0)
        none = torch.empty(0)
        features_seen = torch.randn(50, 400)
        fake = compare.Split(easy_vqa.Questions([], [], []), none, none, none, none, features_seen)
        model, attached = compare.build(arm, compare.Settings(layers=1), fake)
        for layer in attached.layers.values():
            torch.nn.init.normal_(layer.B)
        return model.eval()(tokens["input_ids"], tokens["attention_mask"], features)["logits"]

    one, other = torch.randn(2, 400), torch.randn(2, 400)
    for arm in (compare.Arm("none"), compare.Arm("mul"), compare.Arm("none", prefix=True)):
        sees = arm.route != "none" or arm.prefix
        assert torch.equal(scores(arm, one), scores(arm, other)) != sees, arm


def test_projector_is_fitted_to_mean_zero_and_mean_square_one() -> None:
    features = torch.randn(500, 20) * torch.linspace(0.1, 3, 20) + 5
    projector = VisualProjector(20, {8})
    fit_projector(projector, [features])
    projected = projector(features)[8]
    torch.testing.assert_close(projected.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert projected.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    covariance = projected.T @ projected / 500
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3 and (covariance.diag().diff() <= 1e-4).all()


def test_mul_learns_what_none_cannot(small: list[Path]) -> None:
    """On 60 images, 120 steps: routing fits training answers that the text alone cannot."""
    tower = load_efficientnet_lite0()
    _, tokenizer = load_encoder(encoder_directory(), 1)
    with first_images_only():
        train, test = compare.load_splits(tower, tokenizer, small[1])
    settings = compare.Settings(steps=120, batch=32, layers=1, out=small[0])
    fitted = {}
    for route in ("none", "mul"):
        torch.manual_seed(0)
        model, _ = compare.build(compare.Arm(route), settings, train)
        compare.fit(model, train, test, settings, seed=0)
        every = torch.arange(len(train))
        right = compare.predict(model, train, every) == train.labels
        fitted[route] = float(right.float().mean())
    prior = easy_vqa.question_only_baseline(train.questions, train.questions)
    ceiling = easy_vqa.accuracy_by_type(prior, train.questions.answers)["all"]
    assert fitted["none"] <= ceiling < fitted["mul"]


def test_arms_start_from_the_same_values_and_differ_in_nothing_else() -> None:
    none = torch.empty(0)
    every = torch.randn(50, 400)
    train = compare.Split(easy_vqa.Questions([], [], []), none, none, none, none, every)
    starts = []
    for arm in compare.ARMS:
        torch.manual_seed(0)
        _, attached = compare.build(arm, compare.Settings(layers=1), train)
        starts.append({n: p.clone() for n, p in attached.tensors().items()})
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in starts[0])


def test_a_batch_is_trimmed_to_its_longest_question_and_no_further() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(1, 13).view(3, 4) * mask
    split = compare.Split(
        easy_vqa.Questions([], [], []), ids, mask, torch.tensor([1, 0, 1]),
        torch.tensor([4, 5, 6]), torch.tensor([[0.0], [1.0]]),
    )  # fmt: skip
    batch = split.batch(torch.tensor([1, 0]))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["features"].tolist() == [[0.0], [1.0]] and batch["labels"].tolist() == [5, 4]


def test_earlier_results_never_take_each_others_name(tmp_path: Path) -> None:
    out, kept = tmp_path / "demo", set()
    for number in range(3):
        out.mkdir()
        (out / "report.md").write_text(str(number))
        os.utime(out, (0, 0))  # all written in the same second
        earlier = compare.keep_earlier(out)
        assert earlier is not None
        kept.add(earlier)
    assert {(path / "report.md").read_text() for path in kept} == {"0", "1", "2"}
    assert compare.keep_earlier(out) is None
