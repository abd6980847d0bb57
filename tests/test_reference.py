"""The reference against the published numbers, a second transcription, and finite differences."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transcription
from cases import (
    BUILT_IN,
    HOSTS,
    MODES,
    VALID_MODES,
    Case,
    case,
    mode_id,
    packed,
    takes,
    valid_tokens,
)
from safetensors import safe_open
from torch import Tensor

from fused_route import Dropout, Routing, RoutingInput, routed_adapter, routed_linear
from fused_route.reference import ACTIVATIONS

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).detach().abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-300))


def run(
    c: Case, host: str, routing: Routing, x_r: Tensor | RoutingInput, dropout: Dropout | float = 0.0
) -> Tensor:
    if host == "adapter":
        return routed_adapter(
            c.x_h, c.A, c.B, x_r, b_A=c.b_A, b_B=c.bias, route=routing, dropout=dropout
        )
    return routed_linear(
        c.x_h, c.A, c.B, x_r, weight=c.weight, bias=c.bias, route=routing, s=2.0,
        adapted=c.adapted, of=c.of, dropout=dropout,
    )  # fmt: skip


def transcribed(c: Case, host: str, route: str, modes: dict[str, Any], **given: Any) -> Tensor:
    if host == "adapter":
        modes = {k: v for k, v in modes.items() if k != "segments"}
        return transcription.routed_adapter(
            c.x_h, c.x_r, A=c.A, b_A=c.b_A, B=c.B, b_B=c.bias, route=route, activation="gelu",
            residual=True, **modes, **given,
        )  # fmt: skip
    assert c.weight is not None
    return transcription.routed_linear(
        c.x_h, c.x_r, weight=c.weight, bias=c.bias, A=c.A, B=c.B, route=route, s=2.0,
        adapted=c.adapted, of=c.of, **modes, **given,
    )  # fmt: skip


def assert_same_function(ours: Tensor, theirs: Tensor, c: Case) -> None:
    """Outputs and every gradient, to 1e-12 relative."""
    assert relative_error(ours, theirs) < 1e-12
    seed = torch.randn_like(ours)
    leaves = c.leaves()
    grads = [
        torch.autograd.grad(y, list(leaves.values()), seed, allow_unused=True)
        for y in (ours, theirs)
    ]
    for name, mine, expected in zip(leaves, *grads, strict=True):
        mine = torch.zeros_like(leaves[name]) if mine is None else mine
        expected = torch.zeros_like(leaves[name]) if expected is None else expected
        scale = expected.abs().max().clamp_min(1e-6)
        assert float((mine - expected).abs().max() / scale) < 1e-12, name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_golden(path: Path) -> None:
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    leaves = {name: t[name].requires_grad_() for name in ("x_h", "x_r") if name in t}
    leaves |= {name: t[name].requires_grad_() for name in t if f"grad.{name[6:]}" in t}
    routing = Routing(meta["routing"], compat="eccv24")
    if meta["kind"] == "adapter":
        y = routed_adapter(
            t["x_h"], t["param.down_sampler.weight"], t["param.up_sampler.weight"], t.get("x_r"),
            b_A=t["param.down_sampler.bias"], b_B=t["param.up_sampler.bias"], route=routing,
            activation="gelu_tanh", residual=meta["residual"],
        )  # fmt: skip
    else:
        qkv = meta["kind"] == "lora_qkv"
        y = routed_linear(
            t["x_h"], t["param.lora_A"], t["param.lora_B"], t.get("x_r"),
            weight=t["param.weight"].T if qkv else t["param.weight"], bias=t["param.bias"],
            route=routing, s=meta["scaling"], adapted=(0, 2) if qkv else (0,), of=3 if qkv else 1,
        )  # fmt: skip
    assert relative_error(y, t["y"]) < 1e-12
    y.backward(t["grad_y"])
    for name, leaf in leaves.items():
        expected = t[f"grad_{name}"] if name in ("x_h", "x_r") else t[f"grad.{name[6:]}"]
        assert leaf.grad is not None
        assert relative_error(leaf.grad, expected) < 1e-12, name


def test_golden_files_are_all_there() -> None:
    assert len(GOLDEN) == 23


@pytest.mark.parametrize("modes", VALID_MODES, ids=mode_id)
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", HOSTS)
def test_second_transcription(host: str, route: str, modes: dict[str, str]) -> None:
    r, T = 4, 3
    C = r * (2 if host == "qkv" and modes["segments"] == "joint" else 1)
    for Nv in (1, 3, C):
        if not takes(route, modes, Nv, T, C):
            continue
        c = case(host, Nv=Nv, T=T, r=r)
        y = run(c, host, Routing(route, **modes), c.x_r)
        assert_same_function(y, transcribed(c, host, route, modes), c)


@pytest.mark.parametrize("normalize", ["none", "unit"])
@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", HOSTS)
def test_masks_dropout_and_packing_against_transcription(
    host: str, route: str, pool: str, normalize: str
) -> None:
    Nv = 1 if route == "self_gram" else 4
    modes = {"transpose": "exact", "segments": "per_group", "pool": pool, "normalize": normalize}
    routing = Routing(route, **modes)

    c = case(host, B=3, Nv=Nv)
    mask = valid_tokens(3, Nv)
    y = run(c, host, routing, RoutingInput(c.x_r, mask))
    assert_same_function(y, transcribed(c, host, route, modes, mask=mask), c)

    keep_h, keep_r = torch.rand_like(c.x_h) < 0.7, torch.rand_like(c.x_r) < 0.7
    y = run(c, host, routing, c.x_r, Dropout(0.3, keep_h, keep_r))
    dropped = {"keep_h": keep_h, "keep_r": keep_r, "p": 0.3}
    assert_same_function(y, transcribed(c, host, route, modes, **dropped), c)

    given = packed([2, 0, 3], c.x_r, mask)
    c.x_h = torch.randn(7, c.x_h.shape[-1], dtype=torch.float64, requires_grad=True)
    y = run(c, host, routing, RoutingInput(c.x_r, mask, given.sample_index))
    index = {"sample_index": given.sample_index, "mask": mask}
    assert_same_function(y, transcribed(c, host, route, modes, **index), c)


@pytest.mark.parametrize("modes", VALID_MODES, ids=mode_id)
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", HOSTS)
def test_gradcheck(host: str, route: str, modes: dict[str, str]) -> None:
    T, r = 3, 3
    for Nv in (1, 3):
        C = r * (2 if host == "qkv" and modes["segments"] == "joint" else 1)
        if not takes(route, modes, Nv, T, C):
            continue
        c = case(host, B=1, T=T, Nv=Nv, d=3, r=r)
        routing = Routing(route, **modes)

        def function(*leaves: Tensor, c: Case = c, routing: Routing = routing) -> Tensor:
            for name, leaf in zip(c.leaves(), leaves, strict=True):
                setattr(c, name, leaf)
            return run(c, host, routing, c.x_r)

        assert torch.autograd.gradcheck(function, tuple(c.leaves().values()))


@pytest.mark.parametrize("modes", [m for m in MODES if m not in VALID_MODES], ids=mode_id)
def test_modes_that_exclude_each_other(modes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="pool='first' with transpose='eccv24'"):
        Routing("mul", **modes)


@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("Nv", [2, 3, 5])
@pytest.mark.parametrize("transpose", ["exact", "eccv24"])
def test_visual_token_counts_are_taken_or_refused(route: str, Nv: int, transpose: str) -> None:
    modes = {**VALID_MODES[0], "transpose": transpose}
    c = case("linear", T=3, Nv=Nv, r=5)
    if takes(route, modes, Nv, 3, 5):
        assert run(c, "linear", Routing(route, **modes), c.x_r).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"Nv = {Nv}"):
            run(c, "linear", Routing(route, **modes), c.x_r)


@pytest.mark.parametrize("route", [name for name in BUILT_IN if name != "none"])
def test_mask_with_the_published_reshape_is_refused(route: str) -> None:
    c = case("linear", Nv=3)
    given = RoutingInput(c.x_r, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask with transpose='eccv24'"):
        run(c, "linear", Routing(route, compat="eccv24"), given)


@pytest.mark.parametrize("normalize", ["none", "unit"])
@pytest.mark.parametrize("route", [name for name in BUILT_IN if name != "self_gram"])
def test_masked_tokens_count_for_nothing(route: str, normalize: str) -> None:
    c = case("adapter", Nv=5)
    mask = torch.tensor([[True, True, False, True, False]] * 2)
    rubbish = torch.where(mask.unsqueeze(-1), c.x_r, torch.nan).detach().requires_grad_()
    routing = Routing(route, normalize=normalize)
    only_valid = c.x_r[mask].view(2, 3, -1)
    y = run(c, "adapter", routing, RoutingInput(rubbish, mask))
    expected = run(c, "adapter", routing, only_valid)
    assert relative_error(y, expected) < 1e-13
    assert c.b_A is not None
    leaves = (c.x_h, c.A, c.B, c.b_A)
    for mine, theirs in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, residual: bool) -> None:
    c = case("adapter", T=7)
    arguments: dict[str, Any] = {
        "activation": activation,
        "residual": residual,
        "route": "mul",
    }
    y = routed_adapter(c.x_h, c.A, c.B, c.x_r, b_A=c.b_A, b_B=c.bias, **arguments)
    theirs = transcription.routed_adapter(
        c.x_h, c.x_r, A=c.A, b_A=c.b_A, B=c.B, b_B=c.bias, **arguments,
    )  # fmt: skip
    assert_same_function(y, theirs, c)


def test_biases_may_be_absent() -> None:
    c = case("adapter")
    y = routed_adapter(c.x_h, c.A, c.B, c.x_r, route="add")
    zeros = routed_adapter(
        c.x_h, c.A, c.B, c.x_r, b_A=torch.zeros_like(c.A[:, 0]), b_B=0 * c.bias, route="add"
    )
    assert torch.equal(y, zeros)


def test_features_of_another_dtype_are_converted() -> None:
    c = case("linear")
    y = run(c, "linear", Routing("mul"), c.x_r.float())
    assert y.dtype == torch.float64
    assert torch.equal(y, run(c, "linear", Routing("mul"), c.x_r.float().double()))


def test_a_base_of_another_dtype_decides_the_outputs() -> None:
    c = case("linear")
    assert c.weight is not None
    base_out = (c.x_h @ c.weight.T).half()
    assert routed_linear(c.x_h, c.A, c.B, c.x_r, base_out=base_out).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", BUILT_IN)
@pytest.mark.parametrize("host", HOSTS)
def test_any_dtype(host: str, route: str, dtype: torch.dtype) -> None:
    c = case(host, d=16, r=8, Nv=1 if route == "self_gram" else 3)
    routing = Routing(route, normalize="unit")
    truth = run(c, host, routing, c.x_r)
    for name, leaf in c.leaves().items():
        setattr(c, name, leaf.detach().to(dtype).requires_grad_())
    c.weight = None if c.weight is None else c.weight.to(dtype)
    y = run(c, host, routing, c.x_r)
    assert y.dtype == dtype
    # 64 roundings of relative size eps: two products of 16 and 8 terms with a mix between them
    assert relative_error(y.double(), truth) < 64 * torch.finfo(dtype).eps
    y.sum().backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in c.leaves().values())
