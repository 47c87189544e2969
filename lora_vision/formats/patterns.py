"""PEFT's patterns: numbers for the modules whose path ends with a name, or with what a regular expression matches."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from lora_vision.errors import AdapterError

_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")  # a module's name, its dots escaped or not, as nearly all patterns are
_ENDLESS = re.compile(r"\)[*+{]|(?:[*+{].*){5}|\\\d")  # expressions that could try for hours
_MOST = 256
_SECONDS = 1.0


def expression(text: Any) -> re.Pattern[str]:
    """Returns the compiled regular expression of a settings file, which anybody may have written.

    Raises:
        AdapterError: it is none, or one that could take for ever.
    """
    try:
        if len(text) > 1000 or _ENDLESS.search(text):
            raise AdapterError(f"the pattern {text[:100]!a} of the PEFT settings is too intricate")
        return re.compile(text)
    except (re.error, RecursionError, OverflowError, TypeError):
        raise AdapterError(f"the pattern {str(text)[:100]!a} of the PEFT settings is no regular expression") from None


class Patterns:
    """A `rank_pattern` or `alpha_pattern`, looked up as PEFT does: the first key that the path ends with counts."""

    def __init__(self, given: Any) -> None:
        """The patterns of a JSON object, or none.

        Raises:
            AdapterError: it is no object of patterns.
        """
        self._names: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []
        self._left = _SECONDS
        if not isinstance(given or {}, Mapping):
            raise AdapterError(f"PEFT settings hold the pattern {str(given)[:100]!a}; expected numbers by module")
        for place, (key, value) in enumerate((given or {}).items()):
            if _NAME.fullmatch(key):
                self._names.setdefault(key.replace("\\", ""), (place, value))
            else:
                self._expressions.append((place, expression(rf"(.*\.)?({key})$"), value))
        if len(self._expressions) > _MOST:
            raise AdapterError(f"PEFT settings hold {len(self._expressions)} expressions; at most {_MOST} are accepted")

    def find(self, path: str, otherwise: Any) -> float:
        """Returns the number for a module path, with or without `text_model.`, or `otherwise`.

        Raises:
            AdapterError: what is found is no number, or the expressions took too long altogether.
        """
        spellings = (path, path.removeprefix("text_model."))
        ends = [f"^{spelling}" for spelling in spellings]
        ends += [path[at:] for at in range(len(path)) if at == 0 or path[at - 1] == "."]
        found = [self._names[end] for end in ends if end in self._names]
        place, value = min(found, key=lambda one: one[0], default=(len(self._names) + _MOST, otherwise))
        begin = time.process_time()
        for earlier, regex, candidate in self._expressions:
            if earlier < place and any(regex.match(spelling) for spelling in spellings):
                value = candidate
                break
            if time.process_time() - begin > self._left:
                raise AdapterError("the patterns of the PEFT settings are too intricate to be looked up")
        self._left -= time.process_time() - begin
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise AdapterError(
                f"PEFT settings for {path!a} cannot be used: {str(value)[:100]!a}; expected a number"
            ) from None
