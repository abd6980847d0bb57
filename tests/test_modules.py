"""The two layers: what they start as, what they keep, what they refuse."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from fused_route import (
    Dropout,
    RoutedAdapter,
    RoutedLinear,
    Routing,
    RoutingInput,
    routed_adapter,
    routed_linear,
)
from fused_route.modules import AdaptedModule

D = 8


def quadruple(x: Tensor) -> Tensor:
    return torch.cat([x] * 4, -1)


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(D, 12), {}),
    "no bias": (lambda: nn.Linear(D, 12, bias=False), {}),
    "conv1d": (lambda: Conv1D(12, D), {}),
    "fused": (lambda: Conv1D(12, D), {"adapted": (0, 2), "of": 3}),
    "callable": (lambda: quadruple, {"in_features": D, "out_features": 4 * D}),
}


@pytest.mark.parametrize("kind", BASES)
def test_any_base_is_kept_and_called(kind: str) -> None:
    make, arguments = BASES[kind]
    base = make()
    layer = RoutedLinear(base, 4, 8, "add", **arguments)
    x_h, x_r = torch.randn(2, 3, D), torch.randn(2, D)
    assert layer.base is base
    with layer.context.using(x_r):
        torch.testing.assert_close(layer(x_h), base(x_h), rtol=0, atol=0)  # B = 0 at the start
        nn.init.normal_(layer.B)
        y = layer(x_h)
    z = x_h @ layer.A.T + (x_r @ layer.A.T).unsqueeze(1)
    g, of = len(layer.adapted), layer.of
    expected = list(base(x_h).chunk(of, -1))
    for group, segment in enumerate(layer.adapted):
        update = z.chunk(g, -1)[group] @ layer.B.chunk(g)[group].T
        expected[segment] = expected[segment] + 2.0 * update
    torch.testing.assert_close(y, torch.cat(expected, -1))


def test_segments_not_adapted_are_the_base_bit_for_bit() -> None:
    layer = RoutedLinear(nn.Linear(D, 12), 4, adapted=(2, 0), of=3)
    nn.init.normal_(layer.B)
    x_h = torch.randn(2, 3, D)
    with layer.context.using(torch.randn(2, D)):
        y, base = layer(x_h), layer.base(x_h)
    assert torch.equal(y[..., 4:8], base[..., 4:8])
    assert not torch.equal(y[..., :4], base[..., :4])


@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_initial_values_and_first_gradients(normalize: str) -> None:
    routing = Routing("gram", normalize=normalize)
    layers: list[Any] = [RoutedLinear(nn.Linear(D, D), 64, route=routing)]
    layers.append(RoutedAdapter(D, 64, routing))
    for layer in layers:
        bound = 1 / math.sqrt(D)
        assert layer.A.abs().max() <= bound and layer.A.std() > 0.5 * bound
        assert (layer.B == 0).all()
        with layer.context.using(torch.randn(2, 3, D)):
            layer(torch.randn(2, 4, D)).square().sum().backward()
        assert (layer.A.grad == 0).all() and (layer.B.grad != 0).any()


def test_adapter_bias_starts_as_a_linears() -> None:
    adapter = RoutedAdapter(D, 64)
    assert adapter.b_A is not None
    assert 0.5 / math.sqrt(D) < adapter.b_A.std() and adapter.b_A.abs().max() <= 1 / math.sqrt(D)


class Base(nn.Module):
    """A base with what quantised layers have: an integer weight, further arguments, widths."""

    in_features, out_features = D, D

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D, D, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor, factor: float, *, plus: float = 0.0) -> Tensor:
        return x * factor + plus


def test_an_integer_weight_and_further_arguments() -> None:
    layer = RoutedLinear(Base(), 4)
    assert layer.A.dtype == torch.float32 and layer.B.dtype == torch.float32
    x_h = torch.randn(2, 3, D)
    with layer.context.using(torch.randn(2, D)):
        torch.testing.assert_close(layer(x_h, 2.0, plus=1.0), 2 * x_h + 1, rtol=0, atol=0)


class Named(NamedTuple):
    states: Tensor
    rest: str


class Returning(nn.Linear):
    """That returns its states in something."""

    def __init__(self, put: Callable[[Tensor], Any]) -> None:
        super().__init__(D, D)
        self.put = put

    def forward(self, x: Tensor) -> Any:
        return self.put(super().forward(x))


# How a module returns its states, and how they are taken out again.
RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda h: h, lambda out: out),
    "tuple": (lambda h: (h, "rest"), lambda out: out[0]),
    "list": (lambda h: [h, "rest"], lambda out: out[0]),
    "named tuple": (lambda h: Named(h, "rest"), lambda out: out.states),
    "structseq": (lambda h: torch.return_types.sort((h, h.long())), lambda out: out.values),
    "ModelOutput": (
        lambda h: BaseModelOutput(last_hidden_state=h),
        lambda out: out["last_hidden_state"],
    ),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_adapted_module_returns_what_its_base_does(kind: str) -> None:
    put, take = RETURNED[kind]
    base, adapter = Returning(put), RoutedAdapter(D, 4)
    nn.init.normal_(adapter.B)
    adapted, x_h = AdaptedModule(base, adapter), torch.randn(2, 3, D)
    with adapter.context.using(torch.randn(2, D)):
        plain, out = base(x_h), adapted(x_h)
        assert type(out) is type(plain) and torch.equal(take(out), adapter(take(plain)))
    if kind in ("tuple", "list", "named tuple"):
        assert out[1] == "rest"
    assert (adapted.in_features, adapted.out_features) == (D, D)


@pytest.mark.parametrize(
    ("put", "given"),
    [
        (lambda h: {"h": h}, "returned dict:"),
        (lambda h: (), "returned tuple:"),
        (lambda h: ((h,), h), "returned tuple, the first of it tuple:"),
        (lambda h: BaseModelOutput(attentions=(h,)), "returned BaseModelOutput:"),
    ],
)
def test_what_holds_no_states_is_refused(put: Callable[[Tensor], Any], given: str) -> None:
    adapter = RoutedAdapter(D, 4)
    adapter.label = "encoder"
    with pytest.raises(ValueError, match=f"^encoder {given}.{{,250}}$"):
        AdaptedModule(Returning(put), adapter)(torch.randn(2, 3, D))


def test_adapter_starts_as_the_identity() -> None:
    x_h = torch.randn(2, 4, D)
    for residual, expected in ((True, x_h), (False, torch.zeros_like(x_h))):
        adapter = RoutedAdapter(D, 4, residual=residual)
        with adapter.context.using(torch.randn(2, D)):
            torch.testing.assert_close(adapter(x_h), expected, rtol=0, atol=0)


class HostConfig(PretrainedConfig):
    model_type = "routed_host"


class Host(PreTrainedModel):
    """A Hugging Face model with routed layers of its own; a base class without them."""

    config_class = HostConfig
    routed = True

    def __init__(self, config: HostConfig) -> None:
        super().__init__(config)
        self.dense: nn.Module = nn.Linear(D, D)
        if self.routed:
            self.dense = nn.ModuleDict(
                {"linear": RoutedLinear(nn.Linear(D, D), 4), "adapter": RoutedAdapter(D, 4)}
            )
        self.post_init()


class PlainHost(Host):
    routed = False


def test_initial_values_survive_from_pretrained(tmp_path: Path) -> None:
    """A checkpoint without the layers: A drawn, B zero; a checkpoint with them: its values."""
    PlainHost(HostConfig()).save_pretrained(tmp_path / "plain")
    host = Host.from_pretrained(tmp_path / "plain")
    for layer in (host.dense["linear"], host.dense["adapter"]):
        bound = 1 / math.sqrt(D)
        assert 0.5 * bound < layer.A.std() < bound and layer.A.abs().max() <= bound
        assert (layer.B == 0).all()
        nn.init.normal_(layer.B)
    assert (host.dense["adapter"].b_B == 0).all()
    host.save_pretrained(tmp_path / "routed")
    again = Host.from_pretrained(tmp_path / "routed")
    for name, tensor in host.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_trained_layers_survive_being_wrapped(tmp_path: Path) -> None:
    """A model around trained layers initialises what it lacks, not what it was given."""
    trained = [RoutedLinear(nn.Linear(D, D), 4), RoutedAdapter(D, 4)]
    rebuilt = RoutedLinear(nn.Linear(D, D, device="meta"), 4)
    state = {name: torch.randn(p.shape) for name, p in rebuilt.state_dict().items()}
    rebuilt.load_state_dict(state, assign=True)
    layers = [*trained, copy.deepcopy(trained[0]), rebuilt]
    for layer in layers:
        nn.init.normal_(layer.B)
    before = [layer.B.detach().clone() for layer in layers]

    class Around(PlainHost):
        def __init__(self, config: HostConfig) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList(layers)
            self.post_init()

    Around(HostConfig())
    assert all(torch.equal(layer.B, b) for layer, b in zip(layers, before, strict=True))


def test_to_empty_then_reset_parameters() -> None:
    layer = RoutedAdapter(D, 4, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert (layer.B == 0).all() and layer.b_A is not None and layer.b_A.abs().max() > 0


def test_skipped_initialisers_do_not_reach_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kaiming_uniform_", "uniform_", "zeros_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *a, **k: tensor)
    layer = RoutedLinear(nn.Linear(D, D), 64)
    assert layer.A.std() > 0.5 / math.sqrt(D) and (layer.B == 0).all()


def test_device_and_dtype_follow_the_base() -> None:
    half = RoutedLinear(nn.Linear(D, D, dtype=torch.bfloat16), 4)
    assert half.A.dtype == half.B.dtype == torch.bfloat16
    mixed = RoutedLinear(nn.Linear(D, D, dtype=torch.bfloat16), 4, dtype=torch.float32)
    x_h = torch.randn(2, 3, D, dtype=torch.bfloat16)
    with mixed.context.using(torch.randn(2, D)):
        with pytest.raises(ValueError, match=r"A is torch.float32, x_h is torch.bfloat16"):
            mixed(x_h)
        with torch.autocast("cpu", torch.bfloat16):
            assert mixed(x_h).dtype == torch.bfloat16
    meta = RoutedLinear(nn.Linear(D, D, device="meta"), 4)
    assert meta.A.is_meta


def test_dropout_in_training_only_and_from_torchs_generator() -> None:
    layer = RoutedLinear(nn.Linear(D, D), 4, dropout=0.5)
    nn.init.normal_(layer.B)
    x_h, x_r = torch.randn(2, 3, D), torch.randn(2, 1, D)
    with layer.context.using(x_r):
        torch.manual_seed(1)
        first = layer(x_h)
        assert not torch.equal(first, layer(x_h))
        torch.manual_seed(1)
        assert torch.equal(first, layer(x_h))
        torch.manual_seed(1)
        keep_h = torch.empty_like(x_h, dtype=torch.bool).bernoulli_(0.5)
        keep_r = torch.empty_like(x_r, dtype=torch.bool).bernoulli_(0.5)
        given = Dropout(0.5, keep_h, keep_r)
        masked = routed_linear(x_h, layer.A, layer.B, x_r, base_out=layer.base(x_h), dropout=given)
        given = Dropout(0.5, keep_h, keep_r[:, 0])  # (B, d), as x_r may be
        same = routed_linear(x_h, layer.A, layer.B, x_r, base_out=layer.base(x_h), dropout=given)
        assert torch.equal(masked, same)
        assert torch.equal(first, masked)
        layer.eval()
        assert torch.equal(layer(x_h), layer(x_h))


def test_none_needs_no_image() -> None:
    x_h = torch.randn(2, 3, D)
    layer = RoutedLinear(nn.Linear(D, D), 4, route="none")
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x_h), layer.base(x_h) + x_h @ layer.A.T @ layer.B.T)


@pytest.mark.parametrize("name", ["input", "x", "states"])  # of nn.Linear, Conv1D and one's own
def test_a_model_may_name_the_input_as_its_own_layer_does(name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    def double(states: Tensor) -> Tensor:
        return states * 2

    base = {"input": nn.Linear(D, D), "x": Conv1D(D, D), "states": double}[name]
    layer = RoutedLinear(base, 4, route="none", in_features=D, out_features=D)
    nn.init.normal_(layer.B)
    x_h = torch.randn(2, 3, D)
    assert torch.equal(layer(**{name: x_h}), layer(x_h))
    with pytest.raises(ValueError, match=r"x_h must be a floating-point tensor .*, got None"):
        layer(other=x_h)


def test_rows_may_have_any_shape() -> None:
    layer = RoutedLinear(nn.Linear(D, D), 4)
    nn.init.normal_(layer.B)
    x_h = torch.randn(2, 12, D)
    with layer.context.using(torch.randn(2, D)):
        y = layer(x_h)
        torch.testing.assert_close(layer(x_h.view(2, 3, 4, D)).view_as(y), y)
        torch.testing.assert_close(layer(x_h[:, 0]), y[:, 0])
        assert layer(x_h[:, :0]).shape == (2, 0, D)
        strided = x_h.transpose(1, 2).contiguous().transpose(1, 2)
        torch.testing.assert_close(layer(strided), y)
    with layer.context.using(torch.randn(0, D)):
        assert layer(x_h[:0]).shape == (0, 12, D)


X, A4, B4, B12, W = (
    torch.randn(2, 3, D),
    torch.randn(4, D),
    torch.randn(D, 4),
    torch.zeros(12, 4),
    torch.randn(D, D),
)
REFUSED: dict[str, tuple[Any, str]] = {
    "rank": (lambda: RoutedLinear(nn.Linear(D, D), 0), "rank must be a whole .* got 0"),
    "dropout": (lambda: RoutedAdapter(D, 4, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    "route": (lambda: RoutedAdapter(D, 4, "grum"), "route must be one of"),
    "activation": (lambda: RoutedAdapter(D, 4, "mul", "tanh"), "activation must be one of"),
    "impl": (lambda: RoutedAdapter(D, 4, impl="cuda"), "impl must be one of"),  # type: ignore[arg-type]
    "of": (lambda: RoutedLinear(nn.Linear(D, 10), 4, of=3), "of=3 does not divide"),
    "adapted": (lambda: RoutedLinear(nn.Linear(D, 9), 4, adapted=(3,), of=3), "from 0 to 2"),
    "twice": (lambda: RoutedLinear(nn.Linear(D, 9), 4, adapted=(1, 1), of=3), "distinct"),
    "widths": (lambda: RoutedLinear(quadruple, 4), "give in_features and out_features"),
    "told otherwise": (lambda: RoutedLinear(nn.Linear(D, 9), 4, in_features=9), "the base has 8"),
    "base": (lambda: RoutedLinear(3, 4), "base must be callable, got int"),  # type: ignore[arg-type]
    "context": (lambda: RoutedAdapter(D, 4, context=X), "context must be a RoutingContext"),  # type: ignore[arg-type]
    "d": (lambda: RoutedAdapter(0, 4), "d must be a whole number"),
    "rank 4.0": (lambda: RoutedAdapter(D, 4.0), "rank must be a whole number"),  # type: ignore[arg-type]
    "alpha": (lambda: RoutedLinear(nn.Linear(D, D), 4, float("nan")), "alpha must be a finite"),
    "p": (lambda: Dropout(1.0, None, None), r"p must be in \[0, 1\)"),
    "keep": (lambda: Dropout(0.1, X, None), "keep_h must be a bool tensor"),
    "routing twice": (lambda: Routing(Routing("mul")), "route must be one of"),  # type: ignore[arg-type]
    "route 3": (lambda: routed_linear(X, A4, B4, X, weight=W, route=3), "route must be one of"),  # type: ignore[arg-type]
    "s": (lambda: routed_linear(X, A4, B4, X, weight=W, s="2"), "s must be a finite"),  # type: ignore[arg-type]
    "p drop": (lambda: routed_linear(X, A4, B4, X, weight=W, dropout=1.5), "dropout must be in"),
    "weight": (lambda: routed_linear(X, A4, B4, X, weight=W[:, 1:]), "weight must be"),
    "bias length": (lambda: routed_linear(X, A4, B4, X, weight=W, bias=W[0, :1]), "bias must be"),
    "list": (lambda: routed_linear(X, A4, [1], X, weight=W), r"B must be a tensor, got \[1\]"),  # type: ignore[arg-type]
    "x_h list": (lambda: routed_linear([1], A4, B4, X, weight=W), "x_h must be a floating"),  # type: ignore[arg-type]
    "device": (lambda: routed_linear(X, A4.to("meta"), B4, X, weight=W), "A is on meta, x_h is on"),
    "x_r device": (lambda: routed_linear(X, A4, B4, X.to("meta"), weight=W), "x_r is on meta"),
    "dtype": (lambda: routed_linear(X, A4, B4.half(), X, weight=W), "B is torch.float16"),
    "b_B": (lambda: routed_adapter(X, A4, B4, X, b_B=A4[0, :1]), r"b_B must be \(8,\)"),
    "keep_r": (
        lambda: routed_adapter(X, A4, B4, X, dropout=Dropout(0.1, None, X[:, :1] > 0)),
        "keep_r must be",
    ),
    "of 2": (lambda: routed_linear(X, A4, B4, X, weight=W, of=3), "of=3 does not divide"),
    "segment": (lambda: routed_linear(X, A4, B4, X, weight=W, adapted=(1,)), "from 0 to 0"),
    "none adapted": (lambda: routed_linear(X, A4, B4, X, weight=W, adapted=()), "distinct"),
    "packed self_gram": (
        lambda: routed_linear(
            X, A4, B4, RoutingInput(X[:, :1], None, torch.zeros(6).long()), weight=W,
            route=Routing("self_gram", compat="eccv24"),
        ),
        "sample_index with transpose='eccv24'",
    ),
    "two bases": (lambda: routed_linear(X, A4, B4, X, weight=W, base_out=X), "exactly one of"),
    "no base": (lambda: routed_linear(X, A4, B4, X), "exactly one of"),
    "bias": (lambda: routed_linear(X, A4, B4, X, base_out=X, bias=X[0, 0]), "bias belongs"),
    "base_out": (lambda: routed_linear(X, A4, B4, X, base_out=X[:, :2]), "base_out must be"),
    "A": (lambda: routed_linear(X, A4.T, B4, X, weight=W), r"A must be \(R, d\) with d = 8"),
    "B": (lambda: routed_linear(X, A4, B12, X, weight=W), r"B must be \(g·n, r\) = \(8, 4\)"),
    "x_h": (lambda: routed_linear(X[0, 0], A4, B4, X, weight=W), "x_h must be a floating"),
    "x_r": (lambda: routed_linear(X, A4, B4, weight=W), "x_r is missing"),
    "x_r width": (lambda: routed_linear(X, A4, B4, X[..., 1:], weight=W), "x_r has width 7"),
    "triton": (lambda: routed_linear(X, A4, B4, X, weight=W, impl="triton"), "not on a GPU"),
    "b_A": (lambda: routed_adapter(X, A4, B4, X, b_A=X[0, 0]), r"b_A must be \(4,\)"),
    "keep_h": (
        lambda: routed_adapter(X, A4, B4, X, dropout=Dropout(0.1, X[0] > 0, None)),
        "keep_h must be",
    ),
    "packed": (
        lambda: routed_linear(
            X, A4, B4, RoutingInput(X, None, torch.zeros(6).long()), weight=W,
            route=Routing("gram", compat="eccv24"),
        ),
        "sample_index with transpose='eccv24'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_shows_the_route() -> None:
    shown = repr(RoutedLinear(nn.Linear(D, 12), 4, 8, "gram", adapted=(0, 2), of=3))
    assert "route=gram, rank=4, d=8, segments=per_group" in shown
    assert "alpha=8, adapted=(0, 2), of=3" in shown
    assert "activation=gelu, residual=False" in repr(RoutedAdapter(D, 4, residual=False))
