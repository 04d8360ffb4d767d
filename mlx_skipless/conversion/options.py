"""What a user can ask of a conversion; its fields are the flags of ``mlx-skipless convert``.

Knows no model. Imports neither MLX nor mlx-lm, so that ``--help`` does not wait for them.
"""

# ruff: noqa: RUF009  (what it takes for calls in defaults make fields)

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..constants import FLOAT_NAMES, HUB_ID, MODES, REMOVALS
from ..errors import BadArgument
from ..options import (
    check_choice,
    check_least,
    check_seed,
    check_types,
    option,
    parse_bytes,
    parse_count,
    parse_ratio,
    parse_share,
    parse_texts,
)
from ..quantization.settings import Quantization, make_quantization

DEFAULT_LOSS = 0.01  # share by which "auto" drops may raise the loss
CHECK = "check and report"
ALLOWED = ("drop", "replace")

source = partial(option, group="source and result")
exact = partial(option, group="exact")
approximate = partial(option, group="approximate")
counted = partial(approximate, parse=parse_count, metavar="N")
quantizing = partial(option, group="quantize")
checking = partial(option, group=CHECK)

LOSES = (
    "so many layers lose their {}, the least important; auto: as many as --max-loss allows "
    "(approximate; needs skip connections)"
)


REPLACED = (
    "matrices stand in for the {} of so many layers, fitted to the text; auto: as many as "
    "--max-loss allows (approximate; better than a drop, and saves less)"
)


@dataclass(frozen=True)
class Removals:
    """What is converted to what, and what goes: the first half of ``Options``."""

    model: str | Path | None = source(
        None,
        "Hub id, Hugging Face folder or .gguf file; with --dry-run a config.json will do "
        "(default: the bundled model)",
        flags=("--hf-path", "--model"),
        metavar="SRC",
    )
    mlx_path: str | Path = source("mlx_model", "folder to write; must not exist", metavar="OUT")
    dry_run: bool = source(False, "show the plan, write nothing", const=True)
    dtype: str | None = source(
        None, "type of the weights that are not quantized (default: the source's)", FLOAT_NAMES
    )
    revision: str | None = source(None, "branch, tag or commit of a Hub id", metavar="REVISION")
    upload_repo: str | None = source(None, "Hub repository to upload the result to", metavar="REPO")
    trust_remote_code: bool = source(False, "let the source's tokenizer run its code", const=True)

    remove: str = exact(
        "auto", "matrices to merge into their neighbours; auto: all that pays", REMOVALS
    )
    fold_norms: bool = exact(
        False,
        "put every norm's gain into the matrices behind it (exact); --remove auto does that "
        "unasked to a pretrained model of which mlx-lm has no network, unless it is quantized",
        const=True,
    )
    precompute_first_layer: str | None = exact(
        None,
        "make the first layer's projections a table by token, where that pays or by force "
        "(exact; more memory, fewer bytes read)",
        ("auto", "force"),
        const="auto",
    )

    drop_attention: int | str | None = counted(None, LOSES.format("attention"))
    drop_ffn: int | str | None = counted(None, LOSES.format("FFN"))
    drop_block: int | str | None = counted(None, LOSES.format("attention and FFN"))
    replace_attention: int | str | None = counted(None, REPLACED.format("attention"))
    replace_ffn: int | str | None = counted(None, REPLACED.format("FFN"))
    max_loss: float | None = approximate(
        None,
        "share by which auto may raise the loss, nats per token (default: 1%)",
        parse=parse_share,
        metavar="SHARE",
    )
    greedy: bool = approximate(False, "measure again after each drop: better, slower", const=True)
    allow: str | None = approximate(
        None,
        "what a target may do beside choosing bits: drop, replace or drop,replace sub-layers, "
        "where that costs less than the bits that it frees save",
        metavar="WAYS",
    )
    heal: int = approximate(
        0,
        "train the result towards the source for so many steps, by `heal`'s defaults, before it is "
        "rounded; holds both in memory",
        metavar="STEPS",
    )
    skipless: bool = approximate(
        False,
        "first make the skipless network of a pretrained model; it needs training to speak",
        const=True,
    )

    @property
    def drops(self) -> dict[str, int | str]:
        """How many layers shall lose their "attention", "ffn" or "block" (both): a number, "auto".

        Empty if none shall.
        """
        return _find_asked(attention=self.drop_attention, ffn=self.drop_ffn, block=self.drop_block)

    @property
    def replacements(self) -> dict[str, int | str]:
        """For how many layers' "attention" or "ffn" matrices shall stand in: a number, "auto"."""
        return _find_asked(attention=self.replace_attention, ffn=self.replace_ffn)

    @property
    def allowed_loss(self) -> float:
        """The share by which "auto" drops may raise the loss."""
        return DEFAULT_LOSS if self.max_loss is None else self.max_loss

    @property
    def allowed(self) -> tuple[str, ...]:
        """What a target may do to sub-layers: "drop" or "replace" them; nothing if it may not."""
        return tuple(self.allow.split(",")) if self.allow else ()


@dataclass(frozen=True)
class Options(Removals):
    """All that can be asked of a conversion.

    Raises:
        UserError: for values that are none or do not go together.
    """

    quantize: bool = quantizing(
        False, "quantize the result", flags=("-q", "--quantize"), const=True
    )
    q_bits: int | None = quantizing(
        None, "bits per weight (default: the mode's own)", parse=int, metavar="Q_BITS"
    )
    q_group_size: int | None = quantizing(
        None,
        "weights that share a scale (default: the mode's own)",
        parse=int,
        metavar="Q_GROUP_SIZE",
    )
    q_mode: str = quantizing("affine", "quantization mode", tuple(MODES))
    calibration: str | Path | None = quantizing(
        None,
        "file, or data set of the Hub as OWNER/NAME[:SUBSET[:SPLIT]], to quantize against, its end "
        "for the check (default: sampled from the model)",
        metavar="TEXT",
    )
    target_bytes: int | None = quantizing(
        None,
        "quantize to the best mixture of bits of this size, for instance 1.6MB or 4GB",
        parse=parse_bytes,
        metavar="SIZE",
    )
    target_kl: float | None = quantizing(
        None,
        "quantize to the smallest mixture of bits that is so close to the source, in nats per "
        "token; tries several",
        parse=float,
        metavar="NATS",
    )
    target_speed: float | None = quantizing(
        None,
        "quantize to the best mixture of bits of which decoding a token reads so many times fewer "
        "bytes of weights than of the source, for instance 3x",
        parse=parse_ratio,
        metavar="RATIO",
    )
    distill: int = quantizing(
        0,
        "train the scales and biases of the quantized result towards the source, for instance 200 "
        "steps; holds both in memory",
        metavar="STEPS",
    )

    verify: bool = checking(
        True,
        "do not check the result against its source at the end",
        flags=("--no-verify",),
        const=False,
    )
    force: bool = checking(
        False,
        "keep an exact float32 result whose error is more than rounding explains; else it is "
        "refused",
        const=True,
    )
    seed: int = checking(0, "of the sampled text", metavar="SEED")

    def __post_init__(self) -> None:
        parse_texts(self)
        check_types(self)
        _check_target(self)
        _check_allowed(self)
        _check_quantization(self)
        _check_drops(self)
        _check_values(self)

    @property
    def mixes_bits(self) -> bool:
        """Whether each matrix is to get bits of its own, for a size, a speed or a distance."""
        return bool(self.targets)

    @property
    def targets(self) -> list[str]:
        """The flags that name a target."""
        asked = {
            "--target-bytes": self.target_bytes,
            "--target-kl": self.target_kl,
            "--target-speed": self.target_speed,
        }
        return [*_find_asked(**asked)]

    @property
    def quantization(self) -> Quantization | None:
        """How to quantize the result; None: not at all."""
        wanted = self.quantize or self.mixes_bits
        return make_quantization(wanted, self.q_bits, self.q_group_size, self.q_mode)


def _find_asked(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_target(options: Options) -> None:
    if not options.mixes_bits:
        return
    kl, speed, flags = options.target_kl, options.target_speed, options.targets
    check_least("--target-bytes", options.target_bytes)
    if len(flags) > 1:
        raise BadArgument(f"{' and '.join(flags)} are ends of one trade: drop all but one")
    if options.q_bits is not None or options.q_mode != "affine":
        raise BadArgument(
            f"{flags[0]} chooses the bits, of affine mode: drop --q-bits and --q-mode"
        )
    if speed is not None and not 1 < speed < math.inf:
        raise BadArgument(f"--target-speed {speed:g}: must be a ratio above 1, for instance 3x")
    if kl is not None and not 0 < kl < math.inf:
        raise BadArgument(f"--target-kl {kl}: must be a positive number of nats per token")
    if kl is not None and not options.verify:
        raise BadArgument("--target-kl measures the result: drop --no-verify")


def _check_quantization(options: Options) -> None:
    quantization = options.quantization  # refused here, if MLX does not have it
    if options.distill < 0:
        raise BadArgument(f"--distill {options.distill}: must be a number of steps, 0 or more")
    if options.distill and (quantization is None or quantization.mode != "affine"):
        raise BadArgument("--distill trains scales and biases: it needs -q in affine mode")


def _check_allowed(options: Options) -> None:
    if options.allow is None:
        return
    ways = options.allowed
    if not ways or {*ways} - {*ALLOWED} or len({*ways}) < len(ways):
        raise BadArgument(f"--allow {options.allow}: give drop, replace or drop,replace")
    if not options.mixes_bits:
        raise BadArgument(
            "--allow is for a target: add --target-bytes, --target-kl or --target-speed, or use "
            "--drop-attention and its like"
        )
    if options.drops or options.replacements:
        asked = [f"--drop-{kind}" for kind in options.drops]
        asked += [f"--replace-{kind}" for kind in options.replacements]
        raise BadArgument(f"--allow chooses what goes by itself: drop {' and '.join(asked)}")


def _check_drops(options: Options) -> None:
    asked = {f"--drop-{kind}": count for kind, count in options.drops.items()}
    asked |= {f"--replace-{kind}": count for kind, count in options.replacements.items()}
    for flag, count in asked.items():
        if count != "auto" and not isinstance(count, int):
            raise BadArgument(f"{flag} {count}: give a number of layers, or auto")
        if isinstance(count, int):
            check_least(flag, count)
    share = options.max_loss
    if share is not None and "auto" not in asked.values():
        raise BadArgument(
            "--max-loss is for auto, of --drop-attention, --drop-ffn, --drop-block, "
            "--replace-attention and --replace-ffn"
        )
    if share is not None and not 0 < share < math.inf:
        raise BadArgument(f"--max-loss {share}: must be a positive share, for instance 1%")
    if options.greedy and not asked:
        raise BadArgument(
            "--greedy is for --drop-attention, --drop-ffn, --drop-block, --replace-attention and "
            "--replace-ffn"
        )
    if options.skipless and (asked or options.allow):
        raise BadArgument("--skipless drops every skip connection: drop it to drop sub-layers")
    if options.heal < 0:
        raise BadArgument(f"--heal {options.heal}: must be a number of steps, 0 or more")
    if options.heal and options.skipless:
        raise BadArgument("--heal is no training from nothing, which --skipless needs: drop one")
    if options.heal and not (asked or options.quantization is not None):
        raise BadArgument(
            "--heal makes up for what is lost, and nothing that is asked for loses anything: drop "
            "it"
        )


def _check_values(options: Options) -> None:
    if options.precompute_first_layer not in (None, "auto", "force"):
        raise BadArgument(
            f"--precompute-first-layer {options.precompute_first_layer}: give nothing or force"
        )
    check_choice("--remove", options.remove, REMOVALS)
    if options.dtype is not None:
        check_choice("--dtype", options.dtype, FLOAT_NAMES)
    check_seed(options.seed)
    if options.upload_repo is not None and not HUB_ID.fullmatch(options.upload_repo):
        raise BadArgument(f"--upload-repo {options.upload_repo}: a repository is called owner/name")
