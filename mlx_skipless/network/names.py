"""The canonical names of a network's tensors, which ``docs/checkpoint.md`` lists.

They are Hugging Face's for Llama, wherever Llama has such a tensor.
"""

from .model import ModelArgs

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
ATTENTION, MLP = tuple(PROJECTIONS)[:4], tuple(PROJECTIONS)[4:]
EXPERTS = ("gate_proj", "up_proj", "down_proj")  # one of each per expert, where there are some
EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
# Learned gains by the norm they belong to; the last part of a tensor's name before ".weight".
GAINS = {
    "qkv": {
        "q": "self_attn.q_norm",
        "k": "self_attn.k_norm",
        "v": "self_attn.v_norm",
        "hidden": "mlp.hidden_norm",
    },
    "pre": {"attention": "input_layernorm", "ffn": "post_attention_layernorm"},
    "none": {},
}
LINEAR_PATHS = {
    "gate_offset": "mlp.gate_offset",
    "value_skip": "self_attn.value_skip",
    "attention_gain": "self_attn.attention_gain",
    "uniform_gain": "self_attn.uniform_gain",
}


def is_stream_norm_weight(name: str) -> bool:
    """Whether a tensor is the gain of a norm on the stream, the final one included."""
    return name.endswith(
        (*(f"{norm}.weight" for norm in GAINS["pre"].values()), f"{FINAL_NORM}.weight")
    )


def module_path(layer: int, projection: str) -> str:
    """The module path of a layer's projection: ``path(3, "q_proj")``."""
    return f"model.layers.{layer}.{PROJECTIONS[projection]}"


def find_norms(args: ModelArgs) -> dict[str, str]:
    """The norms of a network's layers, by the name their gains have in ``args.gains``."""
    norms = dict(GAINS[args.norm])
    if args.shared_norm:
        norms.pop("ffn", None)
    if args.qk_norm:
        norms |= {part: GAINS["qkv"][part] for part in "qk"}
    return norms


def find_readers(args: ModelArgs, norm: str) -> tuple[str, ...]:
    """The projections that read what a norm gives."""
    readers = {
        "attention": ATTENTION[:3],
        "ffn": MLP[:3],
        "v": ("o_proj",),
        "hidden": ("down_proj",),
    }
    if norm == "attention" and args.shared_norm:
        return (*readers["attention"], *readers["ffn"])
    return readers.get(norm, ())
