"""From a user's words to token ids, through a model's chat template or plain."""

import numbers
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoints.tokenizer import count_embeddings
from ..errors import BadArgument, UserError, first_line
from ..text.corpus import PLAIN_TEMPLATE


def has_turns(tokenizer: TokenizerWrapper) -> bool:
    """Whether a model was taught to take turns: its template does more than join what was said."""
    template = getattr(tokenizer, "chat_template", None)
    joins = isinstance(template, str) and template.strip() == PLAIN_TEMPLATE
    return bool(tokenizer.has_chat_template) and not joins


def encode_prompt(
    tokenizer: TokenizerWrapper,
    text: str,
    *,
    chat: bool | None = None,
    continued: bool = False,
    system: str | None = None,
) -> list[int]:
    """Turn a prompt into token ids, through the chat template or plain with the start token.

    Args:
        tokenizer: the model's.
        text: what the user says.
        chat: whether to use the template; None: where the tokenizer has one for turns.
        continued: the beginning of the user's message is in a cache already, as
            ``mlx_lm.cache_prompt`` leaves it, and ``text`` ends it.
        system: what the system says before the user.

    Raises:
        UserError: for an empty prompt, for text that is not Unicode, for ``chat`` True without a
            template, and for a system's words where the template has no place for them.
    """
    check_text(text)
    if chat and not tokenizer.has_chat_template:
        raise UserError(
            "this model's tokenizer has no chat template: send the prompt as plain text"
        )
    if chat or (chat is None and has_turns(tokenizer)):
        message = {"role": "user", "content": text}
        if continued:
            return _encode_end(tokenizer, message)
        return list(apply_template(tokenizer, [*open_conversation(tokenizer, system), message]))
    open_conversation(tokenizer, system)
    if continued:
        return list(tokenizer.encode(text, add_special_tokens=False))
    start = tokenizer.bos_token
    return list(
        tokenizer.encode(text, add_special_tokens=start is None or not text.startswith(start))
    )


def list_ids(prompt: Any) -> list[int]:
    """List the token ids of a sequence or an array.

    Raises:
        BadArgument: for anything else, a text's bytes among it.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise BadArgument(f"a prompt is text or token ids, no {type(prompt).__name__}")
    return list(prompt)


def check_ids(model: nn.Module, ids: Sequence[int]) -> None:
    """Raise a UserError for token ids that are none, or have no embedding in a model.

    MLX reads before and past an embedding's rows without a word.
    """
    if not ids:
        raise UserError("the prompt is empty: give at least one token")
    args = getattr(model, "args", None)
    rows = count_embeddings(vars(args)) if hasattr(args, "__dict__") else None
    for token in ids:
        if not isinstance(token, numbers.Integral):
            raise UserError(f"{token!r} in the prompt is no token id")
        if token < 0 or (rows is not None and token >= rows):
            known = "" if rows is None else f" ({rows:,} tokens)"
            raise UserError(
                f"token {token} of the prompt is not in the model's vocabulary{known}: encode the "
                "prompt with the model's own tokenizer"
            )


def check_text(text: str) -> None:
    """Raise a UserError for a prompt that is empty or no Unicode."""
    if not text.strip():
        raise UserError("the prompt is empty: give some text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"the prompt is not valid Unicode at character {e.start}") from None


def open_conversation(tokenizer: TokenizerWrapper, system: str | None) -> list[dict[str, str]]:
    """Make the messages that stand before the user's first: none, or what the system says.

    Raises:
        UserError: if the model takes no system prompt.
    """
    if system is None:
        return []
    if not has_turns(tokenizer):
        raise UserError(
            "--system-prompt: this model was not taught to take turns, so nothing is said before "
            "the prompt; drop it"
        )
    if not system.strip():
        raise BadArgument("--system-prompt is empty: give some text, or drop it")
    check_text(system)
    opening = {"role": "system", "content": system}
    first = {"role": "user", "content": "Hello"}
    apply_template(tokenizer, [first])
    try:
        shown = apply_template(tokenizer, [opening, first], tokenize=False)
    except UserError as error:
        raise UserError(
            f"--system-prompt: this model's chat template takes none ({error}); drop it"
        ) from error
    if system.strip() not in shown:
        raise UserError("--system-prompt: this model's chat template leaves it out; drop it")
    return [opening]


def apply_template(
    tokenizer: TokenizerWrapper, messages: Sequence[dict[str, str]], **options: Any
) -> Any:
    """Put messages through the model's chat template, up to the answer.

    Raises:
        UserError: if the template fails: it is a program, the checkpoint's own, and transformers
            runs it in a sandbox.
    """
    try:
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **options)
    except UserError:  # of the tokenizer
        raise
    except Exception as error:  # jinja2's, and what a template does to Python's own types
        raise UserError(
            f"the model's chat template fails ({first_line(error)}): correct it or download the "
            "model again"
        ) from error
    if not found:
        raise UserError("the model's chat template leaves the message out: correct it")
    return found


def _encode_end(tokenizer: TokenizerWrapper, message: dict[str, str]) -> list[int]:
    """Encode a templated message from its content on, and the opening of the answer."""
    marker = "<content>"
    texts = [
        apply_template(tokenizer, [{**message, "content": content}], tokenize=False)
        for content in (message["content"], marker)
    ]
    if marker not in texts[1]:
        raise UserError("the model's chat template leaves the message out: correct it")
    return list(tokenizer.encode(texts[0][texts[1].index(marker) :], add_special_tokens=False))
