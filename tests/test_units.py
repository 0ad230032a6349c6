import pytest

from cptool.units import duration


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0 us"),
        (4.7e-5, "47 us"),
        (9.996e-4, "1 ms"),  # not 1e+03 us
        (1.8234e-3, "1.82 ms"),
        (-0.0043, "-4.3 ms"),
        (0.9996, "1.00 s"),
        (12.0191, "12.02 s"),
        (1205.3, "1,205.30 s"),
    ],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown
