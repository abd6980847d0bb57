"""The program for compute-sanitizer: that it runs every kernel, and what it reads in the logs."""

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from bench import sanitize
from bench.offline.count_launches import count
from bench.operands import Layer
from bench.sanitize import CASES, KERNELS, TRIALS, Case
from fused_route import coverage
from fused_route.plan import kernels

pytest.importorskip("triton")

START, LAUNCHED = "========= COMPUTE-SANITIZER\n", "launched: project 7, routed_forward 10\n"
INVALID = """\
========= Invalid __global__ read of size 4 bytes
=========     at routed_forward+0x1230 in /src/kernels/parts.py:120
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f74d5a00200 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f74d5a00000 of size 512 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernelEx [0x2d1c00] in libcuda.so.1
=========         Host Frame: _launch [0x1a2b] in __triton_launcher.so
=========
"""
INLINED = """\
========= Invalid __global__ write of size 2 bytes
=========     at down_backward+0x90 in /src/kernels/backward.py:120
=========     by thread (3,0,0) in block (1,0,0)
=========         Device Frame: routed_backward+0x5a0 in /src/kernels/backward.py:190
"""
RACE = """\
========= Error: Race reported between Write access at weight_partials+0x50 in weights.py:47
=========     and Read access at weight_partials+0x1a0 in weights.py:50 [4096 hazards]
=========
"""
OLD_RACE = """\
========= Warning: Race reported between Write access at 0x4c60 in vector_gradient
=========     and Read access at 0x4f70 in vector_gradient [4 hazards]
"""
UNINITIALISED = """\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x160 in /src/kernels/weights.py:180:add_partials
=========     by thread (7,0,0) in block (2,0,0)
"""
TORCH = """\
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4, at::native::project<float>>\
(int, T2, T3)+0x1230 in Loops.cuh:60
=========     by thread (96,0,0) in block (0,0,0)
=========         Host Frame: at::native::copy_kernel_cuda [0x2] in __triton_launcher.so
"""
NO_SUCH_SYMBOL = """\
========= Program hit CUDA_ERROR_NOT_FOUND (error 500) on CUDA API call to cuGetProcAddress_v2.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: cudaGetDriverEntryPoint [0x6d2a4] in libcudart.so.13
"""
NOT_LAUNCHED = """\
========= Program hit CUDA_ERROR_INVALID_VALUE (error 1) on CUDA API call to cuLaunchKernelEx.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: launch [0x1a2b] in /root/.triton/cache/X/__triton_launcher.so
"""


def log(folder: Path, *parts: str, total: str = "ERROR SUMMARY: 0 errors") -> Path:
    path = folder / "memcheck.txt"
    path.write_text(START + "".join(parts) + (f"========= {total}\n" if total else ""))
    return path


@pytest.mark.interpret
def test_every_kernel_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["--device", "cpu"]) == 0
    *names, last = capsys.readouterr().out.splitlines()
    assert names == [case.name for case in CASES] and len(set(names)) == len(CASES)
    assert last.startswith("launched: ") and all(f"{name} " in last for name in KERNELS)


@pytest.mark.interpret
def test_what_does_not_run_or_is_not_finite_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    cases = (Case(Layer("adapter", "none"), "fp32", samples=1, tokens=3),)
    with mock.patch.object(sanitize, "CASES", cases):
        assert sanitize.run("cpu") == 1
        told = capsys.readouterr().out
        left_out = "project, routed_bottleneck, extended_product, vector_gradient, matrix_gradient"
        assert f"not launched: {left_out}\n" in told
        assert sanitize.main(["--device", "cpu", "--share", "0/2"]) == 0  # others run the rest
        assert sanitize.main(["--device", "cpu", "--share", "1/2"]) == 0
        assert "not" not in capsys.readouterr().out
        with mock.patch.object(sanitize, "result", lambda o, case: o.x / 0):
            assert sanitize.run("cpu", 0, 2) == 1
        assert "  not finite: y, dx\n" in capsys.readouterr().out


def test_the_kernels_are_those_that_are_launched() -> None:
    offered = vars(kernels()).values()
    jitted = [kernel.fn.__name__ for kernel in offered if hasattr(kernel, "fn")]
    assert jitted == list(KERNELS)


def test_every_mix_host_and_dtype_is_among_the_cases() -> None:
    layers = [case.layer for case in CASES]
    assert {layer.host for layer in layers} == {"adapter", "linear", "qkv"}
    assert {case.dtype for case in CASES} == {"bf16", "fp32"}
    assert {layer.route for layer in layers} >= {"none", "add", "mul", "gram"}
    assert any(layer.dropout > 0.0 for layer in layers)
    assert {case.trial for case in CASES} == set(TRIALS)
    by_p3 = [case.layer for case in CASES if case.plan == "p3"]
    assert {layer.host for layer in by_p3} == {"linear", "qkv"}
    assert any(layer.dropout > 0.0 for layer in by_p3)


def test_products_by_elements() -> None:
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(4, 7), torch.randn(4)

    def products() -> list[torch.Tensor]:
        y = F.linear(x, weight, bias)
        return [y, y @ weight, x.mT @ x, F.linear(x.bfloat16(), weight.bfloat16())]

    expected = products()
    with sanitize.seen_products():
        torch.testing.assert_close(products(), expected)
        assert set(count(products).aten) == {"_to_copy", "mul", "sum", "add"}
    torch.testing.assert_close(products(), expected, rtol=0, atol=0)
    assert "__matmul__" not in vars(torch.Tensor)


@pytest.mark.interpret
@pytest.mark.parametrize("case", [case for case in CASES if case.layer.host != "adapter"])
def test_kernels_read_no_product_of_cublas(case: Case) -> None:
    """initcheck does not see what it stores."""
    with sanitize.launched(), sanitize.seen_products():
        ran = count(lambda: sanitize.faults(case, "cpu"))
    assert not {"mm", "addmm", "bmm", "baddbmm"} & set(ran.aten)


@pytest.mark.parametrize(
    ("record", "kernel", "said"),
    [
        (INVALID, "routed_forward", "1 × Invalid __global__ read of size 4 bytes at routed_f"),
        (INLINED, "routed_backward", "1 × Invalid __global__ write of size 2 bytes at down_b"),
        (RACE, "weight_partials", "Write access at weight_partials+0x50 in weights.py:47"),
        (OLD_RACE, "vector_gradient", "1 × Warning: Race reported between Write access at 0x4c60"),
        (UNINITIALISED, "add_partials", "1 × Uninitialized __global__ memory read of size 4"),
        (NOT_LAUNCHED, "(a launch by Triton)", "1 × Program hit CUDA_ERROR_INVALID_VALUE"),
    ],
)
def test_records_of_ours(
    record: str, kernel: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log(tmp_path, TORCH, record, record, LAUNCHED, total="ERROR SUMMARY: 3 errors")
    assert sanitize.main(["summarise", str(path)]) == 1
    told = capsys.readouterr().out
    assert told.startswith("memcheck.txt: 2 of ours, 1 of others; ERROR SUMMARY: 3 errors\n")
    assert f"  {kernel}: 2\n" in told and said.replace("1 ×", "2 ×") in told


def test_records_of_others_are_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log(tmp_path, "a line of the program\n", TORCH, TORCH, NO_SUCH_SYMBOL, LAUNCHED)
    assert sanitize.main(["summarise", str(path)]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "memcheck.txt: 0 of ours, 3 of others; ERROR SUMMARY: 0 errors"
    assert others[0].startswith("  others: 2 × void at::native::vectorized_elementwise_kernel<")
    assert others[1] == "  others: 1 × (no kernel)"


INITCHECK = """\
========= Uninitialized __global__ memory read of size 16 bytes
=========     at routed_forward+0x2670 in forward.py:87
=========     by thread (0,0,0) in block (2,0,0)
=========     Address 0x7f686e9e9800
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: launch [0x238e] in __triton_launcher.cpython-312-x86_64-linux-gnu.so
=========         Host Frame:  [0x18218f] in python3
=========         Host Frame: forward in ops.py:109
========= 
"""
NOT_PRINTED = (
    "========= ERROR SUMMARY: 7157 errors were not printed. Use --print-limit option to adjust the "
    "number of printed errors\n"
)
PRINTED = "linear mul bf16 P3\nlaunched: project 7, routed_forward 10\n"


def test_logs_of_a_tool_and_of_the_program_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As compute-sanitizer 2025.3 wrote them on an H200."""
    clean = tmp_path / "sanitize-racecheck.txt"
    total = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    clean.write_text(f"{START}========= {total}\n")
    beside = clean.with_suffix(".log")
    beside.write_text(PRINTED)
    assert sanitize.summarise([clean]) == 0
    assert capsys.readouterr().out == f"sanitize-racecheck.txt: 0 of ours, 0 of others; {total}\n"
    for cut_off in ("linear mul bf16 P3\n", None):
        beside.unlink() if cut_off is None else beside.write_text(cut_off)
        assert sanitize.summarise([clean]) == 1
        why = "the program did not end, by this log or sanitize-racecheck.log"
        assert capsys.readouterr().out.endswith(f"; {why}\n")

    found = tmp_path / "sanitize-initcheck.txt"
    summary = "========= ERROR SUMMARY: 7257 errors\n"
    found.with_suffix(".log").write_text(PRINTED)
    found.write_text(START + INITCHECK * 2 + summary)
    assert sanitize.summarise([found]) == 1
    first, kernel, record = capsys.readouterr().out.splitlines()
    assert first.endswith("txt: 2 of ours, 0 of others; ERROR SUMMARY: 7257 errors")
    assert kernel == "  routed_forward: 2"
    assert record.endswith("2 × Uninitialized __global__ memory read of size 16 bytes at "
                           "routed_forward+0x2670 in forward.py:87")  # fmt: skip
    found.write_text(START + INITCHECK + summary + NOT_PRINTED)
    assert sanitize.summarise([found]) == 1
    assert "; records are missing\n" in capsys.readouterr().out


def test_a_clean_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    path = log(tmp_path, LAUNCHED, total=total)
    assert sanitize.summarise([path, path]) == 0
    assert capsys.readouterr().out == f"memcheck.txt: 0 of ours, 0 of others; {total}\n" * 2


@pytest.mark.parametrize(
    ("parts", "total", "why"),
    [
        ((LAUNCHED,), "", "the sanitizer did not end"),
        (("========= Error: Device not supported\n",), "ERROR SUMMARY: 0 errors", "did not end"),
        ((LAUNCHED,), "ERROR SUMMARY: 5 errors were not printed. Use --print-limit", "are missing"),
    ],
)
def test_a_log_that_does_not_say_all_is_no_clean_one(
    parts: tuple[str, ...],
    total: str,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sanitize.summarise([log(tmp_path, *parts, total=total)]) == 1
    assert why in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--device", "cuda"], "device='cuda', but torch sees no GPU; "),
        (["--device", "tpu"], "device must be cuda or cpu, got 'tpu'"),
        (["--device", "cpu"], "device='cpu', but tensors are on cpu, not on a GPU; "),
        (["summarise", "/nope"], "'/nope'"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(coverage, "has_triton", lambda: True)
    monkeypatch.setattr(coverage, "emulates", lambda device: False)
    assert sanitize.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bench.sanitize: ") and said in line


def test_a_share_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sanitize.main(["--share", "1/0"])
    assert "share must be i/n with i from 0 to n - 1, got '1/0'" in capsys.readouterr().err
