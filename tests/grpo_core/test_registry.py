"""A registry is the one list of its entries."""

import pytest

from grpo_core.registry import Registry


def test_entries_are_found_by_name_in_the_order_of_registration():
    registry: Registry[object] = Registry("shape")

    @registry.register("square")
    def square():
        """Four equal
        sides.

        And more."""

    registry.add("line", 3)
    assert list(registry) == ["square", "line"]
    assert (registry["square"], registry["line"], len(registry)) == (square, 3, 2)
    assert "square" in registry
    assert "circle" not in registry
    assert registry.doc("square") == "Four equal sides."


def test_an_unknown_name_and_one_that_is_taken_are_refused():
    registry: Registry[int] = Registry("shape")
    registry.add("square", 4)
    registry.add("line", 1)
    with pytest.raises(ValueError, match=r"^unknown shape 'sqare': choose one of square, line$"):
        registry["sqare"]
    with pytest.raises(ValueError, match="shape 'line' is registered already"):
        registry.add("line", 2)
