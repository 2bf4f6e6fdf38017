"""What a worker of an engine wants, worked out from the model's shape: to plan refits of engines that do not run.

A run traces its engines (`trace.py`); a test holds the two together. As vLLM lays models out: q, k, v and gate, up are
rows of one tensor each, KV heads are copied where there are fewer than workers, the vocabulary is padded to a multiple
of 64 and then split, experts are slices of two tensors.
"""

from __future__ import annotations

from megatron_fapo.policy.hf_config import ModelShape
from megatron_fapo.weight_sync.regions import Fill, Index, Ints, LocalTensor, Region, View, contiguous_stride

_VOCABULARY_MULTIPLE = 64


def target_problems(shape: ModelShape, tensor_parallel: int) -> list[str]:
    """Why vLLM cannot split the model over so many workers; empty when it can."""
    t = tensor_parallel
    sizes = {"attention heads": shape.heads, "padded vocabulary rows": _padded_vocab(shape)}
    sizes |= {"columns of an expert": shape.experts.ffn} if shape.experts else {"FFN columns": shape.ffn}
    problems = [f"{size} {what} do not divide by an engine's {t} workers" for what, size in sizes.items() if size % t]
    if shape.kv_heads % t and t % shape.kv_heads:
        problems.append(f"{shape.kv_heads} KV heads can be neither split nor copied evenly over {t} workers")
    return problems


def _padded_vocab(shape: ModelShape) -> int:
    return -(-shape.vocab // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def planned_target(shape: ModelShape, tensor_parallel: int, rank: int, dtype: str) -> Index:
    """The index of worker `rank` of `tensor_parallel`; `dtype` as torch names it."""
    return _Target(shape, tensor_parallel, rank, dtype).index()


class _Target:
    def __init__(self, shape: ModelShape, workers: int, rank: int, dtype: str) -> None:
        self.shape, self.workers, self.rank, self.dtype = shape, workers, rank, dtype
        self.tensors: dict[str, LocalTensor] = {}
        self.regions: list[Region] = []
        self.fills: list[Fill] = []

    def index(self) -> Index:
        shape = self.shape
        self._vocabulary("model.embed_tokens.weight")
        for layer in range(shape.layers):
            self._attention(f"model.layers.{layer}.self_attn")
            self._experts(f"model.layers.{layer}.mlp") if shape.experts else self._mlp(f"model.layers.{layer}.mlp")
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._whole(f"model.layers.{layer}.{norm}.weight", (shape.hidden,))
        self._whole("model.norm.weight", (shape.hidden,))
        if not shape.tied:
            self._vocabulary("lm_head.weight")
        return Index(self.tensors, tuple(self.regions), tuple(self.fills))

    def _tensor(self, name: str, shape: Ints) -> None:
        self.tensors[name] = LocalTensor(shape, self.dtype)

    def _want(self, name: str, start: Ints, shape: Ints, tensor: str, offset: int = 0) -> None:
        """A box that lies row after row in the tensor."""
        self.regions.append(Region(name, start, shape, View(tensor, offset, contiguous_stride(shape))))

    def _whole(self, name: str, shape: Ints) -> None:
        self._tensor(name, shape)
        self._want(name, (0,) * len(shape), shape, name)

    def _rows(self, tensor: str, columns: Ints, *wanted: tuple[str, int, int]) -> None:
        """A tensor of rows of several HF tensors: (name, first row, rows) of each."""
        self._tensor(tensor, (sum(rows for _, _, rows in wanted), *columns))
        offset, rest = 0, (0,) * len(columns)
        for name, first, rows in wanted:
            self._want(name, (first, *rest), (rows, *columns), tensor, offset)
            offset += rows * (columns[0] if columns else 1)

    def _columns(self, name: str, rows: int, columns: int) -> None:
        each = columns // self.workers
        self._tensor(name, (rows, each))
        self._want(name, (0, self.rank * each), (rows, each), name)

    def _vocabulary(self, name: str) -> None:
        each, hidden = _padded_vocab(self.shape) // self.workers, self.shape.hidden
        first = self.rank * each
        rows = min(each, max(0, self.shape.vocab - first))
        self._tensor(name, (each, hidden))
        if rows:
            self._want(name, (first, 0), (rows, hidden), name)
        if rows < each:
            self.fills.append(Fill((each - rows, hidden), View(name, rows * hidden, (hidden, 1)), 0.0))

    def _attention(self, prefix: str) -> None:
        shape, dim = self.shape, self.shape.head_dim
        q, kv = shape.heads // self.workers * dim, max(1, shape.kv_heads // self.workers) * dim
        kv_shard = self.rank // max(1, self.workers // shape.kv_heads)
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            self._rows(
                f"{prefix}.qkv_proj.{kind}",
                (shape.hidden,) if kind == "weight" else (),
                (f"{prefix}.q_proj.{kind}", self.rank * q, q),
                (f"{prefix}.k_proj.{kind}", kv_shard * kv, kv),
                (f"{prefix}.v_proj.{kind}", kv_shard * kv, kv),
            )
        self._columns(f"{prefix}.o_proj.weight", shape.hidden, shape.heads * dim)
        if shape.qk_norm:
            self._whole(f"{prefix}.q_norm.weight", (dim,))
            self._whole(f"{prefix}.k_norm.weight", (dim,))

    def _mlp(self, prefix: str) -> None:
        each = self.shape.ffn // self.workers
        gate_up = [(f"{prefix}.{name}_proj.weight", self.rank * each, each) for name in ("gate", "up")]
        self._rows(f"{prefix}.gate_up_proj.weight", (self.shape.hidden,), *gate_up)
        self._columns(f"{prefix}.down_proj.weight", self.shape.hidden, self.shape.ffn)

    def _experts(self, prefix: str) -> None:
        moe, hidden = self.shape.experts, self.shape.hidden
        assert moe is not None
        each, tensors = moe.ffn // self.workers, f"{prefix}.experts.routed_experts"
        self._whole(f"{prefix}.gate.weight", (moe.count, hidden))
        self._tensor(f"{tensors}.w13_weight", (moe.count, 2 * each, hidden))
        self._tensor(f"{tensors}.w2_weight", (moe.count, hidden, each))
        experts = [f"{prefix}.experts.{expert}" for expert in range(moe.count)]
        for i, name in enumerate(f"{e}.{half}_proj.weight" for e in experts for half in ("gate", "up")):
            self._want(name, (self.rank * each, 0), (each, hidden), f"{tensors}.w13_weight", i * each * hidden)
        for i, expert in enumerate(experts):
            start, shape = (0, self.rank * each), (hidden, each)
            self._want(f"{expert}.down_proj.weight", start, shape, f"{tensors}.w2_weight", i * hidden * each)
