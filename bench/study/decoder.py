"""A small decoder that knows how captions are worded, and nothing of any image.

It stands in for a pretrained one where nothing can be downloaded: a GPT-2 of three layers, trained
from scratch on the text of captions alone. What it has learned is their prior: every image is the
same to it, so that what an adapter adds about images is the adapter's own.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bench.study.folders import made_once
from fused_route.checks import whole
from fused_route.training.data.coco import SPLITS
from fused_route.training.experiment.batches import Batches
from fused_route.training.experiment.recipe import TaskRecipe

POSITIONS = 32
AHEAD = 8  # places that something may stand in before a caption
BATCH, RATE, CLIP = 64, 1e-3, 1.0
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
MADE = "perplexity.json"
TASK = "caption"

Row = dict[str, Any]


def train_decoder(captions: Path, out: Path, *, steps: int = 150, seed: int = 0) -> Path:
    """A GPT-2 and its tokeniser in a folder, trained on the text of the training captions.

    perplexity.json in the folder says how far it is from what the captions' frequencies allow. The
    folder is written whole or not at all; one that is finished is left as it is.

    Args:
        captions: a data set as `write_captions` leaves it.
        out: the folder; as model.language of a recipe it has model.kind "decoder".
        steps: of `BATCH` captions.
        seed: of the first weights and of the order of captions.

    Returns:
        The folder.

    Raises:
        ValueError: no captions, no such number of steps, a loss that is not finite, or `out` holds
            something else.
    """
    whole("steps", steps)
    whole("seed", seed, least=0)
    return made_once(out, MADE, lambda folder: _fill(folder, captions, steps, seed))


def _fill(folder: Path, captions: Path, steps: int, seed: int) -> None:
    rows, held_out = _rows(captions, "karpathy-train"), _rows(captions, "karpathy-val")
    tokenizer = word_tokenizer([row["answer"] for row in rows])
    model = _fitted(tokenizer, rows, steps, seed)
    found = {
        "steps": steps,
        "seed": seed,
        "held_out": perplexity(model, tokenizer, held_out),
        "of_frequencies": perplexity_of_frequencies(tokenizer, rows),
    }
    print(
        f"decoder: perplexity of held-out captions {found['held_out']:.3f} a token; "
        f"by how often each is said {found['of_frequencies']:.3f}"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MADE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def word_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Lower-case words and signs of these captions, each a token; any other is "<unk>"."""
    made = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = list(SPECIAL.values())
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    made.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def perplexity(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]
) -> float:
    """exp of the mean −log p of a token of rows' captions, the ends of text included."""
    batches, total, tokens = _batches(tokenizer), 0.0, 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            batch = _inputs(batches, rows[start : start + BATCH])
            number = int((batch["labels"] >= 0).sum())
            total += float(model(**batch).loss) * number
            tokens += number
    return math.exp(total / tokens)


def perplexity_of_frequencies(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """What `perplexity` is at least, on captions that come as often as in these rows.

    exp(H / n): H is the entropy of a whole caption, n the mean number of its tokens and its end.
    """
    said = Counter(row["answer"] for row in rows)
    entropy = -sum(n / len(rows) * math.log(n / len(rows)) for n in said.values())
    lengths = {text: len(tokenizer(text)["input_ids"]) + 1 for text in said}
    return math.exp(entropy * len(rows) / sum(n * lengths[text] for text, n in said.items()))


def _rows(captions: Path, split: str) -> list[Row]:
    """One row a caption."""
    rows = [{**row, "name": TASK} for row in SPLITS[split].rows(captions, "train")]
    if not rows:
        raise ValueError(f"captions={str(captions)!r} has no caption in {split}; accepted: some")
    return rows


def _batches(tokenizer: PreTrainedTokenizerFast) -> Batches:
    """A recipe's batches of captions, but for the images."""
    length = POSITIONS - AHEAD
    task = TaskRecipe("coco", max_length=length, max_new_tokens=length - 2)
    return Batches("decoder", {TASK: task}, tokenizer, images=lambda *rows: {})


def _inputs(batches: Batches, rows: Sequence[Row]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, T)."""
    made = batches.training(rows)
    del made["name"]
    return made


def _fitted(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], steps: int, seed: int
) -> GPT2LMHeadModel:
    """A model trained on the rows, drawn anew in every step."""
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _new(tokenizer)
    batches = _batches(tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1)
    with tqdm(total=steps, desc="decoder", unit="step") as bar:
        for step in range(1, steps + 1):
            places = torch.randint(len(rows), (BATCH,), generator=draw).tolist()
            batch = _inputs(batches, [rows[place] for place in places])
            # no place is the first word's alone: visual tokens may come to stand before it
            first = torch.randint(AHEAD + 1, (BATCH, 1), generator=draw)
            positions = first + torch.arange(batch["input_ids"].shape[1])
            loss = model(**batch, position_ids=positions).loss
            if not torch.isfinite(loss):
                raise ValueError(f"steps={steps}: the loss of step {step} is {loss.item()}")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return model


def _new(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """With random weights; without dropout, since captions repeat and none is learned by heart."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=POSITIONS,
            n_embd=384,
            n_layer=3,
            n_head=6,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
