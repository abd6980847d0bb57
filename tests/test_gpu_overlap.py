"""Kernels that start before the one before them has ended, on a GPU: the same bits as in turn."""

from dataclasses import replace

import pytest
import torch
from test_gpu import (
    BASE,
    DEVICE,
    REPEATS,
    UNEVEN,
    assert_same_bits,
    fused,
    needs_gpu,
    pytestmark,
    released,
)

from bench import providers
from bench.cases import HOSTS, Case, op

__all__ = ["pytestmark", "released"]

OVERLAPPED = [
    *(replace(BASE, host=host) for host in HOSTS),
    *(replace(UNEVEN, host=host, dtype=dtype) for host in HOSTS for dtype in ("bf16", "fp32")),
    replace(UNEVEN, route="gram", Nv=5), replace(UNEVEN, S=8, T=5),
    *(op(host, "mul", 768, 64, 32_768) for host in HOSTS),  # by P3 where there is a base
    op("adapter", "gram", 1024, 128, 2_000), op("linear", "mul", 1024, 128, 10_240),
]  # fmt: skip


@needs_gpu
@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("case", OVERLAPPED, ids=lambda case: case.name)
def test_kernels_that_start_early_give_the_same_bits(case: Case) -> None:
    """Of two inputs in turn: what one of them read too early would be the other's, in the memory
    that it left behind.
    """
    why = providers.obstacle("fused-overlapped", case, DEVICE)
    if why is not None:
        pytest.skip(why)
    expected = [fused(case, seed)[1].results() for seed in (0, 1)]
    subjects = [fused(case, seed, "fused-overlapped")[1] for seed in (0, 1)]
    for _ in range(5 * REPEATS):
        torch.cuda._sleep(4_000_000)  # cycles, in which the host gets ahead
        found = [subject.results() for subject in subjects]
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)
        del found


@needs_gpu
@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("case", [
    *(replace(BASE, host=host) for host in HOSTS),
    *(replace(BASE, host=host, dtype="fp32") for host in HOSTS),
    *(op(host, "gram", 768, 64, 32_768) for host in HOSTS),  # by P3 where there is a base
], ids=lambda case: case.name)  # fmt: skip
def test_a_graph_of_kernels_that_start_early(case: Case) -> None:
    """Calls of two inputs in turn, with the edges that such launches leave in a graph."""
    why = providers.obstacle("fused-overlapped", case, DEVICE)
    if why is not None:
        pytest.skip(why)
    expected = [fused(case, seed)[1].results() for seed in (0, 1)]
    subjects = [fused(case, seed, "fused-overlapped")[1] for seed in (0, 1)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for subject in subjects:
            subject.results()
    torch.cuda.synchronize()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for subject in subjects * 4:
            found.append(subject.results())
    for _ in range(REPEATS):
        for results in found:
            for tensor in results.values():
                tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for results, other in zip(found, expected * 4, strict=True):
            assert_same_bits(results, other)
