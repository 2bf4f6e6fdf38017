"""The real vllm-router in front of servers that come and go; without the package, what can be said of it."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from megatron_fapo.errors import UserError
from megatron_fapo.genrm import router as module
from megatron_fapo.genrm.router import Router, RouterError
from megatron_fapo.rollout.guard import tagged_pids
from tests.faults.fake_server import FakeServer, says


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def named(name: str) -> FakeServer:
    return FakeServer(lambda _body, _number: says(name))


async def answers(router: Router, count: int = 12) -> Counter[str]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        found: Counter[str] = Counter()
        for _ in range(count):
            body = {"model": "genrm", "messages": [{"role": "user", "content": "x"}]}
            try:
                async with session.post(f"{router.url}/chat/completions", json=body) as reply:
                    found[(await reply.json())["choices"][0]["message"]["content"] if reply.ok else "refused"] += 1
            except aiohttp.ClientError:
                found["nobody"] += 1
        return found


async def until(router: Router, names: set[str]) -> None:
    for _ in range(100):
        if set(await answers(router)) == names:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"not {names} within a while: {await answers(router)}")


@pytest.mark.timeout(300)
def test_one_address_for_servers_that_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.1)

    async def main() -> None:
        router = Router(free_port(), tmp_path / "router.log")
        async with named("a") as a, named("b") as b, named("c") as c:
            up = [a.url, b.url]
            await router.start(up)
            tag = router._guard.tag
            following = asyncio.create_task(router.follow(lambda: up))
            try:
                await until(router, {"a", "b"})
                await b.stop()
                await until(router, {"a"})  # what a dead server means is its own business
                up[1] = c.url  # started again, on another port
                await until(router, {"a", "c"})
                up[:] = [c.url]
                await until(router, {"c"})
                router._process.kill()
                await until(router, {"c"})
                up[:] = [c.url, a.url]
                await until(router, {"a", "c"})
                assert not following.done()
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                router.stop()
            assert tagged_pids(tag) == []
            assert set(await answers(router)) == {"nobody"}

    asyncio.run(main())


def test_a_router_that_ends_gives_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "options", lambda _self, _urls: ["--no-such-option"])
    router = Router(free_port(), tmp_path / "router.log")
    with pytest.raises(RouterError, match=r"exit code 2(.|\n)*no-such-option"):
        asyncio.run(router.start(["http://127.0.0.1:9/v1"]))


def test_what_is_missing_or_taken_is_said_before_servers_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda _name, path: None)
    with pytest.raises(UserError, match=r"megatron-fapo\[router\]"):
        Router(free_port(), tmp_path / "log")
    monkeypatch.setattr(module.shutil, "which", lambda _name, path: "vllm-router")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another"):
            Router(taken.getsockname()[1], tmp_path / "log")


def test_one_server_has_no_two_to_choose_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda _name, path: "vllm-router")
    router = Router(free_port(), tmp_path / "log")
    for urls, policy in ((["http://a:1/v1"], "round_robin"), (["http://a:1/v1", "http://b:1/v1"], "power_of_two")):
        options = router.options(urls)
        assert options[options.index("--policy") + 1] == policy
        assert options[options.index("--worker-urls") + 1 :] == [url.removesuffix("/v1") for url in urls]
