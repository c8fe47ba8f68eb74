"""Rule 6: which entries of a log partition count."""

from hypothesis import given
from hypothesis import strategies as st

from tidegate.eventlog.validity import NO_EPOCH, EpochTracker


def test_nothing_is_valid_before_the_first_announcement() -> None:
    tracker = EpochTracker()

    assert not tracker.is_valid(0)
    assert not tracker.is_valid(5)


def test_an_owner_is_valid_from_its_announcement_on_and_its_predecessor_is_not() -> None:
    tracker = EpochTracker()

    tracker.announced(3, NO_EPOCH)
    assert tracker.is_valid(3)
    tracker.announced(7, NO_EPOCH)

    assert tracker.is_valid(7)
    assert not tracker.is_valid(3)


def test_a_zombie_that_repeats_its_announcement_does_not_come_back() -> None:
    tracker = EpochTracker()
    tracker.announced(3, NO_EPOCH)
    tracker.announced(7, NO_EPOCH)

    tracker.announced(9, 3)

    assert tracker.is_valid(7)
    assert not tracker.is_valid(3)


def test_a_repeated_announcement_tells_a_reader_who_starts_in_the_middle() -> None:
    tracker = EpochTracker()

    tracker.announced(1200, 7)

    assert tracker.is_valid(7)
    assert not tracker.is_valid(1200)


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[bool, int]]:
    """Return logs as (is an announcement, its epoch): first announcements, repeats and entries of owners of then."""
    log: list[tuple[bool, int]] = [(True, NO_EPOCH)]
    epochs = [0]
    for kind in draw(st.lists(st.sampled_from(["announce", "repeat", "entry", "entry"]), max_size=40)):
        if kind == "announce":
            epochs.append(len(log))
            log.append((True, NO_EPOCH))
        else:
            log.append((kind == "repeat", draw(st.sampled_from(epochs))))
    return log


def verdicts(log: list[tuple[bool, int]], start: int) -> dict[int, bool]:
    tracker, judged = EpochTracker(), {}
    for offset, (is_announcement, epoch) in enumerate(log):
        if offset < start:
            continue
        if is_announcement:
            tracker.announced(offset, epoch)
        else:
            judged[offset] = tracker.is_valid(epoch)
    return judged


@given(logs())
def test_an_entry_is_valid_exactly_if_nobody_had_announced_after_its_owner(log: list[tuple[bool, int]]) -> None:
    announced = [offset for offset, (is_announcement, epoch) in enumerate(log) if is_announcement and epoch == NO_EPOCH]

    for offset, is_valid in verdicts(log, 0).items():
        assert is_valid == (log[offset][1] == max(a for a in announced if a < offset))


@given(logs(), st.data())
def test_a_reader_who_starts_at_an_announcement_in_force_judges_as_one_who_read_everything(
    log: list[tuple[bool, int]], data: st.DataObject
) -> None:
    highest, in_force = NO_EPOCH, []
    for offset, (is_announcement, epoch) in enumerate(log):
        if is_announcement:
            named = offset if epoch == NO_EPOCH else epoch
            if named >= highest:
                in_force.append(offset)
            highest = max(highest, named)
    start = data.draw(st.sampled_from(in_force))

    everything = verdicts(log, 0)
    assert verdicts(log, start) == {offset: everything[offset] for offset in everything if offset >= start}
