"""Tokens as they are shown: every character can be seen, none acts."""

import unicodedata
from collections.abc import Sequence
from typing import Any

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
EMPTY = "∅"

# Controls, direction marks, surrogates, private use, separators: nothing to see, or harm to order.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"


def check_strings(name: str, tokens: Sequence[Any]) -> list[str]:
    """Check that tokens are strings.

    Args:
      name, tokens: the argument.
    Returns: the tokens.
    Raises: ValueError naming the argument and the first that is none.
    Example:
      >>> check_strings("tokens", ("the", " cat"))
      ['the', ' cat']
    """
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise ValueError(
                f"{name}[{i}] must be a str, got {type(token).__name__}; decode tokens one by one"
            )
    return list(tokens)


def visible(token: str) -> str:
    r"""Show a token by characters that can be seen.

    Space, newline and tab get a glyph; other characters that cannot be seen, or would reorder what
    stands beside them, become escapes.

    Args:
      token: any string.
    Returns: the string to show; `∅` for an empty one.
    Example:
      >>> visible(" the\n"), visible("a\u202eb"), visible("")
      ('␣the⏎', 'a\\u202eb', '∅')
    """
    shown = "".join(
        character if character in _JOINERS and 0 < i < len(token) - 1 else _glyph(character)
        for i, character in enumerate(token)
    )
    # An accent without a letter would sit on the token before it.
    alone = shown and unicodedata.category(shown[0]).startswith("M")
    return f"◌{shown}" if alone else shown or EMPTY


def _glyph(character: str) -> str:
    if character in MARKS:
        return MARKS[character]
    if unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
