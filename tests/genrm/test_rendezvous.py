"""The rendezvous file: what it says, when it is believed, and a pool that follows it without losing a verdict."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fapo.config.genrm import GenRMConfig
from megatron_fapo.data.records import Verdict
from megatron_fapo.genrm import rendezvous
from megatron_fapo.genrm.client import GenRMClient
from megatron_fapo.genrm.membership import GenRMUnavailable, PoolEmptyError
from megatron_fapo.genrm.rendezvous import STALE_S, RendezvousError, Service
from megatron_fapo.genrm.verdict import Unscored
from tests.faults.fake_server import FakeServer, hangs, says, status, until

SERVICE = Service(["http://a:1/v1"], "genrm", "/models/genrm", 90.0, 100.0, "node3", 17, "4711", "KEY")
GENRM = GenRMConfig(servers=0, rendezvous="judges.json", api_key_env="KEY")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "judges.json"
    assert rendezvous.read(path) is None
    for service in (SERVICE, replace(SERVICE, urls=[], job_id=None, api_key_env=None)):
        rendezvous.write(path, service)
        assert rendezvous.read(path) == service
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "run_dir: runs/a",
        "[]",
        "{}",
        json.dumps(SERVICE.__dict__ | {"urls": "http://a"}),
        json.dumps(SERVICE.__dict__)[:-9],
        json.dumps(SERVICE.__dict__ | {"heartbeat": "now"}),
    ],
)
def test_a_malformed_file_is_refused_with_the_remedy(tmp_path: Path, text: str) -> None:
    path = tmp_path / "judges.json"
    path.write_text(text)
    with pytest.raises(RendezvousError, match=r"judges\.json is not the rendezvous file(.|\n)*fapo genrm serve"):
        rendezvous.read(path)
    with pytest.raises(RendezvousError, match="cannot be read"):
        rendezvous.read(tmp_path)


def test_when_a_service_can_be_used() -> None:
    assert rendezvous.obstacle(SERVICE, 100.0 + STALE_S, GENRM) is None
    assert rendezvous.obstacle(SERVICE, 100.0 - STALE_S, GENRM) is None, "clocks differ a little"
    for service, now, words in (
        (None, 100.0, "no judges.json: start the service with `fapo genrm serve --rendezvous judges.json`"),
        (SERVICE, 101.0 + STALE_S, "stale: the judge service on node3 (pid 17, Slurm job 4711)"),
        (SERVICE, 101.0 + STALE_S, "start it again"),
        (SERVICE, 99.0 - STALE_S, "clocks"),
        (replace(SERVICE, urls=[]), 100.0, "restarting its servers"),
    ):
        problem = rendezvous.obstacle(service, now, GENRM)
        assert problem is not None
        assert words in problem
    for changes in ({"served_model": "other"}, {"api_key_env": None}):
        with pytest.raises(RendezvousError, match=f"genrm.{next(iter(changes))}=.*make them equal"):
            rendezvous.obstacle(SERVICE, 100.0, GENRM.model_copy(update=changes))


def announce(path: Path, *servers: FakeServer, age_s: float = 0.0, model: str = "genrm") -> None:
    now = time.time() - age_s
    rendezvous.write(path, Service([s.url for s in servers], model, "m", now, now, "node", 1))


Test = Callable[[GenRMClient, FakeServer, FakeServer, Path], Awaitable[None]]


def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old, new, test: Test, **changes: object) -> None:
    """A client that has met the service at `old`, of which `new` is not yet announced; asserts that nothing is left."""
    monkeypatch.setattr(rendezvous, "FOLLOW_S", 0.05)
    path = tmp_path / "judges.json"
    fields = {"deadline_s": 5.0, "request_timeout_s": 5.0, "max_tokens": 512, "max_attempts": 2} | changes
    config = GenRMConfig(servers=0, rendezvous=str(path), **fields)

    async def main() -> None:
        async with FakeServer(old) as first, FakeServer(new) as second:
            announce(path, first)
            client = GenRMClient([], config)
            await client.check()
            try:
                await test(client, first, second, path)
            finally:
                await client.close()
            await asyncio.sleep(0.05)
            assert first.open == second.open == 0
            assert all(server.requests == server.tokens == 0 for server in client._pool.servers.values())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


async def judge(client: GenRMClient, number: int) -> Verdict | Unscored:
    return await client.judge(f"What is 1+1? ({number})", "2", "First 1+1=2.\n\nSo \\boxed{2}.")


def sound(_body: object, _number: int):
    return says("\\boxed{-1}")


@pytest.mark.parametrize("goodbye", [True, False], ids=["requeued", "killed"])
def test_no_verdict_is_lost_when_the_service_moves_during_a_step(tmp_path, monkeypatch, goodbye) -> None:
    """40 verdicts: some answered, some under way at the old address, some waiting for it, some new; two attempts each.

    A service that is requeued removes its file first; one that is killed leaves it, and refuses connections meanwhile.
    """

    def slow(_body: object, number: int):
        return says("\\boxed{-1}") if number <= 5 else hangs()

    async def test(client: GenRMClient, first: FakeServer, second: FakeServer, path: Path) -> None:
        asking = [asyncio.create_task(judge(client, number)) for number in range(30)]
        await until(lambda: (sum(task.done() for task in asking), first.open) == (5, 10))
        if goodbye:
            path.unlink()
            await until(lambda: client.metrics()["genrm/servers_alive"] == 0)
            await until(lambda: first.open == 0)  # nobody asks it any more
        await first.stop()
        asking += [asyncio.create_task(judge(client, number)) for number in range(30, 40)]
        await asyncio.sleep(0.5)
        announce(path, second)
        outcomes = await asyncio.gather(*asking)
        assert [type(outcome) for outcome in outcomes] == [Verdict] * 40
        assert [o.server for o in outcomes if isinstance(o, Verdict)].count(second.url) == 35
        metrics = client.metrics()
        assert (metrics["genrm/answered"], metrics["genrm/unscored"]) == (40, 0)
        assert metrics.get("genrm/failed/withdrawn", 0) == (10 if goodbye else 0)
        await first.start()

    follow(tmp_path, monkeypatch, slow, sound, test, max_concurrent_per_server=10)


def test_requests_that_hang_at_the_old_address_are_asked_again_at_the_new_one(tmp_path, monkeypatch) -> None:
    async def test(client: GenRMClient, first: FakeServer, second: FakeServer, path: Path) -> None:
        asking = [asyncio.create_task(judge(client, number)) for number in range(5)]
        await until(lambda: first.open == 5)
        announce(path, second)
        assert [type(outcome) for outcome in await asyncio.gather(*asking)] == [Verdict] * 5
        assert "genrm/failed/timeout" not in client.metrics()
        assert first.cancelled == 5

    follow(tmp_path, monkeypatch, lambda *_: hangs(), sound, test)


def test_a_service_that_stays_away_costs_the_deadline_and_no_more(tmp_path, monkeypatch) -> None:
    async def test(client: GenRMClient, _first: FakeServer, _second: FakeServer, path: Path) -> None:
        path.unlink()
        await until(lambda: client.metrics()["genrm/servers_alive"] == 0)
        outcomes = await asyncio.gather(*(judge(client, number) for number in range(5)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {PoolEmptyError}

    follow(tmp_path, monkeypatch, sound, sound, test, pool_empty_timeout_s=1.0)


def test_what_the_file_should_not_say_changes_nothing(tmp_path, monkeypatch, caplog) -> None:
    async def test(client: GenRMClient, first: FakeServer, second: FakeServer, path: Path) -> None:
        for spoil, words in (
            (lambda: path.write_text("x"), "is not the rendezvous file"),
            (lambda: announce(path, second, age_s=1000.0), "stale"),
            (lambda: announce(path, second, model="other"), "served_model=other"),
        ):
            spoil()
            await until(lambda words=words: any(words in record.getMessage() for record in caplog.records))
            await asyncio.sleep(0.2)
            outcome = await judge(client, len(words))
            assert isinstance(outcome, Verdict)
            assert outcome.server == first.url
            assert sum(words in record.getMessage() for record in caplog.records) == 1, "said once"
        announce(path, first, second)
        await until(lambda: client.metrics()["genrm/servers_alive"] == 2)

    follow(tmp_path, monkeypatch, sound, sound, test)


def test_a_run_waits_for_the_service_and_says_for_what(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(rendezvous, "FOLLOW_S", 0.05)
    path, caplog_level = tmp_path / "judges.json", caplog.at_level("INFO")

    async def main() -> None:
        async with FakeServer(sound) as server, FakeServer(sound) as fixed:
            config = GenRMConfig(servers=0, rendezvous=str(path), start_timeout_s=5.0)
            client = GenRMClient([fixed.url], config)
            checking = asyncio.create_task(client.check())
            await until(lambda: "there is no" in caplog.text)
            assert not checking.done()
            announce(path, server, age_s=1000.0)
            await until(lambda: "stale" in caplog.text)
            assert not checking.done()
            announce(path, server)
            await checking
            assert client.metrics()["genrm/servers_alive"] == 2, "beside the URLs of the configuration"
            await client.close()
            said = [record.getMessage() for record in caplog.records if "waiting for" in record.getMessage()]
            assert ["there is no" in said[0], "stale" in said[1], len(said)] == [True, True, 2]

            hasty = GenRMClient([], config.model_copy(update={"start_timeout_s": 0.2, "rendezvous": str(path) + "x"}))
            with pytest.raises(GenRMUnavailable, match=r"start_timeout_s = 0\.2 s.*there is no .*judges\.jsonx"):
                await hasty.check()
            announce(path, server, model="other")
            with pytest.raises(RendezvousError, match="served_model=other"):
                await GenRMClient([], config).check()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with caplog_level:
        asyncio.run(main())


def test_a_server_that_refuses_our_requests_still_uses_up_attempts(tmp_path, monkeypatch) -> None:
    async def test(client: GenRMClient, first: FakeServer, _second: FakeServer, _path: Path) -> None:
        assert isinstance(await judge(client, 0), Unscored)
        assert len(first.bodies) == 2

    follow(tmp_path, monkeypatch, lambda *_: status(500), sound, test)
