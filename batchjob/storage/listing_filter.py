"""Filter of a listing that goes on after a key: a server may ignore "start after", or count it in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from batchjob.errors import InvalidJob

__all__ = ["ListingFilter"]

T = TypeVar("T")

_MAX_HELD = 1000  # objects that are held back until the server has shown its order


class ListingFilter(Generic[T]):
    """Drops the objects up to the key that a listing goes on from.

    A server lists keys in the order of their bytes, or folder by folder, as SeaweedFS does: there `a/x` comes before
    `a-b`. Two neighbours may show which it is. For example, a listing goes on after `a/x`, and the server sends:

    * `b`: after `a/x` in both orders, so it is new.
    * `a`: before `a/x` in both orders: the server ignores "start after", and `a` is dropped.
    * `a-b`: new only if the server lists by folders. It is held back: if `a/x` follows, the order is that of bytes, and
      `a-b` was listed before; if the listing ends or goes on with `b`, the server has begun after `a/x`, so it is new.

    Args:
        after: Key that the listing goes on from; None keeps every object.
        key_of: Returns the key of an object.
    """

    def __init__(self, after: str | None, key_of: Callable[[T], str]) -> None:
        self._after, self._key_of = after, key_of
        self._previous: str | None = None
        self._by_folders: bool | None = None  # None while the order is unknown
        self._held: list[T] = []
        self._dropped = self._kept = False

    def feed(self, objects: Iterable[T]) -> list[T]:
        """Return the new ones of the next objects, and of those that were held back.

        Raises:
            InvalidJob: The listing has no order, so that it cannot go on from a key.
        """
        after = self._after
        if after is None:
            return list(objects)
        new: list[T] = []
        for one in objects:
            key = self._key_of(one)
            self._compare_neighbours(key)
            in_bytes, in_folders = key > after, _folder_order(key) > _folder_order(after)
            if in_bytes != in_folders and self._by_folders is None:
                self._held.append(one)
                if len(self._held) < _MAX_HELD:
                    continue
                self._by_folders = self._guess_order()
                new += self._release()
                continue
            new += self._release()
            if in_folders if self._by_folders else in_bytes:
                new.append(one)
                self._kept = True
            elif self._kept or new:
                raise InvalidJob(
                    f"the store lists {key!r} behind later names, so a listing cannot go on after {after!r}; "
                    "name the images in a manifest"
                )
            else:
                self._dropped = True
        return new

    def finish(self) -> list[T]:
        """Return the new objects of those that were held back to the end."""
        return self._release()

    def _compare_neighbours(self, key: str) -> None:
        previous, self._previous = self._previous, key
        if previous is not None and self._by_folders is None:
            in_bytes, in_folders = key > previous, _folder_order(key) > _folder_order(previous)
            self._by_folders = in_folders if in_bytes != in_folders else None

    def _guess_order(self) -> bool:
        # Without an object that was dropped, the server has begun after the key in its own order, so the held ones are
        # new. With one, it ignores "start after", and most servers list in the order of bytes.
        return not self._dropped and not _is_after(self._key_of(self._held[0]), self._after or "", by_folders=False)

    def _release(self) -> list[T]:
        if not self._held:
            return []
        by_folders = self._guess_order() if self._by_folders is None else self._by_folders
        held, self._held = self._held, []
        new = [one for one in held if _is_after(self._key_of(one), self._after or "", by_folders)]
        self._dropped, self._kept = self._dropped or len(new) < len(held), self._kept or bool(new)
        return new


def _is_after(key: str, after: str, by_folders: bool) -> bool:
    return _folder_order(key) > _folder_order(after) if by_folders else key > after


def _folder_order(key: str) -> str:
    """Return a text that sorts as a listing by folders does: `/` comes before every other character."""
    return key.replace("/", "\0")
