"""The policy loss against a plain formula for one token, and its invariances."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fapo.algorithm.loss import LossInputs, finish_token_sums, policy_loss
from megatron_fapo.config.algorithm import AlgorithmConfig

DIFFERENTIABLE = ("logprobs_BT", "entropy_BT")
ALL_OPTIONS = [
    AlgorithmConfig(clip_low=low, clip_high=high, dual_clip=dual, tis_cap=tis, kl_coef=kl, entropy_coef=entropy)
    for (low, high), dual, tis, kl, entropy in itertools.product(
        [(0.2, 0.28), (0.1, 0.5)], [None, 3.0, 10.0], [None, 1.0, 2.0], [0.0, 0.1], [0.0, 0.01]
    )
]
EVERYTHING_ON = AlgorithmConfig(dual_clip=3.0, tis_cap=2.0, kl_coef=0.1, entropy_coef=0.01)


def random_inputs(seed: int, shape: tuple[int, int] = (3, 7)) -> LossInputs:
    """Ratios spread over every branch, one token beyond the log-ratio clamp in each direction among them."""
    torch.manual_seed(seed)
    old = -2 * torch.rand(shape, dtype=torch.float64)
    logprobs = old + torch.randn(shape, dtype=torch.float64)
    if logprobs.numel() > 2:
        logprobs.view(-1)[0] = old.view(-1)[0] + 21
        logprobs.view(-1)[1] = old.view(-1)[1] - 21
    advantages = torch.randn(shape, dtype=torch.float64)
    return LossInputs(
        logprobs_BT=logprobs.requires_grad_(),
        old_logprobs_BT=old,
        advantages_BT=torch.where(torch.rand(shape) < 0.1, 0.0, advantages),
        mask_BT=torch.rand(shape) < 0.7,
        behaviour_logprobs_BT=old + torch.randn(shape, dtype=torch.float64),
        reference_logprobs_BT=old + torch.randn(shape, dtype=torch.float64),
        entropy_BT=torch.rand(shape, dtype=torch.float64).requires_grad_(),
    )


def one_token(logp, old, advantage, behaviour, reference, entropy, cfg: AlgorithmConfig):
    """The loss of one token, case by case, in the words of the method; torch scalars, so autograd applies."""
    log_ratio = logp - old
    if abs(log_ratio.item()) > 20:
        log_ratio = torch.tensor(math.copysign(20.0, log_ratio.item()), dtype=torch.float64)
    ratio = torch.exp(log_ratio)
    if advantage >= 0:  # raising a good token pays only up to 1 + clip_high
        effective = ratio if ratio <= 1 + cfg.clip_high else 1 + cfg.clip_high
    elif ratio < 1 - cfg.clip_low:  # lowering a bad token pays only down to 1 - clip_low
        effective = 1 - cfg.clip_low
    elif cfg.dual_clip is not None and ratio > cfg.dual_clip:
        effective = cfg.dual_clip
    else:
        effective = ratio
    weight = 1.0 if cfg.tis_cap is None else min(math.exp(old - behaviour), cfg.tis_cap)
    gap = reference - logp
    if abs(gap.item()) > 20:
        gap = torch.tensor(math.copysign(20.0, gap.item()), dtype=torch.float64)
    return -advantage * effective * weight + cfg.kl_coef * (torch.exp(gap) - 1 - gap) - cfg.entropy_coef * entropy


def plain_loss(inputs: LossInputs, cfg: AlgorithmConfig):
    total = 0 * inputs.logprobs_BT.sum() + 0 * inputs.entropy_BT.sum()
    for b, t in inputs.mask_BT.nonzero().tolist():
        total = total + one_token(
            inputs.logprobs_BT[b, t],
            inputs.old_logprobs_BT[b, t].item(),
            inputs.advantages_BT[b, t].item(),
            inputs.behaviour_logprobs_BT[b, t].item(),
            inputs.reference_logprobs_BT[b, t].item(),
            inputs.entropy_BT[b, t],
            cfg,
        )
    return total


def value_and_grads(loss, inputs: LossInputs):
    grads = torch.autograd.grad(loss, [getattr(inputs, name) for name in DIFFERENTIABLE], allow_unused=True)
    return loss.detach(), [torch.zeros_like(inputs.logprobs_BT) if g is None else g for g in grads]


def indexed(inputs: LossInputs, rows) -> LossInputs:
    return LossInputs(**{name: value[rows] for name, value in vars(inputs).items()})


@pytest.mark.parametrize(
    "cfg", ALL_OPTIONS, ids=lambda c: f"{c.clip_low}-{c.dual_clip}-{c.tis_cap}-{c.kl_coef}-{c.entropy_coef}"
)
def test_value_and_gradient_equal_the_plain_formula(cfg):
    for seed in range(3):
        inputs = random_inputs(seed)
        value, grads = value_and_grads(policy_loss(inputs, cfg).loss_sum, inputs)
        expected, expected_grads = value_and_grads(plain_loss(inputs, cfg), inputs)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_on_policy_gradient_is_minus_the_advantage():
    """At ratio exactly 1 both branches of the maximum tie; the gradient must still be the policy gradient."""
    inputs = random_inputs(0)
    logprobs = inputs.old_logprobs_BT.clone().requires_grad_()
    on_policy = LossInputs(logprobs, inputs.old_logprobs_BT, inputs.advantages_BT, inputs.mask_BT)
    (grad,) = torch.autograd.grad(policy_loss(on_policy, AlgorithmConfig()).loss_sum, logprobs)
    torch.testing.assert_close(grad, -inputs.advantages_BT * inputs.mask_BT, rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), data=st.data())
def test_any_split_into_micro_batches_gives_the_whole(seed, rows, data):
    inputs = random_inputs(seed, (rows, 5))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))
    whole = policy_loss(inputs, EVERYTHING_ON)
    parts = [policy_loss(indexed(inputs, owner == part), EVERYTHING_ON) for part in range(4)]  # some without rows
    value, grads = value_and_grads(whole.loss_sum, inputs)
    part_value, part_grads = value_and_grads(sum(part.loss_sum for part in parts), inputs)
    torch.testing.assert_close(part_value, value, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(part_grads, grads, rtol=1e-12, atol=0)
    added = {name: sum(part.token_sums[name] for part in parts) for name in whole.token_sums}
    assert all(part.token_sums.keys() == whole.token_sums.keys() for part in parts)
    assert finish_token_sums(added) == pytest.approx(finish_token_sums(whole.token_sums), rel=1e-12, abs=1e-12)


def test_packed_and_padded_layouts_agree():
    inputs = random_inputs(4)
    packed = LossInputs(**{name: value.reshape(1, -1) for name, value in vars(inputs).items()})
    padded_loss, packed_loss = (policy_loss(i, EVERYTHING_ON).loss_sum for i in (inputs, packed))
    torch.testing.assert_close(padded_loss, packed_loss, rtol=1e-14, atol=0)


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e38])
@pytest.mark.parametrize("field", [f for f in vars(random_inputs(0)) if f != "mask_BT"])
def test_masked_positions_reach_neither_values_nor_gradients(field, garbage):
    inputs = random_inputs(5)
    value, grads = value_and_grads(policy_loss(inputs, EVERYTHING_ON).loss_sum, inputs)
    dirty = getattr(inputs, field).detach().clone()
    dirty[~inputs.mask_BT] = garbage
    spoilt = LossInputs(**(vars(inputs) | {field: dirty.requires_grad_(field in DIFFERENTIABLE)}))
    outputs = policy_loss(spoilt, EVERYTHING_ON)
    spoilt_value, spoilt_grads = value_and_grads(outputs.loss_sum, spoilt)
    assert torch.equal(value, spoilt_value)
    for clean, same in zip(grads, spoilt_grads, strict=True):
        assert torch.equal(clean, same)
        assert (same[~inputs.mask_BT] == 0).all()
    assert finish_token_sums(outputs.token_sums) == finish_token_sums(policy_loss(inputs, EVERYTHING_ON).token_sums)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_no_tokens_is_a_zero_that_can_be_differentiated(shape):
    inputs = random_inputs(6, shape)
    empty = LossInputs(**(vars(inputs) | {"mask_BT": torch.zeros(shape, dtype=torch.bool)}))
    outputs = policy_loss(empty, EVERYTHING_ON)
    value, grads = value_and_grads(outputs.loss_sum, empty)
    assert value == 0
    assert all(torch.equal(grad, torch.zeros(shape, dtype=torch.float64)) for grad in grads)
    assert finish_token_sums(outputs.token_sums) == {"policy/tokens": 0.0}


def test_metrics_of_a_hand_counted_batch():
    ratios = torch.tensor([[0.5, 11.0, 0.5, 12.0, 1.5, 5.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, -2.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, True, False]])
    zeros = torch.zeros_like(ratios)
    behaviour = torch.tensor([[0.0, 0.0, 0.0, -math.log(4.0), math.log(2.0), 0.0]], dtype=torch.float64)
    inputs = LossInputs(ratios.log(), zeros, advantages, mask, behaviour, entropy_BT=torch.full_like(ratios, 0.5))
    outputs = policy_loss(inputs, AlgorithmConfig(tis_cap=2.0))
    logs = [math.log(0.5), math.log(11), math.log(0.5), math.log(12), math.log(1.5)]
    # unclipped 0.5; clipped high 1.28; clipped low 0.8; dual clip 10, TIS weight 4 cut to 2; 2 * 1.5 at weight 1/2
    surrogate = (-0.5 - 1.28 + 0.8 + 10 * 2 + 3 * 0.5) / 5
    assert finish_token_sums(outputs.token_sums) == pytest.approx(
        {
            "policy/tokens": 5,
            "policy/loss": surrogate,
            "policy/surrogate_loss": surrogate,
            "policy/ratio_mean": 25.5 / 5,
            "policy/advantage_mean": -2 / 5,
            "policy/kl_old_new_k1": -sum(logs) / 5,
            "policy/kl_old_new_k3": (25.5 - 5 - sum(logs)) / 5,
            "policy/clip_high_fraction": 1 / 5,
            "policy/clip_low_fraction": 1 / 5,
            "policy/dual_clip_fraction": 1 / 5,
            "policy/tis_weight_mean": (1 + 1 + 1 + 2 + 0.5) / 5,
            "policy/tis_truncated_fraction": 1 / 5,
            "policy/entropy": 0.5,
        }
    )


def test_bfloat16_inputs_are_computed_in_float32():
    inputs = random_inputs(7)
    half = LossInputs(**{k: v if v.dtype == torch.bool else v.detach().bfloat16() for k, v in vars(inputs).items()})
    upcast = LossInputs(**{k: v if v.dtype == torch.bool else v.float() for k, v in vars(half).items()})
    assert torch.equal(policy_loss(half, EVERYTHING_ON).loss_sum, policy_loss(upcast, EVERYTHING_ON).loss_sum)


def test_entropy_that_is_only_reported_costs_no_backward_pass():
    inputs = random_inputs(8)
    loss = policy_loss(inputs, AlgorithmConfig()).loss_sum
    assert torch.autograd.grad(loss, [inputs.entropy_BT], allow_unused=True) == (None,)


def test_all_problems_of_the_inputs_are_reported_at_once():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"mask_BT is torch\.float32") as error:
        policy_loss(LossInputs(x, torch.zeros(2, 4), x, torch.ones(2, 3)), EVERYTHING_ON)
    for part in (
        "old_logprobs_BT has shape (2, 4)",
        "algorithm.tis_cap",
        "algorithm.kl_coef",
        "algorithm.entropy_coef",
    ):
        assert part in str(error.value)
