"""The tools in bench/ that look at kernels without a GPU: each sees what is put before it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.offline.count_launches import Launches, count, saved_bytes

if TYPE_CHECKING:
    from bench.offline.ahead_of_time import Resources

S, T, D, R, N = 4, 5, 32, 16, 24  # samples, tokens, widths in, of the bottleneck and out
H, X_V = 4 * S * T * R, 4 * S * R  # bytes of x_t and of x_v


class Chains:
    """Eager adapter and LoRA with route "mul", as a user would write them."""

    def __init__(self) -> None:
        self.x, self.x_r = self.leaf(S, T, D), torch.randn(S, 1, D)
        self.A, self.b_A = self.leaf(R, D), self.leaf(R)
        self.B, self.b_B = self.leaf(D, R), self.leaf(D)
        self.W, self.b, self.B_o = torch.randn(N, D), torch.randn(N), self.leaf(N, R)
        self.inputs = [value for value in vars(self).values() if isinstance(value, Tensor)]

    @staticmethod
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    def adapter(self) -> Tensor:
        z = F.linear(self.x, self.A, self.b_A) * F.linear(self.x_r, self.A, self.b_A)
        return F.linear(F.gelu(z), self.B, self.b_B) + self.x

    def lora(self) -> Tensor:
        z = F.linear(self.x, self.A) * F.linear(self.x_r, self.A)
        return F.linear(self.x, self.W, self.b) + 2.0 * F.linear(z, self.B_o)


FORWARD = {
    "adapter": ("addmm", "addmm", "mul", "gelu", "addmm", "add"),
    "lora": ("mm", "mm", "mul", "addmm", "mm", "mul", "add"),
}
# x, A, b_A, B and b_B have gradients; A and b_A in two parts, x too.
BACKWARD = {
    "adapter": ["add"] * 3 + ["gelu_backward"] + ["mm"] * 5 + ["mul"] * 2 + ["sum"] * 4,
    "lora": ["add"] * 2 + ["mm"] * 6 + ["mul"] * 3 + ["sum"],
}


@pytest.mark.parametrize("chain", FORWARD)
def test_every_operation_of_a_chain_counts(chain: str) -> None:
    forward: Callable[[], Tensor] = getattr(Chains(), chain)
    results: list[Tensor] = []
    assert count(lambda: results.append(forward())) == Launches(FORWARD[chain], ())
    backward = count(lambda: results[0].backward(torch.ones_like(results[0])))
    assert backward.aten[0] == "ones_like"
    assert sorted(backward.aten[1:]) == BACKWARD[chain]


def test_gradients_that_are_there_are_added_to() -> None:
    chains = Chains()
    dy = torch.randn(S, T, N)
    first = count(lambda: chains.lora().backward(dy))
    second = count(lambda: chains.lora().backward(dy))
    assert second.counts["aten"] == first.counts["aten"] + 3  # x, A, B
    assert second.aten.count("add_") == 3


def test_views_and_empty_memory_launch_nothing() -> None:
    x = torch.randn(4, 6)

    def call() -> None:
        x.view(2, 12).T[:, None].expand(12, 3, 2).detach()
        torch.empty_like(x).t_().unsqueeze_(0)
        x.new_empty(3).split(1)
        assert x.shape == (4, 6) and x.is_contiguous()

    assert count(call) == Launches((), ())


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x: x.new_zeros(3), ("new_zeros",)),
        (lambda x: x.T.contiguous(), ("clone",)),
        (lambda x: x.to(torch.bfloat16), ("_to_copy",)),
        (lambda x: x[0].copy_(x[1]), ("copy_",)),
        (lambda x: x.sum().item(), ("sum", "_local_scalar_dense")),
        (lambda x: F.dropout(x, 0.5), ("bernoulli_", "div_", "mul")),
    ],
)
def test_small_operations_count(call: Callable[[Tensor], object], names: tuple[str, ...]) -> None:
    x = torch.randn(4, 6)
    assert count(lambda: call(x)).aten == names


def test_an_operation_of_a_library_counts_as_what_it_does() -> None:
    @torch.library.custom_op("bench_tools::twice_and_one", mutates_args=())
    def twice_and_one(x: Tensor) -> Tensor:
        return 2 * x.t() + 1

    assert count(lambda: twice_and_one(torch.ones(3, 4)).exp()).aten[1:] == ("mul", "add", "exp")


class Squares(torch.autograd.Function):
    """x² of the first row, saving x and a view of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x[0])
        return x[0].square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        x, row = ctx.saved_tensors
        return torch.zeros_like(x).index_fill_(0, torch.tensor([0]), 1) * 2 * row * gradients[0]


def test_functions_of_our_own_are_seen() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert count(lambda: Squares.apply(x)).aten == ("pow",)
    assert "index_fill_" in count(lambda: Squares.apply(x).sum().backward()).aten
    assert saved_bytes(lambda: Squares.apply(x)) == x.nbytes  # x and its view are one storage
    assert saved_bytes(lambda: Squares.apply(x), exclude=[x]) == 0


def test_saved_bytes_of_the_chains() -> None:
    chains = Chains()
    # adapter: x_t, x_v, z before the activation and after; LoRA: x_t, x_v and z
    assert saved_bytes(chains.adapter, exclude=chains.inputs) == 3 * H + X_V
    assert saved_bytes(chains.lora, exclude=chains.inputs) == 2 * H + X_V
    everything = saved_bytes(chains.lora)
    saved = (chains.x, chains.x_r, chains.A, chains.W, chains.B_o)
    assert everything == 2 * H + X_V + sum(tensor.nbytes for tensor in saved)


def test_a_view_keeps_its_whole_storage() -> None:
    x = torch.randn(10, 8)
    weight = torch.randn(8, requires_grad=True)
    assert saved_bytes(lambda: x[:2] * weight) == x.nbytes


def test_memory_of_a_freed_graph_is_not_taken_for_saved_again() -> None:
    x = torch.randn(64, requires_grad=True)

    def call() -> None:
        for _ in range(50):  # the allocator gives the same memory again
            x.exp().sum().backward()

    assert saved_bytes(call, exclude=[x]) == 50 * x.nbytes


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "ctas"),
    [
        (90, 128, 4, 0, 4),  # 65536 registers / (128 · 128)
        (90, 129, 4, 0, 3),  # given out by 8: 136
        (90, 168, 12, 0, 1),
        (90, 224, 1, 0, 8),  # 9 warps' worth of registers in 4 quarters of 2
        (90, 255, 12, 0, 0),  # 97920 registers
        (90, 32, 4, 0, 16),  # 2048 threads
        (89, 32, 4, 0, 12),  # 1536 threads
        (86, 32, 1, 0, 16),  # programs
        (80, 32, 4, 81 * 1024, 2),  # (81 + 1) · 2 = 164
        (80, 32, 4, 82 * 1024, 1),
        (80, 32, 4, 163 * 1024, 1),
        (80, 32, 4, 163 * 1024 + 1, 0),
        (90, 32, 64, 0, 0),  # 2048 threads in one program
    ],
)
def test_occupancy_of_nvidia(arch: int, registers: int, warps: int, shared: int, ctas: int) -> None:
    from bench.offline.ahead_of_time import ctas_on_nvidia

    metadata = SimpleNamespace(num_warps=warps, shared=shared, target=SimpleNamespace(arch=arch))
    assert ctas_on_nvidia(metadata, registers) == ctas


@pytest.mark.compile
@pytest.mark.parametrize(
    ("registers", "warps", "shared", "ctas"),
    [
        (128, 4, 0, 4),
        (129, 4, 0, 3),
        (64, 8, 0, 4),
        (8, 4, 0, 8),  # 8 waves a SIMD
        (512, 8, 0, 0),  # 8 waves on 4 SIMDs of one wave each
        (64, 4, 32768, 2),
        (64, 4, 65537, 0),
    ],
)
def test_occupancy_of_amd(registers: int, warps: int, shared: int, ctas: int) -> None:
    from bench.offline.ahead_of_time import ctas_on_amd

    assert ctas_on_amd(SimpleNamespace(num_warps=warps, shared=shared), registers) == ctas


POINTERS = {"x": "*bf16", "w": "*bf16", "bias": None, "y": "*bf16", "M": "i32"}
SIZES = {"N": 64, "K": 256, "BM": 128, "BK": 64}
ARCHITECTURES = (80, 86, 89, 90, 100, 120, "gfx942")


def product(arch: int | str, **changes: Any) -> "Resources":
    import tiny_kernels

    from bench.offline.ahead_of_time import compile_for

    arguments = {**POINTERS, **{k: v for k, v in changes.items() if k in POINTERS}}
    constants = {**SIZES, **{k: v for k, v in changes.items() if k in SIZES}}
    rest = {k: v for k, v in changes.items() if k not in POINTERS | SIZES}
    return compile_for(tiny_kernels.product, arguments, constants, arch, **rest)


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_product_compiles_clean(arch: int | str) -> None:
    seen = product(arch)
    assert seen.spills == seen.stack == seen.atomics == 0
    assert seen.matrix > 0 and seen.wide_loads > 0 and seen.narrow_loads == {}
    assert 0 < seen.registers < 256 and seen.shared > 0 and seen.ctas_per_sm > 0


@pytest.mark.compile
def test_on_amd_tensors_are_taken_to_be_within_2_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.offline import ahead_of_time

    monkeypatch.setattr(ahead_of_time, "resources", lambda compiled: compiled.asm["amdgcn"])
    code: Any = product("gfx942")
    assert "buffer_load_dwordx4" in code and "global_load" not in code


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "few_registers"),
    [
        (80, {"maxnreg": 48}),
        (90, {"maxnreg": 64}),  # fewer are refused
        (100, {"maxnreg": 48}),
        ("gfx942", {"waves_per_eu": 8}),  # 64 registers
    ],
)
def test_spills_are_seen(arch: int | str, few_registers: dict[str, int]) -> None:
    seen = product(arch, **few_registers)
    assert seen.spills > 0 and seen.stack > 0


@pytest.mark.compile
@pytest.mark.parametrize("arch", (80, 90, 100, "gfx942"))
def test_atomics_and_narrow_loads_are_seen(arch: int | str) -> None:
    import tiny_kernels

    from bench.offline.ahead_of_time import compile_for

    types = {"x": "*bf16", "y": "*fp32", "M": "i32"}
    atomic = compile_for(tiny_kernels.add_up, types, {"BLOCK": 256}, arch)
    assert atomic.atomics > 0 and atomic.matrix == 0
    narrow = compile_for(tiny_kernels.every_other, types, {"BLOCK": 256}, arch)
    assert narrow.atomics == narrow.wide_loads == 0 and set(narrow.narrow_loads) == {2}


@pytest.mark.compile
def test_a_kernel_that_needs_too_much_shared_memory_cannot_launch() -> None:
    large = {"N": 128, "BK": 128}
    assert product(86, **large).ctas_per_sm == 0
    assert product(90, **large).ctas_per_sm == 1


@pytest.mark.compile
def test_a_pointer_that_is_not_given_is_not_loaded() -> None:
    without, given = product(90), product(90, bias="*fp32")
    assert without.narrow_loads == {}
    assert sum(given.narrow_loads.values()) + given.wide_loads > without.wide_loads


@pytest.mark.compile
@pytest.mark.parametrize(
    ("change", "message"),
    [({"arch": 75}, "arch must be one of"), ({"bias2": "*bf16"}, "must be those of the kernel")],
)
def test_arguments_are_checked(change: dict[str, Any], message: str) -> None:
    import tiny_kernels

    from bench.offline.ahead_of_time import compile_for

    arch = change.pop("arch", 90)
    with pytest.raises(ValueError, match=message):
        compile_for(tiny_kernels.product, {**POINTERS, **change}, SIZES, arch)


# Triton 3.9 warns where it is not told whether a product and a sum may be one instruction.
OPTIONS: dict[str, Any] = {"BLOCK": 128, "enable_fp_fusion": True}


def add_up(x: Tensor, y: Tensor) -> Tensor:
    import tiny_kernels

    tiny_kernels.add_up[(3, 2)](x, y, len(x), **OPTIONS)
    return y


@pytest.mark.compile
def test_launches_through_the_null_driver_are_noted() -> None:
    from bench.offline.null_driver import Launch, microseconds, recorded, use_null_driver

    use_null_driver()
    x, y = torch.ones(300), torch.zeros(128)
    with recorded() as outer:
        with recorded() as inner:
            add_up(x, y)
        add_up(x, y)
        add_up(x, y)
    add_up(x, y)
    assert outer == [Launch("add_up", (3, 2, 1))] * 3 and inner == outer[:1]
    assert not y.any()  # nothing ran
    assert count(lambda: add_up(x, y).exp()) == Launches(("exp",), ("add_up",))
    assert 0 < microseconds(lambda: add_up(x, y), repeats=30, rounds=2) < 1e6


@pytest.mark.compile
def test_a_launch_can_be_repeated_from_what_was_compiled() -> None:
    """What fused_route.kernels relies on: numbers for pointers, a place for each constant."""
    import tiny_kernels

    from bench.offline.null_driver import recorded, use_null_driver

    use_null_driver()
    x, y = torch.ones(300), torch.zeros(128)
    compiled = tiny_kernels.add_up.warmup(x.dtype, y.dtype, 300, grid=(1,), **OPTIONS)
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    with recorded() as launches:
        run(3, 2, 1, 0, function, packed, None, None, None, x.data_ptr(), y.data_ptr(), 300, None)
        assert tiny_kernels.add_up[(3, 2)](x, y, 300, **OPTIONS) is compiled
    assert launches[0] == launches[1]


@pytest.mark.interpret
def test_interpreted_kernels_are_noted() -> None:
    x, y = torch.ones(384), torch.zeros(128)
    assert count(lambda: add_up(x, y).exp()) == Launches(("exp",), ("add_up",))
    assert (y == 2 * 3).all()  # it ran, once for each of the 3 × 2 programs
