"""Files that anyone may have made, read with care."""

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # what is read besides weights
NATIVE = "params.json"  # of Mistral and Meta, with weights that are called consolidated
# The largest files of these kinds on the Hub have a few tens of MB.
CONFIG_BYTES = 64 << 20
TOKENIZER_BYTES = 256 << 20
MOST_TOKENS = 1 << 23  # as a config may have embeddings
DEEPEST = 64  # levels of a config
TEMPLATES = "additional_chat_templates"  # transformers' folder of them
ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"  # mlx-lm's
PEFT_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # a Git LFS pointer has fewer
POINTED = (
    "{} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download "
    "it with `hf download`"
)
DECLARED = "quantization_config"
# Where tools write how they quantized a model, if not into its config.json.
MODELOPT_CONFIG, GPTQ_CONFIG, AWQ_CONFIG = (
    "hf_quant_config.json", "quantize_config.json", "quant_config.json"
)  # fmt: skip
GGUF, GGUF_MAGIC = ".gguf", b"GGUF"
GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
AT_ONCE = 16 << 20  # bytes of a read that the background makes
AHEAD_BYTES = 1 << 30  # more might leave the system's cache before its turn comes


def check_name(path: Path) -> None:
    """Raise a UserError for a path that is no Unicode; MLX and transformers cannot open one."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} has a name that is not UTF-8: give it another") from error


def is_there(path: Path, most: int | None = None) -> bool:
    """Whether there is a file at a path; ``most`` is the largest size in bytes that is believed.

    Raises:
        UserError: if something else has its name (a pipe would block, a device never end), or a
            link that leads nowhere, if it is too large, or if Git has put a pointer in its place.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(f"{path} is a link to nothing: put the file there") from None
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): check its permissions") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is no regular file: put the real one there")
    if most is not None and found.st_size > most:
        raise UserError(
            f"{path} has {found.st_size / 1e6:,.0f} MB, and a file of this kind {most / 1e6:.0f} "
            "at most: download it again"
        )
    if found.st_size < POINTER_BYTES and _starts_as_pointer(path):
        raise UserError(POINTED.format(path))
    return True


def _starts_as_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False  # whoever reads it says why it cannot be read


def is_gguf(path: Path) -> bool:
    """Whether a file is called a GGUF file or begins as one, whatever it is called."""
    if path.suffix.lower() == GGUF:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False  # whoever reads it says why it cannot be read


State = tuple[int, int]


def take_state(path: Path) -> State:
    """Return what changes when a file is written to: its size and its time.

    Raises:
        UserError: if the file is gone or cannot be looked at.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again") from error
    return found.st_size, found.st_mtime_ns


def check_states(states: Mapping[Path, State]) -> None:
    """Check that files are still as they were when ``take_state`` looked at them.

    Raises:
        UserError: if one has changed.
    """
    for path, state in states.items():
        if take_state(path) != state:
            raise UserError(f"{path} changed while it was read: try again")


def take_fingerprint(folder: Path) -> str:
    """Compute a digest of a model's config and weights, which tells whether they are the same.

    Of each file its size counts, its first and last MB, and 64 kB at each of 64 places between.

    Raises:
        UserError: if a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        size = take_state(path)[0]
        digest.update(f"{path.name} {size} ".encode())
        places = [(0, 1 << 20), *((size * i // 65, 1 << 16) for i in range(1, 65))]
        for start, length in [*places, (max(0, size - (1 << 20)), 1 << 20)]:
            part = bytearray(min(length, size - start))
            fill(path, start, part)
            digest.update(part)
    return digest.hexdigest()[:32]


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights; None if there is none.

    Raises:
        UserError: if there are several.
    """
    if any(folder.glob("*.safetensors")):
        return None
    found = list_gguf(file.name for file in folder.iterdir())
    if len(found) > 1 and all(map(GGUF_PART.search, found)):
        raise UserError(
            f"{folder} holds {len(found)} parts of a GGUF file: join them with `llama-gguf-split "
            f"--merge {found[0]} OUT.gguf` and give OUT.gguf"
        )
    if len(found) > 1:
        raise UserError(f"{folder} holds {len(found)} GGUF files, {list_names(found)}: give one")
    return folder / found[0] if found else None


def list_gguf(names: Iterable[str]) -> list[str]:
    """The names of GGUF files of models; the half of a model that sees pictures is none."""
    last = ((name, name.lower().rpartition("/")[2]) for name in names)
    return sorted(
        n for n, own in last if own.endswith(GGUF) and own[:1] != "." and "mmproj" not in own
    )


def list_names(names: Sequence[str], most: int = 6) -> str:
    """The first names of many, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def check_small(folder: Path) -> None:
    """Check everything that is read from a model's folder besides its weights.

    Raises:
        UserError: if something is no regular file or too large.
    """
    for pattern in (*SMALL, f"{TEMPLATES}/*"):
        for file in folder.glob(pattern):
            if not file.name.startswith("."):
                is_there(file, TOKENIZER_BYTES)


def check_links(folder: Path, *, code: bool) -> None:
    """Refuse a model's folder if a file that a result may copy is a link out of the folder.

    A stranger's archive can hold a link to any file of its reader's, and a result may be uploaded.
    transformers decides which files a tokenizer consists of, so every file is checked except the
    weights and the config. These may lie anywhere: what does not parse as safetensors or as a known
    architecture gets no further, and folders of links to large weights are common. Python files are
    checked if ``code`` is copied, too.

    Raises:
        UserError: for a link that leads elsewhere.
    """
    for file in (*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")):
        kept = file.name == "config.json" or file.suffix == ".safetensors"
        if not (kept or file.is_dir() or (file.suffix == ".py" and not code)):
            check_inside(file, folder, f"{file} leads")


def check_inside(file: Path, folder: Path, what: str) -> None:
    """Refuse a path that leads out of a model's folder; ``what`` begins the message.

    The Hub's cache is itself a folder of links, to its own ``blobs``: these are accepted.

    Raises:
        UserError: if the file lies elsewhere.
    """
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    target = Path(os.path.realpath(file))  # Path.resolve fails on a link to itself
    if not target.is_relative_to(root) and target.parent != blobs:
        raise UserError(
            f"{what} out of its folder, to {target}, and would be copied into the result: if that "
            "is meant, put a copy in its place"
        )


def fill(path: Path, offset: int, into: Any) -> None:
    """Fill a contiguous buffer with a file's bytes from ``offset`` on.

    Raises:
        UserError: if the file cannot be read or has too few bytes.
    """
    view = memoryview(into).cast("B")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            found = file.readinto(view)  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): copy or download it again") from error
    if found < view.nbytes:
        raise UserError(f"{path} has become shorter since it was opened: copy or download it again")


def read_ahead(spans: Iterable[tuple[Path, int, int]]) -> None:
    """Have the system load spans of files (path, offset, bytes) into its cache.

    A thread does it in the background. Errors are left to whoever reads the spans later.
    """
    threading.Thread(target=_read_spans, args=(list(spans),), daemon=True).start()


def _read_spans(spans: list[tuple[Path, int, int]]) -> None:
    longest = max((length for _, _, length in spans), default=0)
    buffer, most = memoryview(bytearray(min(AT_ONCE, longest))), AHEAD_BYTES
    for path, offset, left in spans:
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                while min(left, most) > 0 and (read := file.readinto(buffer[: min(left, most)])):
                    left, most = left - read, most - read
        except OSError:
            return


def read_json(file: Path, most: int | None = None) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint, which has ``most`` bytes at most.

    Raises:
        UserError: if the file is missing, malformed or no object, or too large or deep to be
            believed.
    """
    if not is_there(file, CONFIG_BYTES if most is None else most):
        raise UserError(f"no {file.name} in {file.parent}: give a Hugging Face model folder")
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(read, dict):
        raise UserError(f"{file} holds no JSON object: download it again")
    if _is_deeper(read, DEEPEST):
        raise UserError(f"{file} has more than {DEEPEST} levels: download it again")
    return read


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a model's folder, with how its weights are quantized.

    NVIDIA's ModelOpt and early AutoGPTQ and AutoAWQ write that into files of their own, and
    wrapped models into their ``text_config``.

    Raises:
        UserError: if it is missing, malformed or no object, or too large or deep to be believed.
    """
    file = folder / "config.json"
    if not is_there(file, CONFIG_BYTES) and (explained := explain_other_formats(folder)):
        raise UserError(explained)
    config = read_json(file)
    if config.get(DECLARED) is None:
        inner = config.get("text_config")
        found = inner.get(DECLARED) if isinstance(inner, dict) else None
        if found is None:
            found = _read_own_settings(folder)
        config |= {} if found is None else {DECLARED: found}
    return config


def _read_own_settings(folder: Path) -> dict[str, Any] | None:
    """Read how a model was quantized from a tool's own file, as config.json would say it."""
    if is_there(folder / MODELOPT_CONFIG):
        return {"quant_method": "modelopt"} | read_json(folder / MODELOPT_CONFIG)
    if is_there(folder / GPTQ_CONFIG):
        return {"quant_method": "gptq"} | read_json(folder / GPTQ_CONFIG)
    if not is_there(folder / AWQ_CONFIG):
        return None
    own = read_json(folder / AWQ_CONFIG)
    return {
        "quant_method": "awq",
        "bits": own.get("w_bit"),
        "group_size": own.get("q_group_size"),
        "zero_point": own.get("zero_point"),
        "version": str(own.get("version", "gemm")).lower(),
    }


def explain_other_formats(folder: Path) -> str | None:
    """Say how what is in a folder becomes a model that is read; None if it is not known."""
    if explained := _explain_adapters(folder):
        return explained
    if not is_there(folder / NATIVE):
        return None
    return (
        f"{folder} is in Mistral's or Meta's own format ({NATIVE}), which is not read: give the "
        "same model in Hugging Face's, with config.json and model*.safetensors"
    )


def _explain_adapters(folder: Path) -> str | None:
    """Say how the LoRA adapters in a folder become a model; None if there are none."""
    config = folder / ADAPTER_CONFIG
    theirs = any(is_there(folder / name) for name in PEFT_ADAPTERS)
    if not theirs and not is_there(config) and not is_there(folder / ADAPTERS):
        return None
    said = read_json(config) if is_there(config) else {}
    base = said.get("base_model_name_or_path") or said.get("model")
    base = base if isinstance(base, str) else "MODEL"
    if theirs or "peft_type" in said:
        way_out = f"merge them into {base} with PEFT's merge_and_unload() and save_pretrained()"
    else:
        way_out = f"`mlx_lm.fuse --model {base} --adapter-path {folder}` makes a model of both"
    return f"{folder} holds LoRA adapters and no model: {way_out}"


def _is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than ``most`` levels."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)
