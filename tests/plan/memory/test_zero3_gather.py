"""What stage 3 gathers, by hand. Against DeepSpeed itself: the peaks of test_rank_memory.py."""

from train.plan.memory.zero3_gather import GatheredBytes, SharedWeight, follow_change, follow_gathers


def _dense(elements: int) -> SharedWeight:
    return SharedWeight(elements, "dense", 2, 1)


def test_weights_that_come_alone_take_their_size_and_go_after_their_unit():
    units = [[_dense(10)], [_dense(10)], [_dense(11)]]
    assert follow_gathers(units, [(0, True), (1, True), (2, True)], 10) == [
        GatheredBytes(20, 20),
        GatheredBytes(22, 22),
        GatheredBytes(12, 12),
    ]


def test_weights_that_come_together_are_copied_out_of_a_buffer():
    """Both come for the first unit, so the buffer is gone when it works; the third, shared by nobody, takes nothing."""
    units = [[_dense(6), _dense(3), SharedWeight(50, "experts", 1, 1)]]
    assert follow_gathers(units, [(0, True)], 59) == [GatheredBytes(9 + 10, 9)]


def test_a_buffer_stays_until_all_units_of_it_have_waited():
    units = [[_dense(20)], [_dense(8)], [_dense(8)]]
    first, second, third = follow_gathers(units, [(0, True), (1, True), (2, True)], 20)
    assert first == GatheredBytes(20 + 16, 20 + 16), "the two others are on their way in one buffer"
    assert second == GatheredBytes(16 + 16, 16 + 16) and third == GatheredBytes(8 + 16, 8)


def test_the_most_is_that_of_the_worst_order_of_waits():
    """One weight of the last unit came with the unit before, in 24 bytes that it alone holds; the others come in 16, and are copied first."""
    units = [[_dense(20)], [_dense(8), _dense(8)], [_dense(8), _dense(8), _dense(8)]]
    last = follow_gathers(units, [(0, True), (1, True), (2, True)], 20)[2]
    assert last == GatheredBytes(fetching=24 + 8 + 16 + 16, working=24)


def test_a_unit_whose_turn_it_is_not_finds_nothing_but_its_own():
    units = [[_dense(20)], [_dense(8), _dense(8)], [_dense(10)]]
    found = follow_change(units, [(0, True), (1, True), (2, True)], 20, number=1, unit=2)
    assert found == GatheredBytes(fetching=26 + 26, working=10), "those on their way arrive before they go"


def test_a_weight_that_is_counted_on_again_stays():
    """The head's backward follows its forward at once."""
    units = [[_dense(10)], [_dense(10)]]
    visits = [(0, True), (1, True), (1, True), (0, True)]
    assert [held.working for held in follow_gathers(units, visits, 10)] == [20, 20, 20, 10]
