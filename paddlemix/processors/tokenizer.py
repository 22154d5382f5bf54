"""Text to token ids and back, for the two kinds of tokenizer that LLaVA checkpoints hold.

``tokenizer.json`` is run by the library ``tokenizers``, ``tokenizer.model`` by ``sentencepiece``; with both in a folder
the first is taken, as transformers does. Ids equal those of transformers' ``LlamaTokenizer`` (``tokenizer.model``,
``legacy`` true or false) and ``PreTrainedTokenizerFast`` (``tokenizer.json``). PaddleNLP's tokenizers are not used:
its LlamaTokenizer doesn't open a folder with ``tokenizer.model`` (it looks for another file name), none of them gives
the characters behind each token, which the labels need, and importing them takes seconds.
"""

import codecs
import json
import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Collection, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from paddlemix.errors import UserError, folder_to_write, naming, refuse_unbuilt
from paddlemix.models.llava.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX

__all__ = ["Tokenizer", "TokenizedText", "StreamDecoder", "load_tokenizer", "encode_text", "encode_with_offsets"]

logger = logging.getLogger("paddlemix.processors.tokenizer")

JSON_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
PADDLE_MODEL_FILE = "sentencepiece.bpe.model"  # the same file as PaddleNLP names it
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_ASKS_FOR_NOTHING = {"padding": (False, "do_not_pad"), "truncation": (False, "do_not_truncate")}
SPACE = "\u2581"  # how sentencepiece writes a space

Span = Tuple[int, int]


class TokenizedText(dict):
    """``input_ids`` and ``attention_mask``, as items and as attributes."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class AddedToken(NamedTuple):
    """A token beside the trained vocabulary; text is cut at it before anything else is done."""

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Engines: text without special treatment -> ids and the characters behind each, and the bytes behind an id
# --------------------------------------------------------------------------------------------------------------------


class SentencePieceEngine:
    """``tokenizer.model``: LLaMA's byte-fallback BPE.

    Args:
        proto: the file's bytes.
        added: tokens beside the model's own pieces, by id.
        legacy: put a space before the text and after every added token (transformers before 4.31, and the original
            LLaVA training), instead of before the text only.
        named: the contents of bos, eos, … and the additional special tokens; before one of these, text that is not
            legacy starts without the space.
        spaced: False leaves out the space before the text (``add_prefix_space``), which legacy text has anyway.

    Raises:
        ValueError: the bytes are no sentencepiece model.
    """

    def __init__(
        self,
        proto: bytes,
        added: Dict[int, AddedToken],
        legacy: bool,
        named: frozenset = frozenset(),
        spaced: bool = True,
    ):
        self.proto, self.added, self.legacy, self.special, self.spaced = proto, added, legacy, named, spaced
        self._start()

    def _start(self) -> None:
        import sentencepiece

        self.drops_first_space = self.legacy or self.spaced
        try:
            processor = sentencepiece.SentencePieceProcessor(
                model_proto=self.proto if self.legacy else _without_dummy_prefix(self.proto)
            )
        except Exception as error:  # RuntimeError of the C++ library, DecodeError of protobuf
            raise ValueError("it is no sentencepiece model") from error
        size = processor.get_piece_size()
        if not size:
            raise ValueError("it holds no pieces")
        self._processor = processor
        self.size = size
        self._ids = {processor.id_to_piece(index): index for index in range(size)}
        self._bytes: Dict[int, bytes] = {}
        self._ids.update((token.content, index) for index, token in self.added.items())
        # alternatives are tried in order, so the longest goes first; a token may swallow the spaces around it
        self._cut_ids = sorted(
            (index for index, token in self.added.items() if token.content),
            key=lambda index: -len(self.added[index].content),
        )
        self._cut = _pattern_of([self.added[index] for index in self._cut_ids])
        self._mark = "<unk>"  # text before a leading space, which sentencepiece would else drop
        self._mark_length = 0 if self.legacy else len(processor.encode(self._mark))

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("proto", "added", "legacy", "special", "spaced")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def encode(self, text: str) -> Tuple[List[int], List[Span]]:
        if not text:
            return [], []
        shift = 0
        if not self.legacy:
            text = text.replace(SPACE, " ")
            if self.spaced:
                text, shift = SPACE + text, 1
        ids, spans = [], []
        for chunk, start, added in self._split(text):
            if added is not None:
                ids.append(added)
                spans.append((start, start + len(chunk)))
            else:
                chunk_ids, chunk_spans = self._encode_chunk(chunk)
                ids += chunk_ids
                spans += [(start + first, start + last) for first, last in chunk_spans]
        if not self.legacy:
            if len(ids) > 1 and ids[0] == self._ids.get(SPACE) and self.token(ids[1]) in self.special:
                ids, spans = ids[1:], spans[1:]
            spans = [(max(first - shift, 0), max(last - shift, 0)) for first, last in spans]
        return ids, spans

    def _split(self, text: str) -> Iterable[Tuple[str, int, Optional[int]]]:
        """(chunk, where it starts, its id if it is an added token) from left to right; no empty chunk."""
        position = 0
        for match in self._cut.finditer(text) if self._cut else ():
            if match.start() > position:
                yield text[position : match.start()], position, None
            yield match.group(), match.start(), self._cut_ids[match.lastindex - 1]
            position = match.end()
        if position < len(text):
            yield text[position:], position, None

    def _encode_chunk(self, chunk: str) -> Tuple[List[int], List[Span]]:
        if self.legacy:
            ids, surface = self._processor.encode(chunk), " " + chunk
        elif chunk.startswith((SPACE, " ")):
            ids, surface = self._processor.encode(self._mark + chunk)[self._mark_length :], chunk
        else:
            ids, surface = self._processor.encode(chunk), chunk
        spans = align([self.token_bytes(index) for index in ids], surface.replace(SPACE, " "))
        dummy = len(surface) - len(chunk)
        return ids, [(max(first - dummy, 0), max(last - dummy, 0)) for first, last in spans]

    def token_bytes(self, index: int) -> bytes:
        data = self._bytes.get(index)
        if data is None:
            if index in self.added:
                data = self.added[index].content.encode()
            else:
                piece = self._processor.id_to_piece(index)
                is_byte = self._processor.is_byte(index)
                data = bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()
            self._bytes[index] = data
        return data

    def is_special(self, index: int) -> bool:
        if index in self.added:
            return self.added[index].special
        return self._processor.is_control(index) or self._processor.is_unknown(index)

    def named(self) -> Dict[str, str]:
        """bos, eos, unk and pad as the model itself numbers them."""
        numbers = (
            self._processor.bos_id(),
            self._processor.eos_id(),
            self._processor.unk_id(),
            self._processor.pad_id(),
        )
        return {name: self._processor.id_to_piece(number) for name, number in zip(NAMED_TOKENS, numbers) if number >= 0}

    def template(self) -> Tuple[List[int], List[int]]:
        """Ids that stand around every text; the model itself says nothing of them."""
        return [], []

    def vocabulary(self) -> Dict[str, int]:
        return self._ids

    def token(self, index: int) -> str:
        return self.added[index].content if index in self.added else self._processor.id_to_piece(index)


class JsonEngine:
    """``tokenizer.json``, run by the library ``tokenizers``.

    Args:
        text: the file's text.
        added: tokens that other files of the folder name; those that the file lacks are added.

    Raises:
        ValueError: the text is no tokenizer, or an added token can't have its id.
    """

    def __init__(self, text: str, added: Dict[int, AddedToken]):
        self.text, self.given = text, added
        self._start()

    def _start(self) -> None:
        import tokenizers

        try:
            values = json.loads(self.text)
            _keep_space_in_offsets(values.get("post_processor"))
            values["truncation"] = values["padding"] = None
            engine = tokenizers.Tokenizer.from_str(json.dumps(values, ensure_ascii=False))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"it is no tokenizer ({str(error).splitlines()[0]:.100})") from error
        for index, token in sorted(self.given.items()):
            if engine.token_to_id(token.content) is None and index == engine.get_vocab_size():
                new = tokenizers.AddedToken(
                    token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=token.special
                )
                engine.add_special_tokens([new]) if token.special else engine.add_tokens([new])
            if engine.token_to_id(token.content) != index:
                raise ValueError(
                    f"the token {token.content!r} should have the id {index} (says {ADDED_TOKENS_FILE} or "
                    f"{CONFIG_FILE}) but has {engine.token_to_id(token.content)}"
                )
        self._engine = engine
        self._ids = engine.get_vocab(with_added_tokens=True)
        self._tokens = {index: token for token, index in self._ids.items()}
        self.size = engine.get_vocab_size(with_added_tokens=False)
        self.added = {
            index: AddedToken(token.content, token.special, token.lstrip, token.rstrip)
            for index, token in engine.get_added_tokens_decoder().items()
        }
        kinds = _decoder_kinds(values.get("decoder"))
        self._byte_level = "ByteLevel" in kinds
        self._words = not kinds
        self._byte_fallback = bool(values["model"].get("byte_fallback"))
        self.drops_first_space = bool(kinds & {"Strip", "Metaspace"}) or self._words

    def __getstate__(self):
        return {"text": self.text, "given": self.given}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def encode(self, text: str) -> Tuple[List[int], List[Span]]:
        encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token_bytes(self, index: int) -> bytes:
        if index in self.added:
            return self.added[index].content.encode()
        token = self._tokens[index]
        if self._byte_level:
            return b"".join(_byte_of_character().get(character) or character.encode() for character in token)
        if self._byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return (" " + token if self._words else token.replace(SPACE, " ")).encode()

    def is_special(self, index: int) -> bool:
        return index in self.added and self.added[index].special

    def named(self) -> Dict[str, str]:
        """What LLaMA's tokens are called, as far as the file has them."""
        special = {token.content for token in self.added.values() if token.special}
        return {name: token for name, token in zip(NAMED_TOKENS, ("<s>", "</s>", "<unk>", "<pad>")) if token in special}

    def template(self) -> Tuple[List[int], List[int]]:
        """Ids that the file's post-processor puts before and after every text."""
        inner, outer = self._engine.encode("a", add_special_tokens=False).ids, self._engine.encode("a").ids
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start], outer[start + len(inner) :]
        return [], []

    def vocabulary(self) -> Dict[str, int]:
        return self._ids

    def token(self, index: int) -> str:
        return self._tokens[index]


def _without_dummy_prefix(proto: bytes) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    model.normalizer_spec.add_dummy_prefix = False
    return model.SerializeToString()


def _pattern_of(tokens: Sequence[AddedToken]) -> Optional["re.Pattern[str]"]:
    """Finds any of the tokens, the first in the list where several begin at one place; one group for each."""
    parts = [
        "(" + (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "") + ")"
        for token in tokens
    ]
    return re.compile("|".join(parts)) if parts else None


def _keep_space_in_offsets(processor: Optional[Dict[str, Any]]) -> None:
    """Byte-level post-processors leave the space before a word out of its characters; labels need it in."""
    if processor:
        if processor.get("type") == "ByteLevel":
            processor["trim_offsets"] = False
        for inner in processor.get("processors", ()):
            _keep_space_in_offsets(inner)


def _decoder_kinds(decoder: Optional[Dict[str, Any]]) -> set:
    if not decoder:
        return set()
    kinds = {decoder["type"]} | {kind for inner in decoder.get("decoders", ()) for kind in _decoder_kinds(inner)}
    if decoder["type"] == "Metaspace" and decoder.get("prepend_scheme") == "never":
        kinds.discard("Metaspace")
        kinds.add("MetaspaceNever")
    return kinds


@lru_cache(maxsize=1)
def _byte_of_character() -> Dict[str, bytes]:
    """Byte-level BPE writes each byte as a printable character: its own where Latin-1 has one, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update((chr(0x100 + number), bytes([byte])) for number, byte in enumerate(others))
    return table


def align(pieces: Sequence[bytes], text: str) -> List[Span]:
    """The characters ``[start, end)`` of ``text`` behind each piece, in order.

    Pieces that are parts of one character all have that character. A piece whose bytes the text doesn't have at its
    place (a tokenizer that normalizes, or an unknown token) has the characters up to the next one that fits.

    Example:
        >>> align([b"a", b"\\xc3", b"\\xa9"], "aé")
        [(0, 1), (1, 2), (1, 2)]
    """
    raw = text.encode()
    owner: Sequence[int] = range(len(text) + 1)
    if len(raw) > len(text):
        owner = [number for number, character in enumerate(text) for _ in range(len(character.encode()))]
        owner.append(len(text))
    starts, ends, position = [], [], 0
    for piece in pieces:
        start = raw.find(piece, position)
        fits = start >= 0
        start = start if fits else position
        position = start + len(piece) if fits else position
        starts.append(start)
        ends.append(position)
    spans = []
    for number, (start, end) in enumerate(zip(starts, ends)):
        if end == start:  # didn't fit: up to the next piece
            end = starts[number + 1] if number + 1 < len(starts) else len(raw)
        spans.append((owner[start], owner[end - 1] + 1 if end > start else owner[start]))
    return spans


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """A checkpoint's tokenizer; made by :func:`load_tokenizer`.

    Attributes:
        bos_token, eos_token, unk_token, pad_token (str or None), and the same with ``_id`` (int or None).
        vocab_size (int): the trained vocabulary; ``len(tokenizer)`` counts the added tokens too.
        model_max_length (int or None): as ``tokenizer_config.json`` says.
        drops_first_space (bool): encoding puts a space before a text, and decoding takes it away.
    """

    def __init__(self, engine, config: Dict[str, Any], named: Dict[str, str], files: Dict[str, bytes]):
        self._engine, self._config, self._files = engine, config, files
        self._vocabulary = engine.vocabulary()
        for name in NAMED_TOKENS:
            token = named.get(name)
            setattr(self, name, token)
            setattr(self, f"{name}_id", None if token is None else self._vocabulary.get(token))
        self._named_ids = {getattr(self, f"{name}_id") for name in NAMED_TOKENS} - {None}
        self.vocab_size: int = engine.size
        self.drops_first_space: bool = engine.drops_first_space
        length = config.get("model_max_length")
        if not isinstance(length, (int, float, type(None))):
            raise UserError(f"tokenizer_config.json: model_max_length is {length!r}; expected a number of tokens.")
        self.model_max_length: Optional[int] = int(length) if length and length < 1e9 else None
        self._prefix, self._suffix = self._affixes()

    def _affixes(self) -> Tuple[List[int], List[int]]:
        """Ids before and after every text: LLaMA's by the config's two switches, others' by tokenizer.json."""
        prefix, suffix = self._engine.template()
        llama = "Llama" in (self._config.get("tokenizer_class") or "") or MODEL_FILE in self._files
        if llama and not (JSON_FILE in self._files and "tokenizer_class" not in self._config):
            bos = self.bos_token_id if self._config.get("add_bos_token", True) else None
            eos = self.eos_token_id if self._config.get("add_eos_token", False) else None
            prefix, suffix = [] if bos is None else [bos], [] if eos is None else [eos]
        return prefix, suffix

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __call__(
        self,
        text: Union[str, Sequence[str]],
        *,
        add_special_tokens: bool = True,
        return_tensors: Optional[str] = None,
        **asked,
    ) -> TokenizedText:
        """``input_ids`` and ``attention_mask`` of a text, or lists of both for a list of texts (not padded).

        Args:
            text: a text, or a list of B texts.
            add_special_tokens: with the ids that stand around every text.
            return_tensors: ``pd`` or ``np``, as Hugging Face's callers write it, for tensors or arrays [B, T].
            asked: ``padding`` and ``truncation`` as such callers write them; nothing but false.

        Raises:
            UserError: no text, something else than is done, or tensors of texts of different lengths.
        """
        refuse_unbuilt("The tokenizer", asked, _ASKS_FOR_NOTHING, "LlavaProcessor makes padded batches of prompts.")
        texts = [text] if isinstance(text, str) else list(text) if isinstance(text, Iterable) else None
        if texts is None or not all(isinstance(one, str) for one in texts):
            raise UserError(f"The tokenizer got {text!r:.100}; expected a text or a list of texts.")
        rows = [self.encode(one, add_special_tokens) for one in texts]
        masks = [[1] * len(row) for row in rows]
        if return_tensors is not None:
            return TokenizedText(
                input_ids=_as_tensor(rows, return_tensors), attention_mask=_as_tensor(masks, return_tensors)
            )
        if isinstance(text, str):
            return TokenizedText(input_ids=rows[0], attention_mask=masks[0])
        return TokenizedText(input_ids=rows, attention_mask=masks)

    def encode(self, text: str, add_special_tokens: bool = True) -> List[int]:
        """Ids of a text, with the ids that stand around every text (LLaMA: bos) unless ``add_special_tokens`` is off."""
        ids = self.encode_with_offsets(text)[0]
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def encode_with_offsets(self, text: str) -> Tuple[List[int], List[Span]]:
        """Ids of a text and the characters ``[start, end)`` behind each, without the ids around every text.

        Half of a surrogate pair, which no file can hold, counts as U+FFFD.
        """
        return self._engine.encode(re.sub("[\ud800-\udfff]", "\ufffd", text))

    @property
    def prefix_ids(self) -> List[int]:
        """Ids before every text: LLaMA's is bos."""
        return list(self._prefix)

    @property
    def suffix_ids(self) -> List[int]:
        """Ids after every text; LLaVA checkpoints have none."""
        return list(self._suffix)

    def decode(self, token_ids: Union[int, Iterable[int]], skip_special_tokens: bool = False, **asked) -> str:
        """The text of ids; accepts a tensor or array too.

        ``<image>`` placeholders (-200) count as special. Bytes that are no UTF-8 come out as U+FFFD, and an id
        beyond the vocabulary, which a padded embedding can yield, as nothing. ``clean_up_tokenization_spaces`` may be
        given as false.

        Raises:
            UserError: several rows.
        """
        refuse_unbuilt("decode", asked, {"clean_up_tokenization_spaces": (False,)}, "leave it out.")
        decoder = StreamDecoder(self, skip_special_tokens)
        pieces = [decoder.put(index) for index in _as_list(token_ids)]
        return "".join(pieces) + decoder.end()

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **asked) -> List[str]:
        """:meth:`decode` of each row."""
        return [self.decode(row, skip_special_tokens, **asked) for row in rows]

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that an id stands for; a character may be spread over several ids."""
        if index == IMAGE_TOKEN_INDEX:
            return IMAGE_TOKEN.encode()
        try:
            return self._engine.token_bytes(index)
        except (KeyError, IndexError):
            return b""

    def is_special(self, index: int) -> bool:
        """Whether ``skip_special_tokens`` leaves the id out."""
        if index == IMAGE_TOKEN_INDEX or index in self._named_ids:
            return True
        return 0 <= index and self._knows(index) and self._engine.is_special(index)

    def _knows(self, index: int) -> bool:
        return index < self.vocab_size or index in self._engine.added

    def added_token_id(self, token: str) -> Optional[int]:
        """The id of a token that is found as a whole in any text (``<image>``, ``</s>``); None for all others."""
        index = self._vocabulary.get(token)
        return index if index in self._engine.added else None

    @property
    def all_special_ids(self) -> List[int]:
        special = {index for index, token in self._engine.added.items() if token.special}
        return sorted(special | self._named_ids)

    def get_vocab(self) -> Dict[str, int]:
        return dict(self._vocabulary)

    def tokenize(self, text: str) -> List[str]:
        """The tokens of a text as the vocabulary spells them."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=False))

    def convert_tokens_to_ids(self, tokens: Union[str, Sequence[str]]) -> Union[Optional[int], List[Optional[int]]]:
        """The id of a token (a list for a list); the unknown token's where the vocabulary hasn't got it."""
        if isinstance(tokens, str):
            return self._vocabulary.get(tokens, self.unk_token_id)
        return [self._vocabulary.get(token, self.unk_token_id) for token in tokens]

    def convert_ids_to_tokens(self, ids: Union[int, Sequence[int]]) -> Union[str, List[str]]:
        if isinstance(ids, int):
            return self._engine.token(ids)
        return [self._engine.token(int(index)) for index in ids]

    def split_bytes(self, data: bytes) -> List[int]:
        """Ids whose bytes are ``data``: the longest token that fits, then on. For parts of a token that is cut."""
        table = self._bytes_table()
        ids = []
        while data:
            for length in range(len(data), 0, -1):
                if data[:length] in table:
                    ids.append(table[data[:length]])
                    data = data[length:]
                    break
            else:
                raise UserError(f"The tokenizer has no token for the byte {data[:1]!r}.")
        return ids

    def _bytes_table(self) -> Dict[bytes, int]:
        if not hasattr(self, "_by_bytes"):
            ordinary = (index for index in self._vocabulary.values() if not self.is_special(index))
            # a piece goes before the byte token of the same byte: it is what encoding gives
            self._by_bytes = {self.token_bytes(index): index for index in sorted(ordinary)}
        return self._by_bytes

    def save_pretrained(self, folder: Union[str, Path]) -> List[str]:
        """Writes the tokenizer's files into ``folder`` (made if missing); returns their paths."""
        folder = folder_to_write(folder)
        for name, content in self._files.items():
            with naming(folder / name):
                (folder / name).write_bytes(content)
        for stale in replaced_files(folder, self._files):
            stale.unlink()
        return [str(folder / name) for name in self._files]


def replaced_files(folder: Path, written: Collection[str]) -> List[Path]:
    """Files of an earlier tokenizer in ``folder`` that would be read beside, or before, those ``written`` there."""
    names = [JSON_FILE, MODEL_FILE, ADDED_TOKENS_FILE]
    if MODEL_FILE not in written:  # which goes before Paddle's
        names.append(PADDLE_MODEL_FILE)
    return [folder / name for name in names if name not in written and (folder / name).is_file()]


def _as_list(token_ids: Any) -> List[int]:
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    if isinstance(token_ids, int):
        return [token_ids]
    token_ids = list(token_ids)
    if any(isinstance(index, (list, tuple)) or getattr(index, "size", 1) != 1 for index in token_ids):
        raise UserError(f"decode got {len(token_ids)} row(s) of ids; expected one row, batch_decode takes several.")
    return [int(index) for index in token_ids]


def _as_tensor(rows: List[List[int]], kind: str) -> Any:
    """[B, T] of rows of one length: a tensor for ``pd``, an array for ``np``."""
    if kind not in ("pd", "np"):
        raise UserError(f"return_tensors is {kind!r}; expected 'pd' (Paddle's tensors) or 'np' (NumPy's arrays).")
    if len({len(row) for row in rows}) > 1:
        raise UserError("The texts have different numbers of tokens, so they are no tensor; LlavaProcessor pads them.")
    import numpy as np

    array = np.array(rows, dtype=np.int64)
    if kind == "np":
        return array
    import paddle

    return paddle.to_tensor(array)


class StreamDecoder:
    """Text of ids that come one at a time.

    ``put`` returns what is certain so far: bytes of an unfinished character wait for the rest. All that ``put`` and
    ``end`` return, joined, equals ``tokenizer.decode(ids, skip_special_tokens)``.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.drops_first_space

    def put(self, index: int) -> str:
        """The characters that this id completes; often one word, sometimes none."""
        index = int(index)
        if self._skip and self._tokenizer.is_special(index):
            return ""
        data = self._tokenizer.token_bytes(index)
        if self._at_start and data:
            self._at_start = False
            data = data[1:] if data.startswith(b" ") else data
        return self._decoder.decode(data)

    def end(self) -> str:
        """What was waiting; U+FFFD for a character that never came to its end."""
        return self._decoder.decode(b"", final=True)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Union[str, Path]) -> Tokenizer:
    """Opens the tokenizer in ``folder``: ``tokenizer.json`` or ``tokenizer.model`` (PaddleNLP's
    ``sentencepiece.bpe.model``), and the files beside it that name the special and the added tokens
    (``tokenizer_config.json``, ``special_tokens_map.json``, ``added_tokens.json``).

    Raises:
        UserError: no tokenizer in the folder, or a file that can't be read; the message names it.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG_FILE)
    names = _read_json(folder / SPECIAL_TOKENS_FILE)
    extra = _read_json(folder / ADDED_TOKENS_FILE)
    try:
        named, special, added = _named_and_added(config, names, extra)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"The special tokens in {folder} can't be read ({error!r:.100}); expected what transformers writes in "
            f"{CONFIG_FILE}, {SPECIAL_TOKENS_FILE} and {ADDED_TOKENS_FILE}."
        ) from error

    files: Dict[str, bytes] = {}
    for name, held in ((JSON_FILE, JSON_FILE), (MODEL_FILE, PADDLE_MODEL_FILE), (MODEL_FILE, MODEL_FILE)):
        if (folder / held).is_file():
            files[name] = (folder / held).read_bytes()
    if not files:
        raise UserError(
            f"No tokenizer in {folder}; expected {JSON_FILE} or {MODEL_FILE} there (the checkpoint's publisher has it "
            "beside the weights)."
        )
    source = JSON_FILE if JSON_FILE in files else MODEL_FILE
    try:
        if source == JSON_FILE:
            engine = JsonEngine(files[source].decode("utf-8-sig"), added)
            tokenizer_class = "PreTrainedTokenizerFast"
        else:
            legacy = config.get("legacy")
            legacy = legacy is None or bool(legacy)
            spaced = bool(config.get("add_prefix_space", True))
            engine = SentencePieceEngine(files[source], added, legacy, frozenset(special), spaced)
            engine = _with_control_tokens(engine, named)
            tokenizer_class = "LlamaTokenizer"
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"{folder / source} can't be opened: {error}; copy it from its publisher again.") from error

    for name, token in engine.named().items():
        if name not in config and name not in names:
            named.setdefault(name, token)
    for token in list(named.values()) + sorted(special):
        if token is not None and token not in engine.vocabulary():
            logger.warning("The special token %r has no id in %s.", token, folder / source)
    named = {name: token for name, token in named.items() if token in engine.vocabulary()}

    written = dict(config) or {"tokenizer_class": tokenizer_class, **named}
    files[CONFIG_FILE] = _json_bytes(written)
    files[SPECIAL_TOKENS_FILE] = _json_bytes(names or named)
    if extra:
        files[ADDED_TOKENS_FILE] = _json_bytes(extra)
    return Tokenizer(engine, config, named, files)


def encode_text(tokenizer: Tokenizer, text: str) -> List[int]:
    """Ids of a text without those that stand around every text (no bos)."""
    return tokenizer.encode(text, add_special_tokens=False)


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> Tuple[List[int], List[Span]]:
    """Ids of a text (no bos) and the characters ``[start, end)`` behind each."""
    return tokenizer.encode_with_offsets(text)


def _read_json(path: Path) -> Dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON file ({error}); copy it from its publisher again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
    return values


def _json_bytes(values: Dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _named_and_added(
    config: Dict[str, Any], names: Dict[str, Any], extra: Dict[str, Any]
) -> Tuple[Dict[str, Optional[str]], set, Dict[int, AddedToken]]:
    """What the three files say: token of each name, contents that are special, and added tokens by id."""

    def content(token: Any) -> Optional[str]:
        if token is None or isinstance(token, str):
            return token
        return token["content"]

    named = {}
    for name in NAMED_TOKENS:
        for source in (config, names):
            if source.get(name) is not None:
                named[name] = content(source[name])
                break
    others = config.get("additional_special_tokens") or names.get("additional_special_tokens") or []
    others = others.values() if isinstance(others, dict) else others
    special = {token for token in named.values() if token} | {content(token) for token in others}

    added = {}
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        added[int(index)] = AddedToken(
            token["content"],
            bool(token.get("special", False)) or token["content"] in special,
            bool(token.get("lstrip", False)),
            bool(token.get("rstrip", False)),
        )
    for text, index in extra.items():
        added.setdefault(int(index), AddedToken(text, text in special))
    return named, special, added


def _with_control_tokens(engine: SentencePieceEngine, named: Dict[str, Optional[str]]) -> SentencePieceEngine:
    """The engine with its own bos, eos, unk and pad among the added tokens, so that they are found in a text."""
    vocabulary, added = engine.vocabulary(), dict(engine.added)
    for token in [*engine.named().values(), *named.values()]:
        if token is not None and token in vocabulary and vocabulary[token] not in added:
            added[vocabulary[token]] = AddedToken(token, special=True)
    special = engine.special | set(engine.named().values())
    return SentencePieceEngine(engine.proto, added, engine.legacy, special, engine.spaced)
