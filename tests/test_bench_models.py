"""Language models of the benchmarks: every way computes the same, and the gate sees if not."""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bench import models, vision
from bench.cases import GRIDS, MODEL_HOSTS, WIDTHS, Case, grid
from bench.families import MODELS
from bench.models import WAYS, Step, disagreement, subject, truth
from bench.operands import DTYPES
from fused_route import RoutingContext
from fused_route.targets import find_targets

CPU = torch.device("cpu")
TINY = MODELS["tiny"]
SMALL: dict[str, Any] = {
    "d": 32, "layers": 1, "heads": 2, "vocabulary": 64, "positions": 24, "vision": TINY.vision,
}  # fmt: skip
# One of each family, and one that is narrower than its vision model.
TINIES = {
    "tiny": TINY,
    "tiny-roberta": replace(MODELS["roberta-base"], **SMALL),
    "tiny-bart": replace(MODELS["bart-base"], **SMALL),
    "tiny-llama": replace(MODELS["llama-small"], **SMALL),
    "tiny-projected": replace(TINY, d=24, layers=1),
}
CASES = {
    case.name: case
    for case in (
        *(case for case in grid("smoke") if case.kind != "op"),
        Case("step", "adapter", "gram", 32, 4, 2, 5, Nv=3, dtype="bf16", model="tiny"),
        Case("layer", "linear", "gram", 32, 4, 2, 5, Nv=3, dtype="fp16", model="tiny-roberta"),
        Case("step", "adapter", "mul", 32, 4, 2, 5, dtype="fp32", model="tiny-roberta"),
        Case("layer", "adapter", "mul", 32, 4, 2, 5, dtype="fp32", model="tiny-bart"),
        Case("step", "linear", "gram", 32, 4, 2, 5, Nv=3, dtype="fp32", model="tiny-bart"),
        Case("step", "qkv", "mul", 24, 4, 2, 5, dtype="fp32", model="tiny-projected"),
    )
}
LAYER, STEP = list(CASES.values())[:2]
TRACED = [name for name, case in CASES.items() if case.dtype == "fp32" and case.kind == "step"]
PLAIN = Case("layer", "linear", "none", 32, 4, 2, 5, dtype="fp32", model="tiny-roberta")
UNROUTED = replace(PLAIN, host="adapter")
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def tinies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in TINIES.items():
        monkeypatch.setitem(MODELS, name, model)


def results(case: Case, way: str = "reference") -> Results:
    return subject(case, way, CPU).results()


def assert_agrees(case: Case, way: str) -> None:
    actual, reference, exact = results(case, way), results(case), truth(case, CPU)
    assert list(actual) == list(reference) == list(exact)
    assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in reference.items()}
    assert all(bool(tensor.any()) for tensor in exact.values())
    assert disagreement(actual, reference, exact) <= 2.0


@pytest.mark.parametrize("name", CASES)
def test_reference_agrees_with_its_truth(name: str) -> None:
    assert_agrees(CASES[name], "reference")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.parametrize("name", TRACED)
def test_compile_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is traced, not inductor, whose C++ takes 15 s a case; and nothing may break the graph.
    whole = Mock(side_effect=partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(torch, "compile", whole)
    assert_agrees(replace(CASES[name], layers=1), "compile")
    whole.assert_called_once()


@pytest.mark.parametrize("Nv", [1, 3])
@pytest.mark.parametrize("model", ["tiny", "tiny-bart"])
def test_the_image_is_the_class_token_or_the_first(
    model: str, Nv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, using = vision.tower(TINY.vision), Mock(return_value=nullcontext())
    monkeypatch.setattr(vision, "tower", lambda *_: tower)
    monkeypatch.setattr(RoutingContext, "using", using)
    made = subject(replace(UNROUTED, kind="step", model=model, Nv=Nv), "reference", CPU)
    made.forward()
    (features,) = using.call_args.args
    tokens = tower.forward_features(made.live[0])
    assert not features.requires_grad and torch.equal(features, tokens[:, :Nv])
    assert torch.equal(features[:, 0], tower(made.live[0]))  # as pooled


@pytest.mark.interpret
@pytest.mark.parametrize("name", CASES)
def test_fused_agrees(name: str) -> None:
    assert_agrees(CASES[name], "fused")


def test_fused_says_that_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match="impl='triton' cannot be honoured"):
        results(LAYER, "fused")


@pytest.mark.parametrize("kind", ["layer", "step"])
def test_peft_is_the_unrouted_reference(kind: str) -> None:
    pytest.importorskip("peft")
    assert_agrees(replace(PLAIN, kind=kind), "peft")


@pytest.mark.parametrize("case", [LAYER, STEP, replace(STEP, dtype="bf16", dropout=0.1)], ids=str)
def test_peft_on_a_fused_projection_has_the_same_names_and_sizes(case: Case) -> None:
    pytest.importorskip("peft")
    ours, theirs = subject(case, "reference", CPU), subject(case, "peft", CPU)
    assert list(ours.leaves) == list(theirs.leaves)
    assert count(ours.leaves) == count(theirs.leaves)
    assert {tensor.dtype for tensor in theirs.leaves.values()} == {DTYPES[case.dtype]}
    assert list(ours.results()) == list(theirs.results())


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


FROZEN = {
    "tiny": ["h.0.ln_1.weight", "h.0.ln_1.bias"],
    "tiny-roberta": [
        "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias", "head.weight", "head.bias",
    ],
    "tiny-bart": [
        "encoder.layernorm_embedding.weight", "encoder.layernorm_embedding.bias",
        "decoder.layernorm_embedding.weight", "decoder.layernorm_embedding.bias",
        "prefix.weight", "prefix.bias",
    ],
}  # fmt: skip


@pytest.mark.parametrize("model", FROZEN)
def test_frozen_goes_back_through_all_layers(model: str) -> None:
    case = replace(UNROUTED, model=model)
    assert list(results(case, "frozen")) == ["y", "dx"]
    step = results(replace(case, kind="step"), "frozen")
    assert list(step) == ["y", *(f"d{name}" for name in FROZEN[model])]
    assert all(bool(tensor.any()) for tensor in step.values())


@pytest.mark.parametrize("case", [LAYER, STEP], ids=str)
def test_the_same_each_time_and_without_touching_the_generator(case: Case) -> None:
    before = torch.get_rng_state()
    first = results(case)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    again = results(case)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [LAYER, STEP], ids=str)
def test_everything_has_the_dtype_of_the_case(case: Case, dtype: str) -> None:
    made = subject(replace(case, dtype=dtype), "reference", CPU)
    tensors = [*made.live, *made.leaves.values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {DTYPES[dtype]}
    kept = {t.data_ptr() for t in made.live}
    assert all(leaf.data_ptr() in kept for leaf in made.leaves.values())
    assert made.results()["y"].dtype == (torch.float32 if case.kind == "step" else DTYPES[dtype])


@pytest.mark.parametrize("case", [LAYER, STEP], ids=str)
def test_truth_starts_from_values_of_the_dtype(case: Case) -> None:
    made = subject(replace(case, dtype="bf16"), "reference", CPU, torch.float64)
    for tensor in [*made.live, *([made.dy] if made.dy is not None else [])]:
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            assert torch.equal(tensor, tensor.bfloat16().double())


@pytest.mark.parametrize("model", TINIES)
def test_models_have_the_layers_and_take_the_texts_that_they_say(model: str) -> None:
    row = MODELS[model]
    case = replace(UNROUTED, model=model, d=row.d, T=row.positions, S=1)
    single, double = (set(results(replace(case, layers=layers))) for layers in (1, 2))
    assert double == single | {name.replace(".0.", ".1.") for name in single}
    assert set(results(case)) == (double if row.layers == 2 else single)
    step = replace(case, kind="step", T=5)
    assert set(results(replace(step, layers=2))) >= double - {"dx"}
    assert not set(results(replace(step, layers=1))) & (double - single)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("fused", "compile")])
@pytest.mark.parametrize("model", ["tiny-roberta", "tiny-bart"])
def test_finish_changes_what_is_trained_and_nothing_else(way: str, model: str) -> None:
    if way == "peft":
        pytest.importorskip("peft")
    made = subject(replace(PLAIN, kind="step", model=model, route="mul"), way, CPU)
    trained = {id(leaf) for leaf in made.leaves.values()}
    frozen = [tensor for tensor in made.live if id(tensor) not in trained]
    before = [[t.detach().clone() for t in group] for group in (made.leaves.values(), frozen)]
    made.forward().backward()
    assert made.finish is not None
    made.finish()
    for leaf, old in zip(made.leaves.values(), before[0], strict=True):
        assert not torch.equal(leaf, old)
    assert all(torch.equal(new, old) for new, old in zip(frozen, before[1], strict=True))
    made.forget()
    assert all(tensor.grad is None for tensor in made.live)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda t: t * 1.001,
    "reversed": lambda t: t.flip(0) if t.dim() else t * 2,
    "a row": lambda t: t.index_fill(0, torch.tensor([1]), 0.0) if t.dim() else t * 2,
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", ["y", "dx", "dh.0.attn.c_attn.A", "dh.0.attn.c_attn.B"])
def test_a_wrong_tensor_is_caught(name: str, how: str) -> None:
    reference, exact = results(LAYER), truth(LAYER, CPU)
    wrong = reference | {name: WRONG[how](reference[name])}
    assert disagreement(wrong, reference, exact) > 2.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [LAYER, STEP], ids=str)
def test_another_route_is_caught(case: Case, dtype: str) -> None:
    case = replace(case, dtype=dtype)
    reference, exact = results(case), truth(case, CPU)
    for route in ("none", "add", "gram"):
        assert disagreement(results(replace(case, route=route)), reference, exact) > 2.0


def test_disagreement_is_of_whole_tensors_and_the_worst() -> None:
    exact = {"y": torch.ones(100, dtype=torch.float64), "dx": torch.ones(50, dtype=torch.float64)}
    off = {"y": exact["y"] * 1.02, "dx": exact["dx"] * 1.01}
    twice = {"y": exact["y"] * 1.04, "dx": exact["dx"] * 1.04}
    assert disagreement(twice, off, exact) == pytest.approx(4.0)
    assert disagreement(exact, off, exact) == 0.0
    zero = {"y": torch.zeros(3, dtype=torch.float64)}
    assert disagreement(zero, zero, zero) == 0.0
    for value in (math.nan, math.inf):
        lost = off | {"y": off["y"].index_fill(0, torch.tensor([3]), value)}
        assert disagreement(lost, off, exact) == disagreement(off, lost, exact) == math.inf


def test_a_loss_counts_as_made_of_the_coarsest_dtype() -> None:
    exact = {"y": torch.tensor(8.0, dtype=torch.float64), "dA": torch.ones(9, dtype=torch.float64)}
    reference = {"y": torch.tensor(8.0), "dA": torch.ones(9, dtype=torch.bfloat16)}
    assert disagreement(reference | {"y": torch.tensor(8.5)}, reference, exact) < 1.0
    single = {name: tensor.float() for name, tensor in reference.items()}
    assert disagreement(single | {"y": torch.tensor(8.5)}, single, exact) > 2.0


@pytest.mark.parametrize("change", [{"dx": None}, {"dx": torch.ones(2)}], ids=["missing", "shape"])
@pytest.mark.parametrize("whose", [0, 1])
def test_disagreement_of_other_tensors_is_refused(whose: int, change: dict[str, Any]) -> None:
    exact = {"y": torch.ones(2, dtype=torch.float64), "dx": torch.ones(3, dtype=torch.float64)}
    other = {name: tensor for name, tensor in (exact | change).items() if tensor is not None}
    given = [exact, exact]
    given[whose] = other
    with pytest.raises(ValueError, match=r"differ in names or shapes: dx$"):
        disagreement(given[0], given[1], exact)


TARGETS = {
    ("gpt2", "qkv"): ["h.0.attn.c_attn"],
    ("gpt2", "adapter"): ["h.0.attn.c_proj", "h.0.mlp.c_proj"],
    ("roberta", "linear"): [
        "encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value",
    ],
    ("roberta", "adapter"): [
        "encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense",
    ],
    ("bart", "linear"): [
        f"{side}.layers.0.{attention}.{projection}"
        for side, attention in (
            ("decoder", "encoder_attn"), ("decoder", "self_attn"), ("encoder", "self_attn"),
        )
        for projection in ("q_proj", "v_proj")
    ],
    ("bart", "adapter"): [
        "decoder.layers.0.encoder_attn.out_proj", "decoder.layers.0.fc2",
        "decoder.layers.0.self_attn.out_proj", "encoder.layers.0.fc2",
        "encoder.layers.0.self_attn.out_proj",
    ],
}  # fmt: skip


FULL = [(model, host) for model in WIDTHS for host in MODELS[model].family.hosts]


@pytest.mark.parametrize(("model", "host"), FULL)
def test_targets_exist_in_models_of_full_width(model: str, host: str) -> None:
    row = MODELS[model]
    with torch.device("meta"):
        body = row.body(1)
    found = find_targets(body, row.routed(host))
    assert (
        sorted(name for target in found for name in target.names) == TARGETS[row.family.name, host]
    )
    dropped = {name: value for name, value in vars(row.config()).items() if "drop" in name}
    assert len(dropped) >= 3 and not any(dropped.values())
    assert row.config().num_hidden_layers == row.layers and row.d == WIDTHS[model]
    assert body.get_input_embeddings().weight.shape == (row.vocabulary, row.d)


def test_every_case_of_the_grids_fits_its_model() -> None:
    for name in GRIDS:
        for case in grid(name):
            if case.kind != "op":
                models.check(case, "fused")
                assert case.host in MODELS[case.model].family.hosts
    assert all(host in MODELS[model].family.hosts for model, host in MODEL_HOSTS)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "other", "way must be one of reference, fused, compile, peft, frozen; got 'other'"),
    ({"kind": "op"}, "fused", "kind must be one of layer, step; got 'op'"),
    ({"model": "t5"}, "fused", "model must be one of gpt2, .*; got 't5'"),
    ({"dtype": "fp64"}, "fused", "dtype must be one of bf16, fp16, fp32; got 'fp64'"),
    ({"d": 33}, "fused", "d must be 32, the width of tiny; got 33"),
    ({"T": 65}, "fused", "T must be from 2 to 64 for tiny, got 65"),
    ({"T": 1}, "fused", "T must be from 2 to 64 for tiny, got 1"),
    ({"model": "tiny-bart", "T": 22}, "fused", "T must be from 2 to 21 for tiny-bart, got 22"),
    ({"host": "linear"}, "frozen", "host must be one of qkv, adapter for gpt2, got 'linear'"),
    ({"Nv": 18}, "reference", "Nv must be at most 17, the tokens of an image; got 18"),
    ({"host": "adapter"}, "peft", "way='peft' takes host linear or qkv, got 'adapter'"),
    ({"route": "other"}, "fused", "route must be one of"),
]


@pytest.mark.parametrize(("change", "way", "message"), REFUSED)
def test_refused(change: dict[str, Any], way: str, message: str) -> None:
    case = replace(STEP, **{"Nv": 3, **change})
    with pytest.raises(ValueError, match=message):
        subject(case, way, CPU)


def test_without_peft_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="peft is not installed"):
        subject(PLAIN, "peft", CPU)


def test_truth_has_no_dropout() -> None:
    with pytest.raises(ValueError, match="dropout must be 0"):
        truth(replace(LAYER, dropout=0.1), CPU)
    case = replace(LAYER, dropout=0.5)
    assert not torch.equal(results(case)["y"], results(LAYER)["y"])


def step_of(model: str) -> tuple[Step, Tensor, Tensor]:
    """A step, tokens (2, 6) none of which is padding, and features (2, 3, 32)."""
    return Step(MODELS[model], 1, 32), torch.randint(2, 64, (2, 6)), torch.randn(2, 3, 32)


def test_loss_of_a_decoder_is_hugging_faces() -> None:
    from transformers import GPT2LMHeadModel

    step, ids, features = step_of("tiny")
    theirs = GPT2LMHeadModel(step.body.config)
    theirs.transformer = step.body
    theirs.lm_head.weight = step.body.wte.weight
    torch.testing.assert_close(step(ids, ids, features), theirs(ids, labels=ids).loss)


def test_loss_of_an_encoder_is_of_the_first_token() -> None:
    step, ids, features = step_of("tiny-roberta")
    assert step.head is not None
    answers = torch.tensor([5, 3128])
    scores = step.head(step.body(ids).last_hidden_state[:, 0])
    expected = torch.nn.functional.cross_entropy(scores, answers)
    torch.testing.assert_close(step(ids, answers, features), expected)
    assert models.cross_entropy(scores.bfloat16(), answers).dtype == torch.float32
    assert models.cross_entropy(scores.double(), answers).dtype == torch.float64


def test_loss_of_an_encoder_and_decoder_is_hugging_faces_after_visual_tokens() -> None:
    from transformers import BartForConditionalGeneration

    step, ids, features = step_of("tiny-bart")
    assert step.prefix is not None
    labels = ids.flip(1)
    theirs = BartForConditionalGeneration(step.body.config)
    theirs.model = step.body
    theirs.lm_head.weight = step.body.shared.weight
    x = torch.cat([step.prefix(features), step.body.shared(ids)], 1)
    loss = theirs(
        inputs_embeds=x, decoder_input_ids=labels[:, :-1], labels=labels[:, 1:].contiguous()
    ).loss
    torch.testing.assert_close(step(ids, labels, features), loss)
