"""Sizes and durations as text."""

from __future__ import annotations

import pytest

from moe_rco.units import exact_size, format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("1", 1),
        ("7B", 7),
        ("12MiB", 12 * 2**20),
        ("12 MiB", 12 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("20GB", 20 * 10**9),
        ("3kB", 3000),
        ("1TiB", 2**40),
        ("1.0000001kB", 1000),
    ],
)
def test_parse(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        0,
        -1,
        True,
        False,
        1.5,
        None,
        "",
        "MiB",
        "-5MiB",
        "0MiB",
        "0.1B",
        "5Mib",
        "5 M",
        "nan",
        "1e3",
        "1_000",
        "٣MiB",
    ],
)
def test_parse_refuses(text: object) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (12 * 2**20, "12.00 MiB"),
        (54 * 2**30, "54.00 GiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.96, "1 min 00 s"),
        (60, "1 min 00 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1B"),
        (5000, "5KB"),
        (5001, "5001B"),
        (4097, "4097B"),
        (12 * 2**20, "12MiB"),
        (3 * 2**29, "1.5GiB"),
        (20 * 10**9, "20GB"),
        (2**60, "1048576TiB"),
    ],
)
def test_exact(size: int, text: str) -> None:
    assert exact_size(size) == text
    assert parse_size(text) == size
