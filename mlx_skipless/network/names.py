"""The canonical names of a network's tensors, which ``docs/checkpoint.md`` lists.

They are Hugging Face's for Llama, wherever Llama has such a tensor.
"""

from .model import ModelArgs

# Module paths inside a layer, by the matrix's own name.
PROJECTIONS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "router": "mlp.router",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# What a block calls its two halves.
SUBLAYERS = {"attention": "self_attn", "ffn": "mlp"}
ATTENTION, MLP = tuple(PROJECTIONS)[:4], tuple(PROJECTIONS)[4:]
EXPERTS = ("gate_proj", "up_proj", "down_proj")  # a mixture has one of each per expert
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# Module paths inside a layer of the norms that may have a weight, by the config's ``norm`` and by
# their names in its ``gains`` and ``shifts``.
NORMS = {
    "qkv": {
        "q": "self_attn.q_norm",
        "k": "self_attn.k_norm",
        "v": "self_attn.v_norm",
        "kv": "self_attn.kv_norm",
        "heads": "self_attn.heads_norm",
        "hidden": "mlp.hidden_norm",
    },
    "pre": {"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
    "none": {},
}
# Tensors' names inside a layer, by their flags in the config.
LINEAR_PATHS = {
    "gate_offset": "mlp.gate_offset",
    "value_skip": "self_attn.value_skip",
    "attention_gain": "self_attn.attention_gain",
    "uniform_gain": "self_attn.uniform_gain",
    "query_skip": "self_attn.query_skip",
    "head_skip": "self_attn.head_skip",
    "output_skip": "self_attn.output_skip",
}
# Those with a number per head or one per channel.
CHANNEL_PATHS = ("query_skip", "head_skip", "output_skip")


def is_stream_norm_weight(name: str) -> bool:
    """Tell whether a tensor is the weight of a norm on the stream, the final one included."""
    return name.endswith(
        (*(f"{norm}.weight" for norm in NORMS["pre"].values()), f"{FINAL_NORM}.weight")
    )


def module_path(layer: int, projection: str) -> str:
    """Return the module path of a layer's matrix.

    ``module_path(3, "q_proj")`` is "model.layers.3.self_attn.q_proj".
    """
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


def find_norms(args: ModelArgs) -> dict[str, str]:
    """Find the norms of a network's layers: module paths by their names in ``args.gains``."""
    norms = dict(NORMS[args.norm])
    if args.norm == "qkv":
        norms = {norm: module for norm, module in norms.items() if norm in args.norms}
    if args.shared_norm:
        norms.pop("ffn", None)
    if args.qk_norm:
        norms |= {part: NORMS["qkv"][part] for part in "qk"}
    return norms


def find_readers(args: ModelArgs, norm: str) -> tuple[str, ...]:
    """Find the matrices that read a norm's output; ``norm`` is its name in ``args.gains``."""
    readers = {
        "attention": ATTENTION[:3],
        "ffn": MLP[:3],
        "kv": ATTENTION[1:3],
        "v": ("o_proj",),
        "hidden": ("down_proj",),
    }
    if norm == "attention" and args.shared_norm:
        return (*readers["attention"], *readers["ffn"])
    return readers.get(norm, ())
