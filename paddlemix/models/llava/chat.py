"""LlavaChat: one conversation with the model, about pictures or without any.

The chat keeps the token ids whose keys and values are in the decoder's cache. A turn renders the whole conversation,
compares it with what is cached, and reads only what follows the longest common prefix; pictures are compared by
their content. The tokens of an answer stay as the model gave them: its text is never tokenized again, so a turn
reads its own new tokens and no old ones.

    rounds + question -> text -> token ids -> (common prefix is cached) -> the rest is read -> pieces of the answer
"""

import base64
import io
import json
import logging
import math
import os
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import paddle

from paddlemix.errors import UserError
from paddlemix.models.llava.anyres import num_image_features
from paddlemix.models.llava.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.conversation import Template, get_template
from paddlemix.models.llava.features import PictureFeatures
from paddlemix.models.llava.generation import GenerationSettings, Sampler, decode_steps

__all__ = ["ChatStats", "LlavaChat", "Picture", "Round", "TurnStats"]

logger = logging.getLogger(__name__)

FILE_FORMAT = "paddlemix-llava-chat"
FILE_VERSION = 1


@dataclass(frozen=True)
class Picture:
    """A picture of the conversation: the image (PIL, RGB), a hash of its content, and where it came from."""

    image: Any
    digest: str
    source: Optional[str] = None

    @property
    def size(self) -> Tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.size


@dataclass(frozen=True)
class Round:
    """A question with the pictures it brought, and its answer.

    ``answer`` has neither the string that ends a turn nor white space around it; ``answer_ids`` are the tokens that
    the model gave for it, None when the text came from elsewhere (a file that another tokenizer wrote).
    """

    question: str
    answer: str
    answer_ids: Optional[Tuple[int, ...]] = None
    pictures: Tuple[Picture, ...] = ()


@dataclass
class TurnStats:
    """What one answer cost.

    Attributes:
        prompt: the rendered text.
        prompt_ids: its tokens; IMAGE_TOKEN_INDEX at every image feature.
        prefilled_tokens: those of them that had to be read; the others were cached.
        new_tokens: tokens of the answer, its end token included.
        seconds_to_first_token, seconds: from the question to the first and to the last token.
        mean_token_probability: geometric mean of the probabilities that the model gave to the answer's tokens
            (after the repetition penalty; temperature 1, nothing cut); 0 without tokens.
        finish_reason: ``stop`` (end token or stop string), ``length`` (max_new_tokens or the context is full) or
            ``interrupted``.
    """

    prompt: str = ""
    prompt_ids: List[int] = field(default_factory=list)
    prefilled_tokens: int = 0
    new_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    mean_token_probability: float = 0.0
    finish_reason: str = "interrupted"


@dataclass
class ChatStats:
    """What the chat cost since it was made; ``last`` is the last answer alone.

    Attributes:
        tower_calls: pictures that went through the vision tower.
        prefilled_tokens: prompt tokens that were read, over all turns.
        new_tokens: tokens of all answers.
    """

    tower_calls: int = 0
    prefilled_tokens: int = 0
    new_tokens: int = 0
    last: TurnStats = field(default_factory=TurnStats)


@dataclass(frozen=True)
class _Plan:
    """A turn before it runs: the rounds that stay, the question with its pictures, and the prompt.

    ``keys`` are ``ids`` with a number of its own for each picture in place of the placeholder; ``spans`` say which
    of the ids a picture fills.
    """

    rounds: Tuple[Round, ...]
    question: str
    pictures: Tuple[Picture, ...]
    text: str
    ids: List[int]
    keys: List[int]
    spans: List[Tuple[Picture, int, int]]
    notice: str = ""


class LlavaChat:
    """One conversation.

    Args:
        model: a :class:`LlavaLlamaForCausalLM`.
        processor: its :class:`LlavaProcessor`.
        temperature, top_p, top_k, repetition_penalty: how tokens are picked; see :class:`GenerationSettings`.
        max_new_tokens (int): the longest answer.
        seed (int): with it, the same questions get the same answers; None draws a new one.
        template: name of a conversation template, or a :class:`Template`; default: what the checkpoint says.
        stop (list of str): an answer ends before any of these too, beside the template's own.
        on_notice: is called with a sentence that the user should see (old rounds were dropped); default: the logger.

    Example:

        chat = LlavaChat(model, processor, temperature=0)
        for piece in chat.ask("What is this?", image="cat.png"):
            print(piece, end="", flush=True)
        answer = "".join(chat.ask("Which colour is it?"))
    """

    def __init__(
        self,
        model,
        processor,
        temperature: float = 0.2,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 512,
        repetition_penalty: float = 1.0,
        seed: Optional[int] = None,
        template: Union[str, Template, None] = None,
        stop: Sequence[str] = (),
        on_notice: Optional[Callable[[str], None]] = None,
    ):
        self.model, self.processor, self.config = model, processor, model.config
        self.template = get_template(template) if template is not None else processor.template
        if isinstance(stop, str) or not all(stop):
            raise UserError(f"stop is {stop!r}; expected a list of strings that aren't empty.")
        self.stop_strings = tuple(dict.fromkeys([*self.template.stop_strings, *stop]))
        self.settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            decode_strategy="greedy_search" if temperature == 0 else "sampling",
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            eos_token_ids=self._end_ids(),
        )
        self.on_notice = on_notice or logger.warning
        self.stats = ChatStats()
        self._rounds: Tuple[Round, ...] = ()
        self._waiting: Tuple[Picture, ...] = ()  # pictures that the next question brings
        self._spare: Tuple[Picture, ...] = ()  # brought too, unless there is a waiting one (after clear)
        self._features = PictureFeatures.of(model)
        self._weights = self._features.weights  # of what the cache holds
        self._numbers: Dict[str, int] = {}  # a picture's digest -> its key in _cached
        self._cache = None
        self._cached: List[int] = []  # keys of the tokens that the cache holds
        self._running: Optional[Iterator[str]] = None
        self._sampler = Sampler(self.settings)

    # what was said

    @property
    def rounds(self) -> Tuple[Round, ...]:
        """Questions and answers so far, the oldest first."""
        return self._rounds

    @property
    def messages(self) -> List[Dict[str, str]]:
        """The conversation as ``{"role": …, "content": …}``, as the template renders it."""
        messages = []
        for turn in self._rounds:
            messages.append({"role": "user", "content": self._content(turn.question, turn.pictures)})
            messages.append({"role": "assistant", "content": _harmless(turn.answer)})
        return messages

    @property
    def last_answer(self) -> Optional[str]:
        """The text of the last answer; None before the first."""
        return self._rounds[-1].answer if self._rounds else None

    @property
    def picture(self) -> Optional[Picture]:
        """The newest picture of the conversation, one that waits for its question included."""
        if self._waiting:
            return self._waiting[-1]
        return self.answered_picture or (self._spare[-1] if self._spare else None)

    @property
    def answered_picture(self) -> Optional[Picture]:
        """The newest picture that the last answer knew; None if there was none."""
        pictures = [picture for turn in self._rounds for picture in turn.pictures]
        return pictures[-1] if pictures else None

    @property
    def pictures(self) -> Tuple[Picture, ...]:
        """All pictures of the conversation, the oldest first; those that wait for a question included."""
        return tuple(picture for turn in self._rounds for picture in turn.pictures) + self._waiting + self._spare

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and answer may have together: those that the positions were trained, or scaled, for."""
        scaling = self.config.rope_scaling or {}
        return int(self.config.max_position_embeddings * float(scaling.get("factor", 1.0)))

    # talking

    def ask(self, question: str, image: Any = None) -> Iterator[str]:
        """Answers a question, piece by piece.

        The pieces joined are the answer as it goes into the history. A piece never ends inside a character, and no
        part of a stop string is ever given. Whoever stops reading (break, Ctrl-C) keeps what was said so far in the
        history; before the first token, the question is as if it had not been asked.

        Args:
            question: the user's words. ``<image>`` in them, once for each new picture, says where the pictures
                stand; by default they stand before the question, one line each.
            image: a path, a URL or an image: a further picture, from this question on.

        Returns:
            an iterator over text; the chat changes when the first piece is asked for, and any other use of the chat
            ends it.

        Raises:
            UserError: an empty question, a picture that can't be opened or is too thin, or more than the context holds.
        """
        self._finish_running()
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"The question is {question!r}; expected some text.")
        question = question.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
        pictures = () if image is None else (self._open(image),)
        pictures = (self._waiting or (() if pictures else self._spare)) + pictures
        placed = question.count(IMAGE_TOKEN)
        if placed and placed != len(pictures):
            raise UserError(
                f"The question has {placed} {IMAGE_TOKEN} but {len(pictures)} new picture(s); leave {IMAGE_TOKEN} out, "
                "or write it once for each new picture."
            )
        return self._start(self._plan(self._rounds, question, pictures), waiting=(), spare=())

    def retry(self) -> Iterator[str]:
        """Takes the last answer back and answers the same question again.

        If the new answer is stopped before its first token, the old one stays.

        Raises:
            UserError: nothing was asked yet.
        """
        self._finish_running()
        if not self._rounds:
            raise UserError("There is no answer to make again; ask something first.")
        self._heed_weights()
        last = self._rounds[-1]
        plan = self._plan(self._rounds[:-1], last.question, last.pictures)
        return self._start(plan, self._waiting, self._spare)

    def undo(self) -> str:
        """Takes the last question and its answer back; pictures that it brought wait for the next question.

        Returns:
            the question.

        Raises:
            UserError: nothing was asked yet.
        """
        self._finish_running()
        if not self._rounds:
            raise UserError("There is nothing to undo; ask something first.")
        last = self._rounds[-1]
        self._rounds, self._waiting = self._rounds[:-1], last.pictures + self._waiting
        return last.question

    def add_image(self, image: Any, source: Optional[str] = None) -> Picture:
        """A further picture, from the next question on.

        Args:
            image: a path, a URL or an image.
            source: where an image that is already open came from; only to name it.

        Raises:
            UserError: it can't be opened, is too thin, or the model takes text only.
        """
        self._finish_running()
        picture = self._open(image, source)
        self._waiting, self._spare = self._waiting + (picture,), ()
        return picture

    def clear(self) -> None:
        """Starts over, the random state included. The newest picture stays until another one is added."""
        self._finish_running()
        self._heed_weights()
        picture = self.picture
        self._rounds, self._waiting, self._spare = (), (), () if picture is None else (picture,)
        self._sampler = Sampler(self.settings)

    # files

    def save(self, file: Union[str, Path]) -> Path:
        """Writes the conversation, pictures included, as JSON; the file is complete or not there.

        Raises:
            UserError: the file can't be written, or exists and isn't a saved chat.
        """
        path = _path(file)
        if os.path.exists(path) and not _is_saved_chat(path):
            raise UserError(f"{path} exists and isn't a saved chat; give another name.")
        pictures: Dict[str, Dict[str, Optional[str]]] = {}

        def refer(held: Sequence[Picture]) -> List[str]:
            for picture in held:
                if picture.digest not in pictures:
                    buffer = io.BytesIO()
                    picture.image.save(buffer, format="PNG")
                    png = base64.b64encode(buffer.getvalue()).decode("ascii")
                    pictures[picture.digest] = {"source": picture.source, "png": png}
            return [picture.digest for picture in held]

        rounds = [
            {
                "question": turn.question,
                "answer": turn.answer,
                "answer_ids": None if turn.answer_ids is None else list(turn.answer_ids),
                "pictures": refer(turn.pictures),
            }
            for turn in self._rounds
        ]
        content = {"format": FILE_FORMAT, "version": FILE_VERSION, "rounds": rounds}
        content.update(waiting=refer(self._waiting), spare=refer(self._spare), pictures=pictures)
        _write_atomically(path, json.dumps(content, ensure_ascii=False) + "\n")
        return path

    def load(self, file: Union[str, Path]) -> int:
        """Continues a conversation that :meth:`save` wrote, in place of this one.

        Returns:
            the number of rounds.

        Raises:
            UserError: the file isn't there or isn't a saved chat, or holds pictures and the model takes text only;
                the chat is unchanged.
        """
        self._finish_running()
        path = _path(file)
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} isn't a regular file; expected a file that /save or LlavaChat.save wrote.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} can't be read as a saved chat: {_reason(error)}.") from error
        if not isinstance(content, dict) or content.get("format") != FILE_FORMAT:
            raise UserError(f"{path} isn't a saved chat; expected a file that /save or LlavaChat.save wrote.")
        if content.get("version") != FILE_VERSION:
            raise UserError(
                f"{path} is a saved chat of version {content.get('version')!r}; this program reads {FILE_VERSION}."
            )
        try:
            pictures = {
                digest: self._open(base64.b64decode(held["png"]), held["source"] and _text(held["source"]))
                for digest, held in content["pictures"].items()
            }
            rounds = tuple(
                Round(
                    _text(turn["question"]),
                    _text(turn["answer"]),
                    self._checked_ids(turn["answer_ids"], turn["answer"]),
                    tuple(pictures[digest] for digest in turn["pictures"]),
                )
                for turn in content["rounds"]
            )
            waiting, spare = (tuple(pictures[digest] for digest in content[name]) for name in ("waiting", "spare"))
            for turn in rounds:
                if turn.question.count(IMAGE_TOKEN) > len(turn.pictures):
                    raise ValueError(f"the question {turn.question!r:.80} lacks its picture")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise UserError(f"{path} holds a picture that can't be used: {error}") from error
            raise UserError(f"{path} is a damaged saved chat: {_reason(error)}.") from error
        self._heed_weights()
        self._rounds, self._waiting, self._spare = rounds, waiting, spare
        return len(rounds)

    # a turn, step by step

    def _content(self, question: str, pictures: Sequence[Picture]) -> str:
        """The question with a placeholder for each picture; those that it doesn't place itself come first.

        The marks around a placeholder are those of the training; start and end tokens are the processor's matter.
        """
        content = f"{IMAGE_TOKEN}\n" * (len(pictures) - question.count(IMAGE_TOKEN)) + question
        before, after = getattr(self.template, "image_marks", ("", ""))
        return content.replace(IMAGE_TOKEN, before + IMAGE_TOKEN + after)

    def _plan(self, rounds: Tuple[Round, ...], question: str, pictures: Tuple[Picture, ...]) -> _Plan:
        """The prompt of a question after some rounds; without the oldest rounds if the context can't hold them all.

        The pictures of dropped rounds move to the oldest one that stays. If pictures alone are too many for the
        question, the oldest of them go, but the newest one never does, nor any that the question says a place for.
        """
        limit = self.context_limit
        room = min(self.settings.max_new_tokens, max(limit // 8, 1))  # kept free for the answer
        moved: Tuple[Picture, ...] = ()  # from the rounds that were dropped
        dropped = lost = 0
        while True:
            kept, brought = rounds[dropped:], pictures
            if kept:
                kept = (replace(kept[0], pictures=moved + kept[0].pictures),) + kept[1:]
            else:
                brought = moved + pictures
            plan = self._lay_out(kept, question, brought)
            if len(plan.ids) + room <= limit:
                break
            if kept:
                moved += rounds[dropped].pictures
                dropped += 1
            elif len(brought) > 1 and (moved or IMAGE_TOKEN not in question):
                moved, pictures = (moved[1:], pictures) if moved else (moved, pictures[1:])
                lost += 1
            else:
                seen = sum(token == IMAGE_TOKEN_INDEX for token in plan.ids)
                raise UserError(
                    f"The message takes {len(plan.ids)} tokens with what stands around it"
                    + (f" ({seen} of them are of pictures)" if seen else "")
                    + f", but at most {limit - room} fit beside an answer (the model reads {limit} in all); make it shorter"
                    + (", or bring fewer pictures." if len(brought) > 1 else ".")
                )
        if not dropped:
            if lost:
                left = "the oldest one was" if lost == 1 else f"the oldest {lost} were"
                plan = replace(plan, notice=f"The pictures are more than the model can read at once: {left} left out.")
            return plan
        notice = "The conversation is longer than the model can read: its oldest "
        notice += "round was" if dropped == 1 else f"{dropped} rounds were"
        notice += " dropped"
        if lost:
            notice += ", and the oldest " + ("picture" if lost == 1 else f"{lost} pictures") + " too"
        elif moved:
            notice += ", the picture stays" if len(moved) == 1 else ", the pictures stay"
        return replace(plan, notice=notice + ".")

    def _lay_out(self, rounds: Tuple[Round, ...], question: str, pictures: Tuple[Picture, ...]) -> _Plan:
        """Token ids of the whole prompt: text is tokenized, answers are taken as the model gave them."""
        messages: List[Dict[str, str]] = []
        for turn in rounds:
            messages.append({"role": "user", "content": self._content(turn.question, turn.pictures)})
            messages.append({"role": "assistant", "content": _harmless(turn.answer)})
        messages.append({"role": "user", "content": self._content(question, pictures)})
        # at once: a template may write a round in another way when it is no longer the last one
        text, spans_of_answers = self.template.render_spans(messages, add_generation_prompt=True)
        ids: List[int] = []
        done, context = 0, ""  # the text is laid out up to here; the answer that ends there
        sizes: List[Tuple[int, int]] = []  # of the pictures in the text that is not laid out yet
        for turn, (start, _) in zip(rounds, spans_of_answers):
            sizes += [picture.size for picture in turn.pictures]
            if not turn.answer_ids:
                continue
            answer, said = _harmless(turn.answer), text[start:]
            blank = len(said) - len(said.lstrip())
            if said[blank:].startswith(answer):
                ids += self._tokenize(text[done:start], sizes, context) + list(turn.answer_ids)
                done, context, sizes = start + blank + len(answer), answer, []
        sizes += [picture.size for picture in pictures]
        ids += self._tokenize(text[done:], sizes, context)

        keys, spans = list(ids), []
        places = (place for place, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX)
        for picture in [p for turn in rounds for p in turn.pictures] + list(pictures):
            number = self._numbers.setdefault(picture.digest, -1000 - len(self._numbers))
            mine = [next(places) for _ in range(num_image_features(picture.size, self.config))]
            spans.append((picture, mine[0], mine[-1] + 1))
            for place in mine:
                keys[place] = number
        return _Plan(rounds, question, pictures, text, ids, keys, spans)

    def _tokenize(self, text: str, sizes: List[Tuple[int, int]], context: str) -> List[int]:
        """Ids of a stretch of the rendered text that follows ``context`` (an answer; empty at the very start).

        A tokenizer may join letters across the seam, or write a space before a text's first word. So the stretch is
        tokenized behind the answer, or behind a neutral letter where the two would grow together, and what stands
        before the seam is cut off.
        """
        if not context:
            return list(self.processor.tokenize_prompt(text, sizes))
        for lead in (context, "a", "\n"):
            start = list(self.processor.tokenize_prompt(lead, []))
            both = list(self.processor.tokenize_prompt(lead + text, sizes))
            if both[: len(start)] == start:
                return both[len(start) :]
        whole = list(self.processor.tokenize_prompt(text, sizes))
        begin = self.config.bos_token_id
        return whole[1:] if begin is not None and whole[:1] == [begin] else whole

    def _start(self, plan: _Plan, waiting: Tuple[Picture, ...], spare: Tuple[Picture, ...]) -> Iterator[str]:
        if plan.notice:
            self.on_notice(plan.notice)
        self._running = self._answer(plan, waiting, spare)
        return self._running

    def _answer(self, plan: _Plan, waiting: Tuple[Picture, ...], spare: Tuple[Picture, ...]) -> Iterator[str]:
        """Runs a plan; what was said is in the history however the reader leaves.

        waiting, spare: the pictures that are left for later questions.
        """
        started = time.perf_counter()
        turn = self.stats.last = TurnStats(prompt=plan.text, prompt_ids=plan.ids)
        text = _AnswerText(self.processor.stream_decoder(), self.stop_strings)
        log_probs: List[float] = []
        training = self.model.training
        self.model.eval()
        try:
            logits = self._prefill(plan, turn)
            most = min(self.settings.max_new_tokens, self.context_limit - len(plan.ids))
            reason = "length"
            for ids, scores in decode_steps(self.model, self._cache, logits, self._sampler, [plan.ids], most):
                self._cached = plan.keys + text.ids  # the step has read the token before this one
                if not log_probs:
                    turn.seconds_to_first_token = time.perf_counter() - started
                log_probs.append(float(scores[0]))
                token = int(ids[0])
                piece = "" if token in self.settings.eos_token_ids else text.put(token)
                if piece:
                    yield piece
                if token in self.settings.eos_token_ids or text.stopped:
                    reason = "stop"
                    break
            piece = text.end()
            if piece:
                yield piece
            turn.finish_reason = reason
        finally:
            if training:
                self.model.train()
            turn.seconds = time.perf_counter() - started
            turn.new_tokens = len(log_probs)
            self.stats.new_tokens += len(log_probs)
            if log_probs:
                turn.mean_token_probability = math.exp(sum(log_probs) / len(log_probs))
            answer, answer_ids = text.result()
            if answer or turn.finish_reason != "interrupted":
                said = Round(plan.question, answer, answer_ids, plan.pictures)
                self._rounds, self._waiting, self._spare = plan.rounds + (said,), waiting, spare
            self._running = None

    def _prefill(self, plan: _Plan, turn: TurnStats) -> paddle.Tensor:
        """Reads what of the prompt is not cached yet; logits [1, V] after it."""
        if self._cache is None:
            self._cache = self.model.new_cache(1, self.context_limit)
        common = 0
        # the last token is read in any case: its logits begin the answer
        for old, new in zip(self._cached, plan.keys[:-1]):
            if old != new:
                break
            common += 1
        self._cached = self._cached[:common]
        self._cache.truncate(common)
        with paddle.no_grad():
            features = [
                self._encode(picture)[max(common - start, 0) :] for picture, start, end in plan.spans if end > common
            ]
            new_ids = paddle.to_tensor([plan.ids[common:]], dtype="int64")
            logits = self.model.prefill(self.model.embed(new_ids, features or None), self._cache)
        self._cached = list(plan.keys)
        turn.prefilled_tokens = len(plan.ids) - common
        self.stats.prefilled_tokens += turn.prefilled_tokens
        return logits

    def _encode(self, picture: Picture) -> paddle.Tensor:
        """Image features [K, D]; the tower sees a picture once, whichever chat of the model asks."""

        def encode() -> paddle.Tensor:
            pixel_values = paddle.to_tensor(self.processor.image_processor.preprocess(picture.image))
            self.stats.tower_calls += 1
            return self.model.encode_images(pixel_values, [picture.size])[0]

        return self._features.get(picture.digest, self.processor.image_processor, encode)

    # small parts

    def _heed_weights(self) -> None:
        """Forgets what was read with weights that the model no longer has, after a training, a load or a merge."""
        self._features = PictureFeatures.of(self.model)
        if self._features.weights != self._weights:
            self._weights, self._cached = self._features.weights, []

    def _finish_running(self) -> None:
        """An answer whose reader went away without closing it ends here."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _open(self, image: Any, source: Optional[str] = None) -> Picture:
        if self.config.vision is None:
            raise UserError("The model takes text only (its config has no vision_config); leave the picture out.")
        if isinstance(image, (str, Path)) and not str(image).startswith("data:"):
            source = str(image)
        opened = self.processor.load_image(image)
        self.processor.image_processor.check(opened.size, source or "The picture")
        return Picture(opened, self.processor.image_digest(opened), source)

    def _end_ids(self) -> List[int]:
        """The config's end tokens, and stop strings that are one token, for a decoder leaves special tokens out."""
        tokenizer, ends = self.processor.tokenizer, list(self.config.eos_token_ids)
        for stop in self.stop_strings:
            token = tokenizer.convert_tokens_to_ids(stop)
            if isinstance(token, int) and tokenizer.convert_ids_to_tokens(token) == stop:
                ends.append(token)
        return sorted({token for token in ends if token is not None})

    def _checked_ids(self, ids: Optional[List[int]], answer: str) -> Optional[Tuple[int, ...]]:
        """Ids from a file, if they say the answer in this model's tokens; else None."""
        if not ids or not all(isinstance(token, int) and 0 <= token < self.config.vocab_size for token in ids):
            return None
        text = _AnswerText(self.processor.stream_decoder(), ())
        said = "".join([*(text.put(token) for token in ids), text.end()])
        return tuple(ids) if said == answer else None


class _AnswerText:
    """Turns tokens into the visible text of an answer.

    White space around the answer is left out, and so is everything from a stop string on. Text that may be the
    beginning of a stop string is held back until it is clear.
    """

    def __init__(self, decoder, stops: Sequence[str]):
        self.decoder, self.stops = decoder, tuple(stops)
        self.ids: List[int] = []
        self.stopped = False
        self._text = ""  # all that was decoded, up to a stop string
        self._cut = ""  # the stop string and what came with it
        self._ends: List[int] = []  # length of the decoded text after each token
        self._shown = 0

    def put(self, token: int) -> str:
        """Takes a token; what can be shown now, maybe nothing."""
        self.ids.append(token)
        self._text += self.decoder.put(token)
        self._ends.append(len(self._text))
        found = [place for place in (self._text.find(stop, self._shown) for stop in self.stops) if place >= 0]
        if found:
            self.stopped = True
            self._text, self._cut = self._text[: min(found)], self._text[min(found) :]
            return self._show(len(self._text))
        held = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:length]):
                    held = length
                    break
        return self._show(len(self._text) - held)

    def end(self) -> str:
        """What was held back, when no more tokens come. Bytes of a character that never came to its end are left out."""
        return self._show(len(self._text))

    def result(self) -> Tuple[str, Optional[Tuple[int, ...]]]:
        """The text that was shown, and its tokens; None where a token holds more than what was shown."""
        answer = self._text[: self._shown].lstrip()
        if not answer:
            return "", None
        for count, end in enumerate(self._ends, start=1):
            if end >= self._shown:
                beyond = (self._text + self._cut)[self._shown : end].strip()
                return answer, None if beyond else tuple(self.ids[:count])
        return answer, None

    def _show(self, end: int) -> str:
        begin = max(self._shown, len(self._text) - len(self._text.lstrip()))
        end = len(self._text[:end].rstrip())
        if end <= begin:
            return ""
        self._shown = end
        return self._text[begin:end]


def _harmless(answer: str) -> str:
    """An answer is no place for a picture, whatever the model wrote."""
    return answer.replace(IMAGE_TOKEN, IMAGE_TOKEN.replace("<", "< "))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error).rstrip(".") or type(error).__name__


def _path(file: Union[str, Path]) -> Path:
    if not isinstance(file, (str, os.PathLike)):
        raise UserError(f"The file is {file!r}; expected its name.")
    return Path(os.path.expanduser(file))


def _is_saved_chat(path: Path) -> bool:
    if not os.path.isfile(path):  # a pipe or a device may never come to an end
        return False
    try:
        with open(path, "rb") as file:
            return FILE_FORMAT.encode() in file.read(200)
    except OSError:
        return False


def _write_atomically(path: Path, content: str) -> None:
    """A temporary file beside it takes the place of the old one in one step; behind a link, of what the link names."""
    temporary = None
    try:
        target = Path(os.path.realpath(path))
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp gives 0600
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, (OSError, ValueError)):  # ValueError: a name with a NUL
            raise UserError(f"{path} can't be written: {_reason(error)}.") from error
        raise
