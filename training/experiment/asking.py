"""A run's model on images of your own."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.build import Built, check_length, visual_tokens
from fused_route.training.experiment.decoding import Asking, answers
from fused_route.training.experiment.folder import open_run
from fused_route.training.experiment.tasks import TASKS

AT_ONCE = 32  # images that go through the model together


def answer(run: Path, images: Sequence[Path], text: str, task: str | None = None) -> list[str]:
    """The model's answer to a question, or its verdict on a sentence, about one or two images.

    Args:
        run: folder of a run, or of an adapter in it.
        images: as many as the task's rows have.
        text: the question or sentence, without the task's prompt.
        task: of the recipe; None: the first that takes texts.

    Returns:
        The answer; of a classifier its five likeliest, with probabilities, the best first.

    Raises:
        ValueError: no run, no such task, an image that cannot be read, or no text.
    """
    if not text.strip():
        raise ValueError("question is empty")
    built = open_run(run, features_from="tower")
    name = _task(built, task, captions=False)
    takes = TASKS[LAYOUTS[built.recipe.tasks[name].layout].task].images
    if len(images) != takes:
        raise ValueError(f"image: task {name} is about {takes}, got {len(images)} files")
    row = {"id": "0", "row": 0, "name": name, "text": text, "paths": list(images)}
    asking = Asking(built.batches())
    if asking.batches.cut(name, [text])[0]:
        print(
            f"question: its end was left out, the run reads {asking.batches.reads(name)} tokens "
            f"(tasks.{name}.max_length)",
            file=sys.stderr,
        )
    built.tuned.use(name)
    questions = asking([row])
    if built.recipe.model.kind != "classifier":
        return answers(built.model, asking.batches, questions)
    with torch.no_grad():
        scores = built.model(**questions.inputs[0]).logits[0].sigmoid()
    best = scores.topk(min(5, len(built.answers)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [f"{built.answers[place]}  ({score:.1%})" for place, score in found]


def captions(
    run: Path, images: Sequence[Path], task: str | None = None, **generation: Any
) -> list[str]:
    """A caption for each image.

    Args:
        run, task: as in `answer`; None: the first task of captions.
        generation: of transformers' `generate`, in place of the task's num_beams and
            max_new_tokens.

    Raises:
        ValueError: no run, no task of captions, or an image that cannot be read.
    """
    built = open_run(run, features_from="tower")
    name = _task(built, task, captions=True)
    asked = replace(
        built.recipe.tasks[name],
        max_new_tokens=generation.get("max_new_tokens", built.recipe.tasks[name].max_new_tokens),
    )
    visual = visual_tokens(built.recipe, name, built.encoder)
    check_length(name, asked, built.recipe.model.kind, built.model.language, visual)
    asking = Asking(built.batches())
    built.tuned.use(name)
    found: list[str] = []
    for start in range(0, len(images), AT_ONCE):
        rows = [
            {"id": str(path), "row": start + i, "name": name, "text": "", "paths": [path]}
            for i, path in enumerate(images[start : start + AT_ONCE])
        ]
        found += answers(built.model, asking.batches, asking(rows), **generation)
    return found


def _task(built: Built, task: str | None, *, captions: bool) -> str:
    tasks = built.recipe.tasks
    fitting = [n for n, t in tasks.items() if (LAYOUTS[t.layout].task == "caption") == captions]
    if task is None and fitting:
        return fitting[0]
    if task not in fitting:
        what = "captions" if captions else "questions"
        raise ValueError(
            f"task={task!r}: the run has {', '.join(fitting) or 'none'} of {what}, it was trained "
            f"on {', '.join(tasks)}"
        )
    return task
