"""The first cases of each target, the same in every run. `make fuzz` tries others, for as long as it is told to."""

import pytest
from hypothesis import given

from tests.fuzz import NAMES, quietly, target


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_for_the_first_cases(name: str) -> None:
    module = target(name)
    with module.checking() as check:

        @quietly(max_examples=module.EXAMPLES, derandomize=True)
        @given(module.CASES)
        def each(case: object) -> None:
            check(case)

        each()
