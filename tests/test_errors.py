"""What is told of an error."""

import pytest

from sweep.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (OSError("\n\n a\nb"), "a")],
)
def test_first_line_is_the_first_that_says_something(error: Exception, line: str) -> None:
    assert first_line(error) == line
