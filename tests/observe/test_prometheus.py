"""Prometheus scrapes a reward loop at work over HTTP: live counters, histograms over steps, the newest metrics."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.config.load import load_config
from megatron_fapo.config.reward import OverlongConfig, RewardConfig
from megatron_fapo.errors import UserError
from megatron_fapo.genrm.counters import BUCKETS_S, Counters, Totals
from megatron_fapo.genrm.reward_loop import RewardLoop
from megatron_fapo.observe import prometheus
from megatron_fapo.observe.loggers import Loggers
from megatron_fapo.observe.prometheus import Prometheus, prometheus_name
from tests.faults.fake_server import FakeServer, says, status
from tests.genrm.samples import make_sample

REWARD = RewardConfig(
    verifier="recipe_string", compare_rules=False, verifier_processes=1, overlong=OverlongConfig(buffer_tokens=4)
)


def scrape(port: int) -> dict[str, float]:
    """Sample name, with labels where it has any, -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_reward_loop_at_work_is_scraped() -> None:
    async def main() -> None:
        def behave(_body: dict, number: int):
            return status(500) if number == 1 else says("\\boxed{-1}", after_s=0.5 if number == 4 else 0.0)

        sink = Prometheus("127.0.0.1", 0)
        sink.start()
        async with FakeServer(behave) as server:
            genrm = GenRMConfig(deadline_s=20.0, request_timeout_s=10.0, hedge_share=0.0)
            async with RewardLoop(REWARD, genrm, [server.url], max_response_tokens=10) as loop:
                for index in range(2):
                    await loop.score(make_sample(index=index))
                sink.write(1, loop.metrics() | {"eval/aime/avg@4": 0.25})
                loop.begin_step(2)
                asking = asyncio.create_task(loop.score(make_sample(index=2)))
                while server.open == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
                seen = await asyncio.to_thread(scrape, sink.port)
                assert (seen["fapo_step"], seen["fapo_eval_aime_avg_at_4"], seen["fapo_live_up"]) == (1, 0.25, 1)
                assert (seen["fapo_genrm_called"], seen["fapo_live_genrm_called_total"]) == (2, 3)
                assert seen["fapo_live_genrm_failed_http_5xx_total"] == 1
                assert seen["fapo_live_genrm_latency_seconds_count"] == 2
                assert seen[f"fapo_live_genrm_server_requests{{{server.url}}}"] == 1
                assert seen["fapo_live_scoring_in_flight"] == 1
                await asking
                seen = await asyncio.to_thread(scrape, sink.port)
                assert seen["fapo_live_scoring_scored_total"] == 3
                assert seen["fapo_live_genrm_latency_seconds_count"] == 3
                assert seen["fapo_live_genrm_latency_seconds_bucket{0.3}"] < 3
                assert seen["fapo_live_genrm_latency_seconds_bucket{+Inf}"] == 3
        seen = await asyncio.to_thread(scrape, sink.port)
        assert (seen["fapo_live_up"], seen["fapo_step"]) == (1, 1)
        assert not any(name.startswith("fapo_live_genrm") for name in seen), "the loop is gone"
        sink.close(False)
        with pytest.raises(OSError, match="refused"):
            scrape(sink.port)

    asyncio.run(main())


def test_a_driver_that_is_stuck_leaves_its_live_metrics_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "ANSWER_S", 0.2)

    async def main() -> None:
        sink = Prometheus("127.0.0.1", 0)
        sink.start()
        async with RewardLoop(REWARD, GenRMConfig(enabled=False), [], max_response_tokens=10):
            scraping = asyncio.get_running_loop().run_in_executor(None, scrape, sink.port)
            time.sleep(1.0)  # noqa: ASYNC251
            seen = await scraping
        sink.close(False)
        assert seen["fapo_live_up"] == 0
        assert "fapo_step" in seen

    asyncio.run(main())


def test_records_reach_it_through_the_loggers_and_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = [f"run_dir={tmp_path}", "observe.tensorboard=false"]
        busy = load_config([], [*settings, f"observe.prometheus_port={taken.getsockname()[1]}"]).config
        with pytest.raises(UserError, match=r"Prometheus cannot start: .*in use.*observe\.prometheus_port=null"):
            Loggers(busy)
    with Loggers(load_config([], [*settings, "observe.prometheus_port=0"]).config) as loggers:
        loggers.put(3, {"reward/mean": 0.5})
        loggers.put(3, {"eval/a": 1.0})
        (feed,) = loggers._feeds
        deadline = time.monotonic() + 10
        while (seen := scrape(feed.sink.port)).get("fapo_eval_a") != 1.0:
            assert time.monotonic() < deadline
        assert (seen["fapo_step"], seen["fapo_reward_mean"]) == (3, 0.5)


def test_totals_outlive_the_steps() -> None:
    totals = Totals()
    steps = [Counters(totals) for _ in range(3)]
    for step, seconds in zip(steps, ((0.02, 5.0), (0.3,), (2000.0,)), strict=True):
        step.add("called", len(seconds))
        for each in seconds:
            step.observe("latency", each)
    assert [step.counts["called"] for step in steps] == [2, 1, 1]
    histogram = totals.seconds["latency"]
    assert (totals.counts["called"], histogram.count, histogram.sum_s) == (4, 4, pytest.approx(2005.32))
    at_most = dict(zip(BUCKETS_S, histogram.at_most, strict=True))
    assert (at_most[0.1], at_most[0.3], at_most[1000.0]) == (1, 2, 3)


def test_names_are_prometheus_names() -> None:
    assert prometheus_name("eval/aime-24/avg@4") == "eval_aime_24_avg_at_4"
