"""Images folded into layers: equal, reversible, or refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BUILT_IN, valid_tokens
from test_attach import IDS, gpt2
from torch import Tensor, nn

from fused_route import (
    ROUTES,
    Route,
    RoutedAdapter,
    RoutedConfig,
    RoutedLinear,
    Routing,
    RoutingInput,
    attach,
    fold,
    matrix,
    unfold,
)
from fused_route.bottleneck import Bottleneck
from fused_route.fold import BesideDown, IntoDown, IntoHost
from fused_route.testing import assert_as_good_as_eager

D = 8
AFFINE = [
    name for name in BUILT_IN if ROUTES[name].first == "none" and ROUTES[name].scores == "image"
]
AFFINE.remove("none")


def layer(host: str, route: str | Route | Routing, **settings: Any) -> Bottleneck:
    """A layer in evaluation mode whose parameters are all drawn."""
    made: Bottleneck
    if host == "adapter":
        made = RoutedAdapter(D, 4, route, "silu", **settings)
        nn.init.normal_(made.b_B)
    elif host == "conv1d":
        from transformers.pytorch_utils import Conv1D

        made = RoutedLinear(Conv1D(3 * D, D), 4, 2.0, route, adapted=(2, 0), of=3, **settings)
    else:
        bias = host == "linear"
        made = RoutedLinear(nn.Linear(D, D, bias=bias), 4, 2.0, route, **settings)
    nn.init.normal_(made.B)
    return made.eval().requires_grad_(False)


def routed(made: nn.Module, x_h: Tensor, x_r: Tensor | RoutingInput) -> Tensor:
    inner: Any = made
    with inner.context.using(x_r):
        return made(x_h)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


MODES: dict[str, dict[str, str]] = {
    "plain": {},
    "unit": {"normalize": "unit"},
    "joint": {"segments": "joint"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("Nv", [1, 5])
@pytest.mark.parametrize("route", AFFINE)
@pytest.mark.parametrize("host", ["adapter", "linear", "without_bias", "conv1d"])
@pytest.mark.parametrize(("into", "B"), [("bottleneck", 1), ("bottleneck", 3), ("host", 1)])
def test_folded_is_unfolded(into: str, B: int, host: str, route: str, Nv: int, mode: str) -> None:
    if (into, host) == ("host", "adapter"):
        return
    made = layer(host, Routing(route, **MODES[mode])).double()
    x_h, x_r = torch.randn(B, 3, D).double(), torch.randn(B, Nv, D).double()
    given = RoutingInput(x_r, valid_tokens(B, Nv)) if B > 1 else RoutingInput(x_r)
    expected, before = routed(made, x_h, given), values(made)
    with fold(made, given, into=into) as folded:
        assert folded.layers == [made]
        torch.testing.assert_close(made(x_h), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made(x_h[:, :1]), expected[:, :1], rtol=1e-12, atol=1e-12)
        assert_untouched(made, before)
    assert_untouched(made, before)
    assert torch.equal(routed(made, x_h, given), expected)
    with pytest.raises(ValueError, match="has no routing input"):
        made(x_h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("route", ["add", "mul", "gram", "expand"])
@pytest.mark.parametrize("into", ["bottleneck", "host"])
def test_folded_within_the_error_of_the_dtype(into: str, route: str, dtype: torch.dtype) -> None:
    made = layer("linear", route).to(dtype)
    nn.init.normal_(made.B, std=0.3)
    x_h, x_r = torch.randn(1, 40, D).to(dtype), torch.randn(1, 1, D).to(dtype)
    truth = routed(copy.deepcopy(made).double(), x_h.double(), x_r.double())
    eager = routed(made, x_h, x_r)
    with fold(made, x_r, into=into):
        assert_as_good_as_eager({"y": made(x_h)}, {"y": truth}, {"y": eager})


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("Nv", [1, 5])
@pytest.mark.parametrize("route", AFFINE)
@pytest.mark.parametrize("host", ["adapter", "conv1d"])
@pytest.mark.parametrize("B", [1, 3])
def test_kernels_run_folded_layers(
    B: int, host: str, route: str, Nv: int, dtype: torch.dtype
) -> None:
    made = layer(host, route).to(dtype)
    nn.init.normal_(made.B, std=0.3)
    x_h, x_r = torch.randn(B, 5, D).to(dtype), torch.randn(B, Nv, D).to(dtype)
    truth = routed(copy.deepcopy(made).double(), x_h.double(), x_r.double())
    eager = routed(made, x_h, x_r)
    made.impl = "triton"
    with fold(made, x_r):
        assert_as_good_as_eager({"y": made(x_h)}, {"y": truth}, {"y": eager})


KINDS = {
    ("mul", 1, "bottleneck", "linear"): IntoDown,
    ("add", 1, "bottleneck", "linear"): BesideDown,  # it has no bias for what add contributes
    ("add", 1, "bottleneck", "adapter"): IntoDown,
    ("mul", 2, "bottleneck", "linear"): BesideDown,
    ("gram", 1, "host", "linear"): IntoHost,
}


@pytest.mark.parametrize(("route", "B", "into", "host"), KINDS)
def test_where_an_image_goes(route: str, B: int, into: str, host: str) -> None:
    made = layer(host, route)
    with fold(made, torch.randn(B, D), into=into):
        assert type(made.folded) is KINDS[route, B, into, host]
        assert "folded" in repr(made)


@pytest.mark.parametrize("into", ["bottleneck", "host"])
def test_split_projections_and_own_routes_fold(into: str) -> None:
    own = Route("own_fold", lambda x_v: matrix(x_v.mT @ x_v.tanh()))
    x_h, x_r = torch.randn(1, 3, D), torch.randn(1, 2, D)
    for made in (layer("linear", "mul", inner_rank=2), layer("linear", own)):
        expected = routed(made, x_h, x_r)
        with fold(made, x_r, into=into):
            torch.testing.assert_close(made(x_h), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["before", "after"])
def test_adapters_with_a_norm_fold(norm: str) -> None:
    made = layer("adapter", "gram", norm=norm, residual=False)
    x_h, x_r = torch.randn(1, 3, D), torch.randn(1, 1, D)
    expected = routed(made, x_h, x_r)
    with fold(made, x_r):
        torch.testing.assert_close(made(x_h), expected, rtol=1e-4, atol=1e-5)


def test_beams_share_an_image() -> None:
    for host, route, into, B in (
        ("linear", "mul", "host", 1),
        ("linear", "mul", "bottleneck", 1),
        ("linear", "add", "bottleneck", 1),
        ("adapter", "mul", "bottleneck", 2),
    ):
        made = layer(host, route)
        x_h, given = torch.randn(3 * B, 2, D), RoutingInput(torch.randn(B, D))
        expected = routed(made, x_h, given.repeated(3))
        with fold(made, given, into=into, beams=3):
            torch.testing.assert_close(made(x_h), expected)
            if B == 1:  # the image of every row there is
                torch.testing.assert_close(made(x_h[:1]), expected[:1])
                continue
            with pytest.raises(ValueError, match="for a batch of 6 folded in, x_h is a batch of 1"):
                made(x_h[:1])


def test_folding_costs_one_projection_of_the_image() -> None:
    model = nn.ModuleDict({str(i): nn.Linear(D, D) for i in range(6)})
    attached = attach(model.eval(), RoutedConfig(r"\d", r=2, visual_width=5), project="together")
    runs: list[int] = []
    assert attached.projector is not None
    attached.projector.register_forward_hook(lambda *_: runs.append(1))
    with fold(model, torch.randn(1, 5)):
        assert runs == [1]


@pytest.mark.parametrize("into", ["bottleneck", "host"])
def test_folded_layers_compile(into: str) -> None:
    model = nn.Sequential(layer("linear", "mul"), layer("linear", "gram")).eval()
    x_h = torch.randn(1, 3, D)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), fold(model, torch.randn(1, D), into=into):
        torch.testing.assert_close(compiled(x_h), model(x_h))


def test_models_of_inference_mode_fold() -> None:
    with torch.inference_mode():
        made, x_h, x_r = layer("linear", "mul"), torch.randn(1, 3, D), torch.randn(1, D)
        expected = routed(made, x_h, x_r)
        with fold(made, x_r):
            torch.testing.assert_close(made(x_h), expected)


def test_a_dropout_mask_is_not_folded_in() -> None:
    made = layer("linear", "mul", inner_rank=2, dropout=0.9).train()
    with pytest.raises(ValueError, match=r"is in training mode: call model\.eval"):
        fold(made, torch.randn(1, D))


def generated(model: Any, around: Callable[[], Any]) -> Tensor:
    with around():
        return model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("into", ["bottleneck", "host"])
def test_a_model_generates_with_a_folded_image(into: str) -> None:
    model = gpt2()
    attached = attach(
        model, RoutedConfig(["c_attn"], route="gram", adapted=(0, 2), of=3, visual_width=5)
    )
    for inner in attached.layers.values():
        nn.init.normal_(inner.B, std=2.0)
    image, other = torch.randn(1, 5), torch.randn(1, 5)
    expected = generated(model, lambda: attached.using(image))
    assert torch.equal(generated(model, lambda: fold(model, image, into=into)), expected)
    with attached.using(image):
        logits = model(IDS[:1]).logits
    with fold(model, image, into=into):
        torch.testing.assert_close(model(IDS[:1]).logits, logits, rtol=1e-4, atol=1e-5)
    with fold(model, other, into=into):
        assert (model(IDS[:1]).logits - logits).abs().max() > 1e-3


def called(route: str = "mul") -> RoutedLinear:
    """A layer around a function."""
    return RoutedLinear(lambda x: x, 2, route=route, in_features=D, out_features=D).eval()


def test_what_cannot_be_folded_is_refused() -> None:
    x_r = torch.randn(1, D)
    for route in ("gram_relu", "ones_relu", "self_gram"):
        with pytest.raises(ValueError, match=f"route '{route}' is not affine in x_t"):
            fold(layer("linear", route), x_r)
    refused: list[tuple[nn.Module, Any, dict[str, Any], str]] = [
        (layer("adapter", "mul"), x_r, {"into": "host"}, "adapter: it folds into='bottleneck'"),
        (layer("linear", "mul"), torch.randn(2, D), {"into": "host"}, "takes one image, x_r has 2"),
        (layer("linear", "mul"), x_r, {"into": "base"}, "into must be one of bottleneck, host"),
        (layer("linear", "mul"), x_r, {"beams": 0}, "beams must be a whole number of at least 1"),
        (layer("linear", "none"), x_r, {}, "has no layer that an image routes"),
        (nn.Linear(2, 2), x_r, {}, "model=Linear has no layer that an image routes"),
        (layer("linear", "mul", routed_by="text"), x_r, {}, "routed by its own text"),
        (layer("linear", "mul"), RoutingInput(x_r, None, torch.tensor([0, 0])), {}, "packed"),
        (layer("linear", "mul"), torch.randn(1, D + 1), {}, "takes x_r of width 8"),
        (called(), x_r, {"into": "host"}, "needs a base that is a plain"),
    ]  # fmt: skip
    for model, image, settings, message in refused:
        with pytest.raises(ValueError, match=message):
            fold(model, image, **settings)
    paired = layer("linear", Routing("mul", compat="eccv24"))
    with pytest.raises(ValueError, match="pairs visual with text tokens"):
        fold(paired, torch.randn(1, 3, D))
    with pytest.raises(ValueError, match="model must be a torch module, got int"):
        fold(3, x_r)  # type: ignore[arg-type]


def test_a_refusal_folds_nothing() -> None:
    model = nn.Sequential(layer("linear", "mul"), layer("linear", "gram_relu"))
    with pytest.raises(ValueError, match="not affine"):
        fold(model, torch.randn(1, D))
    assert all(inner.folded is None for inner in model.children())


def test_a_folded_layer_cannot_be_changed_unseen() -> None:
    made, x_h, x_r = layer("linear", "mul"), torch.randn(1, 2, D), torch.randn(1, D)
    for change, message in (
        (lambda: fold(made, x_r), "folded in already"),
        (lambda: made.double(), "unfold it before moving"),
        (lambda: made.load_state_dict(made.state_dict()), "unfold it before loading"),
        (lambda: made.train()(x_h), "unfold it before training"),
    ):
        with fold(made.eval(), x_r), pytest.raises(ValueError, match=message):
            change()
    assert isinstance(made, RoutedLinear)

    def scaled() -> None:
        made.alpha *= 2

    for change in (
        lambda: made.B.add_(1.0),
        lambda: setattr(made.B, "data", made.B.data + 1),
        lambda: setattr(made, "B", nn.Parameter(made.B.detach())),
        scaled,
    ):
        with torch.no_grad(), fold(made.eval(), x_r) as folded:
            change()
            with pytest.raises(ValueError, match="has changed since an image was folded in"):
                made(x_h)
    assert folded.layers == []
    with fold(made, x_r, into="host"), pytest.raises(ValueError, match="takes x_h alone"):
        made(x_h, 3)


def test_unfolding_leaves_later_images_alone() -> None:
    made, x_h, x_r = layer("linear", "mul"), torch.randn(1, 2, D), torch.randn(1, D)
    first = fold(made, torch.randn(1, D))
    unfold(made)
    second = fold(made, x_r)
    expected = made(x_h)
    first.unfold()
    assert torch.equal(made(x_h), expected) and second.layers == [made]
    second.unfold()
    assert made.folded is None


def test_hooks_put_on_the_base_of_a_folded_layer_are_refused() -> None:
    made, x_h, x_r = layer("linear", "mul"), torch.randn(1, 2, D), torch.randn(1, D)
    base: Any = made.base
    with fold(made, x_r, into="host"):
        expected = made(x_h)
        for hook in (base.register_forward_hook, base.register_full_backward_hook):
            handle = hook(lambda *_: None)
            with pytest.raises(ValueError, match="without hooks, got Linear with hooks"):
                made(x_h)
            handle.remove()
        assert torch.equal(made(x_h), expected)
    base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="without hooks, got Linear with hooks"):
        fold(made, x_r, into="host")


def test_copies_of_a_folded_model_work() -> None:
    made, x_h, x_r = layer("adapter", "mul"), torch.randn(1, 2, D), torch.randn(1, D)
    with fold(made, x_r):
        expected = made(x_h)
        copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    for copied in copies:
        assert torch.equal(copied(x_h), expected)
        unfold(copied)
        with pytest.raises(ValueError, match="has no routing input"):
            copied(x_h)
