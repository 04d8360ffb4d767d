"""GGUF files: metadata as a Hugging Face config, tensors dense and in Hugging Face's names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError, first_line
from . import files, gguf_tokenizer

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"
DENSE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


MOST_VALUES = 1 << 23  # in the metadata; a vocabulary of a quarter of a million takes a million


class _Reader(gguf.GGUFReader):
    """One that notices where a file ends: the original reads on, for as long as the header says.

    It maps the file, so nothing is read through it after opening but metadata.
    """

    _values = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._values += 1
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError("it ends early")
        if self._values > MOST_VALUES:
            raise ValueError("it has more metadata than any model")
        return found


class GGUFStore:
    """A GGUF file of the llama architecture (Llama, Mistral, SmolLM2 and their like).

    Raises:
        UserError: for another architecture, a corrupt file or an unknown RoPE scaling.
    """

    def __init__(self, path: Path):
        self._path, self._bytes = path, path.stat().st_size
        try:
            with np.errstate(over="raise", divide="raise", invalid="raise"):
                self._reader = _Reader(path)
                self._tensors = {t.name: t for t in self._reader.tensors}
                self._parse()
        except (
            OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError,
        ) as error:  # fmt: skip
            raise UserError(
                f"{path} is truncated or no GGUF file ({error}): download it again"
            ) from error

    def _parse(self) -> None:
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise UserError(
                f"{self._path} holds the architecture {architecture!r}; supported: llama"
            )
        if self._field("llama.expert_count"):
            raise UserError(f"{self._path} holds a mixture of experts, which is not supported")
        if self._field("split.count", 1) > 1:
            raise UserError(
                f"{self._path} is one part of several: join them first (llama-gguf-split --merge)"
            )
        if self._reader.byte_order == "S":
            raise UserError(f"{self._path} is of the other byte order, which is not supported")
        self._original: dict[str, str] = {}
        for original in self._tensors:
            if original != ROPE_FACTORS and _name(original) in self._original:
                raise ValueError(f"{original} comes twice, under two names")
            self._original |= {} if original == ROPE_FACTORS else {_name(original): original}
        for tensor in self._tensors.values():
            self._unpacked(tensor, np.zeros(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1], np.uint8))
        self.config = self._config()
        self.shapes = {
            name: tuple(int(n) for n in reversed(self._tensors[original].shape))
            for name, original in self._original.items()
        }
        kinds = [self._tensors[o].tensor_type.name for o in self._original.values()]
        packed = sorted({kind for kind in kinds if kind not in DENSE})
        self.packing = f"GGUF {', '.join(packed)}" if packed else None
        # What a dense copy would have; the values come in float32, which holds every type exactly.
        self.dtypes: dict[str, mx.Dtype | None] = {
            name: DENSE.get(self._tensors[original].tensor_type.name, mx.float16)
            for name, original in self._original.items()
        }

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            return default
        value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
        return value

    def _config(self) -> dict[str, Any]:
        heads = self._field("llama.attention.head_count")
        hidden = self._field("llama.embedding_length")
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self._path} has no tensor token_embd.weight: download it again")
        vocab = int(embedding.shape[-1])
        rotated = self._field("llama.rope.dimension_count")
        head_dim = self._field("llama.attention.key_length", rotated)
        if rotated is not None and rotated != head_dim:
            raise UserError(
                f"{self._path} rotates {rotated} of {head_dim} channels of a head, which is not "
                "supported"
            )
        config = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "num_hidden_layers": self._field("llama.block_count"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._field("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon"),
            "vocab_size": vocab,
            "rope_theta": self._field("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": self._field("llama.context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "hidden_act": "silu",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }
        scaling = self._rope_scaling(config)
        if scaling is not None:
            config["rope_scaling"] = scaling
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        factor = self._field("llama.rope.scaling.factor", self._field("llama.rope.scale_linear"))
        kind = self._field("llama.rope.scaling.type", "linear")
        if kind == "linear" and factor:
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._field("llama.rope.scaling.original_context_length")
            return {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
            }
        if kind not in ("linear", "none"):
            raise UserError(f"{self._path} scales RoPE as {kind!r}, which is not supported")
        if ROPE_FACTORS not in self._tensors:
            return None
        factors = self._dense(ROPE_FACTORS)
        scaling = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not np.allclose(factors, _llama3_factors(config, scaling), rtol=1e-2):
            raise UserError(
                f"{self._path} scales RoPE by a table that is not Llama 3's; convert the Hugging "
                "Face model instead"
            )
        return scaling

    def _dense(self, original: str) -> np.ndarray:
        tensor = self._tensors[original]
        mapped = tensor.data  # where a file that got shorter would end this process
        data = np.empty(mapped.nbytes, np.uint8)
        files.fill(self._path, tensor.data_offset, data)
        return self._unpacked(tensor, data.view(mapped.dtype).reshape(mapped.shape))

    def _unpacked(self, tensor: gguf.ReaderTensor, data: np.ndarray) -> np.ndarray:
        """Data of a tensor's type in float32."""
        try:
            dense = gguf.quants.dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(
                f"{tensor.name} in {self._path} is of the type {tensor.tensor_type.name}, which "
                "cannot be read: use another export"
            ) from error
        return dense.astype(np.float32)

    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The tokenizer in the file's metadata; None if there is none.

        Raises:
            UserError: if it is broken or of a kind that is not known.
        """
        if self._path.stat().st_size < self._bytes:  # its end may be gone from the map, too
            raise UserError(f"{self._path} has become shorter: copy or download it again")
        try:
            tokenizer = gguf_tokenizer.build(self._field, str(self._path))
        except UserError:
            raise
        except Exception as error:  # transformers and tokenizers raise whatever they like
            raise UserError(
                f"{self._path} has a broken tokenizer ({first_line(error)}): download it again"
            ) from error
        if tokenizer is not None and len(tokenizer) > self.config["vocab_size"]:
            raise UserError(
                f"{self._path} has {len(tokenizer)} tokens and {self.config['vocab_size']} "
                "embeddings: download it again"
            )
        return tokenizer

    def read(self, names: Iterable[str]) -> dict[str, mx.array]:
        return {name: self._read(name) for name in names}

    def read_ahead(self, names: Iterable[str]) -> None:
        found = (self._tensors[self._original[name]] for name in names)
        files.read_ahead((self._path, int(t.data_offset), int(t.n_bytes)) for t in found)

    def _read(self, name: str) -> mx.array:
        tensor = self._dense(self._original[name]).reshape(self.shapes[name])
        for projection, key in (
            ("q_proj", "num_attention_heads"),
            ("k_proj", "num_key_value_heads"),
        ):
            if f".{projection}." in name:
                tensor = _halves(tensor, self.config[key])
        return mx.array(tensor)


def _name(original: str) -> str:
    parts = original.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    if parts[0] in WHOLE and len(parts) == 2:
        return f"{WHOLE[parts[0]]}.{parts[1]}"
    return original


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps each head's rotary pairs side by side; Hugging Face keeps them in halves."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _llama3_factors(config: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    """By what Llama 3.1 divides each rotary frequency: 1 for short waves, ``factor`` for long."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    context, low, high = (
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    smooth = np.clip((context / wave - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)
