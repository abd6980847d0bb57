"""The main job, small, with the real models; the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_demo import ARMS, first, first_images_only
from test_attach import gpt2

from fused_route import RoutedConfig, attach
from fused_route.training import cli
from fused_route.training.data import easy_vqa
from fused_route.training.data.images import load_image
from fused_route.training.demo import compare
from fused_route.training.demo.models import VqaClassifier, load_encoder
from fused_route.training.demo.predict import answer
from fused_route.training.demo.task import encoder_directory
from fused_route.training.demo.vision import load_efficientnet_lite0
from fused_route.training.packages import missing


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


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    attach(gpt2(), RoutedConfig(["c_attn"])).save(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "nowhere.png"}, "image must be a picture's file: nowhere.png does not exist"),
        ({"--image": __file__}, "is not an image"),
        ({"--image": ""}, "image must be a picture's file: image is empty"),
        ({"--question": "  "}, "question is empty"),
        ({"--question": "what color " * 3000}, "tokens; the model takes 512"),
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


def test_predict_answers_from_the_saved_adapter(
    small: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    image, question = easy_vqa.image_paths("test")[0], "what color is the shape?"
    for arm in ARMS:
        ranked = answer(earlier / arm.folder, image, question)
        assert sum(p for _, p in ranked) == pytest.approx(1.0)
        assert {text for text, _ in ranked} == set(easy_vqa.answer_labels())
    adapter = str(earlier / ARMS[-1].folder)
    given = ["--adapter", adapter, "--image", str(image), "--question", question]
    assert cli.main(["predict", *given]) == 0
    printed = capsys.readouterr()
    assert printed.out.split()[0] == ranked[0][0] and "next: fused-route train" in printed.err


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.folder)
def test_predict_equals_the_trained_model(arm: compare.Arm, small: list[Path]) -> None:
    """Loaded by hand, the model gives predict's probabilities; its answers are the report's."""
    (earlier,) = (p for p in small[0].parent.iterdir() if p != small[0])
    questions, paths = first(easy_vqa.load("test")), easy_vqa.image_paths("test")
    image, question = paths[questions.image_ids[7]], questions.texts[7]
    encoder, tokenizer = load_encoder(encoder_directory(), compare.Settings().layers)
    model = VqaClassifier(encoder, 13, prefix=arm.prefix)
    attach(model, earlier / arm.folder)
    tower = load_efficientnet_lite0()
    features = tower.encode(tower.transform(load_image(image)).unsqueeze(0))
    tokens = tokenizer([question], return_tensors="pt")
    with torch.no_grad():
        scores = model.eval()(tokens["input_ids"], tokens["attention_mask"], features)["logits"]
    expected = dict(zip(easy_vqa.answer_labels(), scores.softmax(-1)[0].tolist(), strict=True))
    found = answer(earlier / arm.folder, image, question)
    assert dict(found) == pytest.approx(expected, abs=1e-6)
    record = json.loads((earlier / "results.json").read_text())
    (run,) = (run for run in record["results"] if run["name"] == arm.name)
    assert found[0][0] == run["predictions"][7]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", 2),
        ("layers", True),
        ("vision", "another tower"),
        ("encoder", "another model"),
        ("answers", 13),
        ("answers", "yesno"),
        ("answers", [1, 2]),
        ("prefix", "no"),
        ("adapter", "of another arm"),
        ("surplus", 1),
    ],
)
def test_predict_refuses_a_task_that_does_not_fit(
    name: str, value: object, small: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (small[0] / "none").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    task = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**task, name: value}))
    image = str(easy_vqa.image_paths("test")[0])
    arguments = ["predict", "--adapter", str(tmp_path), "--image", image, "--question", "is it?"]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_keeps_what_it_has_and_what_was_there(
    small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run_arm = [], compare.run_arm

    def interrupted(arm: compare.Arm, *rest: Any) -> Any:
        calls.append(arm)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_arm(arm, *rest)

    monkeypatch.setattr(compare, "run_arm", interrupted)
    out = tmp_path / "demo"
    settings = compare.Settings(steps=1, batch=8, layers=1, out=out, cache=small[1])
    with first_images_only(), pytest.raises(KeyboardInterrupt):
        compare.run(settings, ARMS)
    record = json.loads((out / "results.json").read_text())
    assert [run["name"] for run in record["results"]] == [ARMS[0].name]
    calls[:] = [ARMS[0]]  # now interrupted before its first arm is trained
    with first_images_only(), pytest.raises(KeyboardInterrupt):
        compare.run(settings, ARMS)
    assert (out / ARMS[0].folder / "task.json").is_file() and list(tmp_path.iterdir()) == [out]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        compare.Settings(out=tmp_path)


def test_a_missing_package_is_named_with_its_command() -> None:
    assert "--require-hashes -r" in str(missing("easy_vqa"))
    assert str(missing("timm.data")).endswith("pip install 'fused-route[train]'")


def test_several_seeds_give_a_mean_and_a_spread(small: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "full"
    settings = compare.Settings(steps=1, batch=8, layers=1, seeds=2, out=out, cache=small[1])
    with first_images_only():
        report = compare.run(settings, ARMS[:2]).read_text()
    assert "±" in report and (out / "none-seed1" / "task.json").is_file()
    record = json.loads((out / "results.json").read_text())
    assert [(run["name"], run["seed"]) for run in record["results"]] == [
        ("none", 0), ("none", 1), ("gram (unit)", 0), ("gram (unit)", 1),
    ]  # fmt: skip
    by_seed = [run["accuracy"]["all"] for run in record["results"][:2]]
    assert record["arms"][0]["mean"]["all"] == pytest.approx(sum(by_seed) / 2)
