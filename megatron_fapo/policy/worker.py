"""One policy rank: model, optimizer, forward and train steps.

In: samples of a data-parallel rank. Out: log-probabilities, or an optimizer step and its token sums.
Owned by a Ray actor (`policy/group.py`); the same class runs in tests under plain multiprocessing.

Every method is collective: all ranks of the policy call it in step. Results that only the last pipeline stage has
come from its tensor rank 0; other ranks return None.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_fapo.algorithm.loss import LossInputs, policy_loss
from megatron_fapo.config.algorithm import AlgorithmConfig
from megatron_fapo.config.policy import PolicyConfig
from megatron_fapo.observe.trace import OWN, TRACER
from megatron_fapo.policy.batch import MicroBatch, Padding, TrainSample, build_micro_batch
from megatron_fapo.policy.hf_config import read_model_shape
from megatron_fapo.policy.memory import PolicyMemory
from megatron_fapo.policy.parallel import Rank, join

SUPERVISED = "supervised"
"""Loss name for warm-ups: cross-entropy on the response tokens, with nothing else changed."""

ByMicroBatch = list[list[np.ndarray[Any, Any]]]
"""Log-probabilities of the response tokens, float32: [micro-batch][sample]."""

Placed = tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]
"""Log-probabilities of a micro-batch, which of its response tokens they are of, and how many each sample has."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update did."""

    token_sums: dict[str, float]
    """Sums over this data-parallel rank's response tokens (algorithm.loss names them); {} off the last stage."""
    grad_norm: float
    lr: float
    """Learning rate that this update used."""
    logprobs: ByMicroBatch | None = None
    """As the policy had them before the update, if samples came without `old_logprobs`; None off ranks that report."""


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
        self.state = join(rank, cfg.parallel, self.device, seed)
        self.context = (self.state.get_context_parallel_rank(), cfg.parallel.context)
        self.padding = Padding.of(
            context=cfg.parallel.context,
            tensor=cfg.parallel.tensor if cfg.parallel.sequence_parallel else 1,
            fp8=cfg.fp8 != "none",
        )
        self.shape = read_model_shape(cfg.model_path, cfg.max_position_embeddings)
        self._build(getattr(torch, dtype))

    def _build(self, dtype: torch.dtype) -> None:
        from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

        from megatron_fapo.policy.hf_weights import load_hf
        from megatron_fapo.policy.model import build_chunks
        from megatron_fapo.policy.optimizer import ddp_config, make_optimizer

        self.chunks = build_chunks(self.shape, self.cfg, dtype)
        load_hf(self.chunks, self.shape, self.cfg.model_path)
        self.reference = self._copy_of_weights("cpu") if self.algorithm.kl_coef > 0 else None
        config = self.chunks[0].config
        buckets = ddp_config(overlap=self.cfg.parallel.overlap_grad_reduce)
        self.ddp = [
            # Only the first chunk's reduction can hide behind a backward pass that still runs.
            DistributedDataParallel(config, buckets, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(self.chunks)
        ]
        self.optimizer, self.scheduler = make_optimizer(self.ddp, self.cfg.optimizer, dtype)
        config.finalize_model_grads_func = finalize_model_grads
        waits = [model.no_sync for model in self.ddp]
        config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self.memory = PolicyMemory(self.ddp, self.optimizer, self.device, offload=self.cfg.offload)

    @property
    def data_rank(self) -> int:
        """Which samples are this rank's: its data-parallel replica."""
        return int(self.state.get_data_parallel_rank())

    @property
    def is_last_stage(self) -> bool:
        return bool(self.state.is_pipeline_last_stage())

    @property
    def reports(self) -> bool:
        """Whether this rank's results are to be used: last stage, tensor rank 0. Context ranks each have a part of the
        token sums, and all of the log-probabilities."""
        return self.is_last_stage and self.state.get_tensor_model_parallel_rank() == 0

    def _forward(self, batch: MicroBatch, model: Any) -> torch.Tensor:
        """Hidden states for the next stage; from the last one [2, N]: log-probability and entropy per token."""
        from megatron_fapo.policy.vocab_parallel import logprob_entropy

        group = self.state.get_tensor_model_parallel_group()

        def head(hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, **_: Any) -> torch.Tensor:
            hidden = _hidden_of_all_tokens(hidden_states, sequence_parallel=self.cfg.parallel.sequence_parallel)
            logprob_N, entropy_N = logprob_entropy(
                hidden[:, 0],
                output_layer.weight if output_weight is None else output_weight,
                batch.index_N,
                batch.target_N,
                temperature=self.temperature,
                vocab=self.shape.vocab,
                rank=group.rank(),
                group=group,
                keep=self.cfg.output_layer == "keep",
            )
            assert entropy_N is not None
            # Without an entropy term it is a metric only, whose gradient of zeros would be worked out all the same.
            return torch.stack([logprob_N, entropy_N if self.algorithm.entropy_coef else entropy_N.detach()])

        packed = batch.packed_seq_params()
        output: torch.Tensor = model(batch.tokens_1t, None, None, packed_seq_params=packed, output_processor=head)
        return output

    def _run(self, packs: Sequence[Sequence[TrainSample]], loss: Any, *, forward_only: bool) -> list[Any]:
        """All micro-batches through mcore's schedule; the last stage's loss outputs, in order."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self._refuse_foreign_tokens(packs)

        def step(packs: Iterator[Sequence[TrainSample]], model: Any) -> tuple[torch.Tensor, Any]:
            rank, ranks = self.context
            batch = build_micro_batch(next(packs), self.padding, device=self.device, rank=rank, ranks=ranks)
            return self._forward(batch, model), lambda output, **_: loss(output[0], output[1], batch)

        chunks = len(self.ddp)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(packs) for _ in self.ddp] if chunks > 1 else iter(packs),
            model=self.ddp,
            num_microbatches=len(packs),
            seq_length=1,  # shapes travel with the tensors: every pack has its own length
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _refuse_foreign_tokens(self, packs: Sequence[Sequence[TrainSample]]) -> None:
        largest = max((int(s.token_ids.max()) for pack in packs for s in pack), default=0)
        if largest >= self.shape.vocab:
            # The vocabulary-parallel embedding would read zeros for it, and nothing would fail.
            raise ValueError(
                f"token id {largest} is outside the model's vocabulary of {self.shape.vocab}: do the tokenizer and "
                "config.json in policy.model_path belong together?"
            )

    @torch.no_grad()
    def logprobs(self, packs: Sequence[Sequence[TrainSample]], *, reference: bool = False) -> ByMicroBatch | None:
        """Log-probabilities of the response tokens at the sampling temperature.

        Args:
            packs: the samples of each micro-batch of this data-parallel rank.
            reference: under the weights the run started from (kept when algorithm.kl_coef > 0).
        """

        self.memory.require("logprobs")
        for model in self.ddp:
            model.eval()
        with self._weights(self.reference) if reference else contextlib.nullcontext():
            outputs = self._run(packs, lambda logprob_N, _, batch: _placed(logprob_N, batch), forward_only=True)
        return self._by_sample(outputs)

    def _by_sample(self, outputs: Sequence[Placed]) -> ByMicroBatch | None:
        """What all micro-batches have given, fetched at once: while it fetches, a rank launches nothing."""
        rows = []
        for logprob_N, place_N, lengths in outputs:
            row = torch.zeros(sum(lengths), device=self.device)
            row[place_N] = logprob_N
            rows.append(row)
        if not rows:  # not the last stage
            return None
        values = torch.cat(rows)
        if self.context[1] > 1:  # each context rank has a part of the tokens
            torch.distributed.all_reduce(values, group=self.state.get_context_parallel_group())
        of_packs = [lengths for _, _, lengths in outputs]
        parts = iter(np.split(values.cpu().numpy(), np.cumsum(list(itertools.chain(*of_packs)), dtype=int)))
        return [[next(parts) for _ in lengths] for lengths in of_packs] if self.reports else None

    def _copy_of_weights(self, device: str | None = None) -> list[torch.Tensor]:
        return [p.detach().to(device or p.device, copy=True) for chunk in self.chunks for p in chunk.parameters()]

    @contextlib.contextmanager
    def _weights(self, other: list[torch.Tensor] | None) -> Iterator[None]:
        """Run with other weights, then put the policy's own back."""
        assert other is not None, "algorithm.kl_coef is 0: no reference weights were kept"
        own = self._copy_of_weights()
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        for parameter, value in zip(parameters, other, strict=True):
            parameter.data.copy_(value)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, own, strict=True):
                parameter.data.copy_(value)

    def gradients(
        self, packs: Sequence[Sequence[TrainSample]], *, loss: str = "policy"
    ) -> tuple[dict[str, float], ByMicroBatch | None]:
        """Forward and backward of one global mini-batch; gradients stay in the buffers. Returns token sums, and
        log-probabilities if the samples came without old ones."""

        def token_loss(
            logprob_N: torch.Tensor, entropy_N: torch.Tensor, batch: MicroBatch
        ) -> tuple[torch.Tensor, torch.Tensor, tuple[dict[str, torch.Tensor], Placed]]:
            # Filled on the device: a number copied there would have the host wait for the forward pass.
            count = torch.full((), len(batch.target_N), dtype=torch.int, device=self.device)
            total, sums = logprob_N.sum(), {}
            if loss == SUPERVISED:
                total = -total
                sums = {"tokens": count.double(), "supervised_loss": total.detach().double()}
            elif len(batch.target_N):  # else no samples, or their responses lie with other context ranks
                outputs = policy_loss(_loss_inputs(batch, logprob_N, entropy_N), self.algorithm)
                total, sums = outputs.loss_sum, outputs.token_sums
            return total, count, (sums, _placed(logprob_N.detach(), batch))

        self.memory.require("train")
        for model in self.ddp:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        given = {s.old_logprobs is not None for pack in packs for s in pack}
        assert len(given) < 2, "either all samples of a mini-batch have old log-probabilities or none has"
        outputs = self._run(packs, token_loss, forward_only=False)
        sums: dict[str, torch.Tensor] = {}
        for micro, _ in outputs:
            for name, value in micro.items():
                sums[name] = sums[name] + value if name in sums else value
        values = torch.stack([*sums.values()]).tolist() if sums else []
        own = loss != SUPERVISED and True not in given
        logprobs = self._by_sample([placed for _, placed in outputs]) if own else None
        return dict(zip(sums, values, strict=True)), logprobs

    def train(self, packs: Sequence[Sequence[TrainSample]], *, loss: str = "policy") -> StepResult:
        """One optimizer update on one global mini-batch; `packs` are this data-parallel rank's micro-batches."""
        with TRACER.on(OWN, "gradients"):
            sums, logprobs = self.gradients(packs, loss=loss)
        lr = float(self.optimizer.param_groups[0]["lr"])
        with TRACER.on(OWN, "optimizer"):
            updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise RuntimeError("the optimizer skipped its update: gradients hold inf or nan")
        self.scheduler.step(increment=1)
        return StepResult(sums if self.reports else {}, float(grad_norm or 0.0), lr, logprobs)

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """HF-named full tensors of this pipeline stage; collective over the ranks that `exports`."""
        from megatron_fapo.policy.hf_weights import export_hf

        self.memory.require("refit")
        return export_hf(self.chunks, self.shape)

    def close(self) -> None:
        """Leave the process groups, so that this process could join others."""
        self.state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _hidden_of_all_tokens(hidden_states: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
    """The last stage's output on every tensor rank; what each adds to its gradient is summed on the way back."""
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden_states)


def _placed(logprob_N: torch.Tensor, batch: MicroBatch) -> Placed:
    return logprob_N, batch.place_N, batch.response_lengths


def _loss_inputs(batch: MicroBatch, logprob_N: torch.Tensor, entropy_N: torch.Tensor) -> LossInputs:
    """The micro-batch's response tokens as one row: nothing is padded, so nothing is masked."""

    def row(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[None]

    old_N = logprob_N.detach() if batch.old_N is None else batch.old_N
    return LossInputs(
        logprobs_BT=logprob_N[None],
        old_logprobs_BT=old_N[None],
        advantages_BT=batch.advantage_N[None],
        mask_BT=torch.ones_like(logprob_N[None], dtype=torch.bool),
        behaviour_logprobs_BT=row(batch.behaviour_N),
        reference_logprobs_BT=row(batch.reference_N),
        entropy_BT=entropy_N[None],
    )
