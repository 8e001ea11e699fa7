"""Tokens as they are shown: every character can be seen, none acts."""

import unicodedata

MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
EMPTY = "∅"

# Controls, direction marks, surrogates, private use, separators: nothing to see, or harm to order.
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"


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
