"""Models of several parts, of which one is a language model: that one's config and names.

The other parts, which see pictures, are left out. Knows nothing of files or arrays.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .families import FAMILIES, find_family
from .family import Config, Family

LEFT_OUT = "what this {} sees pictures with is left out: the result is its language model"
# What counts for the whole model, and stands beside "text_config" or, where it does not, in it.
SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization",
    "quantization_config", "model_file", "transformers_version",
)  # fmt: skip
DTYPES = ("dtype", "torch_dtype")
TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Wrapper:
    """A ``model_type`` whose config has the one of a language model in ``text_config``.

    Attributes:
        texts: the ``model_type``s of language models that are known in it, and transformers' class
            of each. The first is meant where ``text_config`` is silent.
        silent: what transformers means where a language model's config is silent, by its type;
            families that have defaults of their own need none.
        names: the wrapper's names of modules to the language model's, as whole dotted parts.
        others: modules of the parts that are left out.
        keys: of the config, for those parts.
    """

    texts: Mapping[str, str]
    silent: Mapping[str, Config] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


MISTRAL3 = Wrapper(
    texts={"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    silent={
        "mistral": {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        }
    },
    names={
        "language_model.lm_head": "lm_head",
        "language_model.model": "model",
        "model.language_model": "model",
    },
    others=("vision_tower", "multi_modal_projector"),
    keys=(
        "vision_config",
        "image_token_id",
        "image_token_index",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "spatial_merge_size",
        "vision_feature_layer",
    ),
)

WRAPPERS: Mapping[str, Wrapper] = {"mistral3": MISTRAL3}


def find_text_type(config: Config) -> str | None:
    """Return the ``model_type`` of the language model; None where no family is known for it."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in WRAPPERS:
        wrapper, text = WRAPPERS[model_type], config.get("text_config")
        inner = text.get("model_type", next(iter(wrapper.texts))) if isinstance(text, dict) else ""
        return inner if isinstance(inner, str) and inner in wrapper.texts else None
    return model_type if isinstance(model_type, str) and model_type in FAMILIES else None


def is_wrapper(config: Config) -> bool:
    """Tell whether a config is of a model of several parts whose language model is known."""
    return find_text_type(config) is not None and config["model_type"] in WRAPPERS


def name_type(config: Mapping[str, Any]) -> str:
    """Return the ``model_type`` of a model for a message, and that of its language model."""
    text, kind = config.get("text_config"), str(config["model_type"])
    inner = text.get("model_type") if kind in WRAPPERS and isinstance(text, dict) else None
    return kind if inner is None else f"{kind} with a {inner}"


def take_text_model(config: Config, *, weights: bool) -> tuple[Config, Family]:
    """Take the language model's config and family out of a model's config.

    Args:
        config: of any model; that of a language model alone is returned as it is.
        weights: whether there are tensors, which then say whether the head is the embedding where
            the config's two parts disagree on it or are silent.

    Raises:
        UserError: for an architecture that is not known.
    """
    if not is_wrapper(config):
        return config, find_family(config)
    wrapper, kind = WRAPPERS[config["model_type"]], str(find_text_type(config))
    text = {**wrapper.silent.get(kind, {}), **config["text_config"], "model_type": kind}
    whole = {key: config[key] for key in SHARED if config.get(key) is not None}
    if not whole.keys().isdisjoint(DTYPES):
        text |= dict.fromkeys(DTYPES)
    text |= whole
    text[TIED] = _find_tied(config, weights)
    text["architectures"] = [wrapper.texts[kind]]
    family = find_family(text)
    return text, replace(
        family, also={**wrapper.names, **family.also}, others=(*family.others, *wrapper.others)
    )


def _find_tied(config: Config, weights: bool) -> bool | None:
    """Return whether the head is the embedding; None where the tensors have to say it.

    transformers believes the whole model's config and mlx-lm the language model's, and neither
    where the other of the two is silent.
    """
    whole, text = config.get(TIED), config["text_config"].get(TIED)
    if weights:
        return text if whole in (None, text) else None
    return text if whole is None else whole


def describe_left_out(config: Mapping[str, Any]) -> str | None:
    """Say what of a model of several parts is left out; None of a model of one."""
    sees = config.get("vision_config") is not None
    return LEFT_OUT.format(config["model_type"]) if sees else None


def drop_other_parts(config: Config) -> Config:
    """Return a config without the keys of the parts that are left out."""
    wrapper = WRAPPERS.get(str(config.get("model_type")))
    keys = ("vision_config", *(wrapper.keys if wrapper else ()))
    return {key: value for key, value in config.items() if key not in keys}
