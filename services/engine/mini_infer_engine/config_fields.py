"""Typed reading of the JSON objects of a model folder, with errors that name file and key."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeGuard

from mini_infer.errors import ModelFolderError
from mini_infer.model_folder import read_json_object


class ConfigFields:
    """The keys of one JSON object; null counts as absent, unknown keys are never looked at.

    Attributes:
        path: The file that holds the object.
    """

    def __init__(self, path: Path, values: dict[str, object], prefix: str = "") -> None:
        """Wraps an object.

        Args:
            path: The file that holds it.
            values: Its keys.
            prefix: Put before keys in messages, such as "rope_scaling.".
        """
        self.path = path
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, path: Path) -> ConfigFields:
        """Reads a file that must hold one object.

        Raises:
            ModelFolderError: The file is missing, unreadable, too large or no JSON object.
        """
        return cls(path, read_json_object(path))

    def get(self, key: str) -> object:
        """The value as it stands there, or None."""
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key stands there, be it with null."""
        return key in self._values

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`; required where there is no default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not is_integer(value, low, high):
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """An integer from `low` to `high`, or None where it is absent."""
        return None if self.get(key) is None else self.integer(key, low, high)

    def number(
        self,
        key: str,
        low: float,
        high: float,
        default: float | None = None,
        *,
        low_allowed: bool = False,
    ) -> float:
        """A number above `low`, or from it on, and at most `high`."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not is_number(value, low, high, low_allowed=low_allowed):
            bounds = f"from {low} to {high}" if low_allowed else f"above {low} and at most {high}"
            raise self.error(key, f"a number {bounds}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """A number above `low` and at most `high`, or None where it is absent."""
        return None if self.get(key) is None else self.number(key, low, high)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        """One of some words."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, f"one of {', '.join(allowed)}")
        return value

    def choices(self, key: str, length: int, allowed: Collection[str]) -> Sequence[str] | None:
        """A list of so many words, or None where it is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"a list of {length} words")
        if not all(isinstance(each, str) and each in allowed for each in value):
            raise self.error(key, f"a list of {', '.join(allowed)}")
        return value

    def numbers(self, key: str, length: int, low: float, high: float) -> tuple[float, ...]:
        """A list of so many numbers above `low` and at most `high`."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"a list of {length} numbers")
        if not all(is_number(each, low, high) for each in value):
            raise self.error(key, f"a list of numbers above {low} and at most {high}")
        return tuple(float(each) for each in value)

    def object(self, key: str) -> ConfigFields:
        """An object; an empty one where it is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigFields(self.path, value or {}, f"{self._prefix}{key}.")

    def is_empty(self) -> bool:
        """Whether the object has no keys."""
        return not self._values

    def error(self, key: str, expected: str) -> ModelFolderError:
        """The error that a key's value is not what was expected."""
        return ModelFolderError(
            f"{self.path}: {self._prefix}{key} must be {expected}, got "
            f"{reprlib.repr(self.get(key))}: correct the file or use another model"
        )


def is_integer(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether a JSON value is an integer in a range; JSON's true is a Python int."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(
    value: object, low: float, high: float, *, low_allowed: bool = False
) -> TypeGuard[int | float]:
    """Whether a JSON value is a number in a range.

    Comparing before converting refuses NaN, infinities and integers beyond a float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low < value <= high or (low_allowed and value == low)
