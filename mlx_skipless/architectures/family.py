"""What an entry of ``families.py`` can say of an architecture, and how it is applied.

Knows no architecture by name, and nothing of files or arrays.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..constants import LARGEST_REAL
from ..errors import UserError
from ..network.model import ModelArgs
from ..network.names import LINEAR_PATHS

Config = dict[str, Any]
# Keys that mean the same in every config. Any other key is believed only where an entry names it.
COMMON_KEYS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "sliding_window", "layer_types",
    "attention_bias", "mlp_bias", "tie_word_embeddings",
)  # fmt: skip
# Ends of the names of tensors that hold no weights: of old exporters, and of a KV cache that
# another program quantizes.
NO_WEIGHTS = (
    "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached",
    ".self_attn.k_scale", ".self_attn.v_scale",
)  # fmt: skip
# LLM-Drop's keys for the layers whose attention or FFN it dropped (He et al., arXiv 2406.15786).
DROP_LISTS = {"drop_attn_list": "attention", "drop_mlp_list": "ffn"}


@dataclass(frozen=True)
class Stock:
    """mlx-lm's own network of a family: what it can be, and what config.json must tell it.

    Attributes:
        told: the format's keys that config.json must give, as mlx-lm has defaults of its own.
        tell: returns what else config.json must give.
        activations: the ``hidden_act`` that it can have.
        tied: whether its head is the embedding; None if config.json says it.
        head_bias: whether its head has a bias.
        optional_biases: groups of matrices that config.json gives biases, all of a group or none.
        slides: whether some of its layers, but not all, can have a sliding window.
        scales_rope: whether it can scale RoPE.
        any_head_dim: whether the heads together can be wider or narrower than the stream.
        also: returns whether whatever else it needs of a network is true.
        drops: returns whether mlx-lm can run a network without some sub-layers too.
    """

    told: tuple[str, ...]
    tell: Callable[[ModelArgs], Config] = lambda args: {}
    activations: tuple[str, ...] = ("silu", "swish")
    tied: bool | None = None
    head_bias: bool = False
    optional_biases: tuple[tuple[str, ...], ...] = ()
    slides: bool = False
    scales_rope: bool = False
    any_head_dim: bool = False
    also: Callable[[ModelArgs], bool] = lambda args: True
    drops: Callable[[ModelArgs], bool] = lambda args: False


@dataclass(frozen=True)
class Family:
    """One source architecture: what its files mean, and what mlx-lm's own network of it can be.

    The first attributes serve reading, ``keys`` to ``biased`` serve both ways, ``stock`` writing.

    Attributes:
        means: the format's keys whose value the architecture implies.
        defaults: the format's keys that a config may give, with what its silence means.
        read: turns a config into those of the format's keys that need a computation.
        unsupported: keys that must not be true.
        also: other names of modules, such as those that mlx-lm saves, to the source's.
        ignored: ends of the names of tensors that hold no weights.
        others: modules of other parts of a model, as whole dotted parts of a path; left out.
        keys: the format's keys to the config's, where these differ.
        names: canonical names of modules to the source's, as whole dotted parts of a path.
        fused: canonical modules by the source's one module that holds them all.
        fused_by_head: whether a fused matrix has each head's rows together, in every layer.
        experts: the source's name of one expert's module, with {} for its number, to the canonical
            module of all experts.
        gain_offset: what the source's files subtract from the weights of stream norms.
        biased: matrices that have a bias in every layer.
        stock: mlx-lm's own network; None if it has none.
    """

    means: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Config], Config] = lambda config: {}
    unsupported: tuple[str, ...] = ()
    also: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = NO_WEIGHTS
    others: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_by_head: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)
    gain_offset: float = 0.0
    biased: tuple[str, ...] = ()
    stock: Stock | None = None

    def to_own_keys(self, config: Config) -> Config:
        """Return a config in the format's own keys.

        Raises:
            UserError: for what the architecture's config asks and this package does not support.
        """
        config = {**config, **{ours: config.get(theirs) for ours, theirs in self.keys.items()}}
        for key in self.unsupported:
            if read_flag(config, key):
                raise UserError(
                    f'"{key}" in config.json is not supported for {config["model_type"]}'
                )
        return {
            **{key: config[key] for key in COMMON_KEYS if key in config},
            **{key: find_value(config, key, default=self.defaults[key]) for key in self.defaults},
            "removed": read_dropped(config),
            "biases": list_biases(config, self.biased),
            **self.means,
            **self.read(config),
        }

    def quote_its_keys(self, complaint: str) -> str:
        """Replace the format's keys in a complaint by the config's own."""
        for ours, theirs in self.keys.items():
            complaint = complaint.replace(f'"{ours}"', f'"{theirs}"')
        return complaint

    def expresses(self, args: ModelArgs) -> bool:
        """Tell whether mlx-lm's own network computes what a network read as this family does."""
        return (
            (stock := self.stock) is not None
            and args.hidden_act in stock.activations
            and stock.tied in (None, args.tie_word_embeddings)
            and stock.head_bias == args.head_bias
            and (stock.slides or "sliding_attention" not in args.layer_types)
            and "full_attention" in args.layer_types
            and (stock.scales_rope or args.rope is None)
            and (stock.any_head_dim or args.hidden_size == args.num_attention_heads * args.head_dim)
            and not any(getattr(args, path) for path in LINEAR_PATHS)
            and self._allows_biases(args, stock)
            and stock.also(args)
        )

    def _allows_biases(self, args: ModelArgs, stock: Stock) -> bool:
        biased = {name for name, layers in args.biases.items() if layers}
        allowed = {*self.biased}
        for group in stock.optional_biases:
            allowed |= {*group} if biased & {*group} else set()
        everywhere = [*range(args.num_hidden_layers)]
        return biased == allowed and all(args.biases[name] == everywhere for name in biased)

    def expresses_without_sublayers(self, args: ModelArgs) -> bool:
        """Tell whether mlx-lm can run a network of this family without any of its sub-layers."""
        return self.stock is not None and self.expresses(args) and self.stock.drops(args)

    def make_stock_settings(self, args: ModelArgs) -> Config:
        """Return what config.json must tell mlx-lm's own network; nothing if there is none."""
        if self.stock is None:
            return {}
        told = {self.keys.get(key, key): getattr(args, key) for key in self.stock.told}
        return told | self.stock.tell(args)


def read_flag(config: Config, key: str, default: bool = False) -> bool:
    """Return a key's value, which must be true, false or absent.

    Raises:
        UserError: if it is anything else.
    """
    value = config.get(key)
    return default if value is None else check_flag(key, value)


def check_flag(key: str, value: Any) -> bool:
    """Return a key's value if it is true or false.

    Raises:
        UserError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise UserError(f'"{key}" in config.json is {value!r}; it must be true or false')
    return value


def check_real(key: str, value: Any) -> float:
    """Return a key's value if it is a positive number.

    Raises:
        UserError: if it is anything else.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < LARGEST_REAL
    ):
        raise UserError(f'"{key}" in config.json is {value!r}; it must be a positive number')
    return float(value)


def read_dropped(config: Config) -> dict[str, list[int]]:
    """Return the layers that LLM-Drop left without "attention" or "ffn".

    It writes their numbers, and its network a flag for each layer.

    Raises:
        UserError: for a list of anything else.
    """
    found = {}
    for key, part in DROP_LISTS.items():
        value = [] if config.get(key) is None else config[key]
        layers = list_layers(config)
        flags = isinstance(value, list) and all(type(one) is bool for one in value)
        if flags and len(value) in (0, len(layers)):
            value = [layer for layer, gone in zip(layers, value, strict=False) if gone]
        if not isinstance(value, list) or any(
            type(one) is not int or one not in layers for one in value
        ):
            raise UserError(
                f'"{key}" in config.json is {value!r}; it must list layers from 0 to '
                f"{len(layers) - 1}, or have true or false for each"
            )
        if value:
            found[part] = sorted({*value})
    return found


def find_value(config: Config, *keys: str, default: Any = None) -> Any:
    """Return the value of the first key that has one."""
    return next((config[key] for key in keys if config.get(key) is not None), default)


def find_rope_value(config: Config, *keys: str, default: Any) -> Any:
    """Return the value of the first key that has one, here or in ``rope_parameters``."""
    inner = config.get("rope_parameters")
    inner = inner if isinstance(inner, dict) else {}
    return find_value({**config, **inner}, *keys, default=default)


def find_rotary_dim(config: Config, *keys: str, default: float) -> int | None:
    """Return how many numbers of a head are rotated, from a share of them; None if not known.

    Raises:
        UserError: if the share is none, or not of pairs.
    """
    share = find_rope_value(config, *keys, default=default)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise UserError(
            f'"{keys[0]}" in config.json is {share!r}; it must be a share of a head, 1 at most'
        )
    size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not isinstance(size, int) or not isinstance(heads, int) or heads < 1 or size % heads:
        return None
    width = int(size // heads * share)
    if width % 2 or width == 0:
        raise UserError(
            f'"{keys[0]}" {share} of a head in config.json is {width}; RoPE needs pairs: correct it'
        )
    return width


def list_layers(config: Config) -> list[int]:
    """Return the numbers of all layers; none where a config's number of them cannot be true."""
    layers = config.get("num_hidden_layers")
    return [*range(layers if isinstance(layers, int) and 0 < layers < 1 << 16 else 0)]


def list_biases(config: Config, names: Iterable[str]) -> dict[str, list[int]]:
    """Return the format's ``biases`` for matrices that have one in every layer."""
    return {name: list_layers(config) for name in names}
