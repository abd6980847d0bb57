"""Training a vision-language model: checkpointing, autocast, torch.compile, the Trainer."""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import in_turn
from test_vlm import labels, lora, routed
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from vlm_models import LANGUAGE, PAIRS, images, texts, vision_language

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import checkpoint_activations  # noqa: E402

# Renamed in transformers 5.24.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in fields(TrainingArguments)}
)
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def gradients(model: Any, language: str, seeds: tuple[int, ...]) -> dict[str, Tensor]:
    """Of several forwards with other images, then one backward."""
    model.zero_grad()
    total = torch.zeros(())
    dtype = next(model.parameters()).dtype
    for seed in seeds:
        out = model(texts(2), pixel_values=images(2, seed).to(dtype), labels=labels(language, 2))
        total = total + out.loss
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def enable(model: Any, **settings: Any) -> None:
    """The model's own method, by the name that its version of transformers has."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    arguments = {f"{kind}_checkpointing_kwargs": settings} if settings else {}
    getattr(model, f"{kind}_checkpointing_enable")(**arguments)


TURNED_ON: dict[str, Callable[[Any], object]] = {
    "as the Trainer does": partial(enable, use_reentrant=False),
    "by default": enable,
    "ours": checkpoint_activations,
}


@pytest.mark.parametrize("way", TURNED_ON)
@pytest.mark.parametrize("place", ["none", "before"])
@pytest.mark.parametrize("language", ["gpt2", "llama", "roberta", "bart", "t5"])
def test_checkpointing_keeps_the_image_of_each_forward(language: str, place: str, way: str) -> None:
    model = routed(language, visual_tokens=place).train().double()
    expected = gradients(model, language, (1, 2, 3))
    seen: list[int] = []
    layer = next(m for m in model.modules() if hasattr(m, "active_views"))
    TURNED_ON[way](model)
    layer.register_forward_pre_hook(lambda *_: seen.append(1))
    found = gradients(model, language, (1, 2, 3))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11)
    assert len(seen) > 3, "nothing was run again"


def test_reentrant_checkpointing() -> None:
    """Behind a frozen projector: through a trained one it would go backward twice."""
    model = routed("gpt2").train()
    model.base_model.visual_projector.requires_grad_(False)
    expected = gradients(model, "gpt2", (1, 2))
    enable(model, use_reentrant=True)
    for name, grad in gradients(model, "gpt2", (1, 2)).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("language", ["gpt2", "roberta", "bart"])
def test_autocast(language: str, dtype: torch.dtype) -> None:
    model = routed(language, visual_tokens="before").train()
    expected = gradients(model, language, (1,))
    with torch.autocast("cpu", dtype=dtype):
        found = gradients(model, language, (1,))
    assert all(grad.dtype == torch.float32 for grad in found.values())
    off, size = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([found[n] - expected[n] for n in found], expected.values())
    )
    assert off < 0.1 * size


# t5's blocks set requires_grad when checkpointed.
COMPILED = [("t5", False), *in_turn(("gpt2", "llama", "roberta"), (False, True))]


@pytest.mark.parametrize(("language", "checkpoints"), COMPILED)
def test_compiles_as_one_graph(language: str, checkpoints: bool) -> None:
    """Four steps with other images and texts: no break, no second graph, the eager gradients.

    RoBERTa's classifier notes its kind of problem in its first forward: two graphs, its own doing.
    """
    torch._dynamo.reset()
    model = routed(language, visual_tokens="before").train()
    if checkpoints:
        enable(model, use_reentrant=False)
    for module in model.get_base_model().language.modules():
        if hasattr(module, "config"):  # transformers' warning about it would break the graph
            module.config.use_cache = False
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(4):
        given: dict[str, Any] = {
            "input_ids": texts(2, seed=seed),
            "attention_mask": torch.ones(2, 5, dtype=torch.long),
            "pixel_values": images(2, seed),
        }
        if language in PAIRS:
            given["decoder_input_ids"] = texts(2, 4, seed=seed)
        if language == "roberta":
            given["labels"] = labels(language, 2)
        found = [step(each, given) for each in (compiled, model)]
        for name, grad in found[0].items():
            torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == (2 if language == "roberta" else 1)


def step(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**given)
    (out.loss if "labels" in given else out.logits.square().mean()).backward()
    parameters = getattr(model, "_orig_mod", model).named_parameters()
    return {n: p.grad.clone() for n, p in parameters if p.grad is not None}


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Questions about images, with a column that no model takes."""

    def __init__(self, count: int, columns: tuple[str, ...] = ("pixel_values",)) -> None:
        pixels, ids, features = images(count), texts(count), torch.randn(count, 12)
        rows: list[dict[str, Any]] = [
            {
                "pixel_values": pixels[i],
                "visual_features": features[i],
                "input_ids": ids[i],
                "attention_mask": torch.ones_like(ids[i]),
                "labels": i % 5,
                "question": float("nan"),
            }
            for i in range(count)
        ]
        dropped = {"pixel_values", "visual_features"} - set(columns)
        self.rows = [{k: v for k, v in row.items() if k not in dropped} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def trainer(folder: Path, model: Any = None, data: Any = None, **settings: Any) -> Trainer:
    if model is None:
        model = peft.get_peft_model(vision_language("roberta"), lora("roberta", lora_dropout=0.1))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=4,
        logging_steps=4, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        seed=3, **settings,
    )  # fmt: skip
    data = Samples(20) if data is None else data
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=Samples(6))


class Stop(TrainerCallback):
    """Ends a run early, as if it were killed after its checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 4


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {CHECKPOINTING: True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_resumed_is_uninterrupted(mode: str, tmp_path: Path) -> None:
    """Difference 0, with dropout; a checkpoint holds the adapter and the Trainer's own state."""
    whole = trainer(tmp_path / "whole", **MODES[mode])
    before = trained(whole.model)
    whole.train()
    assert any(not torch.equal(before[n], p) for n, p in trained(whole.model).items())
    stopped = trainer(tmp_path / "stopped", **MODES[mode])
    stopped.add_callback(Stop())
    stopped.train()
    resumed = trainer(tmp_path / "stopped", **MODES[mode])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    expected = trained(whole.model)
    for name, parameter in trained(resumed.model).items():
        assert torch.equal(parameter, expected[name]), name
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-8").iterdir()}
    assert saved >= ADAPTER
    weights = [name for name in saved - ADAPTER if name.endswith((".safetensors", ".bin"))]
    assert weights == ["training_args.bin"]
    again = peft.PeftModel.from_pretrained(
        vision_language("roberta"), tmp_path / "whole" / "checkpoint-8"
    )
    loaded = dict(again.named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in expected.items())


def test_evaluates_and_keeps_the_best(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
        metric_for_best_model="accuracy", label_names=["labels"], save_total_limit=1,
    )  # fmt: skip
    accuracies = iter([0.9, 0.1, 0.5, 0.5])  # the first is the best, whatever was learnt
    run.compute_metrics = lambda given: {"accuracy": next(accuracies)}
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None and best.endswith("checkpoint-4")
    kept = peft.PeftModel.from_pretrained(vision_language("roberta"), best)
    expected = {n: p for n, p in kept.named_parameters() if "lora_" in n}
    for name, parameter in trained(run.model).items():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name])
    out = run.predict(Samples(6))
    assert out.predictions.shape == (6, 5)
    assert {"eval_loss", "eval_accuracy"} <= run.evaluate().keys()


def test_columns_that_no_argument_takes_are_dropped(tmp_path: Path) -> None:
    batch = next(iter(trainer(tmp_path).get_train_dataloader()))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}


def test_cached_features_train_alike(tmp_path: Path) -> None:
    """Encoded once by the model itself: the same run as from the pixels."""
    runs = []
    for columns in (("pixel_values",), ("visual_features",)):
        data = Samples(20, columns)
        run = trainer(tmp_path / columns[0], data=data)
        if columns == ("visual_features",):
            encoded = run.model.get_base_model().encode_images(images(20))
            for row, features in zip(data.rows, encoded, strict=True):
                row["visual_features"] = features
        run.train()
        runs.append(trained(run.model))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("language", ["gpt2", "llama", "bart", "t5", "roberta"])
def test_label_smoothing_is_the_language_models(language: str, tmp_path: Path) -> None:
    """The Trainer shifts a decoder's labels by the model's name, a pair's by its collator."""
    losses = []
    batch = {"input_ids": texts(2), "labels": labels(language, 2)}
    for model in (vision_language(language), LANGUAGE[language]()):
        given = dict(batch)
        if language in PAIRS:
            shift = model.prepare_decoder_input_ids_from_labels
            given["decoder_input_ids"] = shift(labels=batch["labels"])
        else:
            assert not hasattr(model, "prepare_decoder_input_ids_from_labels")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
        )
        smoothed = Trainer(model=model, args=arguments).compute_loss(model, given)
        losses.append(smoothed)
    torch.testing.assert_close(losses[0], losses[1])
    assert repr(vision_language(language)).startswith("VisionLanguageModel(")


def test_seq2seq_trainer_generates_from_the_image(tmp_path: Path) -> None:
    model = routed("bart")
    rows = [
        {"input_ids": texts(2)[i], "pixel_values": images(2)[i], "labels": texts(2, seed=9)[i]}
        for i in range(2)
    ]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=7,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=model, args=arguments)
    found = torch.as_tensor(trainer.predict(rows).predictions)
    expected = model.generate(texts(2), pixel_values=images(2), max_length=7)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_a_copy_of_a_checkpointed_model_has_its_own_image() -> None:
    model = routed("gpt2").train().double()
    enable(model, use_reentrant=False)
    copied = copy.deepcopy(model)
    expected = gradients(model, "gpt2", (1,))
    found = gradients(copied, "gpt2", (1,))
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_which_labels_the_trainer_counts() -> None:
    """A decoder's first word is predicted from nothing, but after a visual token."""
    kinds = {
        place: vision_language("gpt2", visual_tokens=place).loss_type
        for place in ("none", "before")
    }
    assert kinds == {"none": "ForCausalLM", "before": None}
    assert vision_language("llama").loss_type == "ForCausalLM"
    accepts = {name: vision_language(name).accepts_loss_kwargs for name in LANGUAGE}
    assert {name for name, said in accepts.items() if said} == {"gpt2", "llama", "qwen"}


ACCUMULATED = [("llama", "none"), ("gpt2", "before"), ("roberta", "none"), ("bart", "before")]


@pytest.mark.parametrize(("language", "place"), ACCUMULATED)
def test_accumulated_steps_are_the_joint_batch(language: str, place: str, tmp_path: Path) -> None:
    """In whatever parts a batch comes; a decoder's loss counts the words of the whole.

    With plain gradient descent, which shows a gradient's size.
    """
    runs = []
    for size, parts in ((4, 1), (2, 2)):
        model = vision_language(language, visual_tokens=place)
        model = peft.get_peft_model(model, lora(language))
        data = Samples(16)
        for i, row in enumerate(data.rows):
            if language == "roberta":
                continue
            row["labels"] = row["input_ids"].clone()
            if language != "bart":  # whose loss is a mean over its part
                row["labels"][i % 4 :] = -100
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(size)), max_steps=3, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, report_to="none", use_cpu=True, disable_tqdm=True,
            save_strategy="no", learning_rate=0.1, optim="sgd", max_grad_norm=0.0, seed=3,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=data).train()
        runs.append(trained(model))
    start = trained(peft.get_peft_model(vision_language(language), lora(language)))
    for name, parameter in runs[0].items():
        moved = (parameter - start[name]).norm()
        assert (runs[1][name] - parameter).norm() <= 1e-3 * moved, name
    assert any((runs[0][n] - start[n]).norm() > 1e-3 for n in start if "lora_B" in n)
