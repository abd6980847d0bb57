"""A decoder that learns several tasks: every batch of a step counts as much as another."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from experiments import save_all, tasks, written

from fused_route.training.experiment.arguments import arguments_of
from fused_route.training.experiment.build import build
from fused_route.training.experiment.recipe_file import read_recipe
from fused_route.training.experiment.run import encode, open_data
from fused_route.training.experiment.trainer import ExperimentTrainer

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> ExperimentTrainer:
    """Of answers with weights and of captions."""
    folder = save_all(tmp_path_factory.mktemp("mixed"))
    path = written(folder, "gpt2", "lora", "mixed")
    told = yaml.safe_load(path.read_text())
    both = tasks(folder, "bart")
    told["tasks"] = {name: {**both[name], "max_length": 60} for name in ("vqa", "caption")}
    told["adapter"]["dropout"] = 0.0
    path.write_text(yaml.safe_dump(told))
    recipe = read_recipe(path)
    arguments = arguments_of(recipe, validated=True)
    data = open_data(recipe)
    built = build(recipe, data.answers)
    encode(built, data.images())
    return ExperimentTrainer(built, arguments, data.train, data.validation)


def batch(trainer: ExperimentTrainer, name: str, number: int) -> dict[str, Any]:
    assert trainer.rows is not None
    rows = [trainer.rows[place] for place in trainer.rows.of(name)[4 * number : 4 * number + 4]]
    return trainer.built.batches().training(rows)


def gradients(trainer: ExperimentTrainer, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Of one step that accumulates a batch of each of these tasks."""
    model = trainer.built.model.eval()
    model.zero_grad()
    made = (batch(trainer, name, number) for number, name in enumerate(names))
    batches, tokens = trainer.get_batch_samples(iter(list(made)), len(names), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    for inputs in batches:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "train", lambda *_: model)  # without dropout
            trainer.training_step(model, inputs, tokens)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


@pytest.mark.parametrize("names", [("vqa", "caption"), ("caption", "vqa"), ("caption",) * 2])
def test_a_step_is_the_mean_of_its_batches(
    names: tuple[str, str], trainer: ExperimentTrainer
) -> None:
    model = trainer.built.model
    together = gradients(trainer, names)
    expected = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for number, name in enumerate(names):
        model.zero_grad()
        inputs = batch(trainer, name, number)
        trainer.built.tuned.use(inputs.pop("name"))
        trainer.compute_loss(model, inputs).backward()  # its own mean
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[key] += parameter.grad / len(names)
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-7, msg=key)


def test_one_task_is_the_mean_of_its_tokens(trainer: ExperimentTrainer) -> None:
    """As if accumulated batches were one."""
    one = {"caption": trainer.built.recipe.tasks["caption"]}
    built = replace(trainer.built, recipe=replace(trainer.built.recipe, tasks=one))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "built", built)
        batches = [batch(trainer, "caption", number) for number in (0, 1)]
        _, tokens = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    labels = sum(int(made["labels"][:, 1:].ne(-100).sum()) for made in batches)
    assert int(tokens) == labels > 0
