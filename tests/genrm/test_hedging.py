"""When a second request is sent: never on few observations, never beyond the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_fapo.genrm.hedging import ENOUGH, SILENCE_LEAST_S, HedgeBudget, Latencies


def test_a_quantile_needs_observations_and_follows_them() -> None:
    latencies = Latencies()
    for number in range(ENOUGH - 1):
        latencies.add(float(number))
    assert latencies.quantile(0.95) is None
    assert latencies.silence_s() is None
    latencies.add(float(ENOUGH - 1))
    assert latencies.quantile(0.5) == ENOUGH // 2
    assert latencies.quantile(1.0) == ENOUGH - 1
    for _ in range(1000):
        latencies.add(7.0)
    assert (latencies.quantile(0.0), latencies.quantile(0.95)) == (7.0, 7.0), "what was long ago is forgotten"
    assert latencies.silence_s() == 21.0
    for _ in range(1000):
        latencies.add(0.01)
    assert latencies.silence_s() == SILENCE_LEAST_S, "a hiccup of the network is no silence"


@given(st.floats(0, 1), st.lists(st.booleans(), max_size=500))
def test_second_requests_stay_within_their_share(share: float, wishes: list[bool]) -> None:
    budget, spent = HedgeBudget(share), 0
    for number, wish in enumerate(wishes, 1):
        budget.earn()
        spent += wish and budget.spend()
        assert spent <= share * number + 1e-6
