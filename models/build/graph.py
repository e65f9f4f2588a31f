"""Assemble a decoder of the Llama kind as an ONNX graph without weights.

The graph reads fp32 embeddings `x` (B, T, C) of B sequences and extends static key-value buffers in place; it gives
`hidden` (B, T, C), normalised, and, if it has the vocabulary head, `logits` of the positions from `logits_from` on
(−1: the last one only). Each sequence has a `last_position` of its own. onnxruntime's attention takes B > 1 for T = 1
only. A span that does not end the model hands its residual stream on as `carried`. Weights are initializers named as in
`models.artifact.names`, to be handed in when a session is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import ModelProto, TensorProto, helper

from models.artifact.names import BLOCK, BYTE, DRAFT, INT8_MAX, LOGITS_FROM, Span, bits_and_block, file_of
from models.artifact.shape import GELU_TANH, SILU, LlamaShape

Dims = tuple[int, ...]
CONTRIB = "com.microsoft"
FAST_ACTIVATIONS = 4
"""MatMulNBits' accuracy level that rounds activations to int8 per block; 0 keeps them in fp32."""

BEST = 128
"""How many logits of a head that is a draft are computed again."""
KINDS: Mapping[str, int] = {"q": TensorProto.UINT8, "zero": TensorProto.UINT8, "i8": TensorProto.INT8}
"""Types of stored tensors by suffix; all others are fp32."""

ACTIVATION_OPS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    SILU: ("QuickGelu", CONTRIB, {"alpha": 1.0}),
    GELU_TANH: ("Gelu", "", {"approximate": "tanh"}),
}
"""Operator, domain and attributes of each activation."""

ROTARY_UNIT = 16
"""GroupQueryAttention rotates heads whose width is a multiple of this."""


def decoder_graph(
    shape: LlamaShape,
    span: Span,
    tensors: Mapping[str, Dims],
    *,
    adapter: bool = False,
    prefill: bool = False,
    accuracy_level: int = FAST_ACTIVATIONS,
) -> bytes:
    """Return the serialised graph of `span`.

    `tensors` names every stored tensor with its dimensions; which suffixes a projection has decides how it is
    computed. `adapter` adds the low-rank products of `adapter.*`. `prefill` makes the graph for passes over many
    tokens, of `prefill.*`, without a head; it is given the adapter with each pass, so that it serves without one too.
    """
    builder = _Builder(shape, tensors, adapter, accuracy_level, prefill=prefill)
    hidden, carried = builder.layers(span)
    outputs = {"hidden": hidden} if span.stop == shape.n_layers else {"hidden": hidden, "carried": carried}
    if span.head and not prefill:
        outputs["logits"] = builder.last_logits(hidden)
    return bytes(builder.model(span, outputs).SerializeToString())


def head_graph(shape: LlamaShape, tensors: Mapping[str, Dims]) -> bytes:
    """Return the graph of the vocabulary head alone: `hidden` (1, T, C) → `logits` (1, T, V)."""
    builder = _Builder(shape, tensors, adapter=False, accuracy_level=FAST_ACTIVATIONS)
    logits = builder.logits("hidden")
    results: dict[str, tuple[str, Sequence[str | int]]] = {"logits": (logits, [1, "T", shape.vocab_size])}
    model = builder.close("head", [_value("hidden", [1, "T", shape.width]), *builder.given], results)
    return bytes(model.SerializeToString())


class _Builder:
    """Collects nodes and initializers; every value is named by the node that makes it."""

    def __init__(
        self,
        shape: LlamaShape,
        tensors: Mapping[str, Dims],
        adapter: bool,
        accuracy_level: int,
        *,
        prefill: bool = False,
    ) -> None:
        self._shape, self._tensors, self._adapter, self._accuracy_level = shape, tensors, adapter, accuracy_level
        self._prefill = prefill
        self._given: dict[str, Any] = {}
        self._nodes: list[Any] = []
        self._constants: dict[str, TensorProto] = {}

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add a node; returns its first output."""
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), domain=domain, **attributes))
        return outputs[0]

    @property
    def given(self) -> list[Any]:
        """The stored tensors that are inputs."""
        return list(self._given.values())

    def weight(self, name: str) -> str:
        """Declare a stored tensor as an external initializer, or as an input if it is given with each pass."""
        if name in self._given:
            return name
        if self._prefill and name.startswith("adapter."):
            self._given[name] = _value(name, self._tensors[name])
        elif name not in self._constants:
            kind = KINDS.get(name.rpartition(".")[2], TensorProto.FLOAT)
            proto = TensorProto(name=name, data_type=kind, dims=self._tensors[name])
            proto.data_location = TensorProto.EXTERNAL
            proto.external_data.add(key="location", value=file_of(name))
            self._constants[name] = proto
        return name

    def constant(self, name: str, values: Sequence[int]) -> str:
        """Declare a small vector of int64 inside the graph."""
        self._constants.setdefault(name, helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def layers(self, span: Span) -> tuple[str, str]:
        """Add the span's layers; returns the names of the normalised and the carried stream."""
        norms = [f"layers.{n}.attn_norm" for n in span.layers] + [span.norm]
        carried = self._scaled("x") if span.first == 0 else "x"
        h = self._norm(carried, norms[0], "x_normed")
        for n, next_norm in zip(span.layers, norms[1:], strict=True):
            at = f"layers.{n}"
            attended = self._attention(n, self.project(f"{at}.qkv", h, self._shape.width))
            out = self._post_norm(n, "attn", self.project(f"{at}.out", attended, self._shape.query_width))
            h, carried = self._add_and_norm(f"{at}.attn", out, carried, f"{at}.mlp_norm")
            down = self._post_norm(n, "mlp", self._mlp(n, h))
            h, carried = self._add_and_norm(f"{at}.mlp", down, carried, next_norm)
        return h, carried

    def _norm(self, x: str, weight: str, y: str) -> str:
        eps = self._shape.norm_eps
        return self.node("SimplifiedLayerNormalization", [x, self.weight(weight)], [y], axis=-1, epsilon=eps)

    def _scaled(self, x: str) -> str:
        """Multiply the embeddings by the model's scale, if it has one."""
        scale = self._shape.embedding_scale
        if scale == 1:
            return x
        self._constants["embedding_scale"] = helper.make_tensor("embedding_scale", TensorProto.FLOAT, [], [scale])
        return self.node("Mul", [x, "embedding_scale"], ["x_scaled"])

    def _post_norm(self, n: int, block: str, y: str) -> str:
        """Normalise a block's result before it is added, where the model has a norm for it (Gemma 3)."""
        weight = f"layers.{n}.{block}_post_norm"
        return self._norm(y, weight, f"{weight}ed") if weight in self._tensors else y

    def _add_and_norm(self, name: str, x: str, skip: str, norm: str) -> tuple[str, str]:
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        inputs = [x, skip, self.weight(norm)]
        self.node("SkipSimplifiedLayerNormalization", inputs, outputs, CONTRIB, epsilon=self._shape.norm_eps)
        return outputs[0], outputs[3]

    def _attention(self, n: int, qkv: str) -> str:
        """Rotate, store and attend; onnxruntime's attention rotates heads itself if their width suits it."""
        s, at = self._shape, f"layers.{n}"
        local = n in s.local_layers
        suits, normed = s.head_dim % ROTARY_UNIT == 0, f"{at}.q_norm" in self._tensors
        tables = ["local_cos", "local_sin"] if local and s.local_rope_theta else ["cos", "sin"]
        read = [qkv, "", ""] if suits and not normed else self._cut(n, qkv)
        if normed:
            read = [self._head_norm(n, "q", read[0]), self._head_norm(n, "k", read[1]), read[2]]
        if not suits:
            read = self._rotated(n, read, tables)
        past, present = [f"past_key.{n}", f"past_value.{n}"], [f"present_key.{n}", f"present_value.{n}"]
        inputs = [*read, *past, "last_position", "total_length", *(tables if suits else ())]
        return self.node(
            "GroupQueryAttention",
            inputs,
            [f"{at}.attended", *present],
            CONTRIB,
            num_heads=s.n_heads,
            kv_num_heads=s.n_kv_heads,
            do_rotary=int(suits),
            scale=s.query_scale,
            **({"local_window_size": s.window} if local else {}),
        )

    def _cut(self, n: int, qkv: str) -> list[str]:
        """Cut queries, keys and values apart."""
        s, at = self._shape, f"layers.{n}"
        kv_width = s.n_kv_heads * s.head_dim
        widths = self.constant("qkv_widths", [s.query_width, kv_width, kv_width])
        parts = [f"{at}.q", f"{at}.k", f"{at}.v"]
        self.node("Split", [qkv, widths], parts, axis=-1)
        return parts

    def _head_norm(self, n: int, part: str, x: str) -> str:
        """Normalise each head (1, T, H·D) by itself."""
        heads, at = self._shape.n_heads if part == "q" else self._shape.n_kv_heads, f"layers.{n}.{part}"
        apart = self.constant(f"{part}_heads", [0, 0, heads, self._shape.head_dim])  # 0: as it was
        together = self.constant(f"{part}_width", [0, 0, heads * self._shape.head_dim])
        by_head = self.node("Reshape", [x, apart], [f"{at}_by_head"])
        normed = self._norm(by_head, f"{at}_norm", f"{at}_normed_by_head")
        return self.node("Reshape", [normed, together], [f"{at}_normed"])

    def _rotated(self, n: int, read: Sequence[str], tables: Sequence[str]) -> list[str]:
        """Rotate queries and keys."""
        s, at = self._shape, f"layers.{n}"
        rotated = [
            self.node(
                "RotaryEmbedding", [x, self._positions(), *tables], [f"{at}.{p}_rotated"], CONTRIB, num_heads=heads
            )
            for x, p, heads in zip(read, "qk", (s.n_heads, s.n_kv_heads), strict=False)
        ]
        return [*rotated, read[2]]

    def _positions(self) -> str:
        """Position of each new token (B, T): the last one's, less how many come after it."""
        if not any("positions" in node.output for node in self._nodes):
            self._constants["one"] = helper.make_tensor("one", TensorProto.INT64, [], [1])
            self.node("Cast", ["last_position"], ["last_index"], to=TensorProto.INT64)
            self.node("Unsqueeze", ["last_index", self.constant("last_axis", [-1])], ["last_of_each"])
            self.node("Shape", ["x"], ["lengths"], start=1, end=2)
            self.node("Squeeze", ["lengths"], ["n_tokens"])
            self.node("Sub", ["one", "n_tokens"], ["first_step"])
            self.node("Range", ["first_step", "one", "one"], ["steps"])  # 1 - T … 0
            self.node("Add", ["last_of_each", "steps"], ["positions"])
        return "positions"

    def _mlp(self, n: int, h: str) -> str:
        if self._shape.n_experts:
            return self._mixture(n, h)
        return self.project(f"layers.{n}.down", self._gated(n, h), self._shape.mlp_width)

    def _mixture(self, n: int, h: str) -> str:
        """A sparse mixture of experts; onnxruntime's operator wants tokens in rows, gate and up interleaved."""
        s, at = self._shape, f"layers.{n}"
        router = self.project(f"{at}.router", h, s.width)
        rows = [
            self.node("Reshape", [x, self.constant(f"rows_of_{width}", [-1, width])], [f"{x}.rows"])
            for x, width in ((h, s.width), (router, s.n_experts))
        ]
        experts = [f"{at}.experts_gate_up", f"{at}.experts_down"]
        common = {
            "k": s.n_experts_used, "normalize_routing_weights": int(s.experts_normed), "activation_type": "swiglu",
            "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0,
        }  # fmt: skip
        if f"{experts[0]}.w" in self._tensors:
            first, second = (self.weight(f"{name}.w") for name in experts)
            y = self.node("MoE", [*rows, first, "", second], [f"{at}.mixed_rows"], CONTRIB, **common)
        else:
            codes, scales = ([self.weight(f"{name}.{key}") for name in experts] for key in ("q", "scale"))
            bits = self._tensors[codes[0]][-1] * BYTE // s.width
            inputs = [*rows, codes[0], scales[0], "", codes[1], scales[1]]
            y = self.node(
                "QMoE", inputs, [f"{at}.mixed_rows"], CONTRIB, **common, expert_weight_bits=bits, block_size=BLOCK
            )
        return self.node("Reshape", [y, self.node("Shape", [h], [f"{at}.wide"])], [f"{at}.mixed"])

    def _gated(self, n: int, h: str) -> str:
        at = f"layers.{n}"
        both = self.project(f"{at}.gate_up", h, self._shape.width)
        self.node("Split", [both], [f"{at}.gate", f"{at}.up"], axis=-1, num_outputs=2)
        op, domain, attributes = ACTIVATION_OPS[self._shape.activation]
        act = self.node(op, [f"{at}.gate"], [f"{at}.{self._shape.activation}"], domain, **attributes)
        return self.node("Mul", [act, f"{at}.up"], [f"{at}.gated"])

    def project(self, site: str, x: str, n_in: int) -> str:
        """Add `y = W x`, with the block offsets and the adapter where they are stored; returns y."""
        copied = site.replace("layers.", "prefill.", 1)
        by_rows = self._prefill and f"{copied}.i8" in self._tensors
        if by_rows:
            y = self._row_product(copied, x)
        elif f"{site}.w" in self._tensors:
            y = self._product(f"{site}.w", x, f"{site}.y")
        else:
            y = self._block_product(site, x, n_in)
        if f"{site}.shift" in self._tensors and not by_rows:
            sums = self._block_sums(x, n_in)
            shift = self.node("MatMul", [sums, self.weight(f"{site}.shift")], [f"{site}.offset"])
            y = self.node("Add", [y, shift], [f"{site}.shifted"])
        if f"{site}.bias" in self._tensors:
            y = self.node("Add", [y, self.weight(f"{site}.bias")], [f"{site}.biased"])
        low = site.replace("layers.", "adapter.", 1)
        if self._adapter and f"{low}.a" in self._tensors:
            delta = self._product(f"{low}.b", self._product(f"{low}.a", x, f"{low}.down"), f"{low}.delta")
            y = self.node("Add", [y, delta], [f"{low}.y"])
        return y

    def _product(self, weight: str, x: str, y: str) -> str:
        return self.node("FusedMatMul", [x, self.weight(weight)], [y], CONTRIB, transB=1)

    def _block_product(self, site: str, x: str, n_in: int) -> str:
        bits, block = bits_and_block(n_in, self._tensors[f"{site}.q"])
        operands = [self.weight(f"{site}.{key}") for key in ("q", "scale", "zero") if f"{site}.{key}" in self._tensors]
        if f"{site}.zero" in self._tensors:
            x, n_in = self._with_sums(x, n_in), n_in + n_in // BLOCK
        inputs = [x, *operands]
        return self.node(
            "MatMulNBits", inputs, [f"{site}.y"], CONTRIB,
            K=n_in, N=self._tensors[f"{site}.q"][0], bits=bits, block_size=block, accuracy_level=self._accuracy_level,
        )  # fmt: skip

    def _row_product(self, site: str, x: str) -> str:
        """Multiply in int8, each token scaled by its own largest input: exact sums, so no row depends on another."""
        if "code_step" not in self._constants:
            self._constants["code_step"] = helper.make_tensor("code_step", TensorProto.FLOAT, [], [1 / INT8_MAX])
            self._constants["code_zero"] = helper.make_tensor("code_zero", TensorProto.UINT8, [], [INT8_MAX + 1])
            self._constants["tiny"] = helper.make_tensor("tiny", TensorProto.FLOAT, [], [1e-30])
        size = self.node("Abs", [x], [f"{site}.size"])
        peak = self.node("ReduceMax", [size, self.constant("last_axis", [-1])], [f"{site}.peak"], keepdims=1)
        scale = self.node("Max", [peak, "tiny"], [f"{site}.row_scale"])
        unit = self.node("Div", [x, scale], [f"{site}.unit"])
        codes = self.node("QuantizeLinear", [unit, "code_step", "code_zero"], [f"{site}.codes"])
        inputs = [codes, self.weight(f"{site}.i8"), "code_step", self.weight(f"{site}.scale"), "code_zero"]
        y = self.node("MatMulIntegerToFloat", inputs, [f"{site}.unscaled"], CONTRIB)
        return self.node("Mul", [y, scale], [f"{site}.y"])

    def _block_sums(self, x: str, n_in: int) -> str:
        """Sum x over blocks, (B, T, K) → (B, T, K/32)."""
        blocks = self.constant(f"blocks_of_{n_in}", [0, 0, n_in // BLOCK, BLOCK])  # 0: as it was
        cut = self.node("Reshape", [x, blocks], [f"{x}.blocks"])
        return self.node("ReduceSum", [cut, self.constant("last_axis", [-1])], [f"{x}.sums"], keepdims=0)

    def _with_sums(self, x: str, n_in: int) -> str:
        """Put the sums of x over blocks behind it, (B, T, K) → (B, T, K + K/32)."""
        return self.node("Concat", [x, self._block_sums(x, n_in)], [f"{x}.with_sums"], axis=-1)

    def last_logits(self, hidden: str) -> str:
        """Add the vocabulary head on the last positions, from the one on that an input names."""
        ends = [self.constant(name, [value]) for name, value in (("end", 2**31 - 1), ("time_axis", 1))]
        last = self.node("Slice", [hidden, LOGITS_FROM, *ends], ["last_hidden"])
        return self.logits(last)

    def logits(self, hidden: str) -> str:
        """Add the vocabulary head; the best logits of one that is a draft are computed again, in fp32 from 8 bits."""
        if f"{DRAFT}.q" not in self._tensors:
            return self.project("head", hidden, self._shape.width)
        logits = self.project(DRAFT, hidden, self._shape.width)
        best = self.constant("best_count", [min(BEST, self._shape.vocab_size)])
        self.node("TopK", [logits, best], ["best_logits", "best"], axis=-1, sorted=0)
        table = [self._table("q", TensorProto.UINT8), "best", self._table("scale", TensorProto.FLOAT)]
        _, block = bits_and_block(self._shape.width, self._tensors["embeddings.q"])
        rows = self.node(
            "GatherBlockQuantized", table, ["best_rows"], CONTRIB,
            gather_axis=0, quantize_axis=1, block_size=block, bits=BYTE,
        )  # fmt: skip
        axis = self.constant("row_axis", [2])
        state = self.node("Unsqueeze", [hidden, axis], ["state_row"])
        again = self.node("FusedMatMul", [state, rows], ["best_again"], CONTRIB, transB=1)
        again = self.node("Squeeze", [again, axis], ["best_row"])
        return self.node("ScatterElements", [logits, "best", again], ["refined"], axis=-1)

    def _table(self, key: str, kind: int) -> str:
        """The table of embeddings, codes (V, C) or scales (V, G), as an input: onnxruntime copies initializers."""
        name = f"embeddings.{key}"
        n_rows, n_blocks, *block = self._tensors["embeddings.q"]
        self._given[name] = _value(name, [n_rows, n_blocks * (block[0] if key == "q" else 1)], kind)
        return name

    def model(self, span: Span, outputs: Mapping[str, str]) -> ModelProto:
        """Close the graph of a span; `outputs` maps result names to values."""
        s = self._shape
        wide: list[str | int] = ["B", "T", s.width]
        cache: list[str | int] = ["B", s.n_kv_heads, "room", s.head_dim]
        inputs = [_value("x", wide)]
        inputs += [_value("last_position", ["B"], TensorProto.INT32), _value("total_length", [1], TensorProto.INT32)]
        tables = ("cos", "sin", *(("local_cos", "local_sin") if s.local_rope_theta else ()))
        inputs += [_value(name, ["n_positions", s.head_dim // 2]) for name in tables] + self.given
        inputs += [_value(LOGITS_FROM, [1], TensorProto.INT64)] if span.head else []
        dims: dict[str, Sequence[str | int]] = {"hidden": wide, "carried": wide, "logits": ["B", "R", s.vocab_size]}
        results: dict[str, tuple[str, Sequence[str | int]]] = {
            name: (value, dims[name]) for name, value in outputs.items()
        }
        memories = [(kind, n) for n in span.layers for kind in ("key", "value")]
        inputs += [_value(f"past_{kind}.{n}", cache) for kind, n in memories]
        results |= {f"present_{kind}.{n}": (f"present_{kind}.{n}", cache) for kind, n in memories}
        return self.close(f"layers {span.first} to {span.stop - 1}", inputs, results)

    def close(
        self, name: str, inputs: Sequence[Any], results: Mapping[str, tuple[str, Sequence[str | int]]]
    ) -> ModelProto:
        """Make the model; `results` maps an output's name to the value it shows and its dimensions."""
        for output, (value, _) in results.items():
            if output != value:
                self.node("Identity", [value], [output])
        outputs = [_value(output, dims) for output, (_, dims) in results.items()]
        graph = helper.make_graph(self._nodes, name, list(inputs), outputs, list(self._constants.values()))
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="edgecascade")


def _value(name: str, dims: Sequence[str | int], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(dims))
