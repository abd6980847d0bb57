"""Training steps of the benchmarks: cached features, what comes last, what no time was left for."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from bench import measure, models, protocol, report, results, run, vision
from bench.__main__ import main
from bench.cases import FEATURES, GRIDS, Case, grid
from bench.families import MODELS
from bench.figures import labels
from bench.measure import Settings
from bench.models import disagreement, subject, truth
from bench.results import Record, Results
from bench.runs import load

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "d": 32, "layers": 1, "heads": 2, "vocabulary": 64, "positions": 24,
    "vision": MODELS["tiny"].vision,
}  # fmt: skip
TINIES = {
    "tiny-gpt2": replace(MODELS["gpt2"], **SMALL),
    "tiny-roberta": replace(MODELS["roberta-base"], **SMALL),
    "tiny-bart": replace(MODELS["bart-base"], **SMALL),
}
HOSTS = {"tiny-gpt2": "qkv", "tiny-roberta": "linear", "tiny-bart": "linear"}
COMPUTED = Case("step", "qkv", "gram", 32, 4, 2, 5, Nv=3, dtype="fp32", model="tiny-gpt2")
CACHED = replace(COMPUTED, features="cached")


@pytest.fixture(autouse=True)
def tinies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in TINIES.items():
        monkeypatch.setitem(MODELS, name, model)


@pytest.mark.parametrize("model", TINIES)
def test_of_the_same_features_a_cached_step_computes_the_same(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, images = list[vision.Images](), vision.images

    def noted(*given: Any) -> vision.Images:
        made.append(images(*given))
        return made[-1]

    monkeypatch.setattr(vision, "images", noted)
    case = replace(COMPUTED, model=model, host=HOSTS[model])
    computed = subject(case, "reference", CPU)
    cached = subject(replace(case, features="cached"), "reference", CPU)
    (given,) = made[1].live
    wanted, other = computed.results(), cached.results()
    assert not torch.equal(wanted["y"], other["y"])  # features of other images
    given.copy_(made[0].features())
    found = cached.results()
    assert list(found) == list(wanted) and "y" in found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])
    assert len(computed.live) > len(cached.live) and cached.live[0] is given


def test_a_cached_step_builds_no_vision_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    refused = Mock(side_effect=AssertionError("a vision model"))
    monkeypatch.setattr(timm, "create_model", refused)
    for way in ("reference", "frozen"):
        assert bool(subject(CACHED, way, CPU).results()["y"] > 0)
    refused.assert_not_called()
    with pytest.raises(AssertionError, match="a vision model"):
        subject(COMPUTED, "reference", CPU)


@pytest.mark.parametrize("model", ["gpt2", "tiny"])
def test_sizes_of_features_are_the_vision_models(model: str) -> None:
    changed = MODELS[model].vision
    with torch.device("meta"):
        tower = vision.tower(changed)
    assert vision.width(changed) == tower.num_features
    assert vision.tokens(changed) == 1 + tower.patch_embed.num_patches


def test_cached_features_have_the_scale_of_computed_ones() -> None:
    case = replace(COMPUTED, S=16, Nv=17)
    found = {
        features: vision.images(
            replace(case, features=features), MODELS[case.model].vision, torch.float32
        ).features()
        for features in FEATURES
    }
    for features in found.values():
        assert features.shape == (16, 17, 32) and not features.requires_grad
        assert float(features.std()) == pytest.approx(1.0, rel=0.05)
        assert float(features.mean()) == pytest.approx(0.0, abs=0.05)


def test_every_source_of_features_is_made() -> None:
    assert tuple(vision.SOURCES) == FEATURES


def assert_agrees(way: str, case: Case = CACHED) -> None:
    actual, reference = (subject(case, w, CPU).results() for w in (way, "reference"))
    assert disagreement(actual, reference, truth(case, CPU)) <= 2.0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.parametrize("model", TINIES)
def test_a_compiled_step_is_one_graph_and_agrees(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Mock(side_effect=partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(torch, "compile", whole)
    assert_agrees("compile", replace(CACHED, model=model, host=HOSTS[model]))
    whole.assert_called_once()


def test_layers_that_may_be_left_out_draw_no_numbers() -> None:
    """Of an encoder-decoder, whose compiled step would fall into a graph a layer."""
    body = TINIES["tiny-bart"].body()
    off = {name for name, module in body.named_modules() if not module.training}
    assert off == {"encoder", "decoder"}
    assert all(module.training for module in TINIES["tiny-roberta"].body().modules())


@pytest.mark.interpret
def test_a_fused_step_agrees() -> None:
    assert_agrees("fused")


def test_names_say_cached_alone() -> None:
    assert COMPUTED.name == "step/tiny-gpt2/qkv/gram/d32/r4/M10/T5/Nv3/p0/fp32"
    assert CACHED.name == f"{COMPUTED.name}/cached"
    old = {key: value for key, value in COMPUTED.to_json().items() if key != "features"}
    assert Record(COMPUTED.name, old, "fused").of_case() == COMPUTED


def test_the_grid_of_steps() -> None:
    sizes = "mul/d768/r64/M2000/T50/Nv1/p0/bf16"
    hosts = ("gpt2/qkv", "roberta-base/linear", "bart-base/linear")
    computed = [f"step/{host}/{sizes}" for host in hosts]
    assert [c.name for c in grid("steps")] == [*(f"{name}/cached" for name in computed), *computed]
    every = {case.name for case in grid("full")}
    assert every >= {case.name for case in grid("steps")}
    cached = {name.removesuffix("/cached") for name in every if name.endswith("/cached")}
    assert cached == {name for name in every if name.startswith("step/")} - {
        f"{name}/cached" for name in cached
    }
    for name in set(GRIDS) - {"full", "steps"}:
        assert {case.features for case in grid(name)} == {"computed"}, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "given"}, "features must be one of computed, cached; got 'given'"),
        ({"features": True}, "features must be one of computed, cached; got True"),
        ({"kind": "layer"}, "features must be computed .* got 'cached' of kind 'layer'"),
        ({"kind": "op", "model": ""}, "features must be computed .* got 'cached' of kind 'op'"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CACHED, **change)


@pytest.mark.parametrize("case", [COMPUTED, CACHED], ids=FEATURES)
def test_an_image_has_so_many_tokens(case: Case) -> None:
    with pytest.raises(ValueError, match="Nv must be at most 17, the tokens of an image; got 18"):
        subject(replace(case, Nv=18), "reference", CPU)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_passed_the_gate_is_what_is_timed(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once; with dropout the gate's has none."""
    made = Mock(side_effect=models.subject)
    monkeypatch.setattr(models, "subject", made)
    case = replace(CACHED, dropout=dropout)
    maker = measure.makers_of(case, ["reference"], Settings(CPU))["reference"]
    assert maker.gate() is not None
    before = made.call_count
    first, second = maker.make(0), maker.make(1)
    assert first is not second and first.leaves.keys() == second.leaves.keys()
    assert made.call_count - before == (1 if dropout == 0.0 else 2)


def test_some_providers_come_last() -> None:
    cases, who = [CACHED, COMPUTED], ["compile", "reference", "frozen"]
    asked = {case.name: who for case in cases}
    done = {(CACHED.name, "reference"), (CACHED.name, "frozen")}
    assert run.in_turns(cases, asked, [], set()) == [(case, who) for case in cases]
    assert run.in_turns(cases, asked, ["compile"], done) == [
        (COMPUTED, ["reference", "frozen"]), (CACHED, ["compile"]), (COMPUTED, ["compile"]),
    ]  # fmt: skip


RUN = ["--grid", "smoke", "--device", "cpu", "--seconds", "0.02", "--process", "0"]


def test_what_no_time_was_left_for_is_listed_until_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "ceilings", lambda *_: {"copy": 1e9, "matmul": 1e9})  # seconds
    monkeypatch.setenv("COMMIT", "one")
    out = tmp_path / "r.json"
    step, operation = "step/tiny/*", "op/adapter/mul/*"
    names = [grid("smoke", [glob])[0].name for glob in (step, operation)]
    ways = ["--provider", "reference", "--provider", "frozen", "--out", str(out)]
    assert main([*RUN, "--case", step, *ways, "--budget", "0.001"]) == 0
    assert results.read(out).missing == {names[0]: ["reference", "frozen"]}
    assert main([*RUN, "--case", operation, "--provider", "reference", "--out", str(out)]) == 0
    assert results.read(out).missing == {names[0]: ["reference", "frozen"]}  # of another grid
    assert run.conclude(out) == 0
    said = capsys.readouterr().out
    assert f"no time was left for frozen in 1 cases: {names[0]}\n" in said
    assert main([*RUN, "--case", step, *ways, "--last", "reference"]) == 0
    found = results.read(out)
    assert found.missing == {}
    assert [record.provider for record in found.records] == ["reference", "frozen", "reference"]
    monkeypatch.setenv("COMMIT", "two")
    assert main([*RUN, "--case", operation, *ways, "--budget", "0.001"]) == 0
    assert results.read(out).missing == {names[1]: ["reference"]}


def test_a_provider_that_has_not_the_case_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "ceilings", lambda *_: {"copy": 1e9, "matmul": 1e9})
    out = tmp_path / "r.json"
    given = ["--provider", "reference", "--provider", "max-autotune", "--provider", "fused"]
    main([*RUN, "--case", "step/*", *given, "--out", str(out), "--budget", "0.001"])
    assert list(results.read(out).missing.values()) == [["reference"]]


def test_the_last_are_among_the_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--provider", "reference", "--last", "compile"]) == 2
    assert "last must be one of reference; got 'compile'" in capsys.readouterr().err


def record(case: Case, provider: str) -> Record:
    times = {"wall": {"both": [2000.0, 1990.0, 2010.0]}}
    return Record(case.name, case.to_json(), provider, times=times)


def test_the_report_tells_steps_apart_and_lists_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = grid("steps")
    records = [record(case, way) for case in cases for way in ("reference", "fused")]
    missing = {cases[0].name: ["compile"], cases[5].name: ["compile", "frozen"]}
    about = {"device": "A GPU", "kind": "gpu", "commit": "c"}
    Results(about, {}, records, missing).write(tmp_path / "a.json")
    assert labels(cases)[0][::3] == ["gpt2 qkv mul cached features", "gpt2 qkv mul"]
    table = report.model_table(load(tmp_path / "a.json"), cases, "wall")
    assert [row[0] for row in table[1:] if row[0]] == labels(cases)[0]
    assert [row[1:3] for row in table[1:3]] == [["reference", "2.00"], ["fused", "2.00"]]
    assert len(table) == 1 + 2 * len(cases)  # none for who has no record
    assert report.main([tmp_path / "a.json"]) == 0
    page = (tmp_path / "a" / "report.md").read_text()
    assert f"| {cases[5].name} | compile, frozen |" in page
    assert "no time was left for compile in 2 cases: step/gpt2/" in capsys.readouterr().out


def test_few_of_many_cases_without_time_are_named() -> None:
    (line,) = results.without_time({f"case{i}": ["fused"] for i in range(8)})
    assert line.startswith("no time was left for fused in 8 cases: case0, ")
    assert line.endswith("case5, …")


def test_tensors_of_a_cached_step_have_its_dtype() -> None:
    made = subject(replace(CACHED, dtype="bf16"), "reference", CPU)
    tensors: list[Tensor] = [*made.live, *made.leaves.values()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}
