"""The backward pass of kernels under another autocast, and from tensors that came back changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Call, Layer, gradients, run, trained
from torch import Tensor

from fused_route import Routing, autograd
from fused_route.fusion import Fusion
from fused_route.plan import Plan

pytestmark = pytest.mark.interpret

HOSTS = ("adapter", "linear", "qkv", "linear_p3", "given")
# dtype of the tensors, and of the autocast that only the backward pass is under
FOREIGN = (
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)


def of_all(host: str, dtype: torch.dtype, impl: str = "triton") -> tuple[Tensor, dict[str, Tensor]]:
    layer, call = Layer(host, S=2, T=5, d=32, n=48, r=8), Call(Routing("mul"))
    t = trained(layer, call, dtype)
    return run(layer, call, t, 0.0, impl), t


@pytest.mark.parametrize(("dtype", "foreign"), FOREIGN, ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_an_autocast_of_the_backward_pass_alone_changes_nothing(
    host: str, dtype: torch.dtype, foreign: torch.dtype
) -> None:
    """Not what a frozen base's product gives, which K2 adds to, compiled for another dtype."""
    expected = gradients(*of_all(host, dtype))
    y, t = of_all(host, dtype)
    with torch.autocast("cpu", foreign):
        found = gradients(y, t)
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype and torch.equal(found[name], gradient), name


def strided(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t


def unaligned(t: Tensor) -> Tensor:
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return room.copy_(t)


@pytest.mark.parametrize("route", ["mul", "gram"])
@pytest.mark.parametrize("unpacked", [strided, unaligned])
@pytest.mark.parametrize("host", HOSTS)
def test_saved_tensors_come_back_with_other_strides(
    host: str, unpacked: Callable[[Tensor], Tensor], route: str
) -> None:
    layer = Layer(host, S=2, T=5, Nv=3 if route == "gram" else 1, d=32, n=48, r=8)
    call, found = Call(Routing(route)), []
    for unpack in (lambda t: t, unpacked):
        t = trained(layer, call)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            found.append(gradients(run(layer, call, t, 0.0, "triton"), t))
    # An unaligned weight of P3 goes by P1, which adds in another order.
    bound = 1e-5 if host == "linear_p3" else 0.0
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=bound, atol=bound)


def test_the_image_has_no_part_in_gradients_of_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frozen and the image trained: K3 has no programs for the rows of x_r."""
    asked, sums = list[bool](), Plan.sums

    def noted(*args: Any) -> Any:
        asked.append(args[3])
        return sums(*args)

    monkeypatch.setattr(Plan, "sums", noted)
    for frozen, has_x_r in ((("A",), False), ((), True)):
        layer, call = Layer("linear", d=32, n=48, r=8), Call(Routing("mul"))
        t = trained(layer, call)
        for name in frozen:
            t[name].requires_grad_(False)
        found = gradients(run(layer, call, t, 0.0, "triton"), t)
        assert asked.pop() is has_x_r and {"x_r", "B"} <= found.keys()


@pytest.mark.parametrize("wanted", ["u", "w"])
def test_an_operator_returns_what_was_wanted(wanted: str) -> None:
    """Of the shapes that compilers were told, though K2 makes du and dw together."""
    f = Fusion("rank1", "plain", "plain", "none", 1, "operand", "none", "none", 0.0, (0,), 1,
               "saved", "ieee", "p1")  # fmt: skip
    x, A, B, u, w = (torch.randn(*s) for s in ((2, 3, 16), (16, 16), (16, 16), (2, 16), (2, 16)))
    nothing = (None,) * 5
    told = (0, f.text(), 1.0)
    y, x_t, x_v = autograd.forward_op(x, None, u, w, A, None, B, None, None, *nothing, *told, True)
    flags = [name == wanted for name in ("x", "x_r", "u", "w", "A", "b_A", "B", "b_B")]
    tensors: tuple[Any, ...] = (y, x_t, x_v, x, None, u, w, A, None, B, *nothing)
    found = autograd.backward_op(*tensors, *told, flags)
    assert [g.numel() > 0 for g in found] == flags
