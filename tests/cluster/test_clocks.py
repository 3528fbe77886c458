"""A process that was itself delayed does not blame others for the delay."""

from cluster.clocks import HeldUp


def test_only_what_is_longer_than_a_nap_was_slept_and_is_told_once():
    held_up = HeldUp(1.0, 10.0)
    assert [held_up.since_last_look(now) for now in (10.5, 11.5, 15.0, 15.0, 16.0)] == [0, 0, 2.5, 0, 0]
