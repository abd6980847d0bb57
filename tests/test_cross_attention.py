"""The cross-attention layer against loops, its start, dropout, shapes and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fused_route import RoutingContext, RoutingInput
from fused_route.training.cross_attention import CrossAttentionLinear

D = 16
ONE_TOKEN = "x_r has one visual token"


def layer_of(g: int, **given: Any) -> CrossAttentionLinear:
    """In float64, B random: r = 3, k = 4, n = 5, alpha = 6."""
    base: nn.Module = Conv1D(15, 6) if g == 2 else nn.Linear(6, 5)
    if g == 2:
        given |= {"adapted": (0, 2), "of": 3}
    layer = CrossAttentionLinear(base.double(), 3, 4, 6.0, **given)
    nn.init.normal_(layer.B)
    return layer


def looped(layer: CrossAttentionLinear, x_h: Tensor, x_r: Tensor, seen: Tensor) -> Tensor:
    """One token, one head, one visual token at a time."""
    r, n, s = layer.rank, layer.out_features // layer.of, layer.alpha / layer.rank
    columns = layer.W_q.shape[0] // layer.heads
    y = layer.base(x_h).clone()
    for b in range(x_h.shape[0]):
        valid = [layer.A_img @ x for x, ok in zip(x_r[b], seen[b], strict=True) if ok]
        for t in range(x_h.shape[1]):
            q = layer.W_q @ (layer.A_text @ x_h[b, t])
            read = []
            for h in range(layer.heads):
                own = slice(h * columns, (h + 1) * columns)
                exps = [
                    torch.exp(torch.dot(q[own], (layer.W_k @ x)[own]) / math.sqrt(columns))
                    for x in valid
                ]
                o = torch.zeros(columns, dtype=torch.float64)
                for e, x in zip(exps, valid, strict=True):
                    o = o + e / torch.stack(exps).sum() * (layer.W_v @ x)[own]
                read.append(o)
            z = layer.U @ (layer.W_o @ torch.cat(read))
            for i, segment in enumerate(layer.adapted):
                B_i = layer.B[i * n : (i + 1) * n]
                y[b, t, segment * n : (segment + 1) * n] += s * (B_i @ z[i * r : (i + 1) * r])
    return y


@pytest.mark.filterwarnings(f"ignore:{ONE_TOKEN}")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("Nv", [1, 3, 36])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("g", [1, 2])
def test_attention_against_loops(g: int, heads: int, Nv: int, masked: bool) -> None:
    layer = layer_of(g, heads=heads)
    x_h = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    x_r = torch.randn(3, Nv, 6, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(3, Nv, dtype=torch.bool)
    if masked:
        seen = torch.rand(3, Nv) < 0.5
        seen[0], seen[-1] = True, False  # all valid, none valid
    # As behind a projector, whose bias is in masked tokens too.
    given = RoutingInput(x_r, seen).of(x_r) if masked else x_r
    with layer.context.using(given):
        y = layer(x_h)
    expected = looped(layer, x_h, x_r, seen)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(y)
    leaves = [x_h, x_r, *(p for k, p in layer.named_parameters() if not k.startswith("base."))]
    for mine, theirs in zip(
        torch.autograd.grad(y, leaves, seed),
        torch.autograd.grad(expected, leaves, seed),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)
    if masked:
        assert torch.equal(y[-1], layer.base(x_h)[-1])


def test_gradcheck() -> None:
    layer = layer_of(2, heads=2)
    names = [k for k, _ in layer.named_parameters() if not k.startswith("base.")]
    x_h, x_r = (torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x_h: Tensor, x_r: Tensor, *values: Tensor) -> Tensor:
        with layer.context.using(x_r):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x_h,))

    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, (x_h, x_r, *values))


def test_one_visual_token_says_nothing_about_the_text_and_warns_once() -> None:
    context = RoutingContext()
    layers = [layer_of(1, context=context) for _ in range(2)]
    texts = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    with context.using(torch.randn(2, 1, 6, dtype=torch.float64)):
        with pytest.warns(UserWarning, match=ONE_TOKEN) as warned:
            first, second = (layers[0](text) - layers[0].base(text) for text in texts)
            layers[1](texts[0])
        assert len(warned) == 1
    assert first.abs().min() > 1e-3
    torch.testing.assert_close(first, second[:, :1].expand_as(first), rtol=0, atol=1e-14)
    another = layer_of(1)  # has a context of its own
    another.context.set(torch.randn(2, 1, 6, dtype=torch.float64))
    with pytest.warns(UserWarning, match=ONE_TOKEN):
        another(texts[0])


def test_starts_as_the_base_with_values_as_of_a_linear() -> None:
    layer = CrossAttentionLinear(nn.Linear(D, D), 64, 32)
    x_h = torch.randn(2, 3, D)
    with layer.context.using(torch.randn(2, 3, D)):
        assert torch.equal(layer(x_h), layer.base(x_h))
    for name in ("A_text", "A_img", "W_q", "W_k", "W_v", "W_o", "U"):
        weight = layer.get_parameter(name)
        bound = 1 / math.sqrt(weight.shape[1])
        assert weight.abs().max() <= bound and weight.std() > 0.5 * bound, name


def test_dropout_in_training_alone_and_not_in_the_base() -> None:
    layer = layer_of(1, dropout=0.5)
    x_h, x_r = (torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(2))
    with layer.context.using(x_r):
        assert not torch.equal(layer(x_h), layer(x_h))
        layer.eval()
        assert torch.equal(layer(x_h), layer(x_h))
        layer.train().B.data.zero_()
        assert torch.equal(layer(x_h), layer.base(x_h))


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 4, 6), (2, 0, 6)])
def test_any_axes_between(shape: tuple[int, ...]) -> None:
    layer = layer_of(2)
    x_h, x_r = torch.randn(shape, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    with layer.context.using(x_r):
        y = layer(x_h)
        flat = layer(x_h.reshape(2, math.prod(shape[1:-1]), 6))
    torch.testing.assert_close(y, flat.view(*shape[:-1], 15), rtol=1e-13, atol=1e-13)


def test_what_a_layer_refuses() -> None:
    for arguments, message in (
        ({"base": nn.Identity()}, "does not tell its widths"),
        ({"base": len}, "base must be a module, got builtin_function_or_method"),
        (
            {"adapted": (3,), "of": 2},
            r"adapted must be distinct segments from 0 to 1, .* got \(3,\)",
        ),
        ({"of": 3}, "of=3 does not divide"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"alpha": math.nan}, "alpha must be a finite number"),
    ):
        given: dict[str, Any] = {"base": nn.Linear(D, D), "rank": 4, "inner_rank": 4}
        with pytest.raises(ValueError, match=message):
            CrossAttentionLinear(**{**given, **arguments})


def test_what_a_call_refuses() -> None:
    layer = CrossAttentionLinear(nn.Linear(D, D), 4, 4)
    x_h, x_r = torch.randn(2, 3, D), torch.randn(2, 3, D)
    with pytest.raises(ValueError, match="CrossAttentionLinear has no routing input"):
        layer(x_h)
    packed = RoutingInput(x_r, sample_index=torch.tensor([0, 1, 1]))
    for given, x, message in (
        (RoutingInput(x_r), x_h[:1], r"x_h must be \(B, …, d\) with B = 2, .* got \(1, 3, 16\)"),
        (RoutingInput(x_r), x_h[..., 1:], r"d = 16; got \(2, 3, 15\)"),
        (
            RoutingInput(x_r),
            x_h[0, 0],
            r"x_h must be a floating-point tensor \(B, …, d\), got .*\(16,\)",
        ),
        (RoutingInput(x_r), x_h.double(), "A_text is torch.float32, x_h is torch.float64"),
        (packed, x_h[0], "sample_index is given: cross-attention takes no packed sequences"),
    ):
        with layer.context.using(given), pytest.raises(ValueError, match=message):
            layer(x)
