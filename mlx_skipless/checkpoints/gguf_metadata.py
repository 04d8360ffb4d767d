"""A GGUF file's metadata, by keys without the architecture's name. Knows nothing of files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import UserError

MOST = 1 << 24  # of anything that is counted
Field = Callable[[str], Any]  # a metadata key to its value, None where the file has none


@dataclass(frozen=True)
class Metadata:
    """A file's metadata.

    Attributes:
        field: returns the value of a whole key; None if the file has none.
        keys: all of them, whole.
        source: what to call the file in a message.
    """

    field: Field
    keys: tuple[str, ...]
    source: str

    @property
    def architecture(self) -> Any:
        """What the file says its architecture is."""
        return self.field("general.architecture")

    def get(self, key: str) -> Any:
        """Return the value of a key of the architecture's own; None if the file has none."""
        return self.field(f"{self.architecture}.{key}")

    def get_one(self, key: str) -> Any:
        """Return a number that may be given layer by layer, the same for all.

        Raises:
            UserError: if layers differ.
        """
        value = self.get(key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise UserError(
                f"{self.source} says {self.architecture}.{key} = {shorten(value)}, layers that "
                "differ, which is not supported"
            )
        return value[0]

    def need(self, key: str) -> int:
        """Return a whole number that may be given layer by layer, the same for all.

        Raises:
            UserError: if it is missing, none that a model has, or layers differ.
        """
        value = self.get_one(key)
        if value is None:
            raise UserError(
                f"{self.source} does not say {self.architecture}.{key}, which its network needs: "
                "download it again"
            )
        if type(value) is not int or not 0 < value < MOST:
            self.doubt(key)
        return value

    def doubt(self, key: str) -> NoReturn:
        """Raise a UserError for a value that no network has."""
        raise UserError(
            f"{self.source} says {self.architecture}.{key} = {shorten(self.get(key))}, which no "
            "model has: download it again"
        )

    def list_own(self) -> Iterable[str]:
        """List the keys of the architecture's own, without its name."""
        prefix = f"{self.architecture}."
        return [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]

    def refuse(self, key: str) -> NoReturn:
        """Raise a UserError for what a key of the architecture's own says."""
        raise UserError(
            f"{self.source} says {self.architecture}.{key} = {shorten(self.get(key))}, which is "
            "not supported: convert the Hugging Face model instead"
        )


def either(value: Any, default: Any) -> Any:
    """Return a value, or the default if it is None."""
    return default if value is None else value


def shorten(value: Any) -> str:
    """Show a value in a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."
