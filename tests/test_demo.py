"""The main job on the first images of easy-VQA with the real models, and the command line."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_attach import gpt2
from torch import Tensor

from fused_route import RoutedConfig, VisualProjector, attach
from fused_route.training import cli, demo, easy_vqa
from fused_route.training.models import VqaClassifier, fit_projector, load_encoder
from fused_route.training.predict import answer
from fused_route.training.vision import load_efficientnet_lite0

IMAGES = 60
ARMS = (demo.Arm("none"), demo.Arm("gram", "unit"), demo.Arm("mul", prefix=True))


def first(questions: easy_vqa.Questions) -> easy_vqa.Questions:
    kept = [i for i, image in enumerate(questions.image_ids) if image < IMAGES]
    return easy_vqa.Questions(
        [questions.texts[i] for i in kept],
        [questions.answers[i] for i in kept],
        [questions.image_ids[i] for i in kept],
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> "list[Path]":
    """Runs the demo for a few steps on few images; [folder of results, cache of features]."""
    load, paths = easy_vqa.load, easy_vqa.image_paths
    folder, cache = tmp_path_factory.mktemp("runs") / "demo", tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", lambda split: first(load(split)))
        patch.setattr(easy_vqa, "image_paths", lambda split: paths(split)[:IMAGES])
        settings = demo.Settings(steps=3, batch=16, out=folder, cache=cache)
        report = demo.run(settings, ARMS)
        assert report == folder / "report.md"
        demo.run(replace(settings, steps=2), ARMS[:1])  # again, into the same folder
    return [folder, cache]


def test_demo_leaves_a_report_and_adapters(small: list[Path]) -> None:
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])  # nothing is lost
    assert earlier.name.startswith("demo-20")
    report = (earlier / "report.md").read_text()
    for arm in ARMS:
        assert arm.name in report
        assert (earlier / arm.folder / "adapter_model.safetensors").is_file()
    for picture in ("learning_curves.png", "accuracy.png", "answers.png"):
        assert f"({picture})" in report
        with Image.open(earlier / picture) as image:
            assert image.width > 600
    assert "none" in (small[0] / "report.md").read_text()


def test_arms_train_the_same_number_of_parameters(small: list[Path]) -> None:
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    record = json.loads((earlier / "results.json").read_text())
    counts = {run["trainable"] for run in record["results"]}
    assert len(record["results"]) == len(ARMS)
    # q and v of 3 layers: A (8, 384) and B (384, 8); a head from 384 to 13
    assert counts == {6 * 2 * 8 * 384 + 384 * 13 + 13}


def test_baselines_are_fitted_on_training_questions(small: list[Path]) -> None:
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    baselines = json.loads((earlier / "results.json").read_text())["baselines"]
    train, test = first(easy_vqa.load("train")), first(easy_vqa.load("test"))
    for name, fit in (
        ("question only", easy_vqa.question_only_baseline),
        ("majority answer", easy_vqa.majority_baseline),
    ):
        expected = easy_vqa.accuracy_by_type(fit(train, test), test.answers)
        assert baselines[name]["all"] == pytest.approx(expected["all"])


def test_arms_start_from_the_same_values_and_differ_in_nothing_else() -> None:
    none = torch.empty(0)
    train = demo.Split(easy_vqa.Questions([], [], []), none, none, none, none, torch.randn(50, 400))
    starts = []
    for arm in demo.ARMS:
        torch.manual_seed(0)
        _, attached = demo.build(arm, demo.Settings(layers=1), train)
        starts.append({n: p.clone() for n, p in attached.tensors().items()})
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in starts[0])


def test_a_batch_is_trimmed_to_its_longest_question_and_no_further() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(1, 13).view(3, 4) * mask
    split = demo.Split(
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
        earlier = demo.keep_earlier(out)
        assert earlier is not None
        kept.add(earlier)
    assert {(path / "report.md").read_text() for path in kept} == {"0", "1", "2"}
    assert demo.keep_earlier(out) is None


def test_predict_answers_from_the_saved_adapter(
    small: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    image, question = easy_vqa.image_paths("test")[0], "what color is the shape?"
    for arm in ARMS:
        ranked = answer(earlier / arm.folder, image, question)
        assert sum(p for _, p in ranked) == pytest.approx(1.0)
        assert {text for text, _ in ranked} == set(easy_vqa.answer_labels())
    status = cli.main(
        [
            "predict",
            "--adapter",
            str(earlier / "none"),
            "--image",
            str(image),
            "--question",
            "is it?",
        ]
    )
    assert status == 0
    assert capsys.readouterr().out.split()[0] in easy_vqa.answer_labels()


def test_predict_equals_the_trained_model(small: list[Path]) -> None:
    """What is saved is what was tested: same answers as in results.json."""
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    record = json.loads((earlier / "results.json").read_text())
    questions, paths = first(easy_vqa.load("test")), easy_vqa.image_paths("test")
    for run in record["results"][1:]:
        folder = earlier / {arm.name: arm.folder for arm in ARMS}[run["name"]]
        for i in (0, 7):
            ranked = answer(folder, paths[questions.image_ids[i]], questions.texts[i])
            assert ranked[0][0] == run["predictions"][i]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    attach(gpt2(), RoutedConfig(["c_attn"])).save(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "nowhere.png"}, "nowhere.png does not exist"),
        ({"--image": __file__}, "is not an image"),
        ({"--question": "  "}, "question is empty"),
        ({"--adapter": "nowhere"}, "adapter='nowhere' is no directory"),
        ({"--adapter": "foreign"}, "is an adapter for GPT2LMHeadModel; predict runs VqaClassifier"),
        ({"--adapter": "empty"}, "not an adapter checkpoint"),
    ],
)
def test_predict_refuses_in_one_line(
    change: dict[str, str],
    message: str,
    foreign: Path,
    small: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (foreign.parent / "empty").mkdir()
    given = {
        "--adapter": str(small[0] / "none"),
        "--image": str(easy_vqa.image_paths("test")[0]),
        "--question": "is there a circle?",
        **change,
    }
    if given["--adapter"] in ("foreign", "empty"):
        given["--adapter"] = str(foreign.parent / given["--adapter"])
    assert cli.main(["predict", *(part for item in given.items() for part in item)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


@pytest.mark.parametrize("name", ["layers", "vision", "encoder"])
def test_predict_refuses_an_adapter_for_other_models(
    name: str, small: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (small[0] / "none").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    task = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**task, name: 2 if name == "layers" else "x"}))
    image = str(easy_vqa.image_paths("test")[0])
    arguments = ["predict", "--adapter", str(tmp_path), "--image", image, "--question", "is it?"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["demo", "--steps", "0"], ["demo", "--lr", "x"], [], ["fly"]]
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2 and "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "nan"], "lr must be a finite number"),
        (["--lr", "-1"], "lr must be greater than 0"),
        (["--out", __file__], "is a file"),
    ],
)
def test_demo_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--steps", "1", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err


def test_the_image_reaches_the_answer_only_through_what_an_arm_has() -> None:
    _, tokenizer = load_encoder(demo.encoder_directory(), 1)
    tokens = tokenizer(["is there a circle?", "what is it?"], padding=True, return_tensors="pt")

    def scores(arm: demo.Arm, features: Tensor) -> Tensor:
        torch.manual_seed(0)
        none = torch.empty(0)
        features_seen = torch.randn(50, 400)
        fake = demo.Split(easy_vqa.Questions([], [], []), none, none, none, none, features_seen)
        model, attached = demo.build(arm, demo.Settings(layers=1), fake)
        for layer in attached.layers.values():
            torch.nn.init.normal_(layer.B)
        return model.eval()(tokens["input_ids"], tokens["attention_mask"], features)["logits"]

    one, other = torch.randn(2, 400), torch.randn(2, 400)
    for arm in (demo.Arm("none"), demo.Arm("mul"), demo.Arm("none", prefix=True)):
        sees = arm.route != "none" or arm.prefix
        assert torch.equal(scores(arm, one), scores(arm, other)) != sees, arm


def test_projector_is_fitted_to_mean_zero_and_mean_square_one() -> None:
    features = torch.randn(500, 20) * torch.linspace(0.1, 3, 20) + 5
    projector = VisualProjector(20, {8})
    fit_projector(projector, features)
    projected = projector(features)[8]
    torch.testing.assert_close(projected.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert projected.square().mean().item() == pytest.approx(1.0, rel=1e-4)
    covariance = projected.T @ projected / 500
    off = covariance - covariance.diag().diag()
    assert off.abs().max() < 1e-3 and (covariance.diag().diff() <= 1e-4).all()


def test_padding_does_not_change_a_prediction() -> None:
    encoder, tokenizer = load_encoder(demo.encoder_directory(), 2)
    model = VqaClassifier(encoder, 5).eval()
    short = tokenizer(["what is it?"], return_tensors="pt")
    padded = tokenizer(["what is it?"], return_tensors="pt", padding="max_length", max_length=20)
    features = torch.randn(1, 10)
    one, other = (
        model(t["input_ids"], t["attention_mask"], features)["logits"] for t in (short, padded)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_mul_learns_what_none_cannot(small: list[Path]) -> None:
    """On 60 images, 120 steps: routing fits training answers that the text alone cannot."""
    tower = load_efficientnet_lite0()
    _, tokenizer = load_encoder(demo.encoder_directory(), 1)
    load, paths = easy_vqa.load, easy_vqa.image_paths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", lambda split: first(load(split)))
        patch.setattr(easy_vqa, "image_paths", lambda split: paths(split)[:IMAGES])
        train, test = demo.load_splits(tower, tokenizer, small[1])
    settings = demo.Settings(steps=120, batch=32, layers=1, out=small[0])
    fitted = {}
    for route in ("none", "mul"):
        torch.manual_seed(0)
        model, _ = demo.build(demo.Arm(route), settings, train)
        demo.fit(model, train, test, settings, seed=0)
        every = torch.arange(len(train))
        right = demo.predict(model, train, every) == train.labels
        fitted[route] = float(right.float().mean())
    prior = easy_vqa.question_only_baseline(train.questions, train.questions)
    ceiling = easy_vqa.accuracy_by_type(prior, train.questions.answers)["all"]
    assert fitted["none"] <= ceiling < fitted["mul"]
