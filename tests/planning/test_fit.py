"""The knapsack that gives each item its format."""

from __future__ import annotations

from itertools import product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oomproof.planning.fit import Choice, Item, choose, no_worse_than_uniform


def item(name: str, *choices: tuple[int, float]) -> Item:
    found = (Choice(format=f"{size}", size_bytes=size, damage=damage) for size, damage in choices)
    return Item(name=name, choices=tuple(found))


def by_brute_force(items: list[Item], budget: int) -> float:
    return min(
        (
            sum(choice.damage for choice in choices)
            for choices in product(*(one.choices for one in items))
            if sum(choice.size_bytes for choice in choices) <= budget
        ),
        default=inf,
    )


ITEMS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 60), st.floats(0, 10).map(lambda d: round(d, 3))),
        min_size=1,
        max_size=4,
    ).map(lambda choices: item("", *choices)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(items=ITEMS, budget=st.integers(0, 300))
def test_no_choice_is_better_by_more_than_one_step(items: list[Item], budget: int) -> None:
    found, best = choose(items, budget), by_brute_force(items, budget)
    if found is None:
        assert best == inf
        return
    assert found.size_bytes <= budget
    assert found.bound <= best + 1e-9
    largest_step = max(
        max(c.damage for c in one.choices) - min(c.damage for c in one.choices) for one in items
    )
    assert found.damage <= best + largest_step + 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_or_near_it_for_what_models_have(seed: int) -> None:
    # Four formats; errors that fall by about four for each bit; two sizes of projections.
    items = [
        item(
            str(number),
            *(
                (size * bits // 8 + 7 * number, (1 + (number * 7 + seed) % 5) * 4.0 ** -(bits - 4))
                for bits in (4, 5, 8, 16)
            ),
        )
        for number, size in enumerate((4000, 2600, 10400, 5200) * 2)
    ]
    least = sum(min(c.size_bytes for c in one.choices) for one in items)
    most = sum(max(c.size_bytes for c in one.choices) for one in items)
    budget = least + (most - least) * (seed + 1) // 41
    found = choose(items, budget)
    assert found is not None
    best = by_brute_force(items, budget)
    assert found.damage <= best * 1.05 + 1e-9
    assert budget - found.size_bytes <= max(0.05 * (budget - least), 1500) or found.damage == best


def test_nothing_is_chosen_where_the_smallest_do_not_fit() -> None:
    assert choose([item("a", (10, 1.0), (20, 0.5)), item("b", (5, 1.0))], 14) is None


def test_all_get_their_best_where_there_is_room() -> None:
    found = choose([item("a", (10, 1.0), (20, 0.5)), item("b", (5, 1.0), (80, 0.0))], 100)
    assert found is not None
    assert [choice.size_bytes for choice in found.chosen] == [20, 80]
    assert found.damage == found.bound == 0.5


def test_a_larger_format_that_is_no_better_is_never_chosen() -> None:
    found = choose([item("a", (10, 1.0), (20, 1.0), (30, 2.0))], 100)
    assert found is not None
    assert found.size_bytes == 10


def test_a_format_off_the_hull_takes_what_is_left() -> None:
    found = choose([item("a", (10, 1.0), (19, 0.9), (20, 0.1))], 19)
    assert found is not None
    assert found.size_bytes == 19


def test_against_one_format_for_all_no_item_loses_where_that_is_asked_for() -> None:
    def item(name: str, weight: float) -> Item:
        sizes = {"low": (4, 8.0), "middle": (6, 3.0), "high": (16, 0.1)}
        choices = [
            Choice(format=one, size_bytes=size, damage=weight * damage)
            for one, (size, damage) in sizes.items()
        ]
        return Item(name=name, choices=tuple(choices))

    items = [item("a", 0.01), item("b", 1.0), item("c", 1.0)]
    free = choose(items, 26)
    assert free is not None
    assert free.chosen[0].format == "low"
    assert sorted(one.format for one in free.chosen[1:]) == ["high", "middle"]
    kept = no_worse_than_uniform(items, 26)
    assert [[one.format for one in item.choices] for item in kept] == [["middle", "high"]] * 3
    assert no_worse_than_uniform(items, 17) == items
    assert no_worse_than_uniform(items, 11) == items
    assert no_worse_than_uniform([], 0) == []
