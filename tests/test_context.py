"""The holder of the routing input: what it refuses, what it restores."""

import copy
import pickle

import pytest
import torch
from cases import packed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_route import RoutedAdapter, RoutedLinear, RoutingContext, RoutingInput, VisualProjector
from fused_route import context as context_file

D = 6


def layer(context: RoutingContext | None = None) -> RoutedLinear:
    made = RoutedLinear(nn.Linear(D, D), 3, context=context)
    nn.init.normal_(made.B)
    return made


def test_layers_refuse_what_does_not_match() -> None:
    routed, x_h = layer(), torch.randn(3, 4, D)
    with pytest.raises(ValueError, match="RoutedLinear has no routing input"):
        routed(x_h)
    with routed.context.using(torch.randn(2, D)), pytest.raises(ValueError, match="a batch of 2"):
        routed(x_h)
    with routed.context.using(torch.randn(1, D)), pytest.raises(ValueError, match="a batch of 1"):
        routed(x_h)  # a stale batch of 1 would broadcast without a word
    with routed.context.using(torch.randn(3, D + 1)), pytest.raises(ValueError, match="width 6"):
        routed(x_h)
    with pytest.raises(ValueError, match="no routing input"):
        routed(x_h)  # cleared at the end of each block


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: RoutingInput(torch.zeros(2, 3, dtype=torch.int64)), "floating-point"),
        (lambda: RoutingInput([1.0]), "floating-point tensor, got"),  # type: ignore[arg-type]
        (lambda: RoutingInput(torch.zeros(2, 3, 4, 5)), r"got \(2, 3, 4, 5\)"),
        (lambda: RoutingInput(torch.zeros(2, 0, 4)), "Nv ≥ 1"),
        (lambda: RoutingInput(torch.zeros(2, 3, 4), torch.ones(2, 3)), "mask must be bool"),
        (lambda: RoutingInput(torch.zeros(2, 3, 4), torch.ones(3, 2).bool()), "mask must be bool"),
        (lambda: indexed([0, 1, 0]), "from 0 to 1, not in order"),
        (lambda: indexed([0, 2]), "from 0 to 2"),
        (lambda: indexed([-2, 0]), "from -2 to 0"),
        (lambda: RoutingInput(torch.zeros(2, 4), None, torch.zeros(3)), "integers"),
        (lambda: RoutingInput(torch.zeros(2, 4), None, torch.ones(3).bool()), "integers"),
        (lambda: RoutingInput(torch.zeros(2, 4), [True]), "mask must be a tensor, got"),  # type: ignore[arg-type]
    ],
)
def test_routing_input_refuses(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given()  # type: ignore[operator]


def indexed(index: list[int]) -> RoutingInput:
    return RoutingInput(torch.randn(2, D), None, torch.tensor(index))


@pytest.mark.parametrize(
    ("index", "offsets"),
    [
        ([0, 0, 1], [0, 2, 3]),
        ([1, 1], [0, 0, 2]),
        ([-1, 0, -1, 1, -1], [0, 3, 5]),
        ([-1, -1], [0, 2, 2]),
        ([], [0, 0, 0]),
    ],
)
def test_offsets(index: list[int], offsets: list[int]) -> None:
    found = (
        indexed(index).offsets
        if index
        else RoutingInput(torch.randn(2, D), None, torch.empty(0, dtype=torch.int64)).offsets
    )
    assert found is not None and found.tolist() == offsets


def test_padding_rows_pass_unrouted() -> None:
    adapter = RoutedAdapter(D, 3, "mul", "none")
    nn.init.normal_(adapter.B)
    x_h = torch.randn(5, D)
    with adapter.context.using(packed([1, 2], torch.randn(2, D))):
        y = adapter(x_h)
    assert adapter.b_A is not None
    x_t = x_h @ adapter.A.T + adapter.b_A
    torch.testing.assert_close(y[-2:], x_h[-2:] + x_t[-2:] @ adapter.B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_what_masked_tokens_hold_reaches_nothing(dtype: torch.dtype) -> None:
    mask, x_r = torch.tensor([[True, False, True]]), torch.randn(1, 3, D).to(dtype)
    others = x_r.float()
    others[0, 1] = float("nan")
    expected = RoutingInput(x_r, mask).x_r
    for given in (
        RoutingInput(others.to(dtype), mask),
        RoutingInput(torch.zeros(1, 3, 2), mask).of(others.to(dtype)),
    ):
        assert given.x_r.dtype == dtype and torch.equal(given.x_r.float(), expected.float())
    assert not expected.float()[0, 1].any() and expected.float()[0, 0].any()


def test_packed_rows_must_match() -> None:
    routed = layer()
    with routed.context.using(packed([1, 2], torch.randn(2, D))):
        assert routed(torch.randn(1, 5, D)).shape == (1, 5, D)
        with pytest.raises(ValueError, match="5 rows, x_h has 6"):
            routed(torch.randn(6, D))


def test_beams_are_expanded_sample_by_sample() -> None:
    routed, x_h, x_r = layer(), torch.randn(2, 4, D), torch.randn(2, 3, D)
    given = RoutingInput(x_r, torch.tensor([[True, False, False], [True, True, False]]))
    with routed.context.using(given):
        single = routed(x_h)
    with routed.context.using(given.repeated(3)):
        beams = routed(x_h.repeat_interleave(3, 0))
    torch.testing.assert_close(beams, single.repeat_interleave(3, 0))
    with pytest.raises(ValueError, match="cannot be expanded"):
        packed([1, 1], torch.randn(2, D)).repeated(2)


def test_nested_using_restores_and_survives_errors() -> None:
    context = RoutingContext()
    outer, inner = torch.randn(1, D), torch.randn(2, D)
    with context.using(outer):
        with pytest.raises(RuntimeError, match="inside"), context.using(inner):
            raise RuntimeError("inside")
        assert context.get(D, "layer").batch_size == 1
        with pytest.raises(ValueError, match="x_r must be"):
            context.set(torch.randn(3))
        assert context.get(D, "layer").batch_size == 1
    assert repr(context) == "RoutingContext(empty)"


def test_projector_serves_every_width() -> None:
    projector = VisualProjector(10, {6, 8, 10})
    context = RoutingContext(projector)
    x_r = torch.randn(2, 3, 10)
    mask, index = torch.tensor([[True, False, True]] * 2), torch.tensor([0, 1, 1])
    context.set(RoutingInput(x_r.double(), mask, index))  # converted to the projector's dtype
    for d in (6, 8):
        held = context.get(d, "layer")
        assert held.mask is mask and held.sample_index is index and held.x_r.dtype == torch.float32
    assert {d: context.get(d, "layer").width for d in (6, 8, 10)} == {6: 6, 8: 8, 10: 10}
    assert len(projector.projections) == 2
    with pytest.raises(ValueError, match="visual_width=10"):
        context.set(torch.randn(2, 9))


def test_copies_share_one_context_and_leave_the_image_behind() -> None:
    context = RoutingContext()
    model = nn.Sequential(layer(context), layer(context))
    context.set(torch.randn(2, D, requires_grad=True) * 2)  # not a leaf: could not be copied
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].context is copied[1].context is not context
        with pytest.raises(ValueError, match="no routing input"):
            copied(torch.randn(2, 3, D))


@pytest.mark.parametrize("clear", ["using", "sticky"])
def test_checkpointing_recomputes_with_the_image_of_its_forward(clear: str) -> None:
    routed = layer()
    images, x_h = torch.randn(2, 2, 1, D), torch.randn(2, 3, D, requires_grad=True)

    def gradient(checkpointed: str) -> Tensor:
        total = torch.zeros(())
        for image in images:  # two forwards, then one backward
            routed.context.set(image)
            if checkpointed == "yes":
                y = checkpoint(
                    routed, x_h, use_reentrant=False, context_fn=routed.context.checkpoint_contexts
                )
            else:
                y = routed(x_h)
            total = total + y.square().sum()
            if clear == "using":
                routed.context.clear()
        return torch.autograd.grad(total, routed.A)[0]

    torch.testing.assert_close(gradient("yes"), gradient("no"), rtol=0, atol=0)
    last = images[1] if clear == "sticky" else None  # what was set before the backward still is
    assert (repr(routed.context) == "RoutingContext(empty)") == (last is None)
    if last is not None:
        assert torch.equal(routed.context.get(D, "layer").x_r, last)


def test_image_and_text_mask_are_set_apart_and_cleared_together() -> None:
    context, x_h = RoutingContext(), torch.randn(2, 3, D)
    context.set(text_mask="all")
    context.set(torch.randn(2, D))
    assert context.pooled(x_h, "layer").batch_size == context.get(D, "layer").batch_size == 2
    context.set(text_mask=torch.ones(2, 3).int())
    assert context.get(D, "layer").batch_size == 2
    context.clear()
    for ask in (lambda: context.get(D, "layer"), lambda: context.pooled(x_h, "layer")):
        with pytest.raises(ValueError, match="layer"):
            ask()


def test_hooks_pop_only_what_they_pushed() -> None:
    context, mine, other = RoutingContext(), object(), object()
    context.set(torch.randn(2, D))
    context.push(mine)
    context.set(torch.randn(3, D))
    context.pop(other)
    assert context.get(D, "layer").batch_size == 3
    context.pop(mine)
    assert context.get(D, "layer").batch_size == 2
    context.pop(mine)
    assert context.get(D, "layer").batch_size == 2


def test_what_a_recomputed_block_sets_does_not_stand_in_the_way() -> None:
    routed = layer()
    image, x_h = torch.randn(2, D), torch.randn(2, 3, D, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        routed.context.set(image)  # by itself, not for a `with` block
        y: Tensor = routed(x)
        return y

    with routed.context.using(torch.randn(2, D)):
        checkpoint(block, x_h, use_reentrant=False).sum().backward()
        assert routed(x_h).shape == x_h.shape


def routed_with(found: RoutedLinear) -> RoutingInput:
    """What the layer is routed with on its device."""
    given = found.routing_input(found.A)
    assert given is not None
    return given


class TestOnSeveralGpus:
    """The second GPU is the meta device here, which has shapes and no values."""

    @pytest.fixture(autouse=True)
    def _meta_is_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def is_elsewhere(tensor: Tensor, device: torch.device) -> bool:
            return tensor.device != device

        monkeypatch.setattr(context_file, "is_on_another_gpu", is_elsewhere)

    def test_the_image_follows_once_for_all_layers_of_a_gpu(self) -> None:
        context, meta = RoutingContext(), torch.device("meta")
        layers = [layer(context), *(layer(context).to(meta) for _ in range(2))]
        given = RoutingInput(torch.randn(2, 3, D, requires_grad=True), torch.ones(2, 3).bool())
        with context.using(given):
            first, *others = (routed_with(found) for found in layers)
            with torch.no_grad():
                without = routed_with(layers[1])
            y = layers[1](torch.randn(2, 4, D, device=meta))
        assert first is given and others[0] is others[1] and others[0].mask is not None
        assert others[0].x_r.device == others[0].mask.device == y.device == meta
        assert others[0].x_r.requires_grad and not without.x_r.requires_grad
        with context.using(torch.randn(2, D)):
            assert routed_with(layers[1]).x_r.shape == (2, 1, D)

    def test_an_image_that_changes_is_copied_again(self) -> None:
        found = layer().to("meta")
        with torch.no_grad(), found.context.using(image := torch.randn(2, D)):
            before = routed_with(found)
            assert routed_with(found) is before
            image.add_(1.0)  # a static buffer, or a parameter that is stepped
            assert routed_with(found) is not before

    def test_what_a_transform_made_is_not_kept(self) -> None:
        found, image = layer().to("meta"), torch.randn(2, D)
        with found.context.using(image):
            torch.func.grad(lambda x: (routed_with(found), x.sum())[1])(image)
            assert not found.context._thread.held.moved
            assert routed_with(found).x_r.device.type == "meta"

    def test_a_checkpointed_block_makes_its_own_copy(self) -> None:
        context, found = RoutingContext(), layer().to("meta")
        found.context = context
        with context.using(torch.randn(2, D, requires_grad=True)):
            with torch.no_grad():  # as reentrant checkpointing runs a block
                inside = context.captured(lambda: routed_with(found))()
            assert not inside.x_r.requires_grad
            assert routed_with(found).x_r.requires_grad

    def test_text_masks_follow_too(self) -> None:
        context = RoutingContext()
        with context.using(text_mask=torch.ones(2, 4, dtype=torch.long)):
            assert context.pooled(torch.randn(2, 4, D, device="meta"), "layer").batch_size == 2


def test_an_image_on_a_cpu_is_not_taken_to_another_kind_of_device() -> None:
    found = layer().to("meta")
    with found.context.using(torch.randn(2, D)), pytest.raises(ValueError, match="x_r is on cpu"):
        found(torch.randn(2, 4, D, device="meta"))
