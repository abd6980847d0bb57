"""Recomputed blocks, several forwards, nested contexts, threads: exact gradients or an error."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_route import RoutedAdapter, RoutedConfig, RoutedLinear, RoutingContext, attach

D = 6
DIRECT: Callable[..., Tensor] = lambda context, block, x: block(x)  # noqa: E731
WAYS: dict[str, Callable[..., Tensor]] = {
    "context_fn": lambda context, block, x: checkpoint(
        block, x, use_reentrant=False, context_fn=context.checkpoint_contexts
    ),
    "captured": lambda context, block, x: checkpoint(
        context.captured(block), x, use_reentrant=False
    ),
    "captured reentrant": lambda context, block, x: checkpoint(
        context.captured(block), x, use_reentrant=True
    ),
}
RAW: dict[str, Callable[..., Tensor]] = {
    "raw": lambda context, block, x: checkpoint(block, x, use_reentrant=False),
    "raw reentrant": lambda context, block, x: checkpoint(block, x, use_reentrant=True),
}


def model(project: str = "layer", **settings: Any) -> tuple[Any, RoutingContext]:
    """Three routed blocks that share a context."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3)))
    config = RoutedConfig([r"0"], r=3, route="gram", **settings)
    attached = attach(
        blocks, RoutedConfig(r"\d\.0", r=3, route="gram", **settings), project=project
    )
    assert config.route == "gram"
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    return blocks, attached.context


def gradients(
    blocks: nn.Sequential, context: RoutingContext, way: Callable[..., Tensor], use: str
) -> list[Tensor]:
    """Of two forwards with different images before one backward, as `use` sets and unsets them."""
    torch.manual_seed(5)
    images, x = torch.randn(2, 2, 3, D), torch.randn(2, 4, D, requires_grad=True)
    total = torch.zeros(())
    for image in images:
        if use == "sticky":
            context.set(image)
            for block in blocks:
                x_out = x = way(context, block, x)
        else:
            with context.using(torch.randn(1, D)), context.using(image):  # nested
                for block in blocks:
                    x_out = x = way(context, block, x)
        total = total + x_out.square().sum()
    context.set(torch.randn(5, D)) if use == "other" else None
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    total.backward()
    context.clear()
    return [p.grad.clone() for p in parameters if p.grad is not None]


@pytest.mark.parametrize("host", ["lora", "adapter"])
@pytest.mark.parametrize("project", ["layer", "together"])
@pytest.mark.parametrize("use", ["sticky", "using", "other"])
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_gradients_are_exact(way: str, use: str, project: str, host: str) -> None:
    blocks, context = model(project, host=host)
    expected = gradients(blocks, context, DIRECT, use)
    found = gradients(blocks, context, WAYS[way], use)
    assert len(found) == len(expected) == (12 if host == "adapter" else 6)
    for mine, theirs in zip(found, expected, strict=True):
        if project == "layer" and "reentrant" not in way:  # which adds gradients in another order
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", ["sticky", "using", "other"])
@pytest.mark.parametrize("way", RAW)
def test_a_recompute_without_its_image_is_refused(way: str, use: str) -> None:
    blocks, context = model()
    with pytest.raises(RuntimeError, match=r"[02]\.0 is called inside a backward pass"):
        gradients(blocks, context, RAW[way], use)
    context.clear()  # the error left what was set where it was
    assert len(gradients(blocks, context, DIRECT, use)) == 6


def test_an_image_set_inside_the_block_is_its_own() -> None:
    """A model whose forward sets the context may be checkpointed as a whole, in any way."""
    blocks, context = model()
    images, x = torch.randn(2, 2, D), torch.randn(2, 4, D, requires_grad=True)

    def forward(x: Tensor, image: Tensor) -> Tensor:
        with context.using(image):
            return blocks(x)

    results = []
    for reentrant in (None, False, True):
        total = torch.zeros(())
        for image in images:
            y = (
                forward(x, image)
                if reentrant is None
                else checkpoint(forward, x, image, use_reentrant=reentrant)
            )
            total = total + y.square().sum()
        blocks.zero_grad()
        total.backward()
        results.append([p.grad.clone() for p in blocks.parameters() if p.grad is not None])
    for other in results[1:]:
        for mine, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_nested_checkpoints() -> None:
    blocks, context = model()
    images, x = torch.randn(2, 2, D), torch.randn(2, 4, D, requires_grad=True)

    def way(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=False, context_fn=context.checkpoint_contexts)

    def nested(x: Tensor) -> Tensor:
        return way(lambda x: blocks[2](way(blocks[1], x)), way(blocks[0], x))

    results = []
    for run in (blocks, nested):
        total = torch.zeros(())
        for image in images:
            with context.using(image):
                y = run(x) if run is blocks else way(nested, x)
            total = total + y.square().sum()
        blocks.zero_grad()
        total.backward()
        results.append([p.grad.clone() for p in blocks.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_trained_projector_and_checkpoints() -> None:
    blocks = nn.ModuleDict({"0": nn.Linear(D, D), "1": nn.Linear(D, D)})
    attached = attach(blocks, RoutedConfig(["0", "1"], r=3, visual_width=4))
    context, projector = attached.context, attached.projector
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)
    assert projector is not None
    x, image = torch.randn(2, 3, D, requires_grad=True), torch.randn(2, 4)
    found = []
    for way in (DIRECT, WAYS["context_fn"], WAYS["captured reentrant"]):
        blocks.zero_grad()
        with context.using(image):
            y = way(context, blocks["1"], way(context, blocks["0"], x))
        if way is WAYS["captured reentrant"]:  # goes backward through the projector block by block
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                y.sum().backward()
            continue
        y.sum().backward()
        found.append([p.grad.clone() for p in projector.parameters() if p.grad is not None])
    assert len(found[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("forwards", [1, 2, 4])
def test_any_number_of_forwards_before_a_backward(forwards: int) -> None:
    blocks, context = model("together")
    images, x = torch.randn(forwards, 2, 3, D), torch.randn(2, 4, D)
    expected = [torch.zeros_like(p) for p in blocks.parameters() if p.requires_grad]
    outs = []
    for image in images:
        with context.using(image):
            outs.append(blocks(x))
            alone = blocks(x)  # again with the same image: a graph of its own
        blocks.zero_grad()
        alone.sum().backward()
        for total, p in zip(
            expected, (p for p in blocks.parameters() if p.requires_grad), strict=True
        ):
            assert p.grad is not None
            total += p.grad
    blocks.zero_grad()
    for out in outs:
        out.sum().backward()
    found = [p.grad for p in blocks.parameters() if p.grad is not None]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_threads_do_not_see_each_others_image() -> None:
    blocks, context = model()
    x, images = torch.randn(1, 4, D), torch.randn(8, 1, D)
    expected = []
    for image in images:
        with context.using(image):
            expected.append(blocks(x))
    barrier = threading.Barrier(4)

    def run(image: Tensor) -> Tensor:
        with context.using(image):
            barrier.wait(timeout=30)  # all four have set theirs before any runs
            y: Tensor = blocks(x)
            return y

    with ThreadPoolExecutor(4) as pool:
        for mine, theirs in zip(pool.map(run, images), expected, strict=True):
            assert torch.equal(mine, theirs)
    context.set(images[0])
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="has no routing input"):
        pool.submit(blocks, x).result()


def test_backward_in_another_thread() -> None:
    blocks, context = model()
    x, images = torch.randn(1, 4, D, requires_grad=True), torch.randn(2, 1, D)
    with context.using(images[0]):
        y = WAYS["context_fn"](context, blocks, x)
        direct = torch.autograd.grad(blocks(x).sum(), blocks[0][0].A)[0]
    with context.using(images[1]), ThreadPoolExecutor(1) as pool:
        found = pool.submit(torch.autograd.grad, y.sum(), blocks[0][0].A).result()[0]
    assert torch.equal(found, direct)


@pytest.mark.parametrize("project", ["layer", "together"])
def test_functional_call_uses_the_parameters_it_is_given(project: str) -> None:
    blocks, context = model(project)
    x, image = torch.randn(2, 4, D), torch.randn(2, 2, D)
    other = {n: torch.randn_like(p) for n, p in blocks.named_parameters() if p.requires_grad}
    with context.using(image):
        before = blocks(x)
        called = torch.func.functional_call(blocks, other, (x,))
        assert not torch.allclose(called, before)
        torch.testing.assert_close(blocks(x), before)
    with torch.no_grad():
        for name, parameter in blocks.named_parameters():
            if name in other:
                parameter.copy_(other[name])
    with context.using(image):
        torch.testing.assert_close(blocks(x), called)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_train_apart(copied: str) -> None:
    blocks, context = model("together", host="adapter")
    other = copy.deepcopy(blocks) if copied == "deepcopy" else pickle.loads(pickle.dumps(blocks))
    mine, theirs = context, other[0][0].adapter.context
    assert theirs is other[2][0].adapter.context is not mine
    x, image = torch.randn(2, 4, D), torch.randn(2, D)
    with mine.using(image), theirs.using(image):
        assert torch.equal(blocks(x), other(x))
        other(x).sum().backward()
    assert all(p.grad is None for p in blocks.parameters())
    with pytest.raises(ValueError, match="has no routing input"):
        other(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", ["lora", "adapter"])
def test_state_dicts_move_between_dtypes_and_devices(host: str, dtype: torch.dtype) -> None:
    blocks, context = model(host=host)
    x, image = torch.randn(2, 4, D), torch.randn(2, D)
    state = {name: tensor.to(dtype) for name, tensor in blocks.state_dict().items()}
    other, other_context = model(host=host)
    other.to(dtype).load_state_dict(state)
    with context.using(image), other_context.using(image.to(dtype)):
        torch.testing.assert_close(other(x.to(dtype)).float(), blocks(x), rtol=0.05, atol=0.05)
    empty = copy.deepcopy(blocks).to("meta")
    empty.to_empty(device="cpu").load_state_dict(blocks.state_dict())
    assigned = copy.deepcopy(blocks).to("meta")
    assigned.load_state_dict(blocks.state_dict(), assign=True)
    for moved in (empty, assigned):
        inner: Any = moved[0][0]
        its = (inner.adapter if host == "adapter" else inner).context
        with context.using(image), its.using(image):
            assert torch.equal(moved(x), blocks(x))


def test_layers_of_one_context_may_run_under_any_grad_mode() -> None:
    blocks, context = model("together")
    x, image = torch.randn(2, 4, D), torch.randn(2, D)
    # x_v is projected without a graph, then asked for with one
    with torch.no_grad(), context.using(image), torch.enable_grad():
        y = blocks(x)
    y.sum().backward()
    found = [p.grad.clone() for p in blocks.parameters() if p.grad is not None]
    blocks.zero_grad()
    with context.using(image):
        blocks(x).sum().backward()
    for mine, theirs in zip(
        found, [p.grad for p in blocks.parameters() if p.grad is not None], strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.inference_mode(), context.using(image):
        torch.testing.assert_close(blocks(x), y)


def test_modules_without_attach_share_or_own_contexts() -> None:
    shared = RoutingContext()
    pair = nn.Sequential(
        RoutedLinear(nn.Linear(D, D), 2, context=shared), RoutedAdapter(D, 2, context=shared)
    )
    with shared.using(torch.randn(1, D)):
        assert pair(torch.randn(1, 2, D)).shape == (1, 2, D)
    alone = RoutedAdapter(D, 2)
    assert alone.context is not RoutedAdapter(D, 2).context
