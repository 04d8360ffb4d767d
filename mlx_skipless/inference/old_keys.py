"""Keys of a config.json that mlx-lm's networks read and transformers 5 no longer writes.

RoPE's base, scaling and share of a head went into ``rope_parameters``, the pattern of windows into
``layer_types``, and some names changed. An mlx-lm network that does not find its keys takes
defaults of its own without a word.
"""

from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

from mlx_lm.utils import _get_classes

from ..architectures.families import FAMILIES
from ..errors import UserError

NO_WINDOW = (
    "mlx-lm's own network looks back on all tokens instead of {:,}: texts that are longer differ "
    "from the source's"
)
PARTIAL = (
    'mlx-lm\'s own network does not read "partial_rotary_factor" ({}) of config.json and rotates '
    "whole heads: it may be another function than transformers computes"
)
PATTERN, SLIDING = "sliding_window_pattern", "sliding_attention"
NEW_NAMES = {"num_experts": "num_local_experts"}


def find_classes(config: Mapping[str, Any]) -> tuple[type, type] | None:
    """Find mlx-lm's network for a config, and the class of its settings; None if it has none."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.replace("-", "_").replace(".", "_").isidentifier():
        return None
    try:
        return _get_classes(dict(config))
    except (AttributeError, TypeError, ValueError):  # no such file, or no network in it
        return None
    except SystemExit:  # olmo's file ends the process if a package is missing
        return None


def list_settings(config: Mapping[str, Any]) -> Mapping[str, bool]:
    """List the keys that mlx-lm's network reads of a config, and whether it needs them.

    There are none if mlx-lm has no network for it.
    """
    classes = find_classes(config)
    given = {} if classes is None else signature(classes[1]).parameters
    return {name: one.default is one.empty for name, one in given.items()}


def explain_unread(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key that mlx-lm's network does not read and transformers obeys."""
    text = _take_text(config)
    if not (read := list_settings(text)):
        return
    if (window := find_lost_window(text)) is not None:
        yield NO_WINDOW.format(window)
    key = "partial_rotary_factor"
    share = text.get(key) or _spell_rope(text.get("rope_parameters")).get(key)
    if share not in (None, 1) and not read.keys() & {key, "rotary_dim", "rope_parameters"}:
        yield PARTIAL.format(share)


def _take_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def find_lost_window(config: Mapping[str, Any]) -> int | None:
    """Find the window of attentions that look back on all tokens in mlx-lm's network."""
    text = _take_text(config)
    family = FAMILIES.get(str(text.get("model_type")))
    stock = None if family is None else family.stock
    if family is not None and stock is None:  # this package's own, which knows windows
        return None
    if family is None:
        read = list_settings(text)
        uses = text.get("use_sliding_window", not str(text.get("model_type")).startswith("qwen"))
        if not read or any("window" in name for name in read) or not uses:
            return None
    else:
        try:
            text = family.to_own_keys({**text})
        except UserError:  # whoever reads the model says so
            return None
    window, longest, kinds = map(
        text.get, ("sliding_window", "max_position_embeddings", "layer_types")
    )
    if isinstance(kinds, list) and (SLIDING not in kinds or (stock is not None and stock.slides)):
        return None
    if type(window) is not int or (type(longest) is int and longest <= window):
        return None
    return window


def add_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the old keys that mlx-lm's network reads and that are not there.

    What reads a ``text_config``, or what might stand in one, is not known: it gets all of them.

    Raises:
        UserError: if the windows of the layers have no pattern that the network knows.
    """
    read, inner = list_settings(config), config.get("text_config")
    if not isinstance(inner, Mapping):
        return _add_to(config, read, whole=not read or "text_config" in read)
    return _add_to(
        {**config, "text_config": _add_to(inner, list_settings(inner), whole=True)}, read
    )


def _add_to(
    config: Mapping[str, Any], read: Mapping[str, bool], whole: bool = False
) -> dict[str, Any]:
    """Add the old keys that are read, or the whole of them."""
    found = {old: config.get(new) for old, new in NEW_NAMES.items()}
    if "rope_parameters" not in read:
        found |= _spell_rope(config.get("rope_parameters"))
    # Some networks want to be told that RoPE is not scaled.
    told = {"rope_scaling"} if whole or read.get("rope_scaling") else set()
    missing = [key for key in found if config.get(key) is None and (whole or key in read)]
    found = {k: found[k] for k in missing if found[k] is not None or k in told}
    return {**config, **found, **_spell_pattern(config, read)}


def _spell_pattern(config: Mapping[str, Any], read: Mapping[str, bool]) -> dict[str, Any]:
    """Spell ``layer_types``, which transformers obeys, as what mlx-lm's network reads in its place.

    That is EXAONE 4's letters, L for a layer with a window, or the number of layers of which the
    last one has none. A pattern that says the same is left as it is.
    """
    kinds, given = config.get("layer_types"), config.get(PATTERN)
    if PATTERN not in read or "layer_types" in read or not isinstance(kinds, list):
        return {}
    windows = [kind == SLIDING for kind in kinds]
    if config["model_type"] == "exaone4":
        letters = "".join("L" if window else "G" for window in windows) if any(windows) else None
        same = isinstance(given, str) and (given * len(kinds))[: len(kinds)] == letters
        return {} if same else {PATTERN: letters}
    period = windows.index(False) + 1 if False in windows else 0
    if not period or windows != [(layer + 1) % period > 0 for layer in range(len(windows))]:
        raise UserError(
            '"layer_types" in config.json gives windows to layers in an order that mlx-lm\'s own '
            f"{config['model_type']} does not know: there the last of every so many layers has none"
        )
    return {PATTERN: period}


def _spell_rope(rope: Any) -> dict[str, Any]:
    """Spell ``rope_parameters``, of all layers or of each kind of them, in the old keys."""
    if not isinstance(rope, Mapping):
        return {}
    found = {}
    if isinstance(rope.get("sliding_attention"), Mapping):
        found["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    if isinstance(rope.get("full_attention"), Mapping):
        rope = rope["full_attention"]
    own = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in own}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    scaling |= {"type": kind}  # the older name, which some networks want
    found["rope_scaling"] = None if kind == "default" else scaling
    return found | {key: rope.get(key) for key in own}
