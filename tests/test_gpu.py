"""The operation on a GPU: the kernels against float64, then what only a GPU has.

`pytest -m gpu` on a machine with one; in the interpreter (TRITON_INTERPRET=1) what needs none runs
on the CPU in small sizes, so that these tests are themselves tested.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import formulations, providers
from bench.cases import HOSTS, ROUTES, Case, op
from bench.correct import Gate
from bench.operands import DTYPES, S_SCALE, Operands
from bench.subject import Subject
from fused_route import Dropout, RoutingInput, routed_adapter, routed_linear
from fused_route.ops import draw_seed, keep_mask
from fused_route.testing import assert_as_good_as_eager, roundoff

pytest.importorskip("triton")

from tile_tables import launched

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")

pytestmark = [
    pytest.mark.gpu,
    # cuBLAS may be first called in autograd's own thread; what else torch says of a GPU is shown
    *([pytest.mark.filterwarnings("default")] if ON_GPU else []),
]

# Neither d nor T is a multiple of a tile. Every kernel that a test needs is compiled first, in a
# second or two: the tests share sizes.
SMALL = Case("op", "adapter", "mul", 40, 6, 3, 7)
BASE = op("adapter", "mul", 768, 64, 2_000) if ON_GPU else SMALL
UNEVEN = Case("op", "adapter", "mul", 720, 48, 40, 51) if ON_GPU else SMALL
SHAPES = [
    *(replace(UNEVEN, host=host, dtype=dtype) for host in HOSTS for dtype in ("bf16", "fp32")),
    *(
        replace(UNEVEN, host=host, route="gram", Nv=5, dtype=dtype)
        for host in HOSTS
        for dtype in ("bf16", "fp32")
    ),
]
if ON_GPU:
    SHAPES += [
        *(Case("op", host, "mul", 768, 64, 8, 5) for host in HOSTS),  # K1's columns in parts
        Case("op", "linear", "gram", 768, 128, 8, 5, Nv=5),
        op("adapter", "mul", 1024, 128, 10_240),
        op("linear", "mul", 1024, 128, 10_240, dtype="fp16"),
        op("qkv", "mul", 1024, 128, 10_240),  # a fused projection: R = 256
        op("qkv", "expand", 1024, 128, 2_000, dtype="fp16"),
        op("qkv", "mul", 768, 128, 2_000, dtype="fp32"),
        op("adapter", "gram", 768, 256, 2_000),
        op("linear", "mul", 768, 256, 2_000, dtype="fp16"),
        op("adapter", "mul", 1024, 256, 10_240),
        op("linear", "gram", 1024, 256, 2_000),
        op("adapter", "mul", 768, 64, 32_768, dtype="fp32"),
        op("qkv", "gram", 768, 64, 32_768),
        op("adapter", "mul", 768, 64, 131_072),
        op("linear", "gram", 768, 64, 131_072),
        op("adapter", "mul", 768, 64, 2_000, Nv=36),
        op("linear", "mul", 768, 64, 2_000, Nv=197),
        op("adapter", "gram", 768, 64, 2_000, Nv=36, dtype="fp32"),
        op("linear", "gram", 768, 64, 10_240, Nv=36),
        op("qkv", "gram", 768, 64, 2_000, Nv=36),
        op("adapter", "gram", 768, 64, 2_000, Nv=197),
        op("linear", "gram", 768, 64, 10_240, Nv=197),
        op("qkv", "gram", 768, 64, 2_000, Nv=197),
        op("adapter", "gram", 1024, 128, 2_000, Nv=197),
        op("linear", "gram", 768, 256, 2_000, Nv=36),
        op("qkv", "gram_relu", 1024, 128, 10_240, Nv=36),
        Case("op", "adapter", "mul", 768, 64, 1, 9001),  # few long samples
        Case("op", "linear", "gram_relu", 768, 64, 3, 3000),
        Case("op", "qkv", "gram", 768, 64, 2, 4500, Nv=36),
        Case("op", "adapter", "gram", 720, 48, 1, 9001, Nv=5, dtype="fp32"),
    ]
REPEATS = 10 if ON_GPU else 1
# Offsets of x, or of y, beyond 2³¹ elements.
HUGE = {
    "adapter": Case("op", "adapter", "mul", 768, 16, 100, 29_000),
    "qkv": Case("op", "qkv", "mul", 768, 16, 100, 10_000),
}


@pytest.fixture
def released() -> Iterator[None]:
    """Tests in other processes need the memory, too."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


def fused(case: Case, seed: int = 0, by: str = "fused") -> tuple[Operands, Subject]:
    operands = Operands.of_case(case, DEVICE, seed)
    if case.dtype == "fp16":  # gradients of gram come near its largest number
        operands.dy.mul_(0.125)
    return operands, providers.PROVIDERS[by].make(operands)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("host", HOSTS)
def test_as_good_as_eager(host: str, route: str, dtype: str) -> None:
    hold_to_eager(replace(BASE, host=host, route=route, dtype=dtype))


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_as_good_as_eager_in_other_shapes(case: Case) -> None:
    """Again with the same bits: a race on an H200 spoilt some tiles of dB in two of three runs."""
    subject = hold_to_eager(case)
    first = subject.results()
    for _ in range(REPEATS):
        assert_same_bits(subject.results(), first)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("host", HOSTS)
def test_an_image_made_along_is_as_good_as_eager(host: str, dtype: str) -> None:
    """What is to be timed: no launches of the image's own; also with K1's columns in parts."""
    cases = [UNEVEN, replace(UNEVEN, S=8, T=5), replace(BASE, route="gram")]
    if ON_GPU:
        cases += [op(host, "mul", 1024, 128, 2_000), op(host, "expand", 768, 96, 2_000)]
    for case in cases:
        subject = hold_to_eager(replace(case, host=host, dtype=dtype), "fused-along")
        first = subject.results()
        for _ in range(REPEATS):
            with launched() as names:
                assert_same_bits(subject.results(), first)
            assert "vector_gradient" not in names and names.count("project") == 0


def hold_to_eager(case: Case, by: str = "fused") -> Subject:
    """The case by the kernels, as good as eager with its seed, or else with two others.

    Where one sample decides a gradient so does luck: `gram` in fp32 had 2.07 times eager's error
    with one seed on an H200, and 0.56 to 1.63 with five others. A fault shows with most seeds.
    """
    operands, subject = fused(case, by=by)
    try:
        assert Gate(operands).worst(by, subject.results()) is not None
    except AssertionError:
        for seed in (1, 2):
            other, again = fused(case, seed, by)
            Gate(other).worst(by, again.results())
    return subject


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", ["linear", "qkv"])
def test_p3_is_as_good_as_eager(host: str, dtype: str, p: float) -> None:
    """In uneven sizes, whatever "auto" would choose; with dropout p1 draws the same masks.

    Two honest sums differ by the roundoff of both: on an H200 by 5 to 10 eps of fp32 (of 18), for
    cuBLAS's product and ours, which adds up 720 and 2,160 terms one after the other.
    """
    operands = Operands.of_case(replace(UNEVEN, host=host, dtype=dtype, dropout=p), DEVICE)

    def results(plan: str) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return operands.subject(lambda o: linear_by(plan, o)).results()

    if not p:
        assert Gate(operands).worst("fused", results("p3")) is not None
    for name, tensor in results("p1").items():
        difference = (tensor - results("p3")[name]).double().norm() / tensor.double().norm()
        assert float(difference) < 2 * roundoff(tensor.dtype, tensor.numel()), name


def linear_by(plan: str, o: Operands) -> Tensor:
    """The operands' linear layer by a plan of the kernels."""
    return routed_linear(
        o.x, o.A, o.B, o.x_r, weight=o.weight, bias=o.bias, route=o.layer.route, s=S_SCALE,
        dropout=o.layer.dropout, adapted=o.adapted, of=o.of, impl="triton", plan=plan,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("host", HUGE)
def test_offsets_beyond_32_bits(host: str) -> None:
    """Every row against eager torch on its sample, and the sums over all of them."""
    operands, subject = fused(HUGE[host] if ON_GPU else replace(SMALL, host=host))
    assert not ON_GPU or max(operands.x.numel(), operands.dy.numel()) > 2**31
    actual = subject.results()
    sums = {name: torch.zeros_like(actual[name], dtype=torch.float32) for name in ("dA", "dB")}
    samples = operands.x.shape[0]
    for rows in torch.arange(samples).split(10):
        those = slice(int(rows[0]), int(rows[-1]) + 1)
        part = copy.copy(operands)
        part.x = operands.x.detach()[those].requires_grad_()
        part.x_r, part.dy = operands.x_r[those], operands.dy[those]
        expected = part.subject(formulations.clean).results()
        for name in ("y", "dx"):
            assert float(row_errors(actual[name][those], expected[name]).max()) < 0.02, name
        for name, total in sums.items():
            total += expected[name]
    for name, total in sums.items():
        assert float((actual[name] - total).norm()) < 0.02 * float(total.norm()), name


def row_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Of each row, relative to its norm: a rounding of bf16 is 0.4 % of an element at most."""
    difference = (actual.float() - expected.float()).norm(dim=-1)
    return difference / expected.float().norm(dim=-1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("host", "route", "Nv"), [
    ("adapter", "mul", 1), ("linear", "mul", 1), ("qkv", "mul", 1), ("linear", "gram", 5),
])  # fmt: skip
def test_two_runs_have_the_same_bits(host: str, route: str, Nv: int, dropout: float) -> None:
    _, subject = fused(replace(UNEVEN, host=host, route=route, Nv=Nv, dropout=dropout))
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(subject.results())
    assert_same_bits(*runs[:2])
    assert torch.equal(runs[0]["y"], runs[2]["y"]) == (dropout == 0.0)


def test_every_pass_draws_the_mask_of_torch() -> None:
    """A and B that show the mask: y, dx and dA tell of rows, elements and columns what is kept."""
    M, d, p = (20_000, 768, 0.25) if ON_GPU else (64, 48, 0.25)
    x = torch.ones(1, M, d, device=DEVICE, requires_grad=True)
    A = torch.ones(1, d, device=DEVICE, requires_grad=True)
    dy = torch.zeros(1, M, d, device=DEVICE)
    dy[..., 0] = 1.0
    torch.manual_seed(5)
    seed = draw_seed(DEVICE)
    torch.manual_seed(5)
    y = routed_adapter(
        x, A, torch.ones(d, 1, device=DEVICE),
        route="none", activation="none", residual=False, dropout=p, impl="triton",
    )  # fmt: skip
    y.backward(dy)
    keep = keep_mask(seed, (M, d), p)
    exact: dict[str, Any] = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(y[0, :, 0].detach(), keep.sum(-1) / (1 - p), **exact)
    assert x.grad is not None and A.grad is not None
    torch.testing.assert_close(x.grad[0], keep / (1 - p), **exact)
    torch.testing.assert_close(A.grad[0], keep.sum(0) / (1 - p), **exact)
    share = float((x.grad != 0).double().mean())
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / (M * d)) ** 0.5


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("host", "route", "Nv"), [
    ("adapter", "mul", 1), ("linear", "mul", 1), ("qkv", "mul", 1), ("linear", "gram", 5),
])  # fmt: skip
def test_dropout_is_eager_with_the_same_masks(host: str, route: str, Nv: int, dtype: str) -> None:
    p = 0.1
    case = replace(UNEVEN, host=host, route=route, Nv=Nv, dropout=p, dtype=dtype)
    operands, subject = fused(case)
    torch.manual_seed(7)
    actual = subject.results()
    torch.manual_seed(7)
    seed = draw_seed(DEVICE)
    keep_h = keep_mask(seed, tuple(operands.x.shape), p)
    if Nv == 1:
        keep_r = keep_mask(seed, tuple(operands.x_r.shape), p, "x_r")
    else:  # torch computes x_v of several tokens, and draws for it
        keep_r = torch.empty_like(operands.x_r, dtype=torch.bool).bernoulli_(1.0 - p)
    masks: Any = Dropout(p, keep_h, keep_r)
    operands.layer = replace(operands.layer, dropout=masks)
    assert Gate(operands).worst("fused", actual) is not None


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("host", "route", "Nv"), [
    ("adapter", "mul", 1), ("qkv", "mul", 1), ("adapter", "gram", 5),
])  # fmt: skip
def test_packed_is_padded_without_its_padding(host: str, route: str, Nv: int, dtype: str) -> None:
    operands = Operands.of_case(replace(UNEVEN, host=host, route=route, Nv=Nv, dtype=dtype), DEVICE)
    S, T = operands.x.shape[:2]
    lengths = torch.arange(S, device=DEVICE) * 13 % (T + 1)  # none, all, and between
    lengths[-1] = T
    valid = torch.arange(T, device=DEVICE) < lengths[:, None]
    index = torch.arange(S, device=DEVICE).repeat_interleave(lengths)

    def padded(o: Operands) -> Tensor:
        return formulations.clean(o)[valid]

    def packed(o: Operands) -> Tensor:
        part = copy.copy(o)
        given: Any = RoutingInput(o.x_r, None, index)
        part.x, part.x_r = o.x[valid], given
        return formulations.library(part)

    results = []
    for o, way in ((operands, packed), (operands.in_float64(), padded), (operands, padded)):
        subject = o.subject(way)
        subject.dy = o.dy[valid]
        results.append(subject.results())
    assert_as_good_as_eager(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_autocast(host: str, dtype: torch.dtype) -> None:
    """A module in fp32: both round to 16 bits inside, whatever their results' own dtype."""
    operands = Operands.of_case(replace(BASE, host=host, dtype="fp32"), DEVICE)
    truth = operands.in_float64().subject(formulations.clean).results()
    module: Any = operands.module()
    leaves = {"x": operands.x, **trained(module)}
    found = []
    for impl in ("triton", "reference"):
        module.impl = impl
        with torch.autocast(DEVICE.type, dtype):
            y = module(operands.x)
        grads = torch.autograd.grad(y, list(leaves.values()), operands.dy.to(y.dtype))
        named = zip(leaves, grads, strict=True)
        found.append({"y": y.detach(), **{f"d{name}": grad for name, grad in named}})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and {"y", "dx", "dA", "dB"} <= ours.keys()
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    for name, tensor in ours.items():
        assert_as_good_as_eager(
            {name: tensor.to(dtype)}, {name: truth[name]}, {name: theirs[name].to(dtype)}
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.parametrize(("name", "x_t"), [
    ("adapter_rank1", "saved"), ("adapter_own_rank1", "recomputed"), ("adapter_matrix", "saved"),
    ("frozen_scale", "recomputed"), ("given_shift", "saved"), ("given_matrix", "saved"),
])  # fmt: skip
def test_opcheck(name: str, x_t: str) -> None:
    from test_compilers import OPERATIONS, operation

    with DEVICE:
        given = operation(*OPERATIONS[name], x_t)
    torch.library.opcheck(torch.ops.fused_route.forward.default, given)
    y, saved_x_t, x_v = torch.ops.fused_route.forward(*given)
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in given]
    wanted = [t is not None for t in inputs[:8]]
    backward = (
        torch.randn_like(y), saved_x_t.detach(), x_v.detach(), *inputs[:9], *inputs[11:17], wanted,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fused_route.backward.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_gpu)])
@pytest.mark.parametrize("host", HOSTS)
def test_compiled_whole(host: str, backend: str) -> None:
    import torch._inductor.config as inductor

    operands = Operands.of_case(replace(BASE, host=host), DEVICE)
    module = operands.module()
    leaves = {"x": operands.x, **trained(module)}
    expected = Subject(lambda: module(operands.x), leaves, operands.dy).results()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with inductor.patch(compile_threads=1):  # starts no processes
        found = Subject(lambda: compiled(operands.x), leaves, operands.dy).results()
    assert {"y", "dx", "dA", "dB"} <= found.keys()
    assert_same_bits(found, expected)


@needs_gpu
@pytest.mark.parametrize("host", HOSTS)
def test_on_another_stream(host: str) -> None:
    """The stream is busy before it writes x: what ran on another would read the old one."""
    operands, subject = fused(replace(BASE, host=host))
    old, new = operands.x.detach().clone(), torch.randn_like(operands.x)
    with torch.no_grad():
        operands.x.copy_(new)
    expected = subject.results()
    with torch.no_grad():
        operands.x.copy_(old)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        with torch.no_grad():
            operands.x.copy_(new)
        found = subject.results()
    stream.synchronize()
    assert_same_bits(found, expected)


@needs_gpu
@pytest.mark.parametrize("host", HOSTS)
def test_a_graph_replays_what_was_captured(host: str) -> None:
    _, subject = fused(replace(BASE, host=host))
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
    _, subject = fused(replace(UNEVEN, dropout=0.1))
    subject.results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = subject.forward()
    graph.replay()
    first = y.detach().clone()
    graph.replay()
    assert not torch.equal(first, y)
