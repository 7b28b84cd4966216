"""Text to token ids and back, with the checkpoint's own tokenizer. Needs the `tokenizers` package only."""

from __future__ import annotations

import re
from collections.abc import Iterable

import tokenizers

from qcompiler.errors import InputError
from qcompiler.runtime.artifact import Artifact

FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"
# One byte of a character, in vocabularies that spell unknown characters byte by byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def has_tokenizer(artifact: Artifact) -> bool:
    return FILE in artifact.files


class Tokenizer:
    """The tokenizer of an artifact.

    Attributes:
        special: ids that `decode` leaves out.
        bos, eos, pad: ids from the manifest.

    Raises `InputError` when the artifact has none, or one that cannot be read.
    """

    def __init__(self, artifact: Artifact) -> None:
        if not has_tokenizer(artifact):
            raise InputError(
                f"{artifact.path} has no {FILE}: the checkpoint came without a tokenizer; pass token ids, not text"
            )
        path = artifact.file(FILE)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise InputError(f"{path} cannot be read as a tokenizer: {error}") from error
        # Settings of somebody's training run: a prompt is neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, info in added.items() if info.special)
        self.bos, self.eos, self.pad = artifact.bos, artifact.eos, artifact.pad

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`. `special`: with what the tokenizer itself puts around a text (a leading BOS, say);
        without, for text that already spells its special tokens, such as a rendered chat."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`. `special`: with the special tokens spelled out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def id(self, token: str) -> int | None:
        """The id of a token by its spelling, None when there is none."""
        return self._tokenizer.token_to_id(token)

    def stream(self, *, special: bool = False) -> TextStream:
        """Decodes ids one by one."""
        return TextStream(self, special=special)

    def is_byte(self, token: int) -> bool:
        """Whether the token is one byte of a character that other tokens may complete."""
        spelling = self._tokenizer.id_to_token(token)
        return spelling is not None and _BYTE_TOKEN.fullmatch(spelling) is not None


class TextStream:
    """Text as it comes: `push` each id, `finish` at the end. The pieces joined are `decode` of all ids.

    A token may end within a character, so text is given out only up to the last complete one. Decoding starts again
    from a few tokens back, not from the beginning, and never from nothing: the first token of a text may be decoded
    differently (a leading space dropped).
    """

    _WINDOW = 64
    _OVERLAP = 8

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._given = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        """The text that `token` completes; often its own, empty while a character is incomplete."""
        self._ids.append(int(token))
        if self._tokenizer.is_byte(int(token)) or (not self._special and int(token) in self._tokenizer.special):
            # A run of such bytes is decoded as a whole: one more can still change all of it. A special token that is
            # left out does not end the run.
            return ""
        text = self._tokenizer.decode(self._ids, special=self._special)
        complete = text.rstrip(_REPLACEMENT)
        piece = self._take(complete)
        if len(self._ids) >= self._WINDOW and len(complete) == len(text):
            self._ids = self._ids[-self._OVERLAP :]
            self._given = len(self._tokenizer.decode(self._ids, special=self._special))
        return piece

    def finish(self) -> str:
        """The rest, incomplete characters as the tokenizer decodes them."""
        return self._take(self._tokenizer.decode(self._ids, special=self._special))

    def _take(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece
