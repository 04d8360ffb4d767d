"""Mistral's own tokenizer file, tekken.json, as a Hugging Face tokenizer.

The file holds the bytes of each token by rank, the special tokens, and the rule by which text is
cut into words. The special tokens have the first ids. A merge is any pair of tokens that together
are a token, the lower its rank the earlier. transformers' own reader of the file needs
mistral-common for those that list no special tokens, as Mistral Nemo's, and puts no <s> first.
"""

import base64
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import UserError
from . import files
from .gguf_tokenizer import check_lengths, find_merges, make_frame
from .tekken_chat import UNKNOWN_CHATS, make_template

TEKKEN = "tekken.json"
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
# Up to version 7 a file need not list its special tokens.
FIRST_SPECIALS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)  # fmt: skip
SILENT = ("v1", "v2", "v3", "v7")


def read_tekken(file: Path) -> PreTrainedTokenizerFast:
    """Make a Hugging Face tokenizer of a tekken.json.

    Raises:
        UserError: if the file is broken or contradicts itself.
    """
    content = files.read_json(file, most=files.TOKENIZER_BYTES)
    try:
        return _make_tokenizer(content, file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is broken ({error!r}): download it again") from error


def _make_tokenizer(content: dict[str, Any], file: Path) -> PreTrainedTokenizerFast:
    config = content["config"]
    specials = _list_specials(content, file)
    inner = config["default_vocab_size"] - len(specials)  # the rest of the list is padding
    letters = bytes_to_unicode()
    ranked = [
        "".join(letters[b] for b in base64.b64decode(token["token_bytes"]))
        for token in content["vocab"][: max(inner, 0)]
    ]
    if len({*ranked, *specials}) < max(len(ranked), inner) + len(specials):
        raise UserError(f"{file} has a broken list of tokens: download it again")
    check_lengths(ranked, str(file))
    merges = find_merges({token: -i for i, token in enumerate(ranked)}, str(file))
    vocab = {token: i for i, token in enumerate([*specials, *ranked])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    roles = {role: token for role, token in ROLES.items() if token in specials}
    template = make_template(config.get("version"), specials)
    unknown = {} if template else {UNKNOWN_CHATS: str(config.get("version"))}
    tokenizer.post_processor = make_frame(tokenizer, roles.get("bos"), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        fix_mistral_regex=False,  # transformers warns of a rule that this file does not have
        **unknown,
        **{f"{role}_token": token for role, token in roles.items()},
    )


def _list_specials(content: dict[str, Any], file: Path) -> list[str]:
    """The special tokens in the order of their ids."""
    count, listed = content["config"]["default_num_special_tokens"], content.get("special_tokens")
    if listed is None and content["config"].get("version") not in SILENT:
        raise UserError(f"{file} lists no special tokens: download a newer one")
    if type(count) is not int or not 0 <= count <= files.MOST_TOKENS:
        raise UserError(f"{file} has {count!r} special tokens: download it again")
    named = dict(enumerate(FIRST_SPECIALS[:count]))
    if listed is not None:
        named = {token["rank"]: token["token_str"] for token in listed}
        if len(named) < len(listed) or not all(rank in range(count) for rank in named):
            raise UserError(f"{file} has a broken list of special tokens: download it again")
    return [named.get(i, f"<SPECIAL_{i}>") for i in range(count)]
