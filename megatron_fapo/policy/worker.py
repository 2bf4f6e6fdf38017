"""One policy rank: model, optimizer, forward and train steps.

In: samples of a data-parallel rank. Out: log-probabilities, or an optimizer step and its token sums.
Owned by a Ray actor (`policy/group.py`); the same class runs in tests under plain multiprocessing.

Every method is collective: all ranks of the policy call it in step. Results that only the last pipeline stage has
come from its tensor rank 0; other ranks return None.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_fapo.algorithm.loss import LossInputs, policy_loss
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.policy.batch import MicroBatch, TrainSample, build_micro_batches, with_filler
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.policy.model import use_transformer_engine

SUPERVISED = "supervised"
"""Loss name for warm-ups: cross-entropy on the response tokens, with nothing else changed."""


@dataclass(frozen=True)
class Rank:
    """Where this process stands in the policy."""

    rank: int
    world_size: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update did."""

    token_sums: dict[str, float]
    """Sums over this data-parallel rank's response tokens (algorithm.loss names them); {} off the last stage."""
    grad_norm: float
    lr: float
    """Learning rate that this update used."""


class PolicyWorker:
    """A rank of the policy, from process start to its last step."""

    def __init__(
        self,
        rank: Rank,
        cfg: PolicyConfig,
        algorithm: AlgorithmConfig,
        *,
        device: str,
        dtype: str,
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        self.cfg, self.algorithm, self.temperature = cfg, algorithm, temperature
        self.device = "cuda" if device == "gpu" else "cpu"
        os.environ.update(RANK=str(rank.rank), WORLD_SIZE=str(rank.world_size), LOCAL_RANK="0")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # mcore orders TP communication by launch order
        if device == "cpu":
            from megatron_fapo.policy import cpu_backend

            cpu_backend.install()
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        else:
            torch.cuda.set_device(0)  # Ray shows each rank its own card only
        torch.distributed.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            init_method=f"tcp://{rank.master_address}:{rank.master_port}",
            rank=rank.rank,
            world_size=rank.world_size,
        )
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(cfg.parallel.tensor, cfg.parallel.pipeline)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self.state = parallel_state
        self._open_communicators()
        self.shape = read_model_shape(cfg.model_path, cfg.max_position_embeddings)
        self._build(getattr(torch, dtype))

    def _open_communicators(self) -> None:
        """Use every process group once, now: NCCL takes memory for a group at its first use, and in the middle of a
        step PyTorch's cache may have left it none."""
        state = self.state
        groups = (
            None,
            state.get_tensor_model_parallel_group(),
            state.get_pipeline_model_parallel_group(),
            state.get_model_parallel_group(),
            state.get_data_parallel_group(),
            state.get_data_parallel_group(with_context_parallel=True),
        )
        for group in groups:
            torch.distributed.all_reduce(torch.zeros(1, device=self.device), group=group)

    def _build(self, dtype: torch.dtype) -> None:
        from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

        from megatron_fapo.policy.hf_weights import load_hf
        from megatron_fapo.policy.model import build_model
        from megatron_fapo.policy.optimizer import ddp_config, make_optimizer

        self.chunks = [build_model(self.shape, self.cfg, dtype)]
        load_hf(self.chunks[0], self.shape, self.cfg.model_path)
        self.reference = None
        if self.algorithm.kl_coef > 0:
            self.reference = {name: p.detach().to("cpu", copy=True) for name, p in self.chunks[0].named_parameters()}
        self.ddp = [DistributedDataParallel(chunk.config, ddp_config(), chunk) for chunk in self.chunks]
        self.optimizer, self.scheduler = make_optimizer(self.ddp[0], self.cfg.optimizer, dtype)
        self.chunks[0].config.finalize_model_grads_func = finalize_model_grads
        self.chunks[0].config.no_sync_func = self.ddp[0].no_sync

    @property
    def data_rank(self) -> int:
        return int(self.state.get_data_parallel_rank())

    @property
    def is_last_stage(self) -> bool:
        return bool(self.state.is_pipeline_last_stage())

    @property
    def reports(self) -> bool:
        """Whether this rank's results are the ones to use: last stage, tensor rank 0."""
        return self.is_last_stage and self.state.get_tensor_model_parallel_rank() == 0

    def _forward(self, micro_batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, MicroBatch]:
        batch = next(micro_batches)
        width = batch.tokens_BT.shape[1]
        # Right padding plus causal attention: no response token sees a pad token. Transformer Engine builds the causal
        # mask itself; megatron's own attention wants it (True is masked).
        mask = None
        if not use_transformer_engine():
            mask = torch.ones(width, width, dtype=torch.bool, device=self.device).triu(1)[None, None]
        return model(batch.tokens_BT, batch.positions_BT, mask), batch

    def _logprob_entropy(self, logits_BTV: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron_fapo.policy.vocab_parallel import logprob_entropy

        return logprob_entropy(
            logits_BTV.reshape(-1, logits_BTV.shape[-1]),
            batch.index_N,
            batch.target_N,
            temperature=self.temperature,
            vocab=self.shape.vocab,
            rank=self.state.get_tensor_model_parallel_rank(),
            group=self.state.get_tensor_model_parallel_group(),
        )

    def _run(self, batches: list[MicroBatch], loss: Any, *, forward_only: bool) -> list[Any]:
        """All micro-batches through mcore's schedule; the last stage's loss outputs, in order."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def step(micro_batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
            output, batch = self._forward(micro_batches, model)
            return output, lambda logits, **_: loss(logits, batch)

        widest = max(batch.tokens_BT.shape[1] for batch in batches)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.ddp,
            num_microbatches=len(batches),
            seq_length=widest,
            micro_batch_size=batches[0].tokens_BT.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _micro_batches(self, samples: Sequence[TrainSample], max_tokens: int) -> list[MicroBatch]:
        largest = max((max(s.prompt_ids + s.response_ids) for s in samples), default=0)
        if largest >= self.shape.vocab:
            # The vocabulary-parallel embedding would read zeros for it, and nothing would fail.
            raise ValueError(
                f"token id {largest} is outside the model's vocabulary of {self.shape.vocab}: do the tokenizer and "
                "config.json in policy.model_path belong together?"
            )
        multiple = self.cfg.parallel.tensor if self.cfg.parallel.sequence_parallel else 1
        return build_micro_batches(with_filler(samples), max_tokens, multiple, self.device)

    @torch.no_grad()
    def logprobs(self, samples: Sequence[TrainSample], *, reference: bool = False) -> list[list[float]] | None:
        """Log-probabilities of the response tokens at the sampling temperature, one list per sample.

        Args:
            samples: this data-parallel rank's samples.
            reference: under the weights the run started from (kept when algorithm.kl_coef > 0).
        """
        batches = self._micro_batches(samples, self.cfg.logprob_micro_batch_tokens)

        def collect(logits: torch.Tensor, batch: MicroBatch) -> tuple[MicroBatch, list[float]]:
            return batch, self._logprob_entropy(logits, batch)[0].tolist()

        self.ddp[0].eval()
        with self._weights(self.reference) if reference else contextlib.nullcontext():
            outputs = self._run(batches, collect, forward_only=True)
        if not self.reports:
            return None
        result: list[list[float]] = [[] for _ in samples]
        for batch, values in outputs:
            offset = 0
            for sample, length in zip(batch.samples, batch.response_lengths, strict=True):
                if length:
                    result[sample] = values[offset : offset + length]
                offset += length
        return result

    @contextlib.contextmanager
    def _weights(self, other: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Run with other weights, then put the policy's own back."""
        assert other is not None, "algorithm.kl_coef is 0: no reference weights were kept"
        own = {name: p.detach().clone() for name, p in self.chunks[0].named_parameters()}
        for name, parameter in self.chunks[0].named_parameters():
            parameter.data.copy_(other[name])
        try:
            yield
        finally:
            for name, parameter in self.chunks[0].named_parameters():
                parameter.data.copy_(own[name])

    def gradients(self, samples: Sequence[TrainSample], *, loss: str = "policy") -> dict[str, float]:
        """Forward and backward of one global mini-batch; gradients stay in the buffers. Returns token sums."""
        batches = self._micro_batches(samples, self.cfg.micro_batch_tokens)

        def token_loss(
            logits: torch.Tensor, batch: MicroBatch
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            logprob_N, entropy_N = self._logprob_entropy(logits, batch)
            count = torch.tensor(len(batch.target_N), dtype=torch.int, device=logits.device)
            if loss == SUPERVISED:
                total = -logprob_N.sum()
                return total, count, {"tokens": count.double(), "supervised_loss": total.detach().double()}
            outputs = policy_loss(_loss_inputs(batch, logprob_N, entropy_N), self.algorithm)
            return outputs.loss_sum, count, outputs.token_sums

        self.ddp[0].train()
        self.ddp[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        sums: dict[str, float] = {}
        for micro in self._run(batches, token_loss, forward_only=False):
            for name, value in micro.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def train(self, samples: Sequence[TrainSample], *, loss: str = "policy") -> StepResult:
        """One optimizer update on one global mini-batch, of which `samples` is this data-parallel rank's part."""
        sums = self.gradients(samples, loss=loss)
        lr = float(self.optimizer.param_groups[0]["lr"])
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError("the optimizer skipped its update: gradients hold inf or nan")
        self.scheduler.step(increment=1)
        return StepResult(sums if self.reports else {}, float(grad_norm or 0.0), lr)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF-named full tensors of this pipeline stage; collective over its tensor ranks."""
        from megatron_fapo.policy.hf_weights import export_hf

        return export_hf(self.chunks[0], self.shape)

    def close(self) -> None:
        """Leave the process groups, so that this process could join others."""
        self.state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _loss_inputs(batch: MicroBatch, logprob_N: torch.Tensor, entropy_N: torch.Tensor) -> LossInputs:
    """The micro-batch's response tokens as one row: nothing is padded, so nothing is masked."""

    def row(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[None]

    assert batch.old_N is not None, "old log-probabilities are computed before training"
    return LossInputs(
        logprobs_BT=logprob_N[None],
        old_logprobs_BT=batch.old_N[None],
        advantages_BT=batch.advantage_N[None],
        mask_BT=torch.ones_like(logprob_N[None], dtype=torch.bool),
        behaviour_logprobs_BT=row(batch.behaviour_N),
        reference_logprobs_BT=row(batch.reference_N),
        entropy_BT=entropy_N[None],
    )
