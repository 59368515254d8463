"""The window gives what its loader gives, never holds more than it may, and loads ahead what was announced."""

from __future__ import annotations

import random
import threading
import time

import pytest

from moe_rco.calib.window import Window


class Source:
    """Loads numbers; counts, and knows how much the window could be holding."""

    def __init__(self, pause: float = 0.0) -> None:
        self.loaded: list[int] = []
        self.threads: set[str] = set()
        self._pause = pause

    def load(self, key: int) -> int:
        time.sleep(self._pause)
        self.loaded.append(key)
        self.threads.add(threading.current_thread().name)
        return key * 10


def held(window: Window[int, int]) -> int:
    return len(window._held)


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_values_are_right_and_no_more_are_held_than_fit(capacity: int, seed: int) -> None:
    rng, source = random.Random(seed), Source()
    window: Window[int, int] = Window(source.load, lambda _: 1, capacity)
    for _ in range(60):
        window.expect(rng.choices(range(12), k=rng.randrange(6)))
        for key in rng.choices(range(12), k=rng.randrange(6)):
            assert window.get(key) == key * 10
            assert held(window) <= capacity + 1


def test_what_is_expected_is_loaded_before_it_is_asked_for() -> None:
    source = Source()
    window: Window[int, int] = Window(source.load, lambda _: 1, 3)
    window.expect([1, 2, 3, 4])
    deadline = time.monotonic() + 10
    while len(source.loaded) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert source.loaded == [1, 2, 3]  # 4 has to wait for room
    assert [window.get(key) for key in (1, 2, 3, 4)] == [10, 20, 30, 40]
    assert sorted(source.loaded) == [1, 2, 3, 4]
    assert "prefetch" in source.threads


def test_everything_fits_and_is_loaded_once() -> None:
    source = Source()
    window: Window[int, int] = Window(source.load, lambda _: 1, 100)
    for _ in range(5):
        window.expect(range(20))
        assert [window.get(key) for key in range(20)] == [10 * key for key in range(20)]
    assert sorted(source.loaded) == list(range(20))


def test_what_is_being_loaded_is_waited_for() -> None:
    source = Source(pause=0.05)
    window: Window[int, int] = Window(source.load, lambda _: 1, 10)
    window.expect([7])
    time.sleep(0.02)
    assert window.get(7) == 70
    assert source.loaded == [7]


def test_errors_are_raised_where_the_value_is_asked_for() -> None:
    def load(key: int) -> int:
        if key == 2:
            raise OSError("gone")
        return key

    window: Window[int, int] = Window(load, lambda _: 1, 10)
    window.expect([1, 2, 3])
    assert window.get(1) == 1
    with pytest.raises(OSError, match="gone"):
        window.get(2)
    assert window.get(3) == 3


def test_no_thread_stays_behind() -> None:
    window: Window[int, int] = Window(lambda key: key, lambda _: 1, 10)
    window.expect(range(5))
    assert [window.get(key) for key in range(5)] == [*range(5)]
    deadline = time.monotonic() + 10
    while window._thread is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert window._thread is None


def test_what_was_let_go_is_held_no_more_and_comes_back_when_asked_for() -> None:
    source = Source()
    window: Window[int, int] = Window(source.load, lambda _: 1, 10)
    window.expect(range(5))
    assert window.get(4) == 40
    window.clear()
    deadline = time.monotonic() + 10
    while window._thread is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert held(window) == 0
    assert window.get(2) == 20
    assert source.loaded[-1] == 2
