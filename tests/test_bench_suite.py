"""The benchmark suite: cases, providers, the gate before them, runs that can be interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tile_tables import launched, way_of
from torch import Tensor

from bench import formula, measure, parts, profile, protocol, providers, results, run
from bench.__main__ import main
from bench.cases import GRIDS, HOSTS, ROUTES, Case, grid, op
from bench.correct import Gate
from bench.measure import Settings
from bench.offline import summary
from bench.operands import Operands
from bench.providers import PROVIDERS, Provider
from bench.results import Record
from fused_route import coverage

CPU = torch.device("cpu")
TINY = Case("op", "adapter", "mul", 24, 4, 3, 5, dtype="fp32")
EAGER = ("reference", "published", "matmul-order", "peft", "frozen", "full", "copy")


def test_every_case_of_a_grid_has_a_name_of_its_own() -> None:
    for name in GRIDS:
        cases = grid(name)
        assert len({case.name for case in cases}) == len(cases), name


def test_the_headline_has_sixteen_operations_and_a_step() -> None:
    assert [case.kind for case in grid("headline")] == ["op"] * 16 + ["step"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grid must be one of headline.*got 'huge'"):
        grid("huge")
    with pytest.raises(ValueError, match="none of grid 'cpu' matches op/nothing"):
        grid("cpu", ["op/nothing"])
    with pytest.raises(ValueError, match=r"provider must be one of reference.*got 'magic'"):
        providers.check_names(["magic"])


def offered() -> list[tuple[str, str, str]]:
    """(provider, host, route) of every eager way to compute something."""
    return [
        (name, host, route)
        for name in EAGER
        for host in HOSTS
        for route in ROUTES
        if providers.obstacle(name, replace(TINY, host=host, route=route), CPU) is None
    ]


@pytest.mark.parametrize(("name", "host", "route"), offered())
def test_a_provider_computes_what_it_is_held_to(name: str, host: str, route: str) -> None:
    operands = Operands.of_case(replace(TINY, host=host, route=route), CPU)
    worst = Gate(operands).worst(name, PROVIDERS[name].make(operands).results())
    assert (worst is None) == (not PROVIDERS[name].held_to)


@pytest.mark.parametrize("name", ["reference", "published", "matmul-order"])
@pytest.mark.parametrize("host", HOSTS)
def test_several_visual_tokens(host: str, name: str) -> None:
    operands = Operands.of_case(replace(TINY, host=host, route="gram", Nv=3), CPU)
    assert Gate(operands).worst(name, PROVIDERS[name].make(operands).results()) is not None


def test_plain_lora_is_in_every_grid_with_a_base() -> None:
    assert providers.obstacle("peft", op("linear", "none", 768, 64, 2_000), CPU) is None
    assert "adapter" in (providers.obstacle("peft", TINY, CPU) or "")
    assert "GPU" in (providers.obstacle("fused", TINY, CPU) or "")
    assert "base" in (providers.obstacle("fused-p1", TINY, CPU) or "")
    assert "base" in (providers.obstacle("copy", replace(TINY, host="linear"), CPU) or "")
    few = op("adapter", "mul", 768, 64, 2_000)
    for case, why in (
        (few, "GPU"), (op("adapter", "mul", 768, 64, 10_240), "many rows"),
        (replace(few, dtype="fp32"), "fp32"), (replace(few, route="none"), "one visual vector"),
        (replace(few, route="gram", Nv=2), "one visual vector"),
    ):  # fmt: skip
        assert why in (providers.obstacle("fused-along", case, CPU) or "")
    short, long = (op("adapter", "mul", 768, 64, M) for M in (2_000, 32_768))
    assert "one way" in (providers.obstacle("fused-serial", short, CPU) or "")
    long = replace(long, S=4, T=8192)
    assert providers.obstacle("fused-serial", long, CPU) == providers.obstacle("fused", long, CPU)
    for name in ("fused-p1", "fused-along", "fused-overlapped", "fused-serial"):
        assert not any(name in names for names in run.DEFAULT_PROVIDERS.values())


def test_kernels_start_early_where_a_gpu_can() -> None:
    cuda = torch.device("cuda")
    with mock.patch.object(coverage, "device_obstacle", lambda device: None):
        for major, can in ((8, False), (9, True), (10, True), (None, False)):
            with mock.patch.object(providers, "major_of", lambda device, major=major: major):
                why = providers.obstacle("fused-overlapped", TINY, cuda)
            assert (why or "").endswith("compute capability 9 on") != can
            assert (why is None) == can


@pytest.mark.interpret
@pytest.mark.parametrize("host", ["linear", "qkv"])
def test_the_kernels_by_one_plan(host: str) -> None:
    pytest.importorskip("triton")
    case = replace(TINY, host=host)
    assert providers.obstacle("fused-p1", case, CPU) is None
    operands = Operands.of_case(case, CPU)
    actual = PROVIDERS["fused-p1"].make(operands).results()
    assert Gate(operands).worst("fused-p1", actual) is not None
    with mock.patch.object(providers, "routed_linear") as called:
        PROVIDERS["fused-p1"].make(operands).forward()
    assert called.call_args.kwargs["plan"] == "p1"


@pytest.mark.interpret
def test_the_kernels_with_and_without_launches_of_the_image() -> None:
    pytest.importorskip("triton")
    from fused_route.kernels import config

    assert providers.MANY_ROWS == config.MANY_ROWS
    operands = Operands.of_case(replace(TINY, dtype="bf16"), CPU)
    launches = {}
    for name in ("fused", "fused-along", "fused"):
        subject = PROVIDERS[name].make(operands)
        with launched() as kernels:
            assert Gate(operands).worst(name, subject.results()) is not None
        launches[name] = len(kernels)
    assert launches == {"fused": 6, "fused-along": 4}


@pytest.mark.interpret
@pytest.mark.parametrize("Nv", [1, 3])
def test_the_kernels_with_long_samples_as_short_ones(Nv: int) -> None:
    pytest.importorskip("triton")
    case = replace(TINY, S=1, T=1024, Nv=Nv, route="gram")
    operands, ways = Operands.of_case(case, CPU), {}
    for name in ("fused", "fused-serial"):
        subject = PROVIDERS[name].make(operands)
        with launched(way_of) as told:
            assert Gate(operands).worst(name, subject.results()) is not None
        ways[name] = {way for way in told if way is not None}
    assert ways == {"fused": {"long"}, "fused-serial": {"short"}}


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", [name for name, p in PROVIDERS.items() if p.compiles])
def test_a_compiled_provider_computes_it_too(name: str, host: str) -> None:
    operands = Operands.of_case(replace(TINY, host=host), CPU)
    assert Gate(operands).worst(name, PROVIDERS[name].make(operands).results()) is not None


def wrong(o: Operands) -> Tensor:
    """A provider whose y is 5 % off."""
    return 1.05 * o.x + o.x.sum() * 0


def test_what_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", lambda o: o.subject(wrong)))
    names = ["wrong", "reference"]
    bad, good = measure.measure(TINY, names, Settings(CPU, seconds=0.02))
    assert bad.error is not None and "AssertionError" in bad.error and not bad.times
    assert good.error is None and good.times["wall"]["both"][0] > 0.0
    assert good.launches == [6, 15] and good.bytes["saved"] > 0


def test_one_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(o: Operands) -> Tensor:
        raise RuntimeError("no memory\nat all")

    monkeypatch.setitem(PROVIDERS, "fails", Provider("fails", lambda o: o.subject(fails), ""))
    bad, good = measure.measure(TINY, ["fails", "reference"], Settings(CPU, seconds=0.02))
    assert bad.error is not None and bad.error.startswith("RuntimeError: no memory (")
    assert good.times


def test_gradients_are_none_before_every_call() -> None:
    operands = Operands.of_case(TINY, CPU)
    seen = []

    def watching(o: Operands) -> Tensor:
        seen.append([leaf.grad is None for leaf in (o.A, o.B, o.x)])
        return o.x @ o.A.T @ o.B.T

    protocol.samples(operands.subject(watching), protocol.HostClock(), 4)
    assert seen == [[True] * 3] * 4


def test_input_sets_exceed_the_cache() -> None:
    assert protocol.input_sets(1e6) * 1e6 > protocol.COLD_BYTES
    assert protocol.input_sets(1e9) == 3


def test_equal_arguments_give_equal_operands() -> None:
    first, second, other = (Operands.of_case(TINY, CPU, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.inputs, second.inputs, strict=True))
    assert not torch.equal(first.x, other.x)


RUN = ["--grid", "smoke", "--case", "op/adapter/mul/*", "--device", "cpu", "--seconds", "0.02"]


def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    given = [*RUN, "--provider", "reference", "--out", str(out)]
    assert main([*given, "--process", "0"]) == 0
    lines = parts.part(out, 0)
    first = lines.read_text()
    lines.write_text(first + '{"name": "cut o')
    assert main([*given, "--provider", "published", "--process", "0"]) == 0
    assert lines.read_text().startswith(first)
    found = results.read(out)
    assert [record.provider for record in found.records] == ["reference", "published"]
    assert found.environment["kind"] == "cpu" and found.ceilings["copy"] > 0


def test_processes_are_repeated_and_merged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*RUN, "--provider", "reference", "--processes", "2", "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr("sys.argv", ["bench", *given])
    assert main(given) == 0
    said = capfd.readouterr()
    assert "2 records of 2 processes" in said.out and "next: python -m bench report" in said.out
    assert "kernels need a GPU" in said.err
    assert {record.process for record in results.read(tmp_path / "r.json").records} == {0, 1}


CASE = ["--grid", "cpu", "--case"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--grid", "huge"], "grid must be one of"),
        (["--provider", "magic"], "provider must be one of"),
        (["--device", "tpu"], "device must be cuda or cpu"),
        (["--seconds", "0"], "seconds must be positive"),
        (["--budget", "-5"], "budget must be positive, got -5.0"),
        (["--budget", "nan"], "budget must be positive, got nan"),
        (["--process", "-1"], "process must be a whole number of at least 0, got -1"),
        *(
            (["--share", text], f"share must be i/n with i from 0 to n - 1, got '{text}'")
            for text in ("x/y", "1/0", "2/2", "0/x", "3")
        ),
        (
            [*CASE, "op/adapter/*", *CASE, "op/adaptor/*", *CASE, "oops"],
            "case: none of grid 'cpu' matches op/adaptor/* or oops",
        ),
        (["bogus"], "command must be one of run, report, compare, tune, profile, gates"),
        (["profile", "nowhere.json"], "ncu"),
        (["profile", "nowhere.json", "--budget", "-1"], "budget must be positive, got -1.0"),
    ],
)
def test_bad_input_is_an_error_without_a_traceback(
    given: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_a_list_says_who_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--list"]) == 0
    said = capsys.readouterr().out
    assert "op/adapter/mul/d32/r8/M12" in said and "1 cases" in said and "next:" in said


def test_a_foreign_result_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"records": 3}')
    with pytest.raises(ValueError, match=r"r\.json is no result file"):
        results.read(tmp_path / "r.json")


NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","routed_forward","dram__bytes_read.sum","Mbyte","12.5"
"0","routed_forward","dram__bytes_write.sum","Kbyte","1,500"
"1","routed_backward","dram__bytes_read.sum","byte","64"
"""


def test_bytes_of_a_profile() -> None:
    assert profile.bytes_in(NCU) == pytest.approx(12.5e6 + 1.5e6 + 64)
    assert profile.bytes_in("==ERROR== no permission") is None


def test_a_profile_is_added_to_its_case_alone(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    line = {"name": TINY.name, "provider": "fused", "moved": 5.0}
    parts.moved_file(out).write_text(json.dumps(line) + "\n")
    records = [Record(TINY.name, TINY.to_json(), name) for name in ("fused", "reference")]
    parts.add_moved(out, records)
    assert [record.bytes for record in records] == [{"moved": 5.0}, {}]


@pytest.mark.parametrize(
    ("host", "floor", "fused"), [("adapter", 84, 109), ("linear", 121, 239), ("qkv", 338, 508)]
)
def test_formulas_give_the_modelled_times(host: str, floor: float, fused: float) -> None:
    """µs at 3 TB/s and 800 TFLOP/s, d = 768, r = 64, M = 32768, worked out by hand."""
    case = op(host, "mul", 768, 64, 32_768)
    assert formula.floor_seconds(case, "both", **formula.H100) * 1e6 == pytest.approx(floor, abs=1)
    assert formula.modelled_seconds(case, "both") * 1e6 == pytest.approx(fused, abs=1)
    moved = formula.moved(case, "fused")
    assert moved is not None and moved["both"] == moved["forward"] + moved["backward"]
    assert moved["both"] > formula.least_bytes(case, "both")


@pytest.mark.parametrize(
    ("host", "route"), [("adapter", "gram"), ("qkv", "gram"), ("linear", "mul")]
)
def test_the_floor_holds_several_visual_tokens(host: str, route: str) -> None:
    """By hand, beside one: x_r is read twice; where K needs x_v of all, its products are made."""
    one = op(host, route, 768, 64, 10_240)
    many = replace(one, Nv=197)
    R, V = 128 if host == "qkv" else 64, 512 * 197
    products = 2 * V * 768 * R if route == "gram" else 0
    mixing = 2 * 10_240 * R * 64 if route == "gram" else 0
    for which, passes in (("forward", 1), ("backward", 2)):
        more = formula.least_bytes(many, which) - formula.least_bytes(one, which)
        assert more == 2 * V * 768
        more = formula.flops(many, which) - formula.flops(one, which)
        assert more == products + passes * mixing
    launches = {launch.name: launch for launch in formula.launches(many)}
    plain = {launch.name for launch in formula.launches(one)}
    assert {"x_v", "dA of x_r"} <= launches.keys() - plain
    for name in ("x_v", "dA of x_r"):
        assert launches[name].bytes == 2 * (V * 768 + V * R + R * 768)
        assert launches[name].flops == 2 * V * 768 * R
    for which in ("forward", "backward", "both"):
        moved = formula.moved(many, "fused")
        assert moved is not None and moved[which] > formula.least_bytes(many, which)
    assert formula.moved(many, "reference") is None
    none = replace(one, route="none")
    assert formula.launches(replace(none, Nv=197)) == formula.launches(none)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("Nv", [1, 50])
def test_the_products_of_all_launches_are_those_of_the_formula(host: str, Nv: int) -> None:
    """But for what makes K of x_v, which is small, and for z, which K2 makes a second time."""
    case = op(host, "gram", 768, 64, 10_240, Nv=Nv)
    for which in ("forward", "backward"):
        launched = sum(
            launch.flops for launch in formula.launches(case)
            if launch.which == which and launch.name not in ("K", "dx_v")
        )  # fmt: skip
        again = 2 * 10_240 * case.r * case.r * (2 if host == "qkv" else 1) if Nv > 1 else 0
        more = again if which == "backward" else 0
        assert launched == formula.flops(case, which) + more


def test_modelled_times_are_called_so() -> None:
    table = summary.modelled_table().splitlines()
    assert table[0].startswith("modelled, not measured")
    assert len(table) == 3 + 16
    cells = table[3].split()
    assert cells[0] == op("adapter", "mul", 768, 64, 2_000).name
    assert float(cells[-1]) > float(cells[-2]) > 0.0


def test_one_that_fails_while_it_is_timed_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_later(o: Operands) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("boom")
        return o.x @ o.A.T @ o.B.T

    monkeypatch.setitem(PROVIDERS, "late", Provider("late", lambda o: o.subject(fails_later), ""))
    bad, good = measure.measure(TINY, ["late", "reference"], Settings(CPU, seconds=0.02))
    assert bad.error is not None and "boom" in bad.error and good.times["wall"]


def test_what_cannot_be_counted_leaves_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> int:
        raise MemoryError("no")

    monkeypatch.setattr(measure, "saved_bytes", fails)
    (record,) = measure.measure(TINY, ["reference"], Settings(CPU, seconds=0.02))
    assert record.error is None and record.times["wall"] and "MemoryError" in record.absent["saved"]


def test_a_lost_gpu_ends_the_process_with_its_culprit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(record: Record, error: Exception, _: Settings) -> None:
        record.error = str(error)
        raise measure.GpuLost(record)

    def fails(o: Operands) -> Tensor:
        raise RuntimeError("illegal access")

    monkeypatch.setattr(measure, "_check_gpu", lost)
    monkeypatch.setitem(PROVIDERS, "bad", Provider("bad", lambda o: o.subject(fails), ""))
    given = [*RUN, "--provider", "reference", "--provider", "bad", "--process", "0"]
    assert main([*given, "--out", str(tmp_path / "r.json")]) == run.LOST
    where = results.place(results.environment(CPU))
    (record,) = parts.records_in(parts.part(tmp_path / "r.json", 0), where)
    assert (record.provider, record.error) == ("bad", "illegal access")


def test_records_of_other_code_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*RUN, "--provider", "reference", "--process", "0", "--out", str(tmp_path / "r.json")]
    for commit in ("one", "two", "two"):
        monkeypatch.setenv("COMMIT", commit)
        assert main(given) == 0
        found = results.read(tmp_path / "r.json")
        assert found.environment["commit"] == commit and len(found.records) == 1
    assert len(parts.part(tmp_path / "r.json", 0).read_text().splitlines()) == 2


def test_a_budget_that_is_spent_measures_nothing(tmp_path: Path) -> None:
    given = [*RUN, "--process", "0", "--out", str(tmp_path / "r.json"), "--budget", "0.001"]
    assert main(given) == 0
    assert results.read(tmp_path / "r.json").records == []
