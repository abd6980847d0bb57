"""Which rows make a batch, where several tasks are trained at once."""

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain, repeat

import torch
from torch.utils.data import Sampler

from fused_route.checks import one_of, whole
from fused_route.training.experiment.recipe import SAMPLING


class TaskBatches(Sampler[list[int]]):
    """Batches of one task each, the tasks' order drawn anew in every epoch.

    An index is that of the row, and of the epoch: row + epoch · number of rows. What is drawn for a
    row may then differ from epoch to epoch (see `Rows`).

    Args:
        rows: the row numbers of each task.
        sizes: rows in a batch of each task.
        sampling: "proportional", each row once an epoch; "balanced", as many batches of each task
            as the largest has, the others' rows drawn again.
        seed: with the epoch decides the order.

    Attributes:
        epoch: set by `set_epoch`, as the Trainer does.
    """

    def __init__(
        self, rows: Mapping[str, range], sizes: Mapping[str, int], sampling: str, seed: int
    ) -> None:
        one_of("sampling", sampling, SAMPLING)
        for name, size in sizes.items():
            whole(f"tasks.{name}.batch_size", size)
        self.rows, self.sizes = dict(rows), dict(sizes)
        self.sampling, self.seed, self.epoch = sampling, seed, 0
        # accelerate then takes batches as they come; told a size, it drops those of another
        self.batch_size = None
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Decides what is drawn from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        counts = [self._count(name) for name in self.rows]
        return sum(counts) if self.sampling == "proportional" else max(counts) * len(counts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        most = max(self._count(name) for name in self.rows)
        batches = []
        for name in self.rows:
            wanted = self._count(name) if self.sampling == "proportional" else most
            stream = self._stream(name, generator)
            batches += [next(stream) for _ in range(wanted)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        first = self.epoch * sum(len(rows) for rows in self.rows.values())
        return iter([[first + row for row in batches[place]] for place in order])

    def _count(self, name: str) -> int:
        return -(-len(self.rows[name]) // self.sizes[name])

    def _stream(self, name: str, generator: torch.Generator) -> Iterator[list[int]]:
        """Batches of a task without end: all its rows in another order, again and again."""
        rows, size = self.rows[name], self.sizes[name]
        for _ in repeat(None):
            order = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(order), size):
                yield [rows[place] for place in order[start : start + size]]


def seed_of(*parts: object) -> int:
    """A seed that other parts do not share: sums of seeds and epochs would meet."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big")


def in_order(rows: Mapping[str, range], size: int) -> list[list[int]]:
    """Batches of one task each, every row once, in order."""
    return list(
        chain.from_iterable(
            [list(of[start : start + size]) for start in range(0, len(of), size)]
            for of in rows.values()
        )
    )
