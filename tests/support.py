"""Real parts that tests need and that are too large for the repository, taken from packages that ``make test`` installs."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Union

FIXTURES = Path(__file__).parent / "fixtures"

WHITE_SPACE_SCORE = -1e9
SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def package_file(package: str, relative: str) -> Path:
    """A file that ``package`` installs, found without importing the package."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"The tests need a file of the package {package}; `make test` installs it.")
    return Path(spec.submodule_search_locations[0]) / relative


def llama2_tokenizer_json() -> Path:
    """LLaMA-2's own tokenizer.json (32000 pieces), from the package wordllama."""
    return package_file("wordllama", "tokenizers/l2_supercat_tokenizer_config.json")


def llama2_tokenizer_folder(
    folder: Union[str, Path], *, model: bool = True, json_file: bool = False, legacy: bool = True
) -> Path:
    """Writes LLaMA-2's tokenizer into ``folder`` (created if missing) and returns it.

    Args:
        model: write ``tokenizer.model``, as the original LLaVA release has it.
        json_file: write ``tokenizer.json``, as Hugging Face has it.
        legacy: what ``tokenizer_config.json`` says of transformers' legacy behaviour.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model:
        (folder / "tokenizer.model").write_bytes(llama2_sentencepiece())
    if json_file:
        shutil.copyfile(llama2_tokenizer_json(), folder / "tokenizer.json")
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": "<unk>",
        "padding_side": "right",
        "tokenizer_class": "LlamaTokenizer",
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>", **SPECIAL_TOKENS}, indent=2))
    return folder


ADDED_TOKENS = {"<image>": 32000, "<pad>": 32001, "<im_start>": 32002, "<im_end>": 32003}


def add_tokens(folder: Union[str, Path]) -> Path:
    """Adds ``ADDED_TOKENS`` to the folder's files, as transformers writes them; ``<image>`` and ``<pad>`` are special."""
    folder = Path(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **ADDED_TOKENS}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {
        str(index): {"content": token, "special": not token.startswith("<im_"), **flags}
        for token, index in tokens.items()
    }
    config["pad_token"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps({**SPECIAL_TOKENS, "pad_token": "<pad>"}, indent=2))
    if (folder / "tokenizer.model").exists():
        (folder / "added_tokens.json").write_text(json.dumps(ADDED_TOKENS, indent=2))
    return folder


def byte_level_tokenizer_folder(folder: Union[str, Path]) -> Path:
    """A small byte-level BPE with ChatML's tokens, as SmolLM2 has them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(FIXTURES / "byte_level_tokenizer.json", folder / "tokenizer.json")
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def llama2_sentencepiece() -> bytes:
    """LLaMA-2's ``tokenizer.model``, rebuilt from the vocabulary of its tokenizer.json.

    The published model numbers its pieces unk, bos, eos, 256 bytes, then the pieces by falling score. Only pieces of
    white space alone come after all others in the order of merges (their score is the lowest there is), though their
    numbers are among the first. test_tokenizer.py and make_tokenizer_golden.py hold the result against transformers.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    vocabulary = json.loads(llama2_tokenizer_json().read_text(encoding="utf-8"))["model"]["vocab"]
    model = schema.ModelProto()
    kinds = schema.ModelProto.SentencePiece
    for piece, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = kinds.NORMAL
        if number < 3:
            kind = kinds.UNKNOWN if number == 0 else kinds.CONTROL
        elif number < 259:
            kind = kinds.BYTE
        score = -float(number - 259) if kind == kinds.NORMAL else 0.0
        if len(piece) > 1 and not piece.strip("\u2581"):
            score = WHITE_SPACE_SCORE
        model.pieces.add(piece=piece, type=kind, score=score)
    trainer = model.trainer_spec
    trainer.model_type = schema.TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    trainer.unk_surface = " \u2047 "
    trainer.allow_whitespace_only_pieces = True
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
