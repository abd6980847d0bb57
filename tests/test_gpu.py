"""Smoke tests for a GPU: the kernels against float64, then what only a GPU has.

`pytest -m gpu` on a machine with one; in the interpreter (TRITON_INTERPRET=1) the first part runs
on the CPU, so that these tests are themselves tested.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import formulations, providers
from bench.cases import Case
from bench.correct import Gate
from bench.operands import Operands
from bench.subject import Subject
from fused_route import routed_adapter
from fused_route.ops import draw_seed, keep_mask

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    # cuBLAS may be first called in autograd's own thread
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

# Neither d nor T is a multiple of a tile; with a GPU also both sides of `MANY_ROWS`.
SIZES = {"small": Case("op", "adapter", "mul", 40, 6, 3, 7)}
if ON_GPU:
    SIZES["few"] = Case("op", "adapter", "mul", 720, 48, 40, 51)
    SIZES["many"] = Case("op", "adapter", "mul", 768, 64, 512, 20)
    SIZES["wide"] = Case("op", "adapter", "mul", 1000, 128, 40, 50)  # a fused projection: R = 256


def fused(case: Case) -> tuple[Operands, Subject]:
    operands = Operands.of_case(case, DEVICE)
    return operands, providers.PROVIDERS["fused"].make(operands)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("route", ["none", "add", "mul", "gram", "expand", "gram_relu", "ones"])
@pytest.mark.parametrize("host", ["adapter", "linear", "qkv"])
@pytest.mark.parametrize("size", SIZES)
def test_as_good_as_eager(size: str, host: str, route: str, dtype: str) -> None:
    operands, subject = fused(replace(SIZES[size], host=host, route=route, dtype=dtype))
    assert Gate(operands).worst("fused", subject.results()) is not None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("host", ["adapter", "linear", "qkv"])
@pytest.mark.parametrize("size", SIZES)
def test_several_visual_tokens(size: str, host: str, dtype: str) -> None:
    case = replace(SIZES[size], host=host, route="gram", Nv=5, dtype=dtype)
    operands, subject = fused(case)
    assert Gate(operands).worst("fused", subject.results()) is not None


@pytest.mark.parametrize("size", SIZES)
def test_two_runs_have_the_same_bits(size: str) -> None:
    _, subject = fused(SIZES[size])
    first, second = subject.results(), subject.results()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_draws_the_mask_of_torch() -> None:
    """A and B that show the mask: y − x counts how many of a row's elements are kept."""
    M, d, p = 64, 48, 0.25
    x, A = torch.ones(1, M, d, device=DEVICE), torch.ones(1, d, device=DEVICE)
    B = torch.full((d, 1), 1.0, device=DEVICE)
    torch.manual_seed(5)
    seed = draw_seed(DEVICE)
    torch.manual_seed(5)
    y = routed_adapter(
        x, A, B, route="none", activation="none", residual=False, dropout=p, impl="triton"
    )
    kept: Tensor = keep_mask(seed, (M, d), p).sum(-1)
    torch.testing.assert_close(y[0, :, 0], kept / (1 - p), rtol=1e-5, atol=0.0)


@needs_gpu
@pytest.mark.parametrize("host", ["adapter", "linear", "qkv"])
def test_a_graph_replays_what_was_captured(host: str) -> None:
    _, subject = fused(replace(SIZES["few"], host=host, dtype="bf16"))
    expected = subject.results()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        subject.results()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.forget()
        y = subject.forward()
        y.backward(subject.dy)
    y.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected["y"])
    for name, leaf in subject.leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, expected[f"d{name}"]), name


@needs_gpu
def test_replays_of_a_graph_draw_new_masks() -> None:
    _, subject = fused(replace(SIZES["few"], dropout=0.5))
    subject.results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = subject.forward()
    graph.replay()
    first = y.detach().clone()
    graph.replay()
    assert not torch.equal(first, y)


@needs_gpu
@pytest.mark.parametrize("host", ["adapter", "qkv"])
def test_compiled_whole(host: str) -> None:
    operands, subject = fused(replace(SIZES["few"], host=host))
    compiled = torch.compile(formulations.library, fullgraph=True)
    torch.testing.assert_close(compiled(operands), subject.forward(), rtol=0.0, atol=0.0)
