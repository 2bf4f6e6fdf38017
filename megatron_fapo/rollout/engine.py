"""One rollout engine: vLLM's AsyncLLM in an actor of its own, the only place that generates samples.

In: prompts. Out: a stream of samples, each as soon as it is finished, stamped with the version of the weights that
produced all of it. The caller makes the actor (`ray.remote(RolloutEngine)`); nothing here needs Ray.

Reproducible on one machine: a sample's random numbers depend on its seed alone, and its logits on which requests share
the batch. So the requests of a `generate` call are admitted together while the scheduler is paused, and start from an
empty prefix cache: the batches are then the same in every run, however the requests' arrival was timed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import fields
from typing import Any

from megatron_fapo.config.rollout import RolloutConfig, SamplingConfig
from megatron_fapo.data.records import Prompt, Sample, SampleKey
from megatron_fapo.device import visible_cards
from megatron_fapo.errors import UserError
from megatron_fapo.processes import ProcessDiedError, use_interface_of
from megatron_fapo.rollout.environment import vllm_environment
from megatron_fapo.rollout.guard import Guard
from megatron_fapo.rollout.refitted import Refitted, VLLMDiedError
from megatron_fapo.rollout.sampling import sample_seed
from megatron_fapo.weight_sync.checkpoint import checkpoint_shapes
from megatron_fapo.weight_sync.protocol import EngineState, EngineVersion, StaleEngineError

RECEIVER = "megatron_fapo.weight_sync.receiver.RefitReceiver"
MEMORY = ("weights", "kv_cache")
"""What vLLM can put to sleep, by its tags, in the order of waking."""
_LOOK_S = 1.0
"""How often a call that is not answered looks whether vLLM still lives."""
_SETTLE_S = 0.02
"""How often samples that wait for the end of a refit look for it."""


class EngineDiedError(ProcessDiedError):
    """A rollout engine is gone: vLLM failed, or its process was killed."""


class RolloutEngine(Refitted):
    """A vLLM engine. Call `start` first and `shutdown` last."""

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        device: str,
        dtype: str,
        max_model_len: int,
        max_positions: int | None = None,
        seed: int = 0,
        log_path: str | None = None,
        takes_turns: bool = False,
        address: str | None = None,
    ) -> None:
        """
        Args:
            model_path: HF checkpoint; its weights are served until the first refit.
            device: `cpu` or `gpu`.
            dtype: `float32` or `bfloat16`.
            max_model_len: longest prompt plus longest response, in tokens.
            max_positions: replaces the checkpoint's max_position_embeddings, from which vLLM sizes its RoPE table.
            seed: the run's; seeds samples together with their identity.
            log_path: where this process and vLLM's write their output; None leaves it where it goes.
            takes_turns: others use its GPUs while it sleeps.
            address: this node's in a cluster, by whose interface new weights come.
        """
        self.model_path, self.config, self.device, self.dtype = model_path, config, device, dtype
        self.max_model_len, self.seed, self.log_path = max_model_len, seed, log_path
        self.max_positions = max_positions
        self._version = EngineVersion(-1, EngineState.STALE)
        self._checkpoint = {}
        self._admission = asyncio.Lock()
        self._active = {}
        self._requests = 0
        self._paused = False
        self._asleep: set[str] = set()
        self._address = address
        self._frees_memory = takes_turns and device == "gpu"
        self._llm: Any = None
        self._guard: Guard | None = None

    def _engine_args(self) -> dict[str, Any]:
        args: dict[str, Any] = {
            "model": self.model_path,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "tensor_parallel_size": self.config.tensor_parallel,
            # Inside an actor vLLM would place its workers through Ray, on resources that the actor already holds.
            "distributed_executor_backend": "mp" if self.config.tensor_parallel > 1 else "uni",
            "max_num_seqs": self.config.max_num_seqs,
            "enforce_eager": self.config.enforce_eager or self.device == "cpu",
            "enable_prefix_caching": True,
            # The log-probability of the distribution that the token was drawn from: after temperature, top_p, top_k.
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": RECEIVER,
            "disable_log_stats": True,
        }
        if self.max_positions is not None:
            args["hf_overrides"] = {"max_position_embeddings": self.max_positions}
        if self.device == "cpu":
            args["kv_cache_memory_bytes"] = int(self.config.cpu_kv_cache_gb * 2**30)
            # With chunks, vLLM rewinds the seeded generator of a half-read prompt by an offset that CPU generators do
            # not have, and its engine core dies.
            args["enable_chunked_prefill"] = False
            args["max_num_batched_tokens"] = max(self.max_model_len, 4096)
        else:
            args["gpu_memory_utilization"] = self.config.gpu_memory_utilization
            args["enable_sleep_mode"] = self._frees_memory
        if taken := sorted(args.keys() & self.config.vllm.keys()):
            raise UserError(f"rollout.vllm: {', '.join(taken)} is set by other fields of the configuration; use those")
        return args | self.config.vllm

    async def start(self, version: int = 0) -> dict[str, Any]:
        """Load the model and return facts about the engine. It then serves the checkpoint's weights as `version`.

        Raises:
            UserError: not a checkpoint directory, or `rollout.vllm` names an option that vLLM does not have.
            RuntimeError: vLLM did not start; its own words are in the log.
        """
        began = time.monotonic()
        if self.log_path is not None:
            self._redirect_output(self.log_path)
        self._checkpoint = checkpoint_shapes(self.model_path)
        args = self._engine_args()
        if self._address is not None:
            use_interface_of(self._address)  # before vLLM's workers start, in which NCCL asks once
        self._guard = Guard()
        os.environ.update(vllm_environment(self.device, start_timeout_s=self.config.start_timeout_s))
        os.environ.update(self._guard.environment)
        self._llm = await asyncio.to_thread(self._build, args)  # minutes, in which `shutdown` must be able to end it
        import vllm

        self._tokenizer = self._llm.get_tokenizer()
        self._version = EngineVersion(version)
        return {
            "vllm": vllm.__version__,
            "pid": os.getpid(),
            "max_model_len": self._llm.model_config.max_model_len,
            "kv_cache_tokens": self._kv_cache_tokens(),
            "frees_memory": self._frees_memory,
            "cards": visible_cards(self.device),
            "gpus": await self._llm.collective_rpc("refit_device"),
            "start_s": time.monotonic() - began,
        }

    @staticmethod
    def _build(args: dict[str, Any]) -> Any:
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        if unknown := sorted(args.keys() - {field.name for field in fields(AsyncEngineArgs)}):
            raise UserError(f"rollout.vllm: vLLM {vllm.__version__} has no option {', '.join(unknown)}")
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    def _kv_cache_tokens(self) -> int:
        cache = self._llm.vllm_config.cache_config
        return int(cache.num_gpu_blocks or 0) * int(cache.block_size)

    @staticmethod
    def _redirect_output(path: str) -> None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)

    async def generate(
        self,
        prompts: Sequence[Prompt],
        epochs: Sequence[int],
        *,
        n: int,
        sampling: SamplingConfig,
        max_tokens: int,
    ) -> AsyncGenerator[Sample]:
        """Yield n samples of each prompt, each as soon as it is finished. A refit that is under way is waited for.

        Args:
            prompts: tokenised.
            epochs: the epoch of each prompt, part of its samples' identity and seeds.
            max_tokens: responses are cut here.

        Raises:
            StaleEngineError: a refit failed, or the engine is asleep.
            UserError: a prompt and max_tokens do not fit max_model_len.
        """
        for prompt in prompts:
            if not 0 < len(prompt.token_ids) <= self.max_model_len - max_tokens:
                raise UserError(
                    f"prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens; with max_response_tokens "
                    f"{max_tokens} the engine's context of {self.max_model_len} takes 1 to "
                    f"{self.max_model_len - max_tokens}"
                )
        keys = [
            (prompt, SampleKey(prompt.prompt_id, epoch, index))
            for prompt, epoch in zip(prompts, epochs, strict=True)
            for index in range(n)
        ]
        waiting: dict[str, asyncio.Task[Sample]] = {}
        try:
            while True:  # a refit may overtake a rollout ahead that was asked for before it
                async with self._admission:
                    if self._version.state is not EngineState.UPDATING:
                        await self._admit(keys, sampling, max_tokens, waiting)
                        break
                await asyncio.sleep(_SETTLE_S)
            for finished in asyncio.as_completed(list(waiting.values())):
                yield await finished
        except Exception as error:
            if self._llm.errored:
                raise VLLMDiedError(f"vLLM ended while it generated: {error}") from error
            raise
        finally:
            unfinished = [request for request, task in waiting.items() if not task.done() or task.cancelled()]
            for task in waiting.values():
                task.cancel()
            for request in waiting:
                self._active.pop(request, None)
            if unfinished and not self._llm.errored:
                await self._llm.abort(unfinished, internal=True)

    async def _admit(
        self,
        keys: Sequence[tuple[Prompt, SampleKey]],
        sampling: SamplingConfig,
        max_tokens: int,
        waiting: dict[str, asyncio.Task[Sample]],
    ) -> None:
        """Hand all requests to the scheduler while it is paused, then let it run."""
        version = self.version()  # no refit begins before they are in
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        await self._ask(self._llm.pause_generation(mode="keep", clear_cache=not self._active))
        try:
            for prompt, key in keys:
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=max_tokens,
                    seed=sample_seed(self.seed, key),
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self._requests += 1
                tokens = TokensPrompt(prompt_token_ids=list(prompt.token_ids))
                collector = await self._llm.add_request(f"sample-{self._requests}", tokens, params)
                waiting[collector.request_id] = asyncio.ensure_future(self._finish(collector, prompt, key))
                self._active[collector.request_id] = ((0, version),)
        finally:
            if not self._paused:
                await self._ask(self._llm.resume_generation())

    async def _finish(self, collector: Any, prompt: Prompt, key: SampleKey) -> Sample:
        output = (await collector.get()).outputs[0]
        (_, version), *later = self._active.pop(collector.request_id)
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended sample {key} with finish_reason {output.finish_reason!r}; see its log")
        token_ids, flat = tuple(output.token_ids), output.logprobs
        # One column, the sampled token's: anything else means that vLLM's layout changed under us.
        if tuple(flat.token_ids) != token_ids:
            raise RuntimeError(f"vLLM returned {len(flat.token_ids)} log-probabilities for {len(token_ids)} tokens")
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        logprobs = tuple(flat.logprobs)
        return Sample(key, prompt, token_ids, logprobs, text, output.finish_reason, version, tuple(later))

    async def _ask(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Await a call to vLLM's core: vLLM fails the requests of a core that is killed, but not the calls that it was
        about to answer, which then wait for ever.

        Raises:
            VLLMDiedError: the core is gone.
        """
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait((task,), timeout=_LOOK_S))[0]:
                if self._llm.errored:
                    raise VLLMDiedError("vLLM's core ended before it answered")
            return task.result()
        except Exception as error:  # once its end is known, vLLM refuses the call
            if self._llm.errored and not isinstance(error, VLLMDiedError):
                raise VLLMDiedError(f"vLLM's core is gone: {error}") from error
            raise
        finally:
            task.cancel()

    async def pause(self) -> None:
        """Freeze generation; requests stay where they are until `resume`."""
        async with self._admission:
            self._paused = True
            await self._ask(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        async with self._admission:
            self._paused = False
            await self._ask(self._llm.resume_generation())

    async def sleep(self, keep_weights: bool = False) -> None:
        """Give the memory of weights and KV cache back. Requests are aborted. The weights wait in host memory, or are
        dropped, and the engine is stale until a refit.

        Where vLLM cannot (`frees_memory` of `start`: on CPUs), it stops serving all the same and keeps its memory.
        """
        if not keep_weights:
            self._version.fail()
        async with self._admission:
            self._paused = True
            self._asleep = set(MEMORY)
            # Level 1 keeps the weights on the host, 2 drops them, 0 only stops the scheduler.
            level = 0 if not self._frees_memory else 1 if keep_weights else 2
            await self._ask(self._llm.sleep(level, mode="abort"))

    async def wake(self, tags: Sequence[str]) -> None:
        """Take the memory of `tags` (of MEMORY) again: the weights before a refit, the KV cache when the policy has
        made room."""
        async with self._admission:
            await self._ask(self._llm.wake_up(list(tags) if self._frees_memory else ["scheduling"]))
            self._asleep -= set(tags)
            if not self._asleep and self._version.state is EngineState.FRESH:
                self._paused = False  # its weights were kept

    async def export_weights(self, path: str) -> None:
        """Write what the engine computes with, HF-named, to a safetensors file (for comparisons)."""
        await self._llm.collective_rpc("export_weights", args=(path,))

    def version(self) -> int:
        """The version that samples would be stamped with.

        Raises:
            StaleEngineError: a refit failed or is under way, or the engine is asleep.
        """
        if self._asleep:
            raise StaleEngineError(f"the engine is asleep, without {' and '.join(sorted(self._asleep))}: wake it first")
        return self._version.require_fresh()

    def in_flight(self) -> int:
        """Samples that are waiting or being generated."""
        return len(self._active)

    async def shutdown(self) -> None:
        """Stop vLLM; returns when none of its processes is left."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown, 1.0)
            self._llm = None
        if self._guard is not None:
            await asyncio.to_thread(self._guard.release)
            self._guard = None
