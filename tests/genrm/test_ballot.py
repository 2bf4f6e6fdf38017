"""What a majority of critiques says, against counting all votes; and that no vote is asked for that decides nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.genrm.ballot import Ballot

VOTES = st.sampled_from([1, 3, 5, 7])


@given(VOTES, st.lists(st.sampled_from([None, -1, -1, 0, 1, 2]), min_size=7, max_size=7))
def test_it_ends_as_soon_as_it_is_certain_and_says_what_all_votes_would(k: int, pile: list[int | None]) -> None:
    ballot: Ballot[int] = Ballot(k)
    used = 0
    while wanted := ballot.wanted():
        assert used + wanted <= k
        for index in pile[used : used + wanted]:
            if index is None:
                ballot.fail()
            else:
                ballot.add(index, used)
            used += 1
    sound = sum(index == -1 for index in pile[:k])
    flawed = sum(index is not None and index != -1 for index in pile[:k])
    decision = ballot.decision()
    if decision is None:
        assert max(sound, flawed) <= k // 2
    else:
        assert (decision[0] == -1, decision[0] != -1) == (sound > k // 2, flawed > k // 2)
        assert ballot.agreement() > 0.5
        cast = Counter(index for index in pile[:used] if index not in (None, -1))
        if decision[0] != -1:
            assert cast[decision[0]] == max(cast.values())
            assert pile[decision[1]] == decision[0], "the critique that is kept names the index"


def test_an_agreeing_majority_is_all_that_is_asked() -> None:
    ballot: Ballot[str] = Ballot(5)
    assert ballot.wanted() == 3
    for vote in "abc":
        ballot.add(-1, vote)
    assert (ballot.wanted(), ballot.decision(), ballot.agreement()) == (0, (-1, "a"), 1.0)


def test_flawed_votes_that_differ_on_the_paragraph_agree_that_there_is_an_error() -> None:
    ballot: Ballot[str] = Ballot(5)
    for index, vote in ((4, "a"), (2, "b"), (-1, "c"), (2, "d")):
        ballot.add(index, vote)
    assert ballot.decision() == (2, "b")
    assert ballot.agreement() == pytest.approx(0.75)
    tie: Ballot[str] = Ballot(3)
    tie.add(4, "a")
    tie.add(2, "b")
    assert tie.decision() == (2, "b"), "of equally frequent paragraphs the earliest"


def test_failed_votes_are_not_replaced() -> None:
    ballot: Ballot[str] = Ballot(3)
    ballot.fail()
    assert ballot.wanted() == 2
    ballot.fail()
    assert (ballot.wanted(), ballot.decision()) == (0, None)
