import pytest

from cptool.units import byte_rate, duration, flop_rate, percent, size, some, three, token_rate


@pytest.mark.parametrize(
    "seconds, shown",
    [
        (0, "0 us"),
        (4.7e-5, "47 us"),
        (9.996e-4, "1 ms"),  # not 1e+03 us
        (1.8234e-3, "1.82 ms"),
        (0.0877, "87.7 ms"),
        (-0.0043, "-4.3 ms"),
        (0.9996, "1 s"),
        (12.0191, "12 s"),
        (12.149, "12.1 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),  # not 100 s
        (119.7, "2 min"),
        (1205.3, "20 min 5 s"),
        (3599.8, "1 h"),  # not 60 min
        (7620, "2 h 7 min"),
        (86399, "1 d"),
        (3 * 86400 + 15 * 3600, "3 d 15 h"),
        (4000 * 86400, "4,000 d"),
        (-1205.3, "-20 min 5 s"),
    ],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (0.152, "0.152"),
        (3.14159, "3.14"),
        (99.96, "100"),
        (403.4, "403"),
        (1205.3, "1,210"),
        (123456789.0, "123,000,000"),
        (1.234e-7, "1.23e-07"),
    ],
)
def test_three_significant_digits(value, shown):
    assert three(value) == shown


def test_sizes_and_rates_have_the_unit_that_fits():
    assert [size(n) for n in (700, 1024, 1.5e6, 999.9e6)] == ["700 B", "1.02 kB", "1.5 MB", "1 GB"]
    assert (size(2e12), size(12345e12)) == ("2 TB", "12,300 TB")
    assert byte_rate(7.39e9) == "7.39 GB/s"
    assert [flop_rate(x) for x in (4e10, 1.5217e12, 2.3e15)] == [
        "40 GFLOP/s",
        "1.52 TFLOP/s",
        "2.3 PFLOP/s",
    ]
    assert (token_rate(403.2), token_rate(1.5), token_rate(12345)) == (
        "403 tokens/s",
        "1.5 tokens/s",
        "12,300 tokens/s",
    )


def test_fractions():
    shown = [percent(x) for x in (None, 0, 0.004, 0.634, 1.5, 9.999, 33.62)]
    assert shown == ["", "0%", "0.4%", "63%", "150%", "10 times", "33.6 times"]


def test_counts():
    assert (some(1, "rank"), some(2000, "token")) == ("1 rank", "2,000 tokens")
