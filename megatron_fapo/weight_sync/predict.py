"""How long a plan takes at given link rates. Pure.

Each card copies what it maps, one copy after the other; then messages are exchanged in steps of one chunk of every
part, where what arrives in one step is passed on in the next: a plan of depth d takes d steps more than its longest
part has chunks, and each step is as long as the busiest link's share of it. Links carry both directions at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron_fapo.weight_sync.plan import Endpoint, Plan
from megatron_fapo.weight_sync.share import chunk_size, is_message


@dataclass(frozen=True)
class LinkRates:
    """GB/s of one card."""

    memory_gbs: float
    """Read and written bytes of its own memory together."""
    link_gbs: float
    """To other cards of the node, each way."""
    network_gbs: float
    """To other nodes, each way."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of one refit's transfers; pausing, post-load steps and checks come on top."""

    local_s: float
    """Copies within a card, of the card that has most."""
    node_s: float
    """Copies and messages between cards of a node, likewise; those that are messages run beside the network's."""
    network_s: float
    """Messages between nodes, likewise."""
    fill_s: float
    """Steps in which chunks are on their way down the chains and not everything is busy."""
    total_s: float
    limits: str
    """The link that the total rests on most."""
    critical: str
    """The process whose card carries most over that link, and how much."""


def predict(
    plan: Plan,
    sources: Sequence[Endpoint],
    targets: Sequence[Endpoint],
    rates: LinkRates,
    *,
    node_messages: bool,
    bucket_bytes: int,
) -> Prediction:
    """Seconds of the busiest card by link. Processes on one card share its links; on CPUs each has its own.

    Args:
        node_messages: whether cards of one node exchange messages, too (`weight_sync.node_link`).
        bucket_bytes: of messages that a process holds at once (`weight_sync.bucket_mb`).
    """
    ends = [*sources, *targets]
    cards: list[Hashable] = [(end.node, end.gpu) if end.gpu else i for i, end in enumerate(ends)]
    out: dict[tuple[str, Hashable], int] = defaultdict(int)
    into: dict[tuple[str, Hashable], int] = defaultdict(int)
    longest = depth = 0
    for hop in plan.hops:
        nbytes, message = plan.parts[hop.part].nbytes, is_message(hop, node_messages)
        link = "sent" if message and hop.link == "node" else hop.link
        out[link, cards[hop.giver]] += nbytes
        into[link, cards[hop.taker]] += nbytes
        if message:
            longest, depth = max(longest, nbytes), max(depth, hop.depth)
    rate = {"local": rates.memory_gbs / 2, "node": rates.link_gbs, "sent": rates.link_gbs}
    rate["network"] = rates.network_gbs
    seconds, busiest = dict.fromkeys(rate, 0.0), {}
    for (link, card), nbytes in [*into.items(), *out.items()]:
        if (took := nbytes / (rate[link] * 1e9)) > seconds[link]:
            seconds[link], busiest[link] = took, (card, nbytes)
    exchange_s = max(seconds["network"], seconds["sent"])
    steps = max(1, longest / chunk_size(plan, node_messages=node_messages, bucket_bytes=bucket_bytes))
    fill_s = exchange_s * depth / steps
    limits = max(seconds, key=seconds.__getitem__)
    critical = "nothing moves"
    if limits in busiest:
        card, nbytes = busiest[limits]
        critical = f"{_name(cards.index(card), ends, plan.sources)}, {nbytes / 1e9:.3g} GB"
    total_s = seconds["local"] + seconds["node"] + exchange_s + fill_s
    limits = "node" if limits == "sent" else limits
    node_s = seconds["node"] + seconds["sent"]
    return Prediction(seconds["local"], node_s, seconds["network"], fill_s, total_s, limits, critical)


def _name(process: int, ends: Sequence[Endpoint], sources: int) -> str:
    role = f"policy rank {process}" if process < sources else f"engine worker {process - sources}"
    return f"{role} on node {ends[process].node}"


def all_pull_s(model_bytes: int, replicas: int, cards: int, rates: LinkRates) -> float:
    """What the plan avoids: every replica pulls a copy of its own over the network, spread over so many NICs."""
    return model_bytes * replicas / cards / (rates.network_gbs * 1e9)


def broadcast_s(model_bytes: int, rates: LinkRates) -> float:
    """What the plan avoids: one rank has the whole model and sends it through its NIC."""
    return model_bytes / (rates.network_gbs * 1e9)
