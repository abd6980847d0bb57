"""Memory without a GPU: counts are what steps take that really run, and the published table's."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")
pytest.importorskip("peft")

from bench import __main__ as bench
from bench import memory, models, results
from bench.cases import Case
from bench.families import MODELS
from bench.memory import VARIANTS, Row, counted, made
from bench.offline.count_launches import Saved, saved
from bench.offline.live_bytes import LiveBytes, no_launches, without_values
from bench.protocol import clock_of
from fused_route import RoutedLinear, coverage, known

CPU, META = torch.device("cpu"), torch.device("meta")
GPT2 = Case("step", "qkv", "mul", 32, 8, 8, 16, dtype="fp32", model="tiny")
ROBERTA = Case("step", "linear", "gram", 32, 8, 8, 16, dtype="fp32", model="tiny-roberta")
CASES = {"gpt2": GPT2, "roberta": ROBERTA, "dropout": replace(ROBERTA, route="mul", dropout=0.1)}
FUSED = [name for name in VARIANTS if name.startswith("fused") and not VARIANTS[name].autocasts]
EAGER = [name for name in VARIANTS if not name.startswith("fused")]


@pytest.fixture(autouse=True)
def tinies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose activations are most of their memory, as they are of large ones."""
    small: dict[str, Any] = {"d": 32, "layers": 2, "heads": 2, "vocabulary": 64, "positions": 24}
    monkeypatch.setitem(MODELS, "tiny-roberta", replace(MODELS["roberta-base"], **small))
    monkeypatch.setattr(memory, "VISUAL_WIDTH", 24)
    monkeypatch.setattr(memory, "ANSWERS", 10)
    monkeypatch.setattr(models, "ANSWERS", 10)


def on_meta(case: Case, name: str) -> Row:
    with without_values():
        return counted(case, name, META)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("kind", CASES)
def test_counts_are_what_a_step_takes(kind: str, name: str) -> None:
    """Of a step that runs: to the byte, peak and all."""
    if kind == "dropout" and name.startswith("peft"):
        pytest.skip("torch keeps masks of another size on a CPU than on a GPU")
    row = on_meta(CASES[kind], name)
    assert row == counted(CASES[kind], name, CPU)
    assert row.rest and row.peak and row.weights and row.trained


@pytest.mark.parametrize(("name", "bytes_each"), [("peft", 2), ("peft-fp32", 4), ("reference", 2)])
def test_counts_in_bf16(name: str, bytes_each: int) -> None:
    """But for the norms' means and spreads, which a GPU keeps in fp32 and a CPU does not."""
    case = replace(GPT2, dtype="bf16")
    row, run = on_meta(case, name), counted(case, name, CPU)
    assert (row.layers, row.weights, row.trained) == (run.layers, run.weights, run.trained)
    subject, layers, _ = made(case, VARIANTS[name], META)
    assert {p.dtype.itemsize for p in subject.leaves.values() if p.ndim == 2} == {bytes_each}
    assert len(layers) == 2


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", CASES)
def test_counts_are_what_the_library_allocates(kind: str, name: str) -> None:
    """On the CPU too, with memory for everything and launches that do nothing."""
    with no_launches():
        row = counted(CASES[kind], name, CPU)
    assert row == on_meta(CASES[kind], name)


@pytest.mark.interpret
@pytest.mark.parametrize("name", ["fused", "fused-p3-recompute"])
@pytest.mark.parametrize("kind", CASES)
def test_counts_are_what_kernels_save(kind: str, name: str, unpoisoned: None) -> None:
    subject, layers, _ = made(CASES[kind], VARIANTS[name], CPU)
    row = on_meta(CASES[kind], name)
    assert saved(subject.forward, subject.live, layers) == (row.layers, row.rest)
    subject.results()


H, S, D, R = 2 * 8 * 16 * 16, 8, 64, 16  # H: bytes of x_t (M, R) in bf16, M = 8 × 16
LAYERS: dict[str, tuple[dict[str, Any], int]] = {
    # x (M, d), x_t (M, R) and x_v (S, R); with the reference z too
    "fused": ({"impl": "triton", "plan": "p1"}, 4 * H + H + 2 * S * R),
    "fused-p3": ({"impl": "triton", "plan": "p3"}, 4 * H + H + 2 * S * R),
    "recompute": ({"impl": "triton", "recompute": True}, 4 * H + 2 * S * R),
    "dropout": ({"impl": "triton", "dropout": 0.5}, 4 * H + H + 2 * S * R + 8),  # a seed
    "reference": ({"impl": "reference"}, 4 * H + 2 * H + 2 * S * R),
    # of x a mask of bytes and what it left, of x_r what was left, and A / (1 − p)
    "reference, dropout": ({"impl": "reference", "dropout": 0.5},
                           2 * H + 4 * H + 2 * H + 2 * S * R + 2 * S * D + 2 * R * D),
    "none": ({"impl": "triton", "route": "none"}, 4 * H + H),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_by_hand(name: str) -> None:
    """d = 4 R, so that x is 4 H; parameters and the image x_r are not counted."""
    settings, expected = LAYERS[name]
    with without_values(), META:
        layer = RoutedLinear(nn.Linear(D, D), R, **settings).to(torch.bfloat16)
        layer.base.requires_grad_(False)
        x, x_r = torch.randn(S, 16, D).bfloat16(), torch.randn(S, 1, D).bfloat16()

        def call() -> Tensor:
            with layer.context.using(x_r):
                return layer(F.gelu(x))  # which only the layer saves

        live = [x.requires_grad_(), x_r, *layer.parameters()]
        assert saved(call, live, [layer]) == Saved(layers=expected, rest=0)


def test_what_layers_share_with_the_rest_is_the_rests() -> None:
    x = torch.ones(4, 3)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    inputs: list[Tensor] = []

    def call() -> Tensor:
        inputs[:] = [x * 2.0]
        return first(inputs[0]) + second(inputs[0]) + first(x * 3.0)

    live = [x, *first.parameters(), *second.parameters()]
    assert saved(call, live, [first]) == (x.nbytes, x.nbytes)
    assert saved(call, live, [first, second]) == (2 * x.nbytes, 0)
    assert saved(call, live, []) == (0, 2 * x.nbytes)
    assert not first._forward_hooks and not first._forward_pre_hooks


def test_live_bytes_are_those_of_storages() -> None:
    x = torch.ones(100)
    with LiveBytes([x]) as live:
        y = x * 2.0
        z = y[:10].view(2, 5)
        y += 1.0
        assert (live.now, live.peak) == (400, 400)
        del y
        assert live.now == 400  # its view holds it
        w = torch.zeros(50)
        del z
        assert (live.now, live.peak) == (200, 600)
        x += 1.0
    del w
    assert (live.now, live.peak) == (0, 600)


@pytest.mark.parametrize("name", ["reference", "peft", "reference-checkpoints"])
@pytest.mark.parametrize("case", [GPT2, ROBERTA], ids=["gpt2", "roberta"])
def test_live_bytes_are_the_allocators(case: Case, name: str) -> None:
    """Torch's own record of every allocation, those inside of operators included.

    Checkpointing keeps a state of the CPU's generator for each layer and one to go back to, which
    are no operator's; of a GPU's generator they are 16 bytes.
    """
    subject, _, _ = made(case, VARIANTS[name], CPU)

    def call() -> None:
        subject.forget()
        subject.forward().backward()

    call()
    subject.forget()
    gc.collect()  # what is freed while recording was not recorded
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    subject.forget()
    with LiveBytes(subject.live) as live:
        call()
    states = 3 * torch.get_rng_state().nbytes if VARIANTS[name].checkpoints else 0
    assert live.peak <= peak <= 1.001 * live.peak + states


def test_stand_ins_refuse_what_they_do_not_stand_for() -> None:
    with without_values():
        q = torch.empty(2, 2, 4, 8, device="meta")
        assert F.scaled_dot_product_attention(q, q, q, is_causal=True).shape == q.shape
        for more in ({"attn_mask": q}, {"dropout_p": 0.1}, {"enable_gqa": True}):
            with pytest.raises(NotImplementedError, match="without a mask"):
                F.scaled_dot_product_attention(q, q, q, **more)
        assert bool((q == 0).all())
        with pytest.raises(RuntimeError, match="meta"):
            q.sum().item()
        assert F.dropout(q, 0.5, False) is q and F.dropout(q, 0.0) is q


def test_stand_ins_are_taken_away() -> None:
    before = dict(known._KNOWN)
    kept = (F.scaled_dot_product_attention, F.dropout, coverage.device_obstacle)
    on_meta(GPT2, "fused")
    assert before == known._KNOWN
    assert kept == (F.scaled_dot_product_attention, F.dropout, coverage.device_obstacle)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases in three variants."""
    monkeypatch.setattr(memory, "cases", lambda: [GPT2, replace(GPT2, route="gram")])
    names = ("reference", "fused", "fused-autocast")
    monkeypatch.setattr(memory, "VARIANTS", {name: VARIANTS[name] for name in names})


def test_the_command(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "memory.json"
    assert bench.main(["memory", "--out", str(out)]) == 0
    rows = memory.read(out)
    assert [row.variant for row in rows] == [*memory.VARIANTS] * 2
    eager, fused, autocast = rows[:3]
    assert eager == on_meta(GPT2, "reference") and fused == on_meta(GPT2, "fused")
    assert autocast == Row(
        GPT2.to_json(), "fused-autocast",
        absent="not counted: autocast does not know the meta device",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert memory.document(rows) in printed and "measured" not in memory.document(rows)
    assert "fp32 under autocast | – | – |" in printed and "does not know the meta" in printed


def test_a_case_that_is_not_there(short: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["memory", "--case", "step/gpt3/*"]) == 2
    assert "'step/gpt3/*'" in capsys.readouterr().err


def _as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch, peak: Callable[[], int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    on_cpu = made
    monkeypatch.setattr(
        memory, "made",
        lambda case, variant, device: on_cpu(case, variant, META if device == META else CPU),
    )  # fmt: skip
    clock = clock_of(CPU)
    monkeypatch.setattr(memory, "clock_of", lambda device: clock)


def test_on_a_gpu_the_allocators_peak_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_if_on_a_gpu(monkeypatch, lambda: 123_000_000)
    rows = [memory.row(GPT2, name, torch.device("cuda")) for name in ("reference", "fused")]
    assert replace(rows[0], measured=None) == on_meta(GPT2, "reference")
    assert rows[0].measured == 123_000_000
    assert rows[1].measured is None and rows[1].absent.startswith("not measured: ValueError")
    with no_launches():
        autocast = memory.row(GPT2, "fused-autocast", torch.device("cuda"))
    assert autocast.measured == 123_000_000 and autocast.peak is None
    shown = memory.document(rows)
    assert "measured: mul |" in shown and "| 123 |" in shown and "cannot be honoured" in shown


def test_a_second_call_goes_on(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMIT", "one")
    asked: list[tuple[str, str]] = []
    count = counted

    def noted(case: Case, name: str, device: torch.device) -> Row:
        asked.append((case.route, name))
        if len(asked) == 1:
            raise RuntimeError("no count")
        return count(case, name, device)

    monkeypatch.setattr(memory, "counted", noted)
    out = tmp_path / "memory.json"
    given = ["memory", "--out", str(out)]
    assert bench.main([*given, "--case", GPT2.name]) == 1
    (first, *_) = memory.read(out)
    assert first.absent.startswith("not counted: RuntimeError: no count")
    assert bench.main(given) == 0
    assert bench.main(given) == 0
    assert asked == [
        ("mul", "reference"), ("mul", "fused"), ("mul", "reference"),
        ("gram", "reference"), ("gram", "fused"),
    ]  # fmt: skip
    assert [(row.case["route"], row.variant) for row in memory.read(out)] == [
        (route, name) for route in ("mul", "gram") for name in memory.VARIANTS
    ]
    monkeypatch.setenv("COMMIT", "two")
    assert bench.main(given) == 0  # counts can be made again: no file of before is kept
    assert len(asked) == 9 and [path.name for path in tmp_path.iterdir()] == ["memory.json"]


def test_what_was_measured_is_neither_measured_again_nor_lost(
    short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on a GPU, where one variant needs another call; then counted without one."""
    monkeypatch.setenv("COMMIT", "one")
    cuda = {"versions": memory.about(CPU)["versions"], "commit": "one", "device": "A GPU"}
    rows = [Row(GPT2.to_json(), name, peak=1, measured=2) for name in ("reference", "fused")]
    rows[1].measured = None
    memory.write(rows, {"what": "counted", **cuda}, tmp_path / "m.json")
    found = results.begun(tmp_path / "m.json", cuda)
    whole = [memory.is_whole(Row(**row), torch.device("cuda")) for row in found]
    assert whole == [True, False]
    assert bench.main(["memory", "--out", str(tmp_path / "m.json"), "--case", GPT2.name]) == 0
    assert memory.read(tmp_path / "m.before1.json") == rows


def test_no_gpu_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["memory", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("device='cuda', but torch sees no GPU; use --device cpu")


def test_a_table_of_what_there_is() -> None:
    """Of an interrupted call: a variant that one case lacks."""
    other = replace(GPT2, route="gram")
    rows = [Row(GPT2.to_json(), "reference", 1, 2, 3, 4, 5), Row(other.to_json(), "fused", 6)]
    table = memory.table(rows)
    assert [row[0] for row in table[1:]] == ["eager torch", "fused, P1"]
    assert table[1][2] == "–" and table[2][1] == "–"


def test_the_published_table_is_what_was_counted() -> None:
    rows = memory.read(memory.COUNTED)
    assert {(Case(**row.case).name, row.variant) for row in rows} == {
        (case.name, name) for case in memory.cases() for name in VARIANTS
    }
    page = Path(__file__).parent.parent / "docs" / "benchmarks.md"
    assert memory.document(rows) in page.read_text()
