"""Generation as it is measured: every way does what it says, or is not timed."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from bench import __main__ as bench
from bench import generation, protocol
from bench.families import MODELS
from bench.generation import Row, measure
from bench.results import FOLDER, begun
from bench.runners import Runner, Start, Task
from fused_route import fold

CPU = torch.device("cpu")
TASK = Task("tiny", "qkv", "mul", 2, "fp32", prompt=6, new=8, r=4)
TASKS = {
    "qkv": TASK,
    "one image": replace(TASK, B=1),
    "adapter": replace(TASK, host="adapter", B=1),
    "adapters": replace(TASK, host="adapter", route="gram"),
    "llama": replace(TASK, model="tiny-llama", host="linear", B=1),
    "bf16": replace(TASK, dtype="bf16"),
}
SHORT = ["--device", "cpu", "--model", "tiny", "--prompt", "5", "--new", "3", "--r", "4",
         "--seconds", "0.01"]  # fmt: skip


@pytest.fixture(autouse=True)
def small_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"d": 32, "layers": 1, "heads": 2, "vocabulary": 64, "positions": 24}
    monkeypatch.setitem(MODELS, "tiny-llama", replace(MODELS["llama-small"], **sizes))


def rows_of(task: Task) -> dict[str, Row]:
    return {row.way: row for row in measure(task, CPU, 0.01, math.inf)}


@pytest.mark.parametrize("name", TASKS)
def test_folded_images_give_the_unfolded_tokens(name: str) -> None:
    task = TASKS[name]
    start = Start(task, CPU)
    runner = start.runner("reference", torch.float32)
    expected, logits = runner.generated(task.new), runner.logits()
    unfold = runner.fold(task.into)
    assert torch.equal(runner.generated(task.new), expected)
    for which, value in runner.logits().items():
        torch.testing.assert_close(value, logits[which], rtol=1e-4, atol=1e-4)
    unfold()
    assert all(torch.equal(value, logits[which]) for which, value in runner.logits().items())
    generation.same_tokens_in_fp32(start)


def test_the_image_decides_the_tokens() -> None:
    """Or equal tokens would say nothing."""
    start = Start(replace(TASK, B=4), CPU)
    runner = start.runner("reference")
    expected = runner.generated(8)
    assert len(expected.unique()) > 8
    runner.features = -2.0 * runner.features
    assert (runner.generated(8) == expected).double().mean() < 0.8
    assert not torch.equal(start.runner("frozen").generated(8), expected)


@pytest.mark.parametrize("name", TASKS)
def test_every_way_is_held_to_the_reference_and_timed(name: str) -> None:
    task, rows = TASKS[name], rows_of(TASKS[name])
    assert list(rows) == list(generation.WAYS)
    assert rows["fused"].absent == {"generate": "tensors are on cpu, not on a GPU"}
    for way in ("frozen", "reference", "folded"):
        row = rows[way]
        assert row.error is None and row.samples >= generation.ROUNDS
        middle, low, high = row.rates()
        assert 0 < low <= middle <= high
        assert middle == pytest.approx(task.B * task.new / row.times["generate"][0] * 1e6)
    assert rows["frozen"].gate is None and rows["frozen"].same is None
    for way in ("reference", "folded"):
        gate, same = rows[way].gate, rows[way].same
        assert gate is not None and gate <= 2.0
        assert same is not None and same >= (1.0 if task.dtype == "fp32" else 0.5)
    if task.host == "adapter":
        assert rows["peft"].absent == {"generate": "PEFT has no adapters"}


# Of fp32 numbers: d = 32, r = 4, two layers.
FOLDED = {
    "qkv": 2 * 32 + 2 * (2 * 2 * 4),  # x_r of two images for all layers; w of each in either layer
    "one image": 2 * (3 * 32 * 32),  # W'
    "adapter": 2 * 2 * (4 * 32 + 4),  # A' and b' of two adapters a layer
}


@pytest.mark.parametrize("name", FOLDED)
def test_memory_of_folded_images_is_counted_and_returned(name: str) -> None:
    task = TASKS[name]
    runner = Start(task, CPU).runner("folded")
    alone = sum(t.nbytes for t in (*runner.model.parameters(), *runner.model.buffers()))
    assert generation.folding(runner, task.into, CPU) == {
        "before": alone, "folded": alone + 4 * FOLDED[name], "after": alone
    }  # fmt: skip


def test_generation_runs_on_a_cache() -> None:
    runner = Start(TASK, CPU).runner("frozen")
    lengths: list[int] = []
    runner.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: lengths.append(args[0].shape[1])
    )
    assert runner.generated(5).shape == (2, 5)
    assert lengths == [6, 1, 1, 1, 1]
    lengths.clear()
    logits = runner.logits()
    assert lengths == [5, 1]
    full, _ = runner.called(runner.ids)
    torch.testing.assert_close(torch.cat([logits["prompt"], logits["step"]], 1), full)


@pytest.mark.parametrize("name", ["qkv", "adapters", "llama"])
@pytest.mark.parametrize("is_folded", [False, True])
def test_a_decoding_step_can_be_repeated(name: str, is_folded: bool) -> None:
    """As a graph replays it: the cache is what it was."""
    task = TASKS[name]
    runner = Start(task, CPU).runner("reference")
    if is_folded:
        runner.fold(task.into)
    step = runner.decoding(11)
    first = step()
    assert torch.equal(step(), first)
    text = runner.ids.repeat(1, 2)[:, :11]
    torch.testing.assert_close(first, runner.called(text)[0][:, -1:])


def test_a_step_in_a_graph_is_timed_by_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Tensor] = []

    def captured(subjects: Any, is_both: bool) -> Callable[[], None]:
        assert not is_both and not torch.is_grad_enabled()
        return lambda: ran.append(subjects[0].forward())

    monkeypatch.setattr(protocol, "captured", captured)
    monkeypatch.setattr(protocol, "GpuClock", protocol.HostClock)
    monkeypatch.setattr(protocol, "replays", lambda graph, clock, seconds: [graph() or 2e-6] * 3)
    runner = Start(TASK, CPU).runner("reference")
    row = Row(asdict(TASK), "reference")
    generation._add_step(row, runner, TASK, math.inf)
    assert row.times["step"] == pytest.approx([2.0] * 3) and ran[0].shape == (2, 1, 64)
    late = Row(asdict(TASK), "reference")
    generation._add_step(late, runner, TASK, 0.0)
    assert late.absent == {"step": "the budget was spent"}
    row.times["generate"] = [1.0] * 3
    assert "step, µs" in generation.document([row])


def _other_image(runner: Runner, into: str) -> None:
    fold(runner.model, 1.01 * runner.features, into=into)


def _fails(runner: Runner, into: str) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("broken", "message"),
    [(_other_image, "times the reference's error, not 2"), (_fails, "RuntimeError: no memory")],
)
def test_a_way_that_is_wrong_is_listed_and_not_timed(
    broken: Callable[[Runner, str], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "folding", lambda *_: {})
    monkeypatch.setattr(generation, "same_tokens_in_fp32", lambda start: None)
    monkeypatch.setattr(Runner, "fold", broken)
    rows = rows_of(TASK)
    assert message in (rows["folded"].error or "") and not rows["folded"].times
    assert rows["reference"].error is None and rows["reference"].times
    said = generation.document(list(rows.values()))
    assert f"{TASK.name}, image folded in: " in said and message in said
    assert "| image folded in |" not in said


def test_other_tokens_in_fp32_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Runner, "fold", lambda runner, into: setattr(runner, "features", -2.0 * runner.features)
    )
    with pytest.raises(AssertionError, match=r"in fp32 \d+ of 16 tokens are the unfolded ones"):
        generation.same_tokens_in_fp32(Start(TASK, CPU))


def test_a_way_that_fails_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, failed = Start(TASK, CPU).runner("frozen"), dict[str, Exception]()
    other = replace(runner, using=_unusable)
    clock = protocol.clock_of(CPU)
    pair = {"frozen": runner, "folded": other}
    found = generation.timed(pair, 3, clock, 0.01, math.inf, failed)
    assert list(failed) == ["folded"] and len(found["frozen"]) >= generation.ROUNDS
    spent = generation.timed({"frozen": runner}, 3, clock, 0.01, time.monotonic() - 1, {})
    assert len(spent["frozen"]) == 1


def _unusable(features: Tensor) -> Any:
    raise RuntimeError("no image")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "generation.json"
    assert bench.main(["generate", *SHORT, "--batch", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    for key in ("device", "driver", "versions", "commit", "date"):
        assert key in found["environment"]
    assert found["left"] == [] and found["what"] == "greedy generation"
    rows = generation.read(out)
    tasks = [Task(**row.task) for row in rows[:: len(generation.WAYS)]]
    assert [(task.host, task.B) for task in tasks] == [("qkv", 1), ("adapter", 1)]
    assert {(task.prompt, task.new, task.r) for task in tasks} == {(5, 3, 4)}
    printed = capsys.readouterr().out
    assert generation.document(rows) in printed
    assert printed.splitlines()[-1].startswith("next: ") and str(out) in printed


def test_a_budget_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "generation.json"
    more = ["--host", "qkv", "--budget", "0.001", "--out", str(out)]
    assert bench.main(["generate", *SHORT, *more]) == 0
    found = json.loads(out.read_text())
    assert {row["task"]["B"] for row in found["rows"]} == {1}
    assert found["left"] == ["tiny qkv mul B=8 fp32"]
    assert "not begun, for the budget or a lost GPU: tiny qkv" in capsys.readouterr().out


def test_a_task_that_fails_as_a_whole_is_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "generation.json"
    monkeypatch.setattr(generation, "Start", partial(_raises, "too large"))
    assert bench.main(["generate", *SHORT, "--batch", "1", "--out", str(out)]) == 1
    assert all("too large" in (row.error or "") for row in generation.read(out))


def _raises(message: str, *_: object) -> None:
    raise MemoryError(message)


def test_a_second_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMMIT", "one")
    asked: list[tuple[str, list[str]]] = []

    def noted(task: Task, *given: Any) -> list[Row]:
        ways = list(given[-1])
        asked.append((task.host, ways))
        rows = [Row(asdict(task), way, times={"generate": [1.0] * 3}) for way in ways]
        for row in rows if len(asked) == 1 else ():
            if row.way == "folded":
                row.times, row.error = {}, "MemoryError: no"
            if row.way == "frozen":
                row.absent["step"] = generation.SPENT
        return rows

    monkeypatch.setattr(generation, "measure", noted)
    out = tmp_path / "generation.json"
    given = ["generate", *SHORT, "--batch", "1", "--out", str(out)]
    assert bench.main([*given, "--host", "qkv"]) == 1
    assert bench.main(given) == 0
    assert bench.main(given) == 0
    assert asked == [
        ("qkv", list(generation.WAYS)), ("qkv", ["frozen", "folded"]),
        ("adapter", list(generation.WAYS)),
    ]  # fmt: skip
    rows = generation.read(out)
    assert [(row.task["host"], row.way) for row in rows] == [
        (host, way) for host in ("qkv", "adapter") for way in generation.WAYS
    ]
    assert (
        all(row.is_whole for row in rows) and generation.document(rows) in capsys.readouterr().out
    )
    monkeypatch.setenv("COMMIT", "two")
    before = out.read_text()
    assert bench.main(given) == 0
    assert len(asked) == 5 and json.loads(out.read_text())["environment"]["commit"] == "two"
    assert (tmp_path / "generation.before1.json").read_text() == before
    assert "it is generation.before1.json now" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"records": []}'])
def test_what_is_no_file_of_an_earlier_call_is_moved_aside(text: str, tmp_path: Path) -> None:
    where = {"commit": "one", "versions": {}}
    (tmp_path / "a.before1.json").touch()
    (tmp_path / "a.json").write_text(text)
    assert begun(tmp_path / "a.json", where) == []
    assert (tmp_path / "a.before2.json").read_text() == text and not (tmp_path / "a.json").exists()


REFUSED = {
    "--model=gpt9": "model must be one of gpt2, gpt2-medium, llama-small, tiny; got 'gpt9'",
    "--model=roberta-base": "model must be one of gpt2, gpt2-medium, llama-small, tiny; got",
    "--host=conv": "host must be one of qkv, linear, adapter; got 'conv'",
    "--host=linear": "host must be one of qkv, adapter for tiny, got linear",
    "--route=gram_relu": "route must be one of add, mul, gram, expand; got 'gram_relu'",
    "--dtype=fp8": "dtype must be one of bf16, fp16, fp32; got 'fp8'",
    "--device=tpu": "device must be one of cuda, cpu; got 'tpu'",
    "--batch=0": "batch must be a whole number of at least 1, got 0",
    "--prompt=1": "prompt must be a whole number of at least 2, got 1",
    "--new=0": "new must be a whole number of at least 1, got 0",
    "--new=60": "prompt + new must be at most 64, the positions of tiny; got 5 + 60",
    "--r=0": "r must be a whole number of at least 1, got 0",
    "--seconds=0": "seconds must be positive, got 0.0",
    "--budget=-1": "budget must be positive, got -1.0",
    "--budget=nan": "budget must be a finite number, got nan",
}


@pytest.mark.parametrize("given", REFUSED)
def test_bad_arguments(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["generate", *SHORT, given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m bench generate: ") and REFUSED[given] in said


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert bench.main(["generate", "--device", "cuda"]) == 2
    assert "torch sees no GPU; use --device cpu" in capsys.readouterr().err


def test_the_published_table_is_what_was_measured() -> None:
    rows = generation.read(FOLDER / "generation-amd-epyc-bb751387.json")
    page = (FOLDER.parent.parent / "docs" / "benchmarks.md").read_text()
    assert generation.document([row for row in rows if row.task["B"] == 1]) in page


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["qkv", "adapter"])
def test_kernels_generate(name: str) -> None:
    task = replace(TASKS[name], new=2, prompt=3)
    start = Start(task, CPU)
    gate = generation.Gate(start)
    for way in ("fused", "folded"):
        row = Row(asdict(task), way)
        generation.checked(start, gate, row)
        assert row.gate is not None and row.same == 1.0


@pytest.mark.parametrize(("name", "told"), [("", "it is a folder"), ("file/x.json", "cannot be")])
def test_a_place_that_takes_no_file_is_refused_before_measuring(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = ["generate", "--device", "cpu", "--model", "tiny", "--out", str(tmp_path / name)]
    assert bench.main(given) == 2
    assert told in capsys.readouterr().err
