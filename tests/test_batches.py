"""What a model is trained on: tokens, labels, sampled answers, images, and which rows together."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from model_folders import tokenizer
from PIL import Image
from torch import Tensor

from fused_route.training.experiment.batches import IGNORED, Batches
from fused_route.training.experiment.images import PixelImages
from fused_route.training.experiment.recipe import TaskRecipe
from fused_route.training.experiment.sampling import TaskBatches, in_order

TEN = ["red"] * 5 + ["blue"] * 3 + ["Dark red"] + ["the red"]


def no_images(rows: Any, seed: int | None = None) -> dict[str, Tensor]:
    return {}


def row(number: int = 0, name: str = "vqa", **values: Any) -> dict[str, Any]:
    given = {"text": "what color?", "answer": "red", "references": TEN, "paths": []}
    return {"id": str(number), "row": number, "name": name, **given, **values}


def batches(kind: str, model: str, **settings: Any) -> Batches:
    own = tokenizer(model)
    if own.pad_token is None:
        own.pad_token = own.eos_token
    tasks = {
        "vqa": TaskRecipe("vqav2", prompt="vqa: ", max_length=30, max_new_tokens=8),
        "gqa": TaskRecipe("gqa", prompt="gqa: "),
        "nlvr2": TaskRecipe("nlvr2"),
        "caption": TaskRecipe("coco", max_length=12),
    }
    return Batches(kind, tasks, own, no_images, **settings)


class TestClassifier:
    def test_targets_are_soft_scores(self) -> None:
        made = batches("classifier", "roberta", answers=("blue", "red", "green"))
        batch = made.training([row(), row(1, references=["green"])])
        # "the red" counts as red: six of ten; three of ten say blue
        assert torch.equal(batch["labels"], torch.tensor([[0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        assert batch["name"] == "vqa" and "weights" not in batch
        assert made.tokenizer.decode(batch["input_ids"][0]) == "<s>vqa: what color?</s>"

    def test_answers_of_gqa_are_as_they_are(self) -> None:
        """Its accuracy compares them so."""
        made = batches("classifier", "roberta", answers=("t-shirt", "t shirt", "2", "two"))
        rows = [row(0, "gqa", references=["t-shirt"]), row(1, "gqa", references=["two"])]
        assert made.training(rows)["labels"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]

    def test_long_questions_are_cut(self) -> None:
        made = batches("classifier", "roberta", answers=("a", "b"))
        assert made.training([row(text="red " * 99)])["input_ids"].shape == (1, 30)


class TestDecoder:
    def test_every_word_of_the_answer_and_its_end_are_trained_and_nothing_else(self) -> None:
        made = batches("decoder", "gpt2")
        rows = [row(name="gqa", answer="red circle"), row(1, "gqa", text="a?", answer="yes")]
        batch = made.training(rows)
        end = made.tokenizer.eos_token_id
        for place, answer in enumerate((" red circle", " yes")):
            labels, ids = batch["labels"][place], batch["input_ids"][place]
            said = labels[labels != IGNORED]
            assert made.tokenizer.decode(said[:-1]) == answer and said[-1] == end
            assert torch.equal(ids[labels != IGNORED], said)
            assert batch["attention_mask"][place][labels != IGNORED].all()
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()

    def test_a_caption_starts_from_the_beginning_of_text(self) -> None:
        made = batches("decoder", "gpt2")
        batch = made.training([row(name="caption", text="", answer="a red circle")])
        start = made.tokenizer.bos_token_id
        assert batch["input_ids"][0, 0] == start and batch["labels"][0, 0] == IGNORED
        assert batch["labels"][0, 1] == batch["input_ids"][0, 1]  # the first word has a label

    @pytest.mark.parametrize("prompt", ["a picture of", "a picture of "])
    def test_a_caption_goes_on_with_its_prompt(self, prompt: str) -> None:
        made = batches("decoder", "gpt2")
        task = replace(made.tasks["caption"], max_length=30, max_new_tokens=9, prompt=prompt)
        made = replace(made, tasks={"caption": task})
        batch = made.training([row(name="caption", text="", answer="red circle")])
        (text,) = made.text(batch["input_ids"])
        assert text == "a picture of red circle"
        labels = batch["labels"][0]
        assert made.text(labels[labels != IGNORED].unsqueeze(0)) == ["red circle"]

    def test_a_tokenizer_without_a_beginning_starts_from_the_end(self) -> None:
        made = batches("decoder", "gpt2")
        made.tokenizer.bos_token = None
        batch = made.training([row(name="caption", text="", answer="a red circle")])
        assert batch["input_ids"][0, 0] == made.tokenizer.eos_token_id
        assert batch["labels"][0, 1] == batch["input_ids"][0, 1]
        assert made.prompts([row(name="caption", text="")])["input_ids"].shape == (1, 1)

    def test_a_long_caption_keeps_its_end(self) -> None:
        made = batches("decoder", "gpt2")
        batch = made.training([row(name="caption", text="", answer="circle " * 40)])
        assert batch["input_ids"].shape == (1, 12)
        assert batch["labels"][0, -1] == made.tokenizer.eos_token_id

    def test_prompts_are_padded_on_the_left(self) -> None:
        made = batches("decoder", "gpt2")
        batch = made.prompts([row(name="gqa", text="what color is it?"), row(1, "gqa", text="a?")])
        assert batch["attention_mask"][1, 0] == 0 and batch["attention_mask"][:, -1].all()
        assert "labels" not in batch

    def test_a_long_question_leaves_room_for_the_answer(self) -> None:
        made = batches("decoder", "gpt2")
        given = row(name="nlvr2", text="a red circle " * 30, answer="true")
        batch = made.training([given])
        said = batch["labels"][batch["labels"] != IGNORED]
        assert made.tokenizer.decode(said) == " true<|endoftext|>"
        length = made.prompts([given])["input_ids"].shape[1]  # the same prompt, trained and asked
        assert (batch["labels"][0, :length] == IGNORED).all()
        assert batch["labels"][0, length] != IGNORED
        two = [made.candidates([given], answer)["labels"] for answer in ("true", "false")]
        assert not torch.equal(*two)

    @pytest.mark.parametrize(
        ("name", "settings", "refused"),
        [
            ("vqa", {"max_length": 12, "max_new_tokens": 8}, "leave 3 tokens .* take [56]"),
            ("nlvr2", {"max_length": 20}, "leave 1 tokens .* take 2 at least: raise max_length"),
            ("nlvr2", {"max_length": 23}, ""),
            ("caption", {"max_length": 12}, ""),
            ("caption", {"max_length": 12, "prompt": "a picture of"}, "tasks.caption: max_length"),
        ],
    )
    def test_lengths_leave_room_for_the_text(
        self, name: str, settings: dict[str, Any], refused: str
    ) -> None:
        made = batches("decoder", "gpt2")
        made = replace(made, tasks={name: replace(made.tasks[name], **settings)})
        if refused:
            with pytest.raises(ValueError, match=refused):
                made.check_room(name)
        else:
            made.check_room(name)

    def test_published_captions(self) -> None:
        made = batches("decoder", "gpt2", compat="eccv24")
        rows = [row(name="caption", text="", answer="a red circle!"), row(1, "caption", answer="!")]
        batch = made.training(rows)
        assert batch["input_ids"].shape == (2, 12)
        words = made._ids("a red circle!")
        expected = words + [made.tokenizer.eos_token_id] * (12 - len(words))
        assert batch["input_ids"][0].tolist() == expected
        # token 0 is the end of text of this tokenizer, as "!" is token 0 of GPT-2's
        zero = batch["input_ids"] == 0
        zero[:, 0] = True  # nor is the first word trained
        assert torch.equal(batch["labels"] == IGNORED, zero) and zero[:, 1:].any()
        assert batch["attention_mask"][0].sum() == len(words)
        assert made.prompts([row(name="caption", text="")])["input_ids"].shape == (1, 0)


@pytest.mark.parametrize(
    ("kind", "model"),
    [("classifier", "roberta"), ("decoder", "gpt2"), ("encoder-decoder", "t5")],
)
def test_what_is_cut_is_known(kind: str, model: str) -> None:
    """A text is cut where one word more makes no other batch."""
    made = batches(kind, model, answers=("a", "b"))
    texts = ["red " * n + "?" for n in range(1, 40)]

    def shapes(name: str) -> list[int]:
        return [made.prompts([row(name=name, text=t)])["input_ids"].shape[1] for t in texts]

    for name in ("vqa", "nlvr2"):
        cut, lengths = made.cut(name, texts), shapes(name)
        most = made.reads(name)
        assert max(lengths) == most and not cut[0] and cut[-1]
        whole = [n for n, is_cut in zip(lengths, cut, strict=True) if not is_cut]
        assert whole == sorted(set(whole)) and all(
            n == most for n, is_cut in zip(lengths, cut, strict=True) if is_cut
        )
    assert made.cut("vqa", []) == []


@pytest.mark.parametrize("model", ["bart", "t5"])
class TestPair:
    def test_labels(self, model: str) -> None:
        made = batches("encoder-decoder", model)
        batch = made.training([row(name="nlvr2", answer="true"), row(1, "nlvr2", answer="no")])
        for labels, answer in zip(batch["labels"], ("true", "no"), strict=True):
            said = labels[labels != IGNORED]
            assert made.text(said.unsqueeze(0)) == [answer]
            assert said[-1] == made.tokenizer.eos_token_id

    def test_answers_are_sampled_by_their_scores_which_weigh_the_loss(self, model: str) -> None:
        made = batches("encoder-decoder", model)
        drawn: Counter[str] = Counter()
        for number in range(300):
            batch = made.training([row(number)])
            (text,) = made.text(batch["labels"].masked_fill(batch["labels"] == IGNORED, 1))
            assert batch["weights"].tolist() == pytest.approx(
                [{"red": 1.0, "blue": 0.9, "dark red": 0.3}[text]]
            )
            drawn[text] += 1
        for text, score in {"red": 1.0, "blue": 0.9, "dark red": 0.3}.items():
            assert drawn[text] / 300 == pytest.approx(score / 2.2, abs=0.09)

    def test_what_is_drawn_depends_on_the_rows_and_the_seed_alone(self, model: str) -> None:
        made = batches("encoder-decoder", model)
        rows = [row(number) for number in range(40)]
        torch.manual_seed(1)
        first = made.training(rows)
        torch.manual_seed(2)
        assert torch.equal(made.training(rows)["weights"], first["weights"])
        assert not torch.equal(
            replace(made, seed=1).training(rows)["weights"], first["weights"]
        )  # 40 draws
        assert torch.equal(made.training(rows[::-1])["weights"].flip(0), first["weights"])
        assert torch.equal(made.training(rows[3:7])["weights"], first["weights"][3:7])
        epoch = [row(number + 40) for number in range(40)]
        assert not torch.equal(made.training(epoch)["weights"], first["weights"])

    def test_candidates(self, model: str) -> None:
        made = batches("encoder-decoder", model)
        batch = made.candidates([row(name="nlvr2"), row(1, "nlvr2")], "true")
        assert torch.equal(batch["labels"][0], batch["labels"][1]) and "weights" not in batch


class TestPixelImages:
    @staticmethod
    def save(folder: Path) -> dict[str, Any]:
        """An image whose pixels tell their places."""
        image = Image.new("RGB", (40, 20))
        image.putdata([(x * 6, y * 12, 0) for y in range(20) for x in range(40)])
        image.save(folder / "image.png")
        return row(paths=[folder / "image.png"])

    @staticmethod
    def size_of(image: Image.Image) -> Tensor:
        left, top, _ = image.getpixel((0, 0))  # type: ignore[misc]
        return torch.tensor([*image.size, left, top])

    def test_crops_are_parts_of_the_same_shape_and_of_enough_area(self, tmp_path: Path) -> None:
        images = PixelImages(self.size_of, "crop")
        told = self.save(tmp_path)
        found = [images([told], seed)["pixel_values"][0, 0].tolist() for seed in range(50)]
        assert len({tuple(f) for f in found}) > 20
        for width, height, left, top in found:
            assert width * height >= 0.75 * 800 and width / height == pytest.approx(2, rel=0.06)
            assert left / 6 + width <= 40 and top / 12 + height <= 20

    def test_the_same_seed_gives_the_same_and_none_the_whole(self, tmp_path: Path) -> None:
        images, told = PixelImages(self.size_of, "crop"), self.save(tmp_path)
        assert torch.equal(
            images([told, told], 5)["pixel_values"], images([told, told], 5)["pixel_values"]
        )
        assert images([told])["pixel_values"].tolist() == [[[40, 20, 0, 0]]]
        whole = PixelImages(self.size_of)
        assert whole([told], 5)["pixel_values"].tolist() == [[[40, 20, 0, 0]]]


ROWS = {"large": range(0, 23), "small": range(23, 30)}
SIZES = {"large": 4, "small": 3}


class TestTaskBatches:
    @pytest.mark.parametrize("sampling", ["proportional", "balanced"])
    def test_batches_are_of_one_task(self, sampling: str) -> None:
        sampler = TaskBatches(ROWS, SIZES, sampling, seed=0)
        found = list(sampler)
        assert len(found) == len(sampler)
        for batch in found:
            (name,) = {name for name, rows in ROWS.items() for row in batch if row in rows}
            assert 1 <= len(batch) <= SIZES[name]

    def test_proportional_meets_every_row_once(self) -> None:
        found = [row for batch in TaskBatches(ROWS, SIZES, "proportional", 0) for row in batch]
        assert sorted(found) == list(range(30))

    def test_balanced_has_as_many_batches_of_each(self) -> None:
        found = list(TaskBatches(ROWS, SIZES, "balanced", 0))
        small = [batch for batch in found if batch[0] in ROWS["small"]]
        assert len(small) == len(found) - len(small) == 6
        counts = Counter(row for batch in small for row in batch)
        assert set(counts) == set(ROWS["small"]) and max(counts.values()) - min(counts.values()) < 2

    @pytest.mark.parametrize("sampling", ["proportional", "balanced"])
    def test_seed_and_epoch_decide_the_order(self, sampling: str) -> None:
        def drawn(seed: int, epoch: int) -> list[list[int]]:
            sampler = TaskBatches(ROWS, SIZES, sampling, seed)
            sampler.set_epoch(epoch)
            assert all(row // 30 == epoch for batch in sampler for row in batch)
            return [[row % 30 for row in batch] for batch in sampler]

        assert drawn(0, 1) == drawn(0, 1)
        assert drawn(0, 1) != drawn(0, 0) and drawn(0, 1) != drawn(5, 1)
        # two runs whose seeds differ by one do not share an epoch
        assert drawn(0, 1) != drawn(1, 0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"sampling": "random"}, "sampling must be one of"),
            ({"sizes": {"large": 0, "small": 1}}, r"tasks\.large\.batch_size must be"),
        ],
    )
    def test_refused(self, settings: dict[str, Any], message: str) -> None:
        given = {"rows": ROWS, "sizes": SIZES, "sampling": "balanced", "seed": 0} | settings
        with pytest.raises(ValueError, match=message):
            TaskBatches(**given)  # type: ignore[arg-type]

    @pytest.mark.parametrize("processes", [1, 2, 3, 4])
    @pytest.mark.parametrize("sampling", ["proportional", "balanced"])
    def test_processes_share_all_batches_whole(self, sampling: str, processes: int) -> None:
        """accelerate's shards: as many batches for each, every row, and none of mixed tasks."""
        sampler = TaskBatches(ROWS, SIZES, sampling, seed=0)
        shards = [list(BatchSamplerShard(sampler, processes, place)) for place in range(processes)]
        assert len({len(shard) for shard in shards}) == 1
        assert len(shards[0]) == -(-len(sampler) // processes)
        found = [batch for shard in shards for batch in shard]
        assert {row for batch in found for row in batch} == set(range(30))
        assert all(len({row in ROWS["small"] for row in batch}) == 1 for batch in found)

    def test_in_order(self) -> None:
        found = in_order(ROWS, 5)
        assert [row for batch in found for row in batch] == list(range(30))
        assert [len(batch) for batch in found] == [5, 5, 5, 5, 3, 5, 2]
