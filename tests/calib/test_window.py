"""The window gives what its loader gives, never holds more than it may, and loads ahead what was announced."""

from __future__ import annotations

import random
import subprocess
import sys
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


def test_memory_that_ends_in_the_thread_is_met_by_who_asks_and_nobody_waits_for_ever() -> None:
    """Also where it is not the loading that fails."""
    sizes = iter([MemoryError(), 1, 1, 1, 1])

    def size(_: int) -> int:
        found = next(sizes)
        if isinstance(found, MemoryError):
            raise found
        return found

    window: Window[int, int] = Window(Source(0.05).load, size, 3)
    window.expect([1, 2])
    time.sleep(0.01)
    asked = threading.Thread(target=window.get, args=(1,), daemon=True)
    asked.start()
    asked.join(5)
    assert not asked.is_alive()


ENDS = """\
import sys, time, torch
from moe_rco.calib.window import Window
def load(key):
    for _ in range(200): torch.ones(1 << 16).sum()
    return key
window = Window(load, lambda _: 1, 1000)
window.expect(range(100000))
time.sleep(0.05)
sys.exit(3)
"""


def test_the_process_ends_in_order_while_things_are_loaded() -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", ENDS], capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stderr) == (3, "")


def test_close_waits_for_what_is_being_loaded() -> None:
    source = Source(0.1)
    window: Window[int, int] = Window(source.load, lambda _: 1, 100)
    window.expect(range(100))
    time.sleep(0.02)
    window.close()
    assert source.loaded == [0]
    time.sleep(0.15)
    assert source.loaded == [0]
    assert window.get(5) == 50
