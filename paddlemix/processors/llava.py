"""LlavaProcessor: texts and pictures -> the model's inputs, and rows of a dataset -> ids and labels."""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Collection, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from paddlemix.errors import UserError, folder_to_write, refuse_unbuilt
from paddlemix.models.llava.anyres import num_image_features
from paddlemix.models.llava.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.conversation import Template, get_template
from paddlemix.models.llava.hub import TOKENIZER_FILES, has_tokenizer, resolve_small
from paddlemix.processors.chat_template import FILE_NAME as CHAT_TEMPLATE_FILE
from paddlemix.processors.chat_template import ChatTemplate, name_of, read_saved
from paddlemix.processors.image_processing import LlavaImageProcessor, has_image_processor
from paddlemix.processors.images import image_digest, image_list, load_image
from paddlemix.processors.labels import (
    TokenLabels,
    cut_at,
    expand,
    label,
    render_for_training,
    truncate_rounds,
    wrap_images,
)
from paddlemix.processors.rows import ImageCountError, parse_row
from paddlemix.processors.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from paddlemix.processors.tokenizer import replaced_files as replaced_tokenizer_files

if TYPE_CHECKING:  # the config brings PaddleNLP with it
    from PIL import Image

    from paddlemix.models.llava.configuration import LlavaConfig

__all__ = ["LlavaProcessor"]

logger = logging.getLogger("paddlemix.processors.llava")

_ASKS_FOR_NOTHING = {"truncation": (False, "do_not_truncate"), "add_special_tokens": (True,)}

Size = Tuple[int, int]
Span = Tuple[int, int]


def replaced_files(folder: Path, written: Collection[str]) -> List[Path]:
    """Files of an earlier processor in ``folder`` that would be read beside those ``written`` there; none where these are
    of no processor."""
    if not any(name in written for name in TOKENIZER_FILES):
        return []
    template = folder / CHAT_TEMPLATE_FILE
    stale = [template] if template.name not in written and read_saved(folder) is not None else []
    return [*replaced_tokenizer_files(folder, written), *stale]


class LlavaProcessor:
    """The tokenizer and the image processor of a checkpoint, and its config, which says how they go together.

    Args:
        tokenizer: of :func:`load_tokenizer`.
        image_processor: None for a model that takes text only.
        config: the model's; counts the features of a picture and names the conversation template.
        chat_template: in place of the named template: one in a file of the toolkit's form.

    Example:
        >>> processor = LlavaProcessor.from_pretrained(folder)
        >>> batch = processor(text="USER: <image>\\nWhat is this? ASSISTANT:", images="cat.png")
        >>> ids, _ = model.generate(**batch, max_new_tokens=64)
        >>> processor.batch_decode(ids)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: Optional[LlavaImageProcessor],
        config: "LlavaConfig",
        chat_template: Optional[ChatTemplate] = None,
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.chat_template = chat_template
        if tokenizer.vocab_size > config.vocab_size:
            logger.warning(
                "The tokenizer has %d tokens but the model only %d (vocab_size): they are of different checkpoints.",
                tokenizer.vocab_size,
                config.vocab_size,
            )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: Union[str, Path],
        config: Optional["LlavaConfig"] = None,
        image_aspect_ratio: Optional[str] = None,
        adapter: Union[str, Path, None] = None,
        **asked,
    ) -> "LlavaProcessor":
        """Opens the tokenizer and the image processor of a checkpoint.

        Args:
            folder_or_name: whatever ``LlavaLlamaForCausalLM.from_pretrained`` opens.
            config: instead of the checkpoint's own, for a training that changes it.
            image_aspect_ratio: instead of the checkpoint's own.
            adapter: folder or name of a LoRA adapter that goes over the checkpoint. What it holds of config, tokenizer, chat
                template and image processor is what it was trained with, and used instead.
            asked: ``use_fast``, as Hugging Face's callers write it, has nothing to choose between.

        Raises:
            UserError: an unknown name, a missing or corrupt file.
        """
        takes = "it takes config, image_aspect_ratio and adapter."
        refuse_unbuilt("LlavaProcessor.from_pretrained()", asked, {"use_fast": (True, False)}, takes)
        from paddlemix.models.llava import checkpoint

        folder = resolve_small(folder_or_name)
        adapter = None if adapter is None else resolve_small(adapter)
        config = checkpoint.read_config(folder, adapter) if config is None else config
        if image_aspect_ratio not in (None, config.image_aspect_ratio):
            config = deepcopy(config)
            config.image_aspect_ratio = image_aspect_ratio
            config.validate()
        model = folder
        folder = adapter if adapter is not None and has_tokenizer(adapter) else checkpoint.processor_folder(model)
        image_processor = None
        if config.vision is not None:
            place = folder
            if not has_image_processor(folder):  # the original release has it with the tower
                place = checkpoint.separate_tower(model, config, adapter) or folder
            image_processor = LlavaImageProcessor.from_pretrained(
                place, config=config, image_aspect_ratio=image_aspect_ratio
            )
        saved = read_saved(folder)
        if saved is not None and name_of(saved) == config.conversation_template:
            saved = None
        return cls(load_tokenizer(folder), image_processor, config, saved)

    def __iter__(self):
        """``processor, tokenizer = AutoProcessorMIX.from_pretrained(…)``, as the toolkit's scripts have it."""
        return iter((self, self.tokenizer))

    def save_pretrained(self, folder: Union[str, Path]) -> None:
        """Writes tokenizer and image processor into ``folder``, and the config if none is there.

        What an earlier tokenizer or chat template left there goes, since it would be read instead.
        """
        folder = folder_to_write(folder)
        self.tokenizer.save_pretrained(folder)
        if read_saved(folder) is not None:
            (folder / CHAT_TEMPLATE_FILE).unlink()
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        if self.chat_template is not None:
            text = json.dumps(self.chat_template.values, ensure_ascii=False, indent=2)
            (folder / CHAT_TEMPLATE_FILE).write_text(text + "\n", encoding="utf-8")
        if not (folder / "config.json").exists():  # the model's save writes more into it
            self.config.save_pretrained(str(folder))

    @property
    def template(self) -> Union[Template, ChatTemplate]:
        """The conversation template that the checkpoint was trained with."""
        if self.chat_template is not None:
            return self.chat_template
        return get_template(self.config.conversation_template)

    @property
    def pad_token_id(self) -> int:
        """Fills the shorter rows of a batch: the tokenizer's, else the config's, else unk, eos or 0 (it is masked)."""
        tokenizer = self.tokenizer
        for index in (
            tokenizer.pad_token_id,
            self.config.pad_token_id,
            tokenizer.unk_token_id,
            tokenizer.eos_token_id,
        ):
            if index is not None and 0 <= index < self.config.vocab_size:
                return index
        return 0

    # ---- prompts ----

    def __call__(
        self,
        text: Union[str, Sequence[str]],
        images: Any = None,
        *,
        return_tensors: str = "pd",
        padding: Any = True,
        **asked,
    ) -> Dict[str, Any]:
        """A batch for ``model(**batch)`` and ``model.generate(**batch)``.

        Args:
            text: one prompt or a list of B prompts, with one ``<image>`` for each picture.
            images: the pictures (path, URL, PIL image, array): one, a list, or a list with a list (or a picture, or
                None) for each prompt. A flat list is dealt out by the number of ``<image>`` in each prompt.
            return_tensors, padding: as PaddleNLP's and Hugging Face's callers write them; ``pd`` and true alone.
            asked: ``truncation`` (false) and ``add_special_tokens`` (true), likewise.

        Returns:
            Paddle tensors ``input_ids`` and ``attention_mask`` [B, T] int64, shorter rows padded on the left; each
            ``<image>`` is as many ``IMAGE_TOKEN_INDEX`` as its picture has features. With pictures also
            ``pixel_values`` [N, 3, H, W] float32 (all tiles of all pictures) and ``image_sizes`` [M, 2] int64
            (width, height).

        Raises:
            ImageCountError: another number of ``<image>`` than of pictures.
            UserError: a picture that can't be opened or is too thin, or a prompt without tokens.
        """
        import paddle

        refuse_unbuilt("The processor", asked, _ASKS_FOR_NOTHING, "a prompt comes whole, as the model was trained.")
        for name, given, allowed in (
            ("return_tensors", return_tensors, ("pd",)),
            ("padding", padding, (True, "longest")),
        ):
            if given not in allowed:
                raise UserError(
                    f"{name} is {given!r}; expected {allowed[0]!r}: the batch comes padded, as Paddle's tensors."
                )
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
            raise UserError("The processor got no prompt; expected a text or a list of texts.")
        dealt = _deal_out(prompts, images)
        pictures = [[self.load_image(image) for image in row] for row in dealt]
        rows = [self.tokenize_prompt(prompt, [image.size for image in row]) for prompt, row in zip(prompts, pictures)]
        for number, row in enumerate(rows, start=1):
            if not row:
                raise UserError(f"Prompt {number} is empty; expected some text.")
        longest = max(len(row) for row in rows)
        input_ids = np.full((len(rows), longest), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, longest - len(row) :] = row
            attention_mask[number, longest - len(row) :] = 1
        batch = {"input_ids": paddle.to_tensor(input_ids), "attention_mask": paddle.to_tensor(attention_mask)}
        flat = [image for row in pictures for image in row]
        sources = [source for row in dealt for source in row]
        for number, (image, source) in enumerate(zip(flat, sources), start=1):
            if self.image_processor is not None:
                self.image_processor.check(image.size, _name(source, number))
        if flat:
            batch["pixel_values"] = paddle.to_tensor(self._pixel_values(flat))
            batch["image_sizes"] = paddle.to_tensor(np.array([image.size for image in flat], dtype=np.int64))
        return batch

    def tokenize_prompt(self, text: str, image_sizes: Sequence[Size]) -> List[int]:
        """Ids of one prompt: the tokenizer's bos, the text, and for each picture as many placeholders as it has features.

        Args:
            text: with one ``<image>`` for each picture.
            image_sizes: (width, height) of each picture.

        Raises:
            ImageCountError: another number of ``<image>`` than of sizes.
        """
        if self.config.mm_use_im_start_end:
            text = wrap_images(text)
        ids, _ = self._encode(text)
        return expand(ids, ids, [], self._features(text, image_sizes)).input_ids

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **asked) -> str:
        """The text of ids (a list, array or tensor of one row)."""
        return self.tokenizer.decode(token_ids, skip_special_tokens, **asked)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = True, **asked) -> List[str]:
        """:meth:`decode` of each row."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens, **asked)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Decodes ids that come one at a time."""
        return StreamDecoder(self.tokenizer, skip_special_tokens)

    @staticmethod
    def load_image(image: Any) -> "Image.Image":
        """A picture from a path, URL, array, bytes or PIL image; RGB, upright."""
        return load_image(image)

    @staticmethod
    def image_digest(image: "Image.Image") -> str:
        """The same for equal pictures, whatever file they came from."""
        return image_digest(image)

    # ---- training samples ----

    def encode_conversation(
        self, row: Mapping[str, Any], template: Union[str, Template, None] = None, max_length: Optional[int] = None
    ) -> Dict[str, Any]:
        """One row of a dataset, in any of its forms, as a training sample.

        Args:
            row: see :mod:`paddlemix.processors.rows`; its pictures are opened as they are named there.
            template: a name or an object that renders; default: the checkpoint's.
            max_length: a longer sample is cut after its last whole round that fits, and so are its pictures.

        Returns:
            ``input_ids`` and ``labels`` (lists of T ints; -100 where nothing is learned), ``pixel_values``
            (float32 array [n, 3, H, W] of all tiles of the row's pictures, or None) and ``image_sizes`` (list of
            (width, height)). If no label is left (``max_length`` is too short for the first round, or the row has no
            answer), every label is -100, or both lists are empty; such a sample is to be left out.

        Raises:
            UserError: the row is malformed, or a picture can't be opened.
        """
        messages, sources = parse_row(row)
        images = [self.load_image(source) for source in sources]
        sizes = [image.size for image in images]
        whole = self.encode_messages(messages, sizes, template)
        sample = truncate_rounds(whole, max_length)
        if len(sample.input_ids) < len(whole.input_ids):
            images = images[: self.count_images(sample.input_ids, sizes)]
        return {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "pixel_values": self._pixel_values(images) if images else None,
            "image_sizes": [image.size for image in images],
        }

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        image_sizes: Sequence[Size] = (),
        template: Union[str, Template, None] = None,
    ) -> TokenLabels:
        """Ids and labels of a conversation whose pictures have these sizes (width, height); no picture is opened.

        With the templates ``v1``, ``llama_2`` and ``plain`` (and those like them) both equal what the original
        release trains on, except that it has one placeholder for each picture, and masks a whole sample where a text
        looks like one of the template's own marks.

        Raises:
            UserError: wrong messages, or another number of ``<image>`` than of sizes.
        """
        template = self.template if template is None else get_template(template)
        text, spans = render_for_training(messages, template, self.config.mm_use_im_start_end)
        features = self._features(text, image_sizes)
        ids, offsets = self._encode(text)
        places = sorted({place for span in spans for place in span})
        ids, offsets = cut_at(self.tokenizer, text, ids, offsets, places)
        labels, round_ends = label(ids, offsets, spans)
        return expand(ids, labels, round_ends, features)

    def count_images(self, input_ids: Sequence[int], image_sizes: Sequence[Size]) -> int:
        """How many of the pictures, in order, lie in the ids of a sample that was cut."""
        left = sum(index == IMAGE_TOKEN_INDEX for index in input_ids)
        count = 0
        for size in image_sizes:
            left -= num_image_features(size, self.config)
            if left < 0:
                break
            count += 1
        return count

    # ---- parts ----

    def _encode(self, text: str) -> Tuple[List[int], List[Span]]:
        """Ids with the tokenizer's prefix (bos) and one ``IMAGE_TOKEN_INDEX`` for each ``<image>``, and their characters.

        A tokenizer that has a token ``<image>`` (Hugging Face's checkpoints) finds it by itself. For another (the
        original release's) the text is cut at each ``<image>`` and the pieces are tokenized one by one. A text that
        begins with bos itself, as chat templates in files may write it, gets no second one.
        """
        ids = self.tokenizer.prefix_ids
        if ids == [self.tokenizer.bos_token_id] and text.startswith(self.tokenizer.bos_token):
            ids = []
        offsets = [(-1, -1)] * len(ids)
        own = self.tokenizer.added_token_id(IMAGE_TOKEN)
        if own is not None:
            more, spans = self.tokenizer.encode_with_offsets(text)
            return ids + [IMAGE_TOKEN_INDEX if index == own else index for index in more], offsets + spans
        position = 0
        for number, chunk in enumerate(text.split(IMAGE_TOKEN)):
            if number:
                ids.append(IMAGE_TOKEN_INDEX)
                offsets.append((position - len(IMAGE_TOKEN), position))
            more, spans = self.tokenizer.encode_with_offsets(chunk)
            ids += more
            offsets += [(position + start, position + end) for start, end in spans]
            position += len(chunk) + len(IMAGE_TOKEN)
        return ids, offsets

    def _features(self, text: str, image_sizes: Sequence[Size]) -> List[int]:
        """How many features each picture has, if the text has a place for each."""
        count = text.count(IMAGE_TOKEN)
        if count != len(image_sizes):
            raise ImageCountError(_mismatch(count, len(image_sizes)))
        return [num_image_features(size, self.config) for size in image_sizes]

    def _pixel_values(self, images: Sequence["Image.Image"]) -> np.ndarray:
        """float32 [n, 3, H, W]: the tiles of all pictures behind each other."""
        if self.image_processor is None:
            raise UserError("The model takes text only (its config has no vision_config); leave the picture out.")
        return np.concatenate([self.image_processor.preprocess(image) for image in images])


def _deal_out(prompts: Sequence[str], images: Any) -> List[List[Any]]:
    """The pictures of each prompt, from whatever form they came in."""
    if images is None:
        return [[] for _ in prompts]
    images = image_list(images)
    counts = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
    if any(image is None or isinstance(image, (list, tuple)) for image in images):
        rows = [list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in images]
        if len(rows) != len(prompts):
            raise ImageCountError(
                f"There are {len(prompts)} prompt(s) but {len(rows)} lists of pictures; expected one list for each."
            )
        for number, (count, row) in enumerate(zip(counts, rows), start=1):
            if count != len(row):
                raise ImageCountError(f"Prompt {number} has {count} {IMAGE_TOKEN} but {len(row)} picture(s).")
        return rows
    if sum(counts) != len(images):
        raise ImageCountError(_mismatch(sum(counts), len(images)))
    waiting = iter(images)
    return [[next(waiting) for _ in range(count)] for count in counts]


def _name(source: Any, number: int) -> str:
    """What an error calls a picture."""
    if isinstance(source, (str, Path)) and not str(source).startswith("data:"):
        return str(source)
    return f"Picture {number}"


def _mismatch(places: int, pictures: int) -> str:
    return (
        f"The text has {places} {IMAGE_TOKEN} but {pictures} picture(s) came with it; expected one {IMAGE_TOKEN} for "
        "each picture."
    )
