"""Tokenising text that must never become special tokens.

A fast tokenizer keeps whether special tokens are recognised as a setting of its shared core, and each call changes it:
two threads that call one tokenizer with different settings get each other's. So text from documents and users goes
through a copy that is never called in any other way.
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

_copies: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def encode_plain(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """Tokenise text, reading `<|im_end|>` and its like as the characters they are.

    Args:
        tokenizer: A tokenizer of transformers; it is not called itself.
        text: One text or several.
        **options: Of the tokenizer's call, such as `return_offsets_mapping`.

    Returns:
        The encoding, without tokens added at the ends.
    """
    return _call(_copy_of(tokenizer), text, options)


def _call(tokenizer: Any, text: str | list[str], options: dict[str, Any]) -> Any:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False, **options)


def _copy_of(tokenizer: Any) -> Any:
    with _lock:
        made = _copies.get(tokenizer)
        if made is None:
            made = copy.deepcopy(tokenizer)
            _call(made, "", {})  # the one call that changes the setting, while nobody else has the copy
            _copies[tokenizer] = made
        return made
