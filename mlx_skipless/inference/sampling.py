"""How the next token is chosen: options checked, a model's own defaults, mlx-lm's samplers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ..checkpoints.files import is_there, read_json
from ..checkpoints.tokenizer import GENERATION_CONFIG
from ..errors import BadArgument, UserError
from ..options import check_least, check_seed, flag_name, is_of

# Options by the names that generation_config.json has for them.
NAMES = {
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
}
COLDEST = 1e-4  # logits that differ by a thousandth are e^-10 apart
WITHOUT_EFFECT = {"top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0}


def check_options(
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> None:
    """Raise UserError for options of a sampled answer that cannot be."""
    whole = {"max_tokens": max_tokens, "top_k": top_k, "seed": seed}
    real = {"temp": temp, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    for found, kind, what in ((whole, int, "a whole number"), (real, float, "a number")):
        for name, value in found.items():
            optional = name in ("seed", "repetition_penalty") and value is None
            if not optional and not is_of(value, kind):
                raise BadArgument(f"{flag_name(name)} {value!r}: must be {what}")
    check_least("--max-tokens", max_tokens)
    if not (math.isfinite(temp) and temp >= 0):
        raise BadArgument(f"--temp {temp}: must be at least 0 (0 takes the likeliest token)")
    if not 0 <= top_p <= 1:
        raise BadArgument(f"--top-p {top_p}: must lie between 0 and 1 (0 or 1 turns it off)")
    if not 0 <= min_p <= 1:
        raise BadArgument(f"--min-p {min_p}: must lie between 0 and 1 (0 turns it off)")
    if top_k < 0:
        raise BadArgument(f"--top-k {top_k}: must be at least 0 (0 turns it off)")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise BadArgument(
            f"--repetition-penalty {repetition_penalty}: must exceed 0 (1 turns it off)"
        )
    check_seed(seed)


def make_samplers(
    *,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    repetition_penalty: float | None = None,
) -> dict[str, Any]:
    """Make what mlx-lm's ``stream_generate`` chooses tokens with, from checked options.

    They mean what they mean to ``make_sampler`` and ``make_logits_processors`` of
    ``mlx_lm.sample_utils``; a ``top_p`` of 1 and a ``top_k`` of the vocabulary's size are off, too.
    Half precision holds no log-probability divided by a low temperature, so float32 is sampled
    from, and below ``COLDEST`` the likeliest token is taken.
    """
    temp = temp if temp >= COLDEST else 0.0
    whole = make_sampler(temp, top_p, min_p)
    top = make_sampler(temp, top_p, min_p, top_k=top_k) if top_k else whole

    def sample(logprobs: mx.array) -> mx.array:
        chosen = top if top_k < logprobs.shape[-1] else whole  # mlx-lm's refuses all
        return chosen(logprobs.astype(mx.float32))

    penalty = None if repetition_penalty == 1 else repetition_penalty
    return {
        "sampler": sample,
        "logits_processors": make_logits_processors(repetition_penalty=penalty) or None,
    }


def read_defaults(folder: Path) -> dict[str, Any]:
    """Read the sampling that a model's generation_config.json recommends, as options.

    Where it says ``"do_sample": false`` only the repetition penalty counts; where it says true and
    names no temperature, that is 1. Options that would change nothing are left out.

    Raises:
        UserError: if it cannot be read, or recommends what cannot be.
    """
    file = folder / GENERATION_CONFIG
    config: Mapping[str, Any] = read_json(file) if is_there(file) else {}
    found = {NAMES[key]: config[key] for key in NAMES if config.get(key) is not None}
    if config.get("do_sample") is True:
        found = {"temp": 1.0, **found}
    elif config.get("do_sample") is False:
        found = {key: found[key] for key in ("repetition_penalty",) if key in found}
    if found.get("top_k") == -1:  # some programs' word for none
        del found["top_k"]
    for name, value in found.items():
        number = int if name == "top_k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, number) or not abs(value) < 1e9:
            raise UserError(f"{file}: {value!r:.40} is no {name}; correct it or leave it out")
    try:
        check_options(**found)
    except UserError as error:
        raise UserError(f"{file}: {error}; correct it or leave it out") from None
    return {key: value for key, value in found.items() if value != WITHOUT_EFFECT.get(key)}
