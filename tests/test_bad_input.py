"""Every wrong input ends with one clear line: the one that docs/reliability.md shows."""

from collections.abc import Iterator

import bad_input
import pytest
from bad_input import Place, documented, shown

CASES = documented()


def test_the_page_has_many_cases() -> None:
    assert len(CASES) >= 100


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with bad_input.place() as where:
        yield where


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_said_in_one_line(place: Place, case: str) -> None:
    command, line = CASES[case]
    status, said = place.run(command)
    assert status in (1, 2)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("clip-lightning: error: ")
    assert shown(place.plain(last)) == line
