"""Batches of any kind are what a loop over their samples is: packed, masked, patches, decoding."""

from typing import Any

import pytest
import torch
from cases import BUILT_IN, packed, valid_tokens
from kernel_cases import KERNEL_ROUTES
from torch import Tensor

from fused_route import Routing, RoutingInput, routed_adapter, routed_linear
from fused_route.testing import assert_as_good_as_eager

D, N, RANK = 20, 6, 5
# T, Nv, and the lengths of packed sequences or whether visual tokens are masked
BATCHES: dict[str, dict[str, Any]] = {
    "one vector": {"T": 6},
    "36 tokens": {"Nv": 36},
    "197 tokens": {"Nv": 197},
    "197 tokens, masked": {"Nv": 197, "masked": True},
    "decoding": {"T": 1},
    "decoding, 36 tokens": {"T": 1, "Nv": 36},
    "decoding, masked": {"T": 1, "Nv": 9, "masked": True},
    "packed": {"lengths": [3, 1, 5]},
    "packed, one empty": {"lengths": [4, 0, 2]},
    "packed, 36 tokens": {"lengths": [2, 7, 1], "Nv": 36},
    "packed, 197 tokens, masked": {"lengths": [1, 2, 3], "Nv": 197, "masked": True},
}
HOSTS = {"adapter": 1, "qkv": 2, "qkv_p3": 2}


def values(host: str, T: int, Nv: int, lengths: list[int] | None) -> dict[str, Tensor]:
    g = HOSTS[host]
    rows = (sum(lengths) + 2,) if lengths else (3, T)
    named = {
        "x_h": torch.randn(*rows, D),
        "x_r": torch.randn(3, Nv, D) * Nv**-0.5,
        "A": torch.randn(g * RANK, D) * D**-0.5,
        "B": torch.randn(D if host == "adapter" else N * g, RANK),
    }
    if host == "qkv":
        return {**named, "base_out": torch.randn(*rows, 3 * N)}
    if host == "qkv_p3":
        return {**named, "weight": torch.randn(3 * N, D) * D**-0.5}
    return {**named, "b_A": torch.randn(RANK), "b_B": torch.randn(D)}


def run(t: dict[str, Tensor], given: RoutingInput, routing: Routing, impl: Any) -> Tensor:
    if "b_A" not in t:
        return routed_linear(
            t["x_h"], t["A"], t["B"], given, weight=t.get("weight"), base_out=t.get("base_out"),
            adapted=(0, 2), of=3, route=routing, impl=impl, plan="p3" if "weight" in t else "auto",
        )  # fmt: skip
    return routed_adapter(
        t["x_h"], t["A"], t["B"], given, b_A=t["b_A"], b_B=t["b_B"], route=routing, impl=impl
    )


def loop(
    t: dict[str, Tensor], mask: Tensor | None, lengths: list[int] | None, routing: Routing
) -> Tensor:
    """Sample by sample, with its valid visual tokens and its rows alone."""
    out, start = [], 0
    for b in range(3):
        end = start + lengths[b] if lengths else b + 1
        rows = slice(start, end) if lengths else slice(b, b + 1)
        start = end
        image: Tensor | None = t["x_r"][b : b + 1]
        if mask is not None:
            image = t["x_r"][b : b + 1, mask[b]] if mask[b].any() else None
        one = {**t, "x_h": t["x_h"][rows]}
        if "base_out" in t:
            one["base_out"] = t["base_out"][rows]
        if lengths:
            one = {k: v[None] if k in ("x_h", "base_out") else v for k, v in one.items()}
        if image is None:  # no token is valid: what a masked token counts for
            nothing = torch.zeros(1, 1, dtype=torch.bool)
            y = run(one, RoutingInput(t["x_r"][b : b + 1, :1], nothing), routing, "reference")
        else:
            y = run(one, RoutingInput(image), routing, "reference")
        out.append(y[0] if lengths else y)
    return torch.cat(out)


def results(
    batch: dict[str, Any], host: str, route: str, dtype: torch.dtype, kind: torch.dtype, impl: str
) -> dict[str, Tensor]:
    """Outputs of valid rows and all gradients, in `kind`, of values that dtype can hold."""
    torch.manual_seed(2)
    T, Nv, lengths = batch.get("T", 4), batch.get("Nv", 1), batch.get("lengths")
    drawn = values(host, T, Nv, lengths)
    t = {k: v.to(dtype).to(kind).requires_grad_(k != "weight") for k, v in drawn.items()}
    mask = valid_tokens(3, Nv) if batch.get("masked") else None
    routing = Routing(route)
    if impl == "loop":
        y = loop(t, mask, lengths, routing)
    else:
        given = packed(lengths, t["x_r"], mask) if lengths else RoutingInput(t["x_r"], mask)
        y = run(t, given, routing, impl)
        y = y[: sum(lengths)] if lengths else y  # without padding rows
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(dtype).to(kind)
    y.backward(dy)
    found = {"y": y.detach()}
    return found | {k: v.grad for k, v in t.items() if v.grad is not None}


@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("host", ["adapter", "qkv"])
def test_the_reference_is_the_loop(host: str, batch: str, route: str) -> None:
    if route == "self_gram" and BATCHES[batch].get("Nv", 1) > 1:
        return
    settings = BATCHES[batch], host, route, torch.float64, torch.float64
    ours, theirs = results(*settings, "reference"), results(*settings, "loop")
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.interpret
@pytest.mark.parametrize("route", KERNEL_ROUTES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("host", "dtype"),
    [("adapter", torch.bfloat16), ("qkv", torch.float32), ("qkv_p3", torch.float16)],
    ids=str,
)
def test_the_kernels_are_the_loop(host: str, dtype: torch.dtype, batch: str, route: str) -> None:
    settings = BATCHES[batch], host, route, dtype
    assert_as_good_as_eager(
        results(*settings, dtype, "triton"),
        results(*settings, torch.float64, "loop"),
        results(*settings, dtype, "loop"),
    )


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("route", KERNEL_ROUTES)
def test_images_of_other_sizes_from_batch_to_batch(route: str, impl: str) -> None:
    torch.manual_seed(0)
    t = values("adapter", 3, 1, None)
    routing = Routing(route)
    for Nv, T, B in ((1, 3, 3), (9, 3, 3), (36, 1, 2), (1, 1, 2), (9, 5, 1), (1, 3, 3)):
        t |= {"x_h": torch.randn(B, T, D), "x_r": torch.randn(B, Nv, D)}
        y = run(t, RoutingInput(t["x_r"]), routing, impl)
        each = [
            run(
                {**t, "x_h": t["x_h"][b : b + 1]},
                RoutingInput(t["x_r"][b : b + 1]),
                routing,
                "reference",
            )
            for b in range(B)
        ]
        torch.testing.assert_close(y, torch.cat(each), rtol=1e-4, atol=1e-4)
