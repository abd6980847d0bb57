"""Rows to what a model's forward takes: texts as tokens, images, and what is trained on."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fused_route.training.data.answers import soft_targets
from fused_route.training.data.layouts import LAYOUTS
from fused_route.training.experiment.recipe import TaskRecipe
from fused_route.training.experiment.sampling import seed_of
from fused_route.training.experiment.tasks import TASKS
from fused_route.training.metrics.vqa_accuracy import normalized

IGNORED = -100
Row = dict[str, Any]


@dataclass(frozen=True)
class Batches:
    """Makes batches of rows of one task.

    Attributes:
        kind, compat: as in `Recipe`.
        tasks: the recipe's.
        tokenizer: the language model's.
        images: `CachedImages` or `PixelImages`.
        answers: of a classifier, its answers by number.
        seed: of what is drawn: answers, and parts of images. What is drawn for a row depends on it
            and on the row's index alone, so that a resumed run draws the same.
    """

    kind: str
    tasks: Mapping[str, TaskRecipe]
    tokenizer: PreTrainedTokenizerBase
    images: Callable[..., dict[str, Tensor]]
    answers: tuple[str, ...] = ()
    compat: str = "none"
    seed: int = 0

    def training(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch with labels: of a classifier soft targets (B, answers), else tokens (B, T).

        "name" is the task's; "weights" (B,) are the scores of sampled answers, for tasks that have
        them.
        """
        made = _MADE[self.kind](self, rows)
        return {"name": rows[0]["name"], **made, **self.images(rows, self.seed)}

    def prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch without answers, padded for generation: a decoder's on the left."""
        task = self.tasks[rows[0]["name"]]
        texts = [task.prompt + row["text"] for row in rows]
        if self.kind == "decoder":
            ids = [self._prompt_of(text, task) for text in texts]
            batch = _padded(ids, self.tokenizer.pad_token_id, side="left")
        else:
            batch = self._tokens(texts, task)
        return {**batch, **self.images(rows)}

    def candidates(self, rows: Sequence[Row], answer: str) -> dict[str, Any]:
        """A batch whose labels are the tokens of the same answer for every row."""
        told = [{**row, "answer": answer, "references": [answer]} for row in rows]
        batch = _MADE[self.kind](self, told)
        batch.pop("weights", None)
        return {**batch, **self.images(rows)}

    def text(self, ids: Tensor) -> list[str]:
        """Generated tokens as text."""
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.replace("\n", " ").strip() for text in decoded]

    def check_room(self, name: str) -> None:
        """Refuses lengths of a task that leave a decoder no room for what stands before the answer.

        Raises:
            ValueError: the beginning of text, the prompt and a token of the text do not fit.
        """
        task = self.tasks[name]
        asks = LAYOUTS[task.layout].task != "caption"
        if self.kind != "decoder" or self.compat == "eccv24" or not (asks or task.prompt):
            return
        room, needed = self._room(task), len(self._begun(task.prompt)) + asks
        if room < needed:
            raise ValueError(
                f"tasks.{name}: max_length={task.max_length} and max_new_tokens="
                f"{task.max_new_tokens} leave {room} tokens before a decoder's answer and its end, "
                f"the beginning, prompt and text take {needed} at least: raise max_length"
            )

    def reads(self, name: str) -> int | None:
        """Tokens of prompt and text that the model reads at most, those of its own among them;
        None where nothing is cut."""
        if self.kind != "decoder":
            return self.tasks[name].max_length
        return None if self.compat == "eccv24" else self._room(self.tasks[name])

    def cut(self, name: str, texts: Sequence[str]) -> list[bool]:
        """Which texts the model reads without their end."""
        most = self.reads(name)
        if most is None or not texts:
            return [False] * len(texts)
        prompt, decodes = self.tasks[name].prompt, self.kind == "decoder"
        made = self.tokenizer(
            [prompt + text for text in texts], add_special_tokens=not decodes, truncation=True,
            max_length=most + 1, return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        return [len(self._with_start(ids) if decodes else ids) > most for ids in made]

    def _tokens(self, texts: list[str], task: TaskRecipe) -> dict[str, Tensor]:
        made = self.tokenizer(
            texts, padding=True, truncation=True, max_length=task.max_length, return_tensors="pt"
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def _prompt_of(self, text: str, task: TaskRecipe) -> list[int]:
        """Tokens before a decoder's answer, the beginning of text first."""
        return self._ids(text) if self.compat == "eccv24" else self._begun(text)[: self._room(task)]

    def _begun(self, text: str) -> list[int]:
        return self._with_start(self._ids(text))

    def _with_start(self, ids: list[int]) -> list[int]:
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start  # Qwen has no other
        return ids if ids[:1] == [start] else [start, *ids]

    @staticmethod
    def _room(task: TaskRecipe) -> int:
        """Tokens before a decoder's answer and its end: of captions, the beginning of text."""
        return max(task.max_length - task.max_new_tokens - 1, 1)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids

    def _classifier(self, rows: Sequence[Row]) -> dict[str, Any]:
        task = self.tasks[rows[0]["name"]]
        batch: dict[str, Any] = self._tokens([task.prompt + row["text"] for row in rows], task)
        labels = torch.zeros(len(rows), len(self.answers))
        index, form = _indexed(self.answers), TASKS[LAYOUTS[task.layout].task].form
        for place, row in enumerate(rows):
            for answer, score in soft_targets(row["references"], index, form).items():
                labels[place, answer] = score
        return {**batch, "labels": labels}

    def _decoder(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Prompt, answer and the end of text; labels of the answer and its end."""
        task = self.tasks[rows[0]["name"]]
        if self.compat == "eccv24":
            return self._published(rows, task)
        end = self.tokenizer.eos_token_id
        answers, weights = self._drawn(rows)
        ids, labels = [], []
        for row, answer in zip(rows, answers, strict=True):
            before = task.prompt + row["text"]
            prompt = self._prompt_of(before, task)
            joins = row["text"] or (before and not before[-1].isspace())
            space = " " if answer and joins else ""
            said = [*self._ids(space + answer)[: task.max_length - len(prompt) - 1], end]
            ids.append(prompt + said)
            labels.append([IGNORED] * len(prompt) + said)
        batch = _padded(ids, self.tokenizer.pad_token_id)
        batch["labels"] = _padded(labels, IGNORED)["input_ids"]
        return batch | weights

    def _published(self, rows: Sequence[Row], task: TaskRecipe) -> dict[str, Any]:
        """As the published captioning trains: the first word and "!" without labels, every
        padding place (the end of text) with one."""
        end, length = self.tokenizer.eos_token_id, task.max_length
        ids = [self._ids(task.prompt + row["answer"])[:length] for row in rows]
        padded = torch.tensor([row + [end] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
        labels = padded.masked_fill(padded == 0, IGNORED)
        labels[:, 0] = IGNORED
        return {"input_ids": padded, "attention_mask": mask, "labels": labels}

    def _pair(self, rows: Sequence[Row]) -> dict[str, Any]:
        task = self.tasks[rows[0]["name"]]
        answers, weights = self._drawn(rows)
        batch: dict[str, Any] = self._tokens([task.prompt + row["text"] for row in rows], task)
        said = self.tokenizer(
            text_target=answers, padding=True, truncation=True, max_length=task.max_new_tokens,
            return_tensors="pt",
        )  # fmt: skip
        labels = said["input_ids"].masked_fill(said["attention_mask"] == 0, IGNORED)
        return {**batch, "labels": labels, **weights}

    def _drawn(self, rows: Sequence[Row]) -> tuple[list[str], dict[str, Tensor]]:
        """(the answers to train on, their weights)."""
        task = TASKS[LAYOUTS[self.tasks[rows[0]["name"]].layout].task]
        if task.targets == "answer":
            return [row["answer"] for row in rows], {}
        drawn, weights = [], []
        for row in rows:
            answers = list(dict.fromkeys(map(normalized, row["references"])))
            scores = soft_targets(row["references"], _indexed(answers))
            draw = random.Random(seed_of(self.seed, row["row"]))
            (place,) = draw.choices(list(scores), list(scores.values()))
            drawn.append(answers[place])
            weights.append(scores[place])
        return drawn, {"weights": torch.tensor(weights)}


_MADE: dict[str, Callable[[Batches, Sequence[Row]], dict[str, Any]]] = {
    "classifier": Batches._classifier,
    "decoder": Batches._decoder,
    "encoder-decoder": Batches._pair,
}


def _indexed(answers: Sequence[str]) -> dict[str, int]:
    return {answer: place for place, answer in enumerate(answers)}


def _padded(ids: list[list[int]], padding: Any, side: str = "right") -> dict[str, Tensor]:
    """input_ids and attention_mask (B, T)."""
    length = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        rest = length - len(row)
        filled, ones, zeros = [padding] * rest, [1] * len(row), [0] * rest
        rows.append(filled + row if side == "left" else row + filled)
        masks.append(zeros + ones if side == "left" else ones + zeros)
    shape = (len(ids), length)
    tokens = torch.tensor(rows, dtype=torch.long).reshape(shape)
    return {"input_ids": tokens, "attention_mask": torch.tensor(masks).long().reshape(shape)}
