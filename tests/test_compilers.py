"""The kernels under torch's compilers: opcheck, torch.compile without breaks, torch.export."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import in_turn
from kernel_cases import KERNEL_ROUTES
from torch import Tensor, nn

from fused_route import ROUTES, RoutedAdapter, RoutedLinear, RoutingInput, routed_adapter
from fused_route.fusion import Fusion

pytestmark = pytest.mark.interpret

S, T, D, R, N = 2, 3, 32, 4, 24

OPERATIONS = {
    "adapter_rank1": ("residual", "owned", "rank1", 0.0),
    "adapter_own_rank1": ("none", "operand", "rank1", 0.1),
    "adapter_matrix": ("residual", "operand", "matrix", 0.0),
    "frozen_scale": ("frozen", "owned", "scale", 0.1),
    "frozen_identity": ("frozen", "none", "identity", 0.0),
    "given_matrix": ("given", "operand", "matrix", 0.1),
    "given_shift": ("given", "operand", "shift", 0.0),
}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def operation(base: str, image: str, mix: str, p: float, x_t: str = "saved") -> tuple[Any, ...]:
    """Arguments of `fused_route::forward`."""
    is_adapter = base in ("residual", "none")
    n = D if is_adapter else N
    u = leaf(S, R) if image == "operand" and mix == "rank1" else None
    w = leaf(S, 1, R, R) if mix == "matrix" else leaf(S, R)
    fusion = Fusion(
        mix, "plain", "plain", "relu", 1, image, base, "gelu" if is_adapter else "none", p,
        (0,), 1, x_t, "ieee",
    )  # fmt: skip
    return (
        leaf(S, T, D), leaf(S, 1, D) if image == "owned" else None, u,
        w if image == "operand" else None, leaf(R, D), leaf(R) if is_adapter else None,
        leaf(n, R), leaf(n) if is_adapter else None,
        torch.randn(n, D) if base == "frozen" else None,
        torch.randn(n) if base == "frozen" else None,
        leaf(S, T, n) if base == "given" else None,
        torch.tensor([123]) if p else None, None, None, 0, fusion.text(), 0.5, x_t == "saved",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("x_t", ["saved", "recomputed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name: str, x_t: str) -> None:
    given = operation(*OPERATIONS[name], x_t)
    torch.library.opcheck(torch.ops.fused_route.forward.default, given)
    y, saved_x_t, x_v = torch.ops.fused_route.forward(*given)
    inputs = [t.detach() if isinstance(t, Tensor) else t for t in given]
    wanted = [t is not None for t in inputs[:8]]
    backward = (
        torch.randn_like(y), saved_x_t.detach(), x_v.detach(), *inputs[:9], *inputs[11:17], wanted,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fused_route.backward.default, backward)


def test_text_of_a_fusion_is_the_fusion() -> None:
    for p, segments in ((0.1 + 0.2, (0,)), (1e-7, (2, 0))):
        fusion = Fusion("scale", "one", "plain", "none", 2, "owned", "frozen", "none", p,
                        segments, 3, "saved", "tf32")  # fmt: skip
        assert Fusion.of_text(fusion.text()) == fusion


@pytest.mark.parametrize("route", ["mul", ROUTES["gram"]], ids=["name", "route"])
def test_a_function_with_a_route_of_any_kind_is_traced_without_a_warning(route: Any) -> None:
    x, A, B = torch.randn(S, T, D), torch.randn(R, D), torch.randn(D, R)
    x_r = torch.randn(S, 1, D)

    def adapted(x: Tensor) -> Tensor:
        return routed_adapter(x, A, B, x_r, route=route, impl="reference")

    torch._dynamo.reset()
    compiled = torch.compile(adapted, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), adapted(x))  # warnings are errors


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "adapter": lambda **kw: RoutedAdapter(D, R, impl="triton", **kw),
    "linear": lambda **kw: RoutedLinear(
        nn.Linear(D, N).requires_grad_(False), R, impl="triton", **kw
    ),
    "qkv": lambda **kw: RoutedLinear(
        nn.Linear(D, 3 * N).requires_grad_(False), R, adapted=(0, 2), of=3, impl="triton", **kw
    ),
    "trainable": lambda **kw: RoutedLinear(nn.Linear(D, N), R, impl="triton", **kw),
}


def layer_of(kind: str, route: str = "mul", **settings: Any) -> Any:
    layer = LAYERS[kind](route=route, **settings)
    nn.init.normal_(layer.B)  # type: ignore[arg-type]
    return layer


def results(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()][:3])]


def assert_traced_whole(layer: Any, backend: str) -> None:
    """Compiled without a break it gives the bits that it gives eagerly."""
    x = leaf(S, T, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for mine, eager in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize(
    ("kind", "route", "Nv", "recompute"),
    in_turn(LAYERS, ["none", "mul", "gram", "ones_relu"], [1, 3], [False, True]),
)
def test_compile_traces_layers_whole(kind: str, route: str, Nv: int, recompute: bool) -> None:
    layer = layer_of(kind, route, recompute=recompute)
    layer.context.set(torch.randn(S, Nv, D))
    assert_traced_whole(layer, "aot_eager")


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize(("kind", "route", "Nv"), in_turn(LAYERS, KERNEL_ROUTES, [1, 3]))
def test_compile_traces_the_reference_whole(kind: str, route: str, Nv: int) -> None:
    layer = layer_of(kind, route)
    layer.impl = "reference"
    layer.context.set(torch.randn(S, Nv, D))
    assert_traced_whole(layer, "eager")


@pytest.mark.usefixtures("unpoisoned")
def test_compile_with_inductor() -> None:
    layer = layer_of("qkv", "gram")
    layer.context.set(torch.randn(S, D))
    x = leaf(S, T, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for mine, eager in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
        assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("kind", LAYERS)
def test_other_values_do_not_recompile(kind: str) -> None:
    layer = layer_of(kind, dropout=0.1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(4):
        layer.context.set(RoutingInput(torch.randn(S, 1, D)))
        results(compiled, layer, leaf(S, T, D))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.1 * step)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("unpoisoned")
def test_another_alpha_compiles() -> None:
    layer = layer_of("linear")
    layer.context.set(torch.randn(S, D))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = leaf(S, T, D)
    for alpha in (1.0, 2.0, 3.0):
        layer.alpha = alpha
        for mine, eager in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
            assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unpoisoned")
def test_packed_rows_compile_once_whatever_their_lengths() -> None:
    layer = layer_of("adapter")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for first in (1, 2, 4):
        index = torch.tensor([0] * first + [1] * (6 - first))
        layer.context.set(RoutingInput(torch.randn(2, D), sample_index=index))
        x = leaf(6, D)
        for mine, eager in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
            assert torch.equal(mine, eager)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("unpoisoned")
def test_other_lengths_recompile_once() -> None:
    """A second shape makes the sizes dynamic; a third and fourth are served by that."""
    layer = layer_of("adapter", "gram")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    layer.context.set(torch.randn(S, D))
    for length in (3, 5, 8, 13):
        x = leaf(S, length, D)
        for mine, eager in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
            assert torch.allclose(mine, eager, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("unpoisoned")
def test_compiled_dropout_draws_from_torch() -> None:
    layer = layer_of("linear", dropout=0.5)
    layer.context.set(torch.randn(S, D))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(S, T, D)
    torch.manual_seed(1)
    one, two = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(one, compiled(x)) and not torch.equal(one, two)


class Routed(nn.Module):
    """A layer with its image as an input."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        with self.layer.context.using(image):
            return self.layer(x)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("route", ["mul", "gram"])
@pytest.mark.parametrize("kind", ["adapter", "linear", "qkv"])
def test_export_of_an_inference_module(kind: str, route: str, tmp_path: Any) -> None:
    module = Routed(layer_of(kind, route)).eval().requires_grad_(False)
    x, image = torch.randn(S, T, D), torch.randn(S, 3, D)
    program = torch.export.export(module, (x, image))
    called = [str(node.target) for node in program.graph.nodes]
    assert "fused_route.forward.default" in called
    torch.export.save(program, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for _ in range(2):
        x, image = torch.randn(S, T, D), torch.randn(S, 3, D)
        assert torch.equal(again(x, image), module(x, image))


@pytest.mark.usefixtures("unpoisoned")
def test_export_without_gradients_can_be_trained() -> None:
    """The exported graph wants no x_t; a backward pass through it computes x_t anew."""
    module = Routed(layer_of("linear"))
    x, image = torch.randn(S, T, D), torch.randn(S, 1, D)
    with torch.no_grad():
        again = torch.export.export(module, (x, image)).module()
    again(x, image).square().sum().backward()
    module(x, image).square().sum().backward()
    found = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert found
    for name, parameter in module.named_parameters():
        if name in found:
            assert torch.equal(found[name], parameter.grad)  # type: ignore[arg-type]


def test_functional_call_and_deepcopy() -> None:
    from copy import deepcopy

    layer = layer_of("adapter")
    layer.context.set(torch.randn(S, D))
    x = torch.randn(S, T, D)
    values = {name: value + 1.0 for name, value in layer.named_parameters()}
    y = torch.func.functional_call(layer, values, (x,))
    other = deepcopy(layer)
    other.load_state_dict(values)
    other.context.set(layer.context.get(D, "").x_r)
    assert torch.equal(other(x), y) and not torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_itself_under_autocast(dtype: torch.dtype) -> None:
    given = list(operation("frozen", "owned", "scale", 0.0))
    with torch.autocast("cpu", dtype):
        y, x_t, _ = torch.ops.fused_route.forward(*given)
    assert y.dtype == x_t.dtype == dtype
    y.float().sum().backward()
    assert given[4].grad.dtype == torch.float32
