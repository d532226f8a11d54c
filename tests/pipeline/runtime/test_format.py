"""Figures as text."""

from pipeline.runtime.format import are, binary_size, clock_time, count_of, decimal_size, rough_time, short_number


def test_sizes_are_readable() -> None:
    assert [binary_size(n) for n in (0, 1023, 1024, 5 << 30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]
    assert [decimal_size(n) for n in (12, 20_000, 1_239_000)] == ["12 bytes", "20 kB", "1.239 MB"]
    assert [short_number(n) for n in (3e-5, 0.25, 20_000, -1.5e6)] == ["3e-05", "0.25", "20k", "-1.5M"]


def test_times_are_readable() -> None:
    assert [rough_time(seconds) for seconds in (71, 720, 12_600, 181_440)] == ["71 s", "12 min", "3.5 h", "2.1 d"]
    assert [clock_time(seconds, short=True) for seconds in (0.4, 61, 3661.2)] == ["0:00", "1:01", "1:01:01"]
    assert [clock_time(seconds) for seconds in (59.6, 3661.2, 4e6)] == ["0:01:00", "1:01:01", "1,111:06:40"]
    assert rough_time(60, longest=7200) == "0.0167 h"


def test_one_thing_is_counted_in_the_singular() -> None:
    assert [count_of(n, "row") for n in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1200 rows"]
    assert count_of(1200, "document", ",") == "1,200 documents"
    assert [are(n) for n in (0, 1, 2)] == ["are", "is", "are"]
    assert decimal_size(1) == "1 byte"
