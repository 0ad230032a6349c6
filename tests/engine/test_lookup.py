"""What was said before is found again, the longest match first, the latest of equal ones."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.engine.drafts.lookup import LONGEST, Lookup, LookupDrafts, Match, kind_of
from cptool.engine.drafts.pace import Budget, StepTime, worthwhile


def plainly(text: list[int], most: int) -> Match | None:
    """The same, by comparing with every earlier place."""
    best, longest = 0, 1
    last = len(text) - 1
    for end in range(last - 1, 0, -1):
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[last - length]:
            length += 1
        if length > longest:
            best, longest = end, length
    if longest < 2:
        return None
    tokens = text[best + 1 :]
    while len(tokens) < most:
        tokens.append(tokens[len(tokens) - (last - best)])
    return Match(longest, tuple(tokens[:most]))


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 9),
    st.booleans(),
)
def test_finds_what_a_plain_search_finds(prompt, answer, most, is_sorted):
    """A prompt in the table or sorted, and an answer that grows."""
    lookup = Lookup(prompt)
    if is_sorted and len(prompt) > 2:
        lookup._sort()
    for at in range(len(answer) + 1):
        said = prompt + answer[:at]
        assert lookup.length == len(said)
        assert lookup.find(most) == (plainly(said, most) if len(said) > 2 else None)
        if at < len(answer):
            lookup.push(answer[at])


def test_a_long_prompt_is_sorted():
    said = [i * i % 7919 for i in range(5000)]
    lookup = Lookup(said)
    for token in said[1200:1210]:
        lookup.push(token)
    assert lookup.find(6) == Match(10, tuple(said[1210:1216]))


def test_a_loop_goes_on():
    assert Lookup([9, 1, 2, 3, 1, 2, 3, 1, 2]).find(8) == Match(5, (3, 1, 2, 3, 1, 2, 3, 1))


def test_nothing_to_find():
    for said in ([], [1], [1, 1], [1, 2, 3, 4]):
        assert Lookup(said).find(4) is None
    assert Lookup([1, 2, 3, 1, 2]).find(0) is None


def cost(slope: float) -> StepTime:
    times = StepTime()
    for _ in range(60):
        for rows in (1, 2, 5, 8):
            times.record(rows, 0.03 * (1 + slope * (rows - 1)))
    return times


def test_the_time_of_a_step_is_learned():
    for slope in (0.0, 0.05, 0.4, 1.0):
        assert abs(cost(slope).slope - slope) < 0.02
        assert abs(cost(slope).one / 0.03 - 1) < 0.1


def test_one_disturbed_step_changes_little():
    times = cost(0.1)
    times.record(4, 30.0)
    assert times.slope < 0.2 and times.one < 0.04


def counted(chances, most, slope, *, rows=1, room=15):
    return worthwhile(chances, most, Budget(rows, cost(slope), room=room))


def test_disturbed_steps_do_not_end_drafts():
    times = cost(0.1)
    for _ in range(20):
        times.record(2, 1.0)
    assert times.slope > 0.6
    for _ in range(100):
        times.record(1, times.one)
    assert times.slope < 0.3


def test_drafts_are_as_long_as_they_pay():
    assert counted({0: 0.95}, {0: 9}, 0.02) == {0: 9}
    assert counted({0: 0.5}, {0: 9}, 0.9) == {0: 0}
    assert 1 <= counted({0: 0.8}, {0: 9}, 0.3)[0] <= 3
    assert counted({0: 0.95}, {0: 9}, 0.02, room=4) == {0: 4}
    assert counted({}, {}, 0.02, rows=3, room=4) == {}


def test_what_is_likelier_is_drafted_first():
    counts = counted({0: 0.95, 4: 0.3, 7: 0.9}, {0: 9, 4: 9, 7: 2}, 0.05, rows=3, room=6)
    assert counts == {0: 4, 4: 0, 7: 2}


def test_chances_follow_what_came_true():
    seen = LookupDrafts([], []).acceptance
    short, long = kind_of(2), kind_of(LONGEST)
    assert seen.chance(short) < seen.chance(long)
    first = seen.chance(short)
    for _ in range(40):
        seen.record(short, true=True)
        seen.record(long, true=False)
    assert seen.chance(short) > 0.9 and seen.chance(long) < 0.15
    for _ in range(400):
        seen.relax()
    assert abs(seen.chance(short) - first) < 0.01
