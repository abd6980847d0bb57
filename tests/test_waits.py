"""Loads that come before a wait, found in what the compiler makes of a kernel."""

from typing import Any

import pytest

pytest.importorskip("triton")

from bench.configured import configured
from bench.offline.ahead_of_time import compiled_for
from bench.offline.gates import VERSION
from bench.offline.specialisations import Layer, Specialisation, launched_by
from bench.offline.waits import read_before, too_early
from fused_route.kernels import config

PTX = "{before}\n{wait}\ngriddepcontrol.launch_dependents;\nst.global.b32 [%rd1], %r1;"
TTGIR = """
tt.func public @kernel(%u_ptr: !tt.ptr<bf16> {{tt.divisibility = 16}}, %x_ptr: !tt.ptr<f32>) {{
  %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
  %x_1:2 = scf.for %i = %a to %b step %c iter_args(%at = %x, %n = %zero) {{
    %t = ttg.async_copy_global_to_local %at, %buffer mask %m
  }}
  {early}
  %w = tt.elementwise_inline_asm "{wait}; // dummy $0" -> i32
  {late}
}}
"""
LOAD = "%v = tt.load %u_ptr : !tt.ptr<bf16>"


def told(how: str) -> Specialisation:
    arguments = (("u_ptr", "*bf16"), ("w_ptr", None), ("x_ptr", "*fp32"))
    return Specialisation("module:kernel", arguments, (("WAIT", how),), config.ADD)


def code(before: str = "", wait: str = "griddepcontrol.wait;", **ttgir: str) -> dict[str, Any]:
    lines = {"early": "", "late": "", "wait": wait.rstrip(";") or "nothing", **ttgir}
    return {"ptx": PTX.format(before=before, wait=wait), "ttgir": TTGIR.format(**lines)}


@pytest.mark.parametrize(("how", "asm", "expected"), [
    ("none", code(wait=""), []),
    ("none", code(), ["waits, though its launch does"]),
    ("none", {"amdgcn": "global_load_dword"}, []),
    ("first", code("mov.u32 %r1, %ctaid.x;"), []),
    ("first", code(wait=""), ["never waits"]),
    ("first", code("ld.global.b32 %r1, [%rd1];"), ["touches memory before it waits"]),
    ("first", code("@%p1 st.global.v4.b32 [%rd1], %r1;"), ["touches memory before it waits"]),
    ("first", code("cp.async.cg.shared.global [%r1], [%rd1], 0x10;"),
     ["touches memory before it waits"]),
    ("first", code("griddepcontrol.launch_dependents;"),
     ["lets the next kernel start before it waits"]),
    ("first", {"amdgcn": "global_load_dword"}, ["never waits"]),
    ("late", code("ld.global.b32 %r1, [%rd1]; griddepcontrol.launch_dependents;", late=LOAD), []),
    ("late", code(early=LOAD), ["reads u_ptr before it waits"]),
])  # fmt: skip
def test_what_is_wrong_is_said(how: str, asm: dict[str, Any], expected: list[str]) -> None:
    assert list(too_early(told(how), asm)) == expected


def test_one_that_lets_nobody_start() -> None:
    asm = code()
    asm["ptx"] = asm["ptx"].replace("launch_dependents", "nothing")
    assert list(too_early(told("first"), asm)) == ["never lets the next kernel start"]


def test_pointers_are_followed_into_loops() -> None:
    assert read_before(code(early=LOAD)["ttgir"], ["u_ptr", "x_ptr"]) == {"u_ptr", "x_ptr"}


def test_a_wait_is_found_by_its_later_name() -> None:
    ttgir = code(late=LOAD)["ttgir"]
    inline = next(line for line in ttgir.splitlines() if "inline_asm" in line)
    later = ttgir.replace(inline, "  tt.grid_dependency_wait loc(#loc8)")
    for text in (ttgir, later):
        assert read_before(text, ["u_ptr", "x_ptr"]) == {"x_ptr"}


@pytest.mark.compile
@pytest.mark.parametrize("stages", [1, 3])
def test_a_wait_in_a_pipelined_loop_comes_too_late(stages: int) -> None:
    """Why kernels wait outside of loops: Triton copies ahead of a wait that it does not look at, as
    it does from 3.9 on.
    """
    import tiny_kernels

    types = dict.fromkeys(("x", "w", "y"), "*bf16")
    values = {"K": 512, "BM": 64, "BK": 64}
    made = compiled_for(tiny_kernels.waits_in_its_loop, types, values, 90, num_stages=stages)
    early = read_before(made.asm["ttgir"], list(types))
    assert early == ({"x", "w"} if stages > 1 and VERSION < (3, 9) else set())


@pytest.mark.compile
def test_kernels_ask_to_be_launched_early() -> None:
    from bench.offline.gate_cases import Case
    from bench.offline.gates import check

    layer = Layer("adapter", "scale", "owned", 64, 768, "bf16", "few", starts="early")
    with configured():
        launches = list(launched_by(layer, 9))
    ways = {s.kernel.partition(":")[2]: s.values["WAIT"] for s in launches}
    assert ways == {
        "project": "first", "routed_forward": "late", "routed_backward": "first",
        "vector_gradient": "first", "weight_partials": "late", "add_partials": "first",
    }  # fmt: skip
    (K1,) = (s for s in launches if "routed_forward" in s.kernel)
    assert [check(Case(layer, s, 90)).faults for s in launches] == [[]] * 6
    options = config.compiler_options(K1.tile, "cuda", "late")
    assert options["launch_pdl"] is True
    assert compiled_for(K1.function, K1.types, K1.values, 90, **options).metadata.launch_pdl
    on_others = {s.values["WAIT"] for s in launched_by(layer, 8)}
    assert on_others == {"none"}
