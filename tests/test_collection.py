"""What `pytest` runs when nobody says."""

from __future__ import annotations

from conftest import LEFT_OUT


def test_every_file_has_tests_that_are_not_slow(request) -> None:
    quick = {item.path for item in request.session.items}
    slow = {item.path for item in request.config.stash[LEFT_OUT] if item.get_closest_marker("slow")}
    assert not slow - quick
