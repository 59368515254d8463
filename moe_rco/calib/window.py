"""Loads things ahead of need in a background thread, and holds as many as fit."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
_RUNNING: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread in the middle of torch's work when Python ends would bring the process down, whatever its exit code was to be."""
    for window in list(_RUNNING):
        window.close()


class Window(Generic[Key, Value]):
    """Values by key, made by `load`; as many are held as `size` says fit into `capacity` bytes, or one more.

    `expect` is a hint: a key that was not announced, or dropped again, is loaded when it is asked for. One thread asks.
    """

    def __init__(self, load: Callable[[Key], Value], size: Callable[[Value], int], capacity: int) -> None:
        self._load, self._size, self._capacity = load, size, capacity
        self._held: OrderedDict[Key, Value] = OrderedDict()
        self._bytes = 0
        self._ahead: deque[Key] = deque()
        self._wanted: set[Key] = set()
        self._loading: Key | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def expect(self, keys: Iterable[Key]) -> None:
        """Say what will be asked for next, in this order; what was said before is forgotten."""
        with self._changed:
            self._ahead = deque(keys)
            self._wanted = set(self._ahead)
            if self._ahead and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
                _RUNNING.add(self)
                self._thread.start()
            self._changed.notify_all()

    def clear(self) -> None:
        """Hold nothing, and expect nothing."""
        self.expect(())
        with self._changed:
            self._held.clear()
            self._bytes, self._loading = 0, None

    def close(self) -> None:
        """As `clear`, and wait until nothing is being loaded."""
        self.clear()
        thread = self._thread
        if thread is not None:
            thread.join()

    def get(self, key: Key) -> Value:
        """The value of a key. Raises what `load` raises."""
        with self._changed:
            self._wanted.discard(key)
            while self._loading == key:
                self._changed.wait()
            self._changed.notify_all()
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = self._load(key)
        with self._changed:
            self._make_room(self._size(value))
            if self._bytes + self._size(value) <= self._capacity:
                self._keep(key, value)
        return value

    def _run(self) -> None:
        try:
            self._load_ahead()
        except Exception:  # noqa: BLE001 (as memory that ends: who asks next will meet it, and must not wait for this thread)
            with self._changed:
                self._thread = self._loading = None
                self._changed.notify_all()

    def _load_ahead(self) -> None:
        while True:
            with self._changed:
                while (key := self._next()) is None:
                    if not self._ahead:  # nothing left to do: no thread stays behind
                        self._thread = None
                        return
                    self._changed.wait()
                self._loading = key
            try:
                value = self._load(key)
            except Exception:  # noqa: BLE001 (raised again where it is asked for)
                with self._changed:
                    self._loading = None
                    self._changed.notify_all()
                continue
            with self._changed:
                if self._loading == key:  # else it was let go meanwhile
                    self._loading = None
                    self._make_room(self._size(value))
                    self._keep(key, value)
                self._changed.notify_all()

    def _next(self) -> Key | None:
        """The next key to load, if there is room for more."""
        while self._ahead and (self._ahead[0] in self._held or self._ahead[0] not in self._wanted):
            self._ahead.popleft()
        if not self._ahead:
            return None
        self._make_room(0)
        return self._ahead.popleft() if self._bytes < self._capacity else None

    def _keep(self, key: Key, value: Value) -> None:
        if key not in self._held:
            self._held[key] = value
            self._bytes += self._size(value)

    def _make_room(self, size: int) -> None:
        """Drop what is not expected, the longest unused first."""
        for key in [k for k in self._held if k not in self._wanted]:
            if self._bytes + size <= self._capacity:
                return
            self._bytes -= self._size(self._held.pop(key))
