"""Text generation: tokens as they are chosen, text as it is complete, times as they were."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import InputError, UsageError
from qcompiler.runtime.artifact import Artifact
from qcompiler.runtime.sampling import Sampler
from qcompiler.runtime.session import Session
from qcompiler.runtime.tokens import Tokenizer, has_tokenizer

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Token:
    """One generated token.

    `text` is what became complete with it: joined over all tokens, the generated text. It is empty for the token that
    ends the text, for part of a character, where a stop text may be beginning, and for artifacts without a tokenizer.
    """

    id: int
    text: str


@dataclass
class Stats:
    """What a generation did and how long it took. `finish` is `eos`, `stop`, `length`, `interrupted` or None so far."""

    prompt_tokens: int
    tokens: int = 0
    prefill_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0
    finish: str | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Over the tokens after the first, which comes with the prompt."""
        return self.steps / self.decode_seconds if self.decode_seconds else 0.0


def generate(
    session: Session,
    prompt: str | Sequence[int] | np.ndarray,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] = (),
    special: bool = True,
    reset: bool = True,
    begin: str | Sequence[int] | None = None,
) -> Generation:
    """Continue `prompt`: an iterator of `Token`, each given out as soon as it is chosen.

    Args:
        session: of a decoder. Its cache afterwards holds the prompt and all generated tokens but the last.
        prompt: text (the artifact needs a tokenizer), or token ids.
        max_tokens: at most so many; None fills the context.
        temperature, top_k, top_p, seed: see `Sampler`; greedy by default.
        stop: texts and token ids that end the generation; a stop text is not given out.
        special: encode a text with the tokenizer's own special tokens around it; False for a rendered chat.
        reset: start from an empty cache; False continues what is in it.
        begin: of an encoder-decoder, whose encoder reads the prompt: what its decoder's text begins with behind the start
            token, in place of the first token that the checkpoint forces (such as the language to translate to).

    The tokens that end a text (the manifest's, the generation configuration's) end the generation, too; the token
    itself is given out, with no text of its own. An interrupt (KeyboardInterrupt) leaves the session usable.

    Raises:
        CapacityError: prompt and `max_tokens` are beyond the context.
        InputError: text without a tokenizer, an empty prompt, ids outside the vocabulary.
        UsageError: an option is out of range.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    return Generation(session, prompt, max_tokens, sampler, _stops(stop), special=special, reset=reset, begin=begin)


def end_tokens(artifact: Artifact) -> frozenset[int]:
    """Every token id that ends a text: the manifest's and the generation configuration's."""
    ends = set(artifact.eos)
    if GENERATION_CONFIG in artifact.files:
        path = artifact.file(GENERATION_CONFIG)
        try:
            configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a JSON object: {error}") from error
        ends.update(configured if isinstance(configured, list) else [] if configured is None else [configured])
    return frozenset(int(end) for end in ends)


def _stops(stop: str | int | Sequence[str | int]) -> list[str | int]:
    stops = [stop] if isinstance(stop, (str, int)) else list(stop)
    if "" in stops:
        raise UsageError("a stop text is empty, which would stop at once")
    return stops


class Generation(Iterator[Token]):
    """A generation under way: iterate it for its tokens; `stats` is right at any time, `text` what was given out."""

    def __init__(
        self,
        session: Session,
        prompt: str | Sequence[int] | np.ndarray,
        max_tokens: int | None,
        sampler: Sampler,
        stops: list[str | int],
        *,
        special: bool,
        reset: bool,
        begin: str | Sequence[int] | None,
    ) -> None:
        artifact = session.artifact
        needed = isinstance(prompt, str) or isinstance(begin, str)
        self._tokenizer = Tokenizer(artifact) if has_tokenizer(artifact) or needed else None
        texts = [stop for stop in stops if isinstance(stop, str)]
        if texts and self._tokenizer is None:
            raise InputError(f"{artifact.path} has no tokenizer, so it cannot stop at {texts[0]!r}; pass token ids")
        if isinstance(prompt, str):
            assert self._tokenizer is not None
            prompt = self._tokenizer.encode(prompt, special=special)
        if len(prompt) == 0:
            raise InputError("the prompt has no tokens; give at least one, such as the token that begins a text")
        if reset:
            session.reset()
        self.stats = Stats(prompt_tokens=len(prompt))
        if artifact.kind == "encoder-decoder":
            session.read(prompt)
            prompt = _beginning(artifact, begin, self._tokenizer)
        elif begin is not None:
            raise UsageError(f"{artifact.path} is of kind {artifact.kind!r}: its text begins with the prompt")
        self._session, self._sampler, self._prompt = session, sampler, prompt
        self._ends = end_tokens(artifact) | {stop for stop in stops if isinstance(stop, int)}
        self._eos = end_tokens(artifact)
        self._max_tokens = _limit(session, len(prompt), max_tokens)
        self._text = _StoppableText(self._tokenizer, texts)
        self.text = ""
        self.ids: list[int] = []
        self._tokens = self._run()

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """Stop; the session can be used for something else."""
        self._tokens.close()

    def _allowed(self, logits: np.ndarray) -> np.ndarray:
        """`logits` without the tokens that no text has."""
        if never := [token for token in self._session.artifact.never if token < len(logits)]:
            logits = logits.copy()
            logits[never] = -np.inf
        return logits

    def _run(self) -> Generator[Token, None, None]:
        stats = self.stats
        try:
            start = time.perf_counter()
            logits = self._session.prefill(self._prompt)
            stats.prefill_seconds = time.perf_counter() - start
            while stats.finish is None:
                token = self._sampler(self._allowed(logits))
                stats.tokens += 1
                piece, stopped = ("", False) if token in self._ends else self._text.push(token)
                finish = "eos" if token in self._eos else "stop" if token in self._ends or stopped else None
                if finish is None and stats.tokens == self._max_tokens:
                    finish = "length"
                if finish is not None and not stopped:
                    piece += self._text.finish()
                self.text += piece
                self.ids.append(token)
                stats.finish = finish
                yield Token(token, piece)
                if finish is None:
                    start = time.perf_counter()
                    logits = self._session.step(token)
                    stats.decode_seconds += time.perf_counter() - start
                    stats.steps += 1
        finally:
            stats.finish = stats.finish or "interrupted"


def _limit(session: Session, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens may be generated. Raises `CapacityError` when they would not fit."""
    if max_tokens is not None:
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}, expected at least 1")
        session.check_room(prompt_tokens + max_tokens)
        return max_tokens
    room = session.artifact.room
    if room is None:
        raise UsageError("the model's context is not known: say how many tokens at most (max_tokens)")
    session.check_room(prompt_tokens + 1)
    return room - session.length - prompt_tokens


def _beginning(artifact: Artifact, begin: str | Sequence[int] | None, tokenizer: Tokenizer | None) -> Sequence[int]:
    """What the text of an encoder-decoder's decoder begins with."""
    if not artifact.decoder_start and begin is None:
        raise InputError(f"{artifact.path}: nothing says which token its decoder's text begins with; give it (begin)")
    if begin is None:
        return artifact.decoder_start
    if isinstance(begin, str):
        assert tokenizer is not None
        begin = tokenizer.encode(begin, special=False)
    return [*artifact.decoder_start[:1], *begin]


class _StoppableText:
    """Decoded text, held back where it may be the beginning of a stop text."""

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]) -> None:
        self._stream = tokenizer.stream() if tokenizer is not None else None
        self._stops = stops
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """`(text, stopped)`: what is certain now, and whether a stop text was reached (the text ends before it)."""
        if self._stream is None:
            return "", False
        return self._sift(self._stream.push(token), final=False)

    def finish(self) -> str:
        """What was held back, at the end."""
        return "" if self._stream is None else self._sift(self._stream.finish(), final=True)[0]

    def _sift(self, piece: str, final: bool) -> tuple[str, bool]:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
