"""Conversions that can heal their result: what the command and Python call ``convert``."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..conversion import convert as conversion
from ..conversion.healing import Healing
from ..conversion.options import Options
from ..conversion.report import Report
from ..errors import UserError
from ..progress import Progress
from ..text import corpus, samples
from .recipe import Pace, Treatment

QUIET = Pace(log_every=0, eval_every=0, save_every=0)


def convert(
    model: str | Path | None = None,
    mlx_path: str | Path | None = None,
    *,
    options: Options | None = None,
    progress: Progress = lambda stage, done, total: None,
    **fields: Any,
) -> Report:
    """Remove weights from a model and write one that mlx-lm runs.

    Args:
        model: a Hub id, a Hugging Face folder, a .gguf file, or with ``dry_run`` a config.json;
            None: that of ``options``, which without one is the bundled model.
        mlx_path: the folder to write; must not exist. None: that of ``options``, "mlx_model".
        options: all that can be asked for; default: ``Options()``.
        progress: called with (stage, done, total).
        fields: of ``Options``, in the place of those of ``options``: ``remove="qp"``.

    Returns:
        What was done, its check included; with ``dry_run`` what would be.

    Raises:
        UserError: for anything the user can mend; nothing is left at ``mlx_path`` then.
    """
    return conversion.convert(
        model, mlx_path, options=options, progress=progress, trainer=train_result, **fields
    )


def train_result(
    model: Path,
    teacher: Path,
    out: Path,
    *,
    options: Options,
    text: Sequence[corpus.Document] | None,
    progress: Progress,
) -> Healing:
    """Train a conversion's result by ``heal``'s defaults; a signal ends it as it ends a conversion.

    Args:
        model: the result's folder.
        teacher: the source's folder.
        out: the folder of the trained model, which is made.
        options: of the conversion.
        text: the user's: its end, on which the conversion is checked, is held out; None: text that
            the source speaks.
        progress: called with (stage, done, total).

    Raises:
        UserError: for too little text, or weights that are no numbers any more.
    """
    from .folder import RunFolder
    from .healing import Run, Settings, Sources, load_pair, make_tokens
    from .tokens import encode_texts

    named: Sequence[str] = () if text is None else [str(options.calibration)]
    sources = Sources([*named], [*named], 0.0, str(model), str(teacher))
    pair = load_pair(sources, options.trust_remote_code)
    treatment = Treatment(steps=options.heal, seed=options.seed)
    longest = pair.context or treatment.context
    treatment = replace(treatment, context=min(treatment.context, longest))
    if text is None:
        tell = partial(progress, "sampling text to train on")
        tokens = make_tokens(sources, treatment, pair, tell)
    else:
        rest, tail = samples.split_tail(corpus.join_documents(text, pair.tokenizer))
        tokens = encode_texts(corpus.Texts([rest], [tail]), pair.tokenizer)
    context = min(treatment.context, len(tokens.held_out) - 1, (len(tokens.train) - 1) // 2)
    if context < samples.SHORTEST:
        raise UserError(
            f"--heal: {options.calibration} has {len(tokens.train):,} tokens to train on and "
            f"{len(tokens.held_out):,} to measure with: give more text"
        )
    settings = Settings(replace(treatment, context=context), QUIET, sources)
    out.mkdir()
    run = Run(RunFolder(out), settings, pair, tokens)
    run.progress = partial(progress, "healing")
    run.begin()
    result = run.go(lambda event: None)
    before, after = result.before.kl, result.after.kl
    return Healing(result.step, result.tokens, before, after, after < before)
