"""GenRM servers in turn with the engines: who is awake when, the same scores as while streaming, and clear failures."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fapo.config.load import load_config
from megatron_fapo.config.root import Config
from megatron_fapo.data.datasets import load_prompts, write_testbed
from megatron_fapo.data.records import Group
from megatron_fapo.errors import UserError
from megatron_fapo.processes import Process
from megatron_fapo.rollout.engine import MEMORY
from megatron_fapo.training import servers as servers_module
from megatron_fapo.training.cluster import Cluster, launch
from megatron_fapo.training.evaluation import sample_set
from megatron_fapo.training.rollouts import rollout
from megatron_fapo.training.servers import ServerDiedError, Servers

MODELS = Path(__file__).parents[2] / "examples" / "models"


class Turns:
    """A cluster of fakes that writes down what it is told, and refuses two on one GPU."""

    def __init__(self, *, colocated_engines: bool, policy: bool = True, servers: int = 1) -> None:
        values: dict[str, Any] = {"genrm": {"colocated": True, "model_path": "judge", "servers": servers}}
        values |= {"rollout": {"colocated": colocated_engines, "replicas": servers}}
        values |= {"policy": {"offload": colocated_engines, "parallel": {"data": servers}}}
        self.said: list[str] = []
        self.engines: set[str] = set(MEMORY)
        self.judging = False
        self.answers: dict[str, Any] = {}
        remote = {order: SimpleNamespace(remote=lambda order=order: self._server(order)) for order in ("sleep", "wake")}
        self.cluster = Cluster(
            Config.model_validate(values),
            "gpu",
            policy=SimpleNamespace(enter=self._policy) if policy else None,  # type: ignore[arg-type]
            rollout=SimpleNamespace(sleep=self._sleep, wake=self._wake),  # type: ignore[arg-type]
            servers=Servers([Process("genrm", i) for i in range(servers)], [SimpleNamespace(**remote)] * servers),
        )

    async def _policy(self, phase: str) -> dict[str, float]:
        self.said.append(phase)
        return {}

    async def _sleep(self, *, keep_weights: bool) -> None:
        assert self.engines == set(MEMORY), "vLLM falls asleep only when all of it is awake"
        self.engines = set()
        self.said.append("engines keep" if keep_weights else "engines drop")

    async def _wake(self, tags: list[str]) -> None:
        assert not self.judging, "both on the card"
        self.engines |= set(tags)
        self.said.append("engines " + "+".join(tags))

    async def _server(self, order: str) -> None:
        assert order == "sleep" or not self.engines, "both on the card"
        self.said.append(f"servers {order}")
        self.judging = order == "wake"
        if isinstance(answer := self.answers.get(order), BaseException):
            raise answer
        if answer is not None:
            await answer.wait()

    def enter(self, *phases: str, **options: Any) -> list[str]:
        """What is said on entering the phases."""
        self.said.clear()

        async def main() -> None:
            for phase in phases:
                await self.cluster.enter(phase, **options)

        asyncio.run(main())
        return list(self.said)


@pytest.mark.parametrize("colocated_engines", [False, True])
def test_a_step_has_the_servers_awake_between_rollout_and_updates_only(colocated_engines: bool) -> None:
    turns = Turns(colocated_engines=colocated_engines)
    assert turns.enter("judge") == ["engines drop", "judge"], "servers start awake, on what the engines left"
    refit = ["servers sleep", "refit", "engines weights", "rollout", "engines kv_cache"]
    assert turns.enter("refit", "rollout") == refit
    assert turns.enter("judge") == ["engines drop", "judge", "servers wake"]
    assert turns.enter("logprobs", "train") == ["servers sleep", "logprobs", "train"]
    assert turns.enter("refit", "rollout") == refit[1:]
    assert turns.enter("judge", "rollout", keep_weights=True) == [
        *("engines keep", "judge", "servers wake"),
        *("servers sleep", "rollout", "engines weights+kv_cache"),
    ]
    assert turns.cluster.serving
    assert turns.enter("checkpoint") == ["engines drop", "checkpoint"]


def test_an_evaluation_without_a_policy_takes_turns_too() -> None:
    turns = Turns(colocated_engines=False, policy=False)
    turns.enter("judge", "rollout", keep_weights=True)
    assert turns.enter("judge", "rollout", keep_weights=True) == [
        *("engines keep", "servers wake", "servers sleep", "engines weights+kv_cache"),
    ]


def test_a_turn_that_is_cut_short_is_ended_by_the_next_phase() -> None:
    turns = Turns(colocated_engines=True)
    turns.enter("judge", "refit", "rollout")
    turns.answers["wake"] = asyncio.Event()

    async def stopped() -> None:
        task = asyncio.create_task(turns.cluster.enter("judge"))
        await asyncio.wait((task,), timeout=0.1)
        assert turns.said[-1] == "servers wake"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(stopped())
    assert turns.enter("checkpoint") == ["servers sleep", "checkpoint"], "it may be awake after all"


def test_a_server_that_does_not_wake_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers_module, "TURN_S", 0.1)
    monkeypatch.setattr(servers_module, "ALIVE_S", 0.1)
    turns = Turns(colocated_engines=False)
    turns.enter("judge", "refit", "rollout")
    turns.answers["wake"] = asyncio.Event()
    with pytest.raises(ServerDiedError, match=r"genrm-0.*did not wake within 0.2 s") as error:
        turns.enter("judge")
    assert error.value.lost, "another attempt may go well"


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"genrm.urls": "[http://127.0.0.1:1/v1]"}, "only servers of this run can sleep"),
        ({"genrm.servers": "0", "genrm.urls": "[http://127.0.0.1:1/v1]"}, "only servers of this run can sleep"),
        ({"cluster.train_nodes": "1", "cluster.genrm_nodes": "1"}, "set genrm_nodes to 0"),
        ({"genrm.servers": "2", "genrm.tensor_parallel": "2", "rollout.replicas": "3"}, "have the GPUs of the engines"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(fields: dict[str, str], remedy: str) -> None:
    base = {"genrm.colocated": "true", "genrm.model_path": "judge", "policy.model_path": "p", "data.train": "[x]"}
    with pytest.raises(UserError, match=remedy):
        load_config([], [f"{name}={value}" for name, value in (base | fields).items()], purpose="train")
    baseline = base | fields | {"genrm.enabled": "false"}
    load_config([], [f"{name}={value}" for name, value in baseline.items()], purpose="train")


def _tiny(tmp_path: Path) -> Config:
    write_testbed(tmp_path / "data", 6, 4, seed=3)
    return Config.model_validate(
        {
            "run_dir": str(tmp_path / "run"),
            "device": "cpu",
            "data": {"train": [str(tmp_path / "data" / "train.jsonl")], "max_prompt_tokens": 160},
            "policy": {"model_path": str(MODELS / "policy")},
            "rollout": {"samples_per_prompt": 4, "max_response_tokens": 112, "cpu_kv_cache_gb": 0.05},
            "genrm": {
                **{"colocated": True, "model_path": str(MODELS / "genrm"), "max_tokens": 256, "max_model_len": 768},
                **{"temperature": 0.0, "cpu_kv_cache_gb": 0.05},
            },
            "reward": {"overlong": {"enabled": False}, "verifier_processes": 1},
            "training": {"evaluation": {"samples_per_prompt": 4, "temperature": 1.0, "top_p": 1.0}},
        }
    )


def _untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: v for name, v in metrics.items() if not name.endswith("_s") and not name.startswith("scoring/")}


def _told(groups: list[Group]) -> list[Any]:
    """Everything of the samples but times and addresses."""
    return [
        (s.sample.key, s.sample.text, s.score.reward, s.score.correct, s.score.unscored_reason, verdict)
        for group in groups
        for s in group.samples
        for verdict in [s.score.verdict and (s.score.verdict.index, s.score.verdict.critique)]
    ]


@pytest.mark.timeout(600)
def test_the_scores_are_those_of_the_stream_and_a_lost_server_is_named(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = _tiny(tmp_path)
    streaming = config.model_copy(update={"genrm": config.genrm.model_copy(update={"colocated": False})})
    prompts = load_prompts(config.data.train, AutoTokenizer.from_pretrained(MODELS / "policy"), config.data).prompts
    taken = [(prompt, 0) for prompt in prompts]
    ahead: Any = SimpleNamespace(generated=lambda _: None, awaited=None)

    async def main() -> None:
        async with launch(config, policy=False) as cluster:
            assert cluster.reward is not None
            assert cluster.serving
            assert not cluster.judges_awake
            outcomes = []
            for _ in range(2):  # the second set needs no refit
                scoring = cluster.reward.begin_step()
                groups = await cluster.while_judged(sample_set(config, cluster, scoring, "held", prompts))
                outcomes.append((_told(groups), _untimed(scoring.metrics())))
                assert cluster.serving
                assert not cluster.judges_awake
            assert outcomes[0][1]["genrm/answered"] > 4
            assert outcomes[1] == outcomes[0]

            await cluster.enter("judge", keep_weights=True)
            await cluster.rollout.wake(MEMORY)  # type: ignore[union-attr]  # beside the servers: on CPUs there is room
            scoring = cluster.reward.begin_step()
            beside = dataclasses.replace(cluster, config=streaming)
            groups = await sample_set(streaming, beside, scoring, "held", prompts)
            assert (_told(groups), _untimed(scoring.metrics())) == outcomes[0]
            cluster.awake = MEMORY
            await cluster.enter("rollout")

            await cluster.servers.actors[0].stop.remote()
            with pytest.raises(ServerDiedError, match=r"genrm-0.*did not wake"):
                await rollout(config, cluster, None, ahead, 1, taken, {})  # type: ignore[arg-type]

    asyncio.run(main())
