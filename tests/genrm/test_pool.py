"""The pool's state machine: its invariants under any sequence of events, and each transition by hand."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.genrm.pool import FAILURES_UNTIL_DEAD, FIRST_PROBE_S, LAST_PROBE_S, Effect, ServerPool, State

URLS = ["a", "b", "c"]
UNUSABLE = (State.DEAD, State.WITHDRAWN, None)


def fail(pool: ServerPool, url: str, effect: Effect = Effect.FAILED, now: float = 0.0) -> State:
    pool.begin(url, 1, now)
    pool.end(url, 1, effect, now)
    return pool.servers[url].state


def test_healthy_suspect_dead_recovering_healthy() -> None:
    pool = ServerPool(["a"], 4)
    assert [fail(pool, "a", now=5.0) for _ in range(FAILURES_UNTIL_DEAD)] == [State.SUSPECT, State.SUSPECT, State.DEAD]
    assert pool.choose(set(), 5.0) is None
    assert pool.down_since() == 5.0
    assert not pool.probe_due("a", 5.0)
    assert pool.probe_due("a", 5.0 + FIRST_PROBE_S)
    pool.probed("a", True, 6.0)
    assert pool.servers["a"].state is State.RECOVERING
    assert pool.down_since() == 5.0, "listing models is not answering"
    assert pool.choose(set(), 6.0) == "a"
    pool.begin("a", 1, 0.0)
    assert pool.choose(set(), 6.0) is None, "one request at a time while it recovers"
    pool.end("a", 1, Effect.ANSWERED, 7.0)
    assert pool.servers["a"].state is State.HEALTHY
    assert pool.down_since() is None


def test_an_answer_clears_suspicion() -> None:
    pool = ServerPool(["a"], 4)
    for _ in range(10):
        assert fail(pool, "a") is State.SUSPECT
        assert fail(pool, "a", Effect.ANSWERED) is State.HEALTHY


def test_a_refused_connection_is_death_at_once() -> None:
    assert fail(ServerPool(["a"], 4), "a", Effect.GONE) is State.DEAD


def test_probes_back_off_and_a_failed_recovery_backs_off_too() -> None:
    pool = ServerPool(["a"], 4)
    now, delays = 0.0, []
    fail(pool, "a", Effect.GONE, now)
    for round_ in range(8):
        delays.append(pool.servers["a"].probe_at - now)
        now = pool.servers["a"].probe_at
        pool.probed("a", round_ % 2 == 1, now)
        if round_ % 2 == 1:
            fail(pool, "a", now=now)
    assert delays == [1, 2, 4, 8, 16, 30, 30, 30]
    assert max(delays) == LAST_PROBE_S


def test_busy_is_left_alone_without_being_ill() -> None:
    pool = ServerPool(["a"], 4)
    pool.begin("a", 1, 0.0)
    pool.end("a", 1, Effect.BUSY, 10.0, busy_for_s=2.0)
    assert pool.servers["a"].state is State.HEALTHY
    assert (pool.choose(set(), 11.9), pool.choose(set(), 12.0)) == (None, "a")


def test_the_server_with_the_least_outstanding_tokens_is_chosen() -> None:
    pool = ServerPool(URLS, 4)
    pool.begin("a", 10, 0.0)
    pool.begin("b", 7, 0.0)
    pool.begin("c", 4, 0.0)
    pool.begin("c", 4, 0.0)
    assert pool.choose(set(), 0.0) == "b"


def test_a_tried_server_is_not_asked_while_another_is_usable_even_a_full_one() -> None:
    pool = ServerPool(["a", "b"], 1)
    assert pool.choose({"a"}, 0.0) == "b"
    pool.begin("b", 1, 0.0)
    assert pool.choose({"a"}, 0.0) is None
    assert pool.choose({"a", "b"}, 0.0) == "a"
    pool.end("b", 1, Effect.GONE, 0.0)
    assert pool.choose({"a"}, 0.0) == "a"


def test_withdrawn_servers_are_left_alone_and_those_that_stay_keep_what_is_known_of_them() -> None:
    pool = ServerPool(["a", "b"], 4)
    fail(pool, "b")
    pool.begin("a", 3, 0.0)
    added, withdrawn = pool.replace(["b", "c"], 1.0)
    assert (added, withdrawn) == (["c"], ["a"])
    assert pool.servers["b"].state is State.SUSPECT
    assert pool.choose({"b", "c"}, 1.0) in ("b", "c")
    pool.end("a", 3, Effect.ANSWERED, 1.0)
    assert pool.servers["a"].state is State.WITHDRAWN, "a late answer does not bring it back"
    pool.replace(["a"], 2.0)
    assert pool.servers["a"].state is State.HEALTHY
    assert list(pool.servers) == ["a"], "nothing is kept of servers without open requests"


def test_an_empty_pool_is_down_since_it_was_emptied() -> None:
    pool = ServerPool(["a"], 4)
    pool.replace([], 5.0)
    pool.replace([], 7.0)
    assert (pool.down_since(), pool.has_room(7.0), pool.choose(set(), 7.0)) == (5.0, False, None)
    pool.replace(["a"], 8.0)
    assert (pool.down_since(), pool.choose(set(), 8.0)) == (None, "a")


def test_a_server_is_silent_only_while_another_answers() -> None:
    pool = ServerPool(["a", "b"], 4)
    pool.begin("a", 1, 0.0)
    pool.begin("b", 1, 0.0)
    pool.begin("b", 1, 0.0)
    assert pool.silent(100.0, 10.0) == [], "nobody answers: the judge is slow"
    pool.end("b", 1, Effect.ANSWERED, 9.0)
    assert pool.silent(100.0, 10.0) == [], "when b was last heard, a had not been silent for long"
    pool.end("b", 1, Effect.ANSWERED, 11.0)
    assert (pool.silent(11.0, 10.0), pool.silent(11.0, 12.0)) == (["a"], [])
    pool.bury("a", 11.0)
    assert (pool.servers["a"].state, pool.silent(100.0, 10.0)) == (State.DEAD, [])
    pool.end("a", 1, Effect.NOTHING, 11.0)
    pool.probed("a", True, 12.0)
    pool.begin("a", 1, 20.0)
    assert pool.silent(29.0, 10.0) == [], "its time begins anew with its requests"


def test_a_warm_cache_is_worth_what_it_saves() -> None:
    pool = ServerPool(["a", "b"], 4)
    pool.begin("a", 100, 0.0)
    assert pool.choose(set(), 0.0, home="a", saved_tokens=99) == "b"
    assert pool.choose(set(), 0.0, home="a", saved_tokens=101) == "a"


def test_a_second_request_goes_to_a_server_that_answers() -> None:
    pool = ServerPool(URLS, 1)
    fail(pool, "b", Effect.GONE)
    pool.probed("b", True, 2.0)
    assert pool.spare({"a"}, 2.0) == "c", "b recovers: its one request must not be a second one"
    pool.begin("c", 1, 2.0)
    assert pool.spare({"a"}, 2.0) is None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "probe", "wait", "replace", "bury"]),
        st.integers(0, 10),
        st.sampled_from(Effect),
        st.booleans(),
        st.sets(st.sampled_from(URLS)),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS)
def test_invariants_hold_under_any_sequence_of_events(events: list[tuple[str, int, Effect, bool, set[str]]]) -> None:
    pool, now, limit = ServerPool(URLS, 3), 0.0, 3
    open_requests: list[tuple[str, int]] = []
    for kind, number, effect, answered, tried in events:
        states = {url: server.state for url, server in pool.servers.items()}
        if kind == "begin" and (url := pool.choose(tried, now)) is not None:
            held = sum(open_url == url for open_url, _ in open_requests)
            assert states[url] not in UNUSABLE
            assert held < (1 if states[url] is State.RECOVERING else limit)
            assert url not in tried or all(states.get(other) in UNUSABLE for other in URLS if other not in tried)
            pool.begin(url, number, now)
            open_requests.append((url, number))
        elif kind == "end" and open_requests:
            url, tokens = open_requests.pop(number % len(open_requests))
            pool.end(url, tokens, effect, now, busy_for_s=float(number))
            if states[url] is State.WITHDRAWN:
                assert pool.servers[url].state is State.WITHDRAWN
            elif states[url] is State.DEAD:
                assert (pool.servers[url].state is State.HEALTHY) == (effect is Effect.ANSWERED)
        elif kind == "bury" and URLS[number % 3] in pool.servers:
            silent = pool.silent(now, float(number))
            for url in silent:
                assert pool.servers[url].requests
                assert any(other.answered_at > pool.servers[url].answered_at for other in pool.present())
                pool.bury(url, now)
                assert pool.servers[url].state is State.DEAD
        elif kind == "replace":
            pool.replace(tried, now)
            assert {server.url for server in pool.present()} == tried
        elif kind == "probe" and URLS[number % 3] in pool.servers:
            pool.probed(URLS[number % 3], answered, now)
            for url in pool.servers:
                assert pool.servers[url].state is states[url] or (states[url] is State.DEAD and answered)
        else:
            now += number
        for url, server in pool.servers.items():
            mine = [tokens for open_url, tokens in open_requests if open_url == url]
            assert (server.requests, server.tokens) == (len(mine), sum(mine))
            if server.state is not State.WITHDRAWN:
                assert (server.down_since is None) == (server.state in (State.HEALTHY, State.SUSPECT))
        assert {url for url, _ in open_requests} <= pool.servers.keys()
        assert pool.has_room(now) == (pool.choose(set(), now) is not None)
