"""Listings that go on after a key, on servers that honour it, ignore it, or list in another order."""

from __future__ import annotations

import itertools
import random

import pytest

from batchjob.errors import InvalidJob
from batchjob.storage.listing_filter import ListingFilter


def by_folders(key: str) -> str:
    return key.replace("/", "\0")


def go_on(keys: list[str], after: str | None, page_size: int = 3) -> list[str]:
    """Return the keys that are left of a listing in pages."""
    new_keys = ListingFilter[str](after, str)
    pages = [keys[at : at + page_size] for at in range(0, len(keys), page_size)]
    return [key for page in pages for key in new_keys.feed(page)] + new_keys.finish()


KEYS = ["a", "a-b", "a-c/x", "a.d", "a/x", "a/y/z", "a0", "b", "b-", "b/x", "é", "😀/x"]


@pytest.mark.parametrize("order", [str, by_folders])
@pytest.mark.parametrize("honours", [True, False])
def test_rest_of_a_listing_comes_once_in_both_orders(order: type[str], honours: bool) -> None:
    keys = sorted(KEYS, key=order)
    for at, after in enumerate(keys):
        sent = keys[at + 1 :] if honours else keys
        assert go_on(sent, after) == keys[at + 1 :], after
    assert go_on(keys, None) == keys


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_are_listed_once(seed: int) -> None:
    chance = random.Random(seed)
    names = {"".join(chance.choices("ab-/.", k=chance.randint(1, 6))) for _ in range(60)}
    for in_folders, honours in itertools.product((True, False), (True, False)):
        keys = sorted(names, key=by_folders if in_folders else None)
        after = chance.choice(keys)
        rest = keys[keys.index(after) + 1 :]
        assert go_on(rest if honours else keys, after) == rest


def test_server_that_sends_the_key_itself_again_is_filtered() -> None:
    assert go_on(["b", "b-", "c"], "b") == ["b-", "c"]


def test_many_keys_behind_a_folder_name_are_not_held_back() -> None:
    new_keys = ListingFilter[str]("a-b", str)
    assert len(new_keys.feed([f"a/{number:05}" for number in range(5000)])) == 5000


def test_listing_without_an_order_is_refused() -> None:
    with pytest.raises(InvalidJob, match="manifest"):
        go_on(["c", "a", "b"], "b")
