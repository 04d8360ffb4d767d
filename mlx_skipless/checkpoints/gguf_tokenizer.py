"""A Hugging Face tokenizer from a GGUF file's metadata. Knows nothing of files or tensors.

A GGUF file holds the tokens, and for byte-level BPE the merges. It only names the rule by which
text is cut into words (``tokenizer.ggml.pre``). A SentencePiece model's merges follow from its
scores.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from .gguf_metadata import Field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}  # where a file of that kind names none
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message that calls a tool
# Tokens that llama.cpp lets end an answer by their names, whatever else a file says of them.
END_NAMES = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|eot|>",
    "<end_of_utterance>", "<|end_of_turn|>", "<|endofturn|>", "<|END_OF_TURN_TOKEN|>",
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "</s>", "<eos>", "<turn|>",
    "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
}  # fmt: skip
# A name that ends no answer where all of some other ends are there: gpt-oss and Solar Open end a
# message with it, and an answer has several.
NO_ENDS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|call|>", "<|flush|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
# Phi-3's special tokens take the white space behind them, but for these. No key of a file says so.
PHI3, PHI3_PLAIN = ("phi-3", "phi3", "phi 3"), ("<unk>", "<s>", "<|endoftext|>")
NONE = (None, "none", "no_vocab")
# The longest tokens that are known are runs of some hundred spaces. The largest vocabularies have
# two million characters, and their merges some times as many.
LONGEST_TOKEN, MOST_CHARACTERS, MOST_MERGED = 1024, 1 << 22, 1 << 26
LONGEST_TEMPLATE = 1 << 20
TEMPLATE = "tokenizer.chat_template"
SPACE = "▁"

DIGIT, LINE_END = r"\p{N}", r"[\r\n]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS_THEN = (CONTRACTION, BEFORE_WORD + r"\p{L}+")
# DeepSeek's letters are those with two cases, but for some of Unicode's blocks.
NO_LETTERS = (
    r"\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A78F}-\x{AB6F}"
    r"\x{10570}-\x{105BF}\x{10D50}-\x{10D8F}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7FF}"
    r"\x{1DF00}-\x{1DFFF}"
)
MARKS = r"!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"
CJK = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+"


@dataclass(frozen=True)
class Words:
    """How a byte-level BPE cuts text into words, and what it does with them.

    Attributes:
        patterns: regular expressions, one after the other: what one matches is cut out of each
            piece that those before it made.
        whole: whether a word that is a token stays whole, whatever the merges say.
        begins: whether text begins with the bos token if the file does not say.
        composed: whether text is brought to Unicode's composed form (NFC) first.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    begins: bool = False
    composed: bool = False


def _either(*patterns: str) -> tuple[str]:
    """One pattern that matches what the first of these that fits does."""
    return ("|".join(patterns),)


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2 = Words((GPT2_WORDS,))
DIGITS = Words((DIGIT, GPT2_WORDS))
CL100K = Words(_either(*WORDS_THEN, r"\p{N}{1,3}", SYMBOLS + r"[\r\n]*", SPACES))
LLAMA3 = replace(CL100K, whole=True, begins=True)
QWEN2 = Words(_either(*WORDS_THEN, DIGIT, SYMBOLS + r"[\r\n]*", SPACES), composed=True)
SEED = Words(_either(*WORDS_THEN, DIGIT, SYMBOLS, SPACES))
O200K = Words(
    _either(
        f"{BEFORE_WORD}{UPPER}*{LOWER}+{CONTRACTION}?",
        f"{BEFORE_WORD}{UPPER}+{LOWER}*{CONTRACTION}?",
        r"\p{N}{1,3}",
        SYMBOLS + r"[\r\n/]*",
        SPACES,
    )
)
TEKKEN = Words(
    _either(
        f"{BEFORE_WORD}{UPPER}*{LOWER}+",
        f"{BEFORE_WORD}{UPPER}+{LOWER}*",
        DIGIT,
        SYMBOLS + r"[\r\n/]*",
        SPACES,
    ),
    whole=True,
    begins=True,
)
DEEPSEEK = Words(
    (
        LINE_END,
        rf"\s?[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{NO_LETTERS}]]+",
        rf"\s?[{MARKS}]+",
        r"\s+$",
        CJK,
        DIGIT,
    )
)
DEEPSEEK_CODER = Words((LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", CJK, DIGIT))
VIKING = Words((r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+", DIGIT))
WORDS = {
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "a.x-4.0": GPT2,
    "trillion": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "minerva-7b": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "pixtral": LLAMA3,
    "midm-2.0": LLAMA3,
    "smaug-bpe": CL100K,
    "dbrx": CL100K,
    "gpt-4o": O200K,
    "llama4": O200K,
    "tekken": TEKKEN,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "megrez": QWEN2,
    "seed-coder": SEED,
    "deepseek-llm": DEEPSEEK,
    "deepseek-coder": DEEPSEEK_CODER,
    "viking": VIKING,
}


def find_id(field: Field, name: str, vocab_size: int) -> int | None:
    """The id that a file gives a special token; None if it gives none that there is."""
    index = field(f"tokenizer.ggml.{name}_token_id")
    return index if type(index) is int and 0 <= index < vocab_size else None


def find_ends(field: Field, vocab_size: int) -> list[int]:
    """The ids of the tokens that end an answer, that of the end of a text first."""
    ends = [find_id(field, name, vocab_size) for name in ENDS]
    tokens = field("tokenizer.ggml.tokens")
    no_ends: set[int] = set()
    if _are_strings(tokens):
        named = {token: i for i, token in enumerate(tokens[:vocab_size]) if token in END_NAMES}
        ends += named.values()
        no_ends = {named[one] for one, others in NO_ENDS if {one, *others} <= named.keys()}
    return list(dict.fromkeys(i for i in ends if i is not None and i not in no_ends))


def make_tokenizer(
    field: Field, keys: Iterable[str], source: str
) -> PreTrainedTokenizerFast | None:
    """Make the tokenizer that a GGUF file describes; None if it describes none.

    Args:
        field: the file's metadata by key.
        keys: all keys of the metadata.
        source: what to call the file in a message.

    Raises:
        UserError: for a kind that is not known, or a description that contradicts itself.
    """
    kind = field("tokenizer.ggml.model")
    if kind in NONE:
        return None
    tokens = field("tokenizer.ggml.tokens")
    types = field("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not _are_strings(tokens) or len(set(tokens)) < len(tokens) or len(types) != len(tokens):
        raise UserError(f"{source} has a broken list of tokens: download it again")
    check_lengths(tokens, source)
    types = [
        CONTROL if token in END_NAMES else type_ for token, type_ in zip(tokens, types, strict=True)
    ]
    ids = dict(SENTENCEPIECE_IDS) if kind == "llama" else {}
    for role, name in ROLES.items():
        index = find_id(field, name, len(tokens))
        # Some files pad with a word.
        if index is not None and not (role == "pad" and types[index] == NORMAL):
            ids[role] = index
    named = {role: tokens[index] for role, index in ids.items() if index < len(tokens)}
    if kind == "gpt2":
        tokenizer, begins = _make_byte_level(field, tokens, source)
    elif kind == "llama":
        tokenizer = _make_sentencepiece(field, tokens, types, named.get("unk"), source)
        begins = True
    else:
        raise UserError(
            f"{source} has a tokenizer of the kind {kind!r}; known: gpt2 and llama. Convert the "
            "Hugging Face model instead"
        )
    _add_tokens(tokenizer, tokens, types, takes_space=_is_phi3(field, kind))
    add_bos, add_eos = field("tokenizer.ggml.add_bos_token"), field("tokenizer.ggml.add_eos_token")
    first = named.get("bos") if (begins if add_bos is None else add_bos) else None
    last = named.get("eos") if add_eos else None
    tokenizer.post_processor = make_frame(tokenizer, first, last)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_find_templates(field, keys, source),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": token for role, token in named.items()},
    )


def _add_tokens(
    tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int], *, takes_space: bool
) -> None:
    """Add the tokens that are found before text is cut into words.

    ``takes_space`` tells whether they take the white space behind them.
    """
    for added in (CONTROL, UNKNOWN, USER_DEFINED):
        found = [
            AddedToken(
                token,
                normalized=False,
                special=added != USER_DEFINED,
                rstrip=takes_space and token not in PHI3_PLAIN,
            )
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == added
        ]
        tokenizer.add_tokens(found)


def _is_phi3(field: Field, kind: str) -> bool:
    """Whether a file holds a Phi-3: by its name, as llama.cpp sees it, or by its architecture."""
    name = str(field("general.name")).lower()
    own = field("general.architecture") == "phi3" and kind == "llama"  # Phi-4 is no such kind
    return own or any(known in name for known in PHI3)


def check_lengths(tokens: Sequence[str], source: str) -> None:
    """Refuse tokens that are longer than any model's; what merges they have takes their square."""
    longest = max(map(len, tokens))
    if longest > LONGEST_TOKEN or sum(map(len, tokens)) > MOST_CHARACTERS:
        raise UserError(
            f"{source} has a token of {longest:,} characters, {sum(map(len, tokens)):,} in all; "
            "no model has such tokens: download it again"
        )


def _find_templates(field: Field, keys: Iterable[str], source: str) -> str | dict[str, str] | None:
    """The chat template; by their names where there are several, the first one by default."""
    found = {
        key.removeprefix(TEMPLATE).lstrip(".") or "default": field(key)
        for key in keys
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    templates = {name: text for name, text in found.items() if isinstance(text, str)}
    if max(map(len, templates.values()), default=0) > LONGEST_TEMPLATE:
        raise UserError(f"{source} has a chat template of more than a million characters")
    if len(templates) < 2:
        return next(iter(templates.values()), None)
    return {"default": next(iter(templates.values())), **templates}


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def _make_byte_level(field: Field, tokens: Sequence[str], source: str) -> tuple[Tokenizer, bool]:
    """Make a BPE on bytes; returns it and whether text begins with the bos token."""
    name = field("tokenizer.ggml.pre")
    words = WORDS.get(name)
    if words is None:
        raise UserError(
            f"{source} cuts text into words by the rule {name!r}, which is not known; known: "
            f"{', '.join(WORDS)}. Convert the Hugging Face model instead"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    listed = field("tokenizer.ggml.merges") or []
    merges = [tuple(merge.split(" ")) for merge in listed if isinstance(merge, str)]
    pairs = [pair for pair in merges if len(pair) == 2 and {*pair, "".join(pair)} <= vocab.keys()]
    if len(pairs) < len(listed):
        raise UserError(f"{source} has a broken list of merges: download it again")
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=words.whole))
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.begins


def _make_sentencepiece(
    field: Field, tokens: Sequence[str], types: Sequence[int], unknown: str | None, source: str
) -> Tokenizer:
    """Make a BPE on characters, spaces among them; bytes that no token covers have their own."""
    scores = field("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{source} has a broken list of token scores: download it again")
    score = {t: s for t, s, k in zip(tokens, scores, types, strict=True) if k == NORMAL}
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab, find_merges(score, source), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    # SentencePiece and llama.cpp put a space before any text, even before one. llama.cpp puts one
    # after a special token, too.
    prefix = field("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1, right=0)] if prefix else steps
    )
    return tokenizer


def find_merges(score: dict[str, float], source: str) -> list[tuple[str, str]]:
    """The pairs of tokens whose concatenation is a token, by its score, the highest first."""
    pairs, left = [], MOST_MERGED
    for token in sorted(score, key=lambda token: -score[token]):
        cuts = range(1, len(token))
        own = [(token[:c], token[c:]) for c in cuts if token[:c] in score and token[c:] in score]
        left -= len(own) * len(token)
        if left < 0:
            raise UserError(
                f"{source} has tokens with more merges than any model: download it again"
            )
        pairs += own
    return pairs


def make_frame(tokenizer: Tokenizer, first: str | None, last: str | None) -> Any:
    """Make the step that puts the bos and eos tokens around a text."""
    before, after = [first] if first else [], [last] if last else []
    second = [f"{piece}:1" for piece in (*before, "$B", *after)]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )
