"""What fused-route compare works out of the scores of its runs."""

import itertools

import numpy as np
import pytest

from fused_route.training.comparison.results import unequal
from fused_route.training.comparison.statistics import (
    differences,
    grouped,
    paired_bootstrap,
    spread,
)


class TestStatistics:
    def test_spread_by_hand(self) -> None:
        assert spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
        assert spread([0.5]) == (0.5, None)

    def test_differences_average_seeds_and_pair_items(self) -> None:
        ours = [{"vqa": {"a": 1.0, "b": 0.0}}, {"vqa": {"b": 1.0, "a": 1.0}}]
        theirs = [{"vqa": {"b": 1.0, "a": 0.0}}]
        (found,) = differences(ours, theirs)
        assert found.tolist() == [1.0, -0.5]

    def test_other_items_are_not_paired(self) -> None:
        with pytest.raises(ValueError, match="other items"):
            differences([{"vqa": {"a": 1.0}}], [{"vqa": {"b": 1.0}}])
        with pytest.raises(ValueError, match="a run of either arm"):
            differences([], [{"vqa": {"b": 1.0}}])

    def test_interval_is_that_of_all_resamples(self) -> None:
        """Four items have 4⁴ resamples, all of which can be written down."""
        values = np.array([0.0, 1.0, 1.0, -0.5])
        every = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
        low, high = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
        found = paired_bootstrap([values], resamples=50_000)
        assert found.mean == values.mean()
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))

    def test_interval_is_that_of_drawn_items(self) -> None:
        draw = np.random.default_rng(1)
        values = draw.normal(0.1, 1.0, 300)
        means = values[draw.integers(0, 300, (20_000, 300))].mean(1)
        found = paired_bootstrap([values])
        assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)
        assert found == paired_bootstrap([values])

    def test_groups_are_drawn_whole(self) -> None:
        """As many resamples of groups of 1 to 5 items, drawn one by one, have the same interval."""
        draw = np.random.default_rng(2)
        sizes = draw.integers(1, 6, 200)
        of = np.repeat(np.arange(200), sizes)
        values = np.repeat(draw.normal(0.1, 1.0, 200), sizes) + draw.normal(0, 0.1, len(of))
        order = draw.permutation(len(of))
        parts = [values[of == group] for group in range(200)]
        drawn = ([parts[i] for i in draw.integers(0, 200, 200)] for _ in range(5000))
        means = [np.concatenate(found).mean() for found in drawn]
        found = paired_bootstrap([values[order]], [of[order]])
        assert found.mean == pytest.approx(values.mean())
        assert found[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
        alone = paired_bootstrap([values])
        assert found.high - found.low > 1.5 * (alone.high - alone.low)

    def test_groups_are_numbered_in_the_order_of_the_items(self) -> None:
        first = {"vqa": {"c": 1.0, "a": 0.0, "b": 1.0}}
        (numbers,) = grouped(first, {"vqa": {"a": "x", "b": "y", "c": "y"}})
        assert numbers is not None and numbers.tolist() == [0, 1, 0]
        assert grouped(first, None) == [None]

    def test_tasks_count_alike_and_are_drawn_apart(self) -> None:
        small, large = np.array([1.0, 1.0]), np.array([0.0, 1.0] * 200)
        found = paired_bootstrap([small, large])
        alone = paired_bootstrap([large])
        assert found.mean == 0.75
        assert found.high - found.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)

    def test_no_difference_at_all(self) -> None:
        assert paired_bootstrap([np.zeros(5)]) == (0.0, 0.0, 0.0)


def test_unequal_budgets() -> None:
    base = [{"trainable": 12_288, "steps": 10, "batch": {"vqa": 4}}]
    arm = [{"trainable": 12_345, "steps": 10, "batch": {"vqa": 8}}]
    assert unequal(arm, base) == [
        "other number of parameters: 12,345 against 12,288",
        "other rows in a step: vqa 8 against vqa 4",
    ]
    assert unequal(base, base) == unequal([], base) == unequal(base, []) == []
