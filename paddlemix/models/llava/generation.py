"""Choosing tokens: greedy, sampling and beam search over a model with a cache.

Shapes: B rows, V vocabulary, L new tokens.
"""

import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import numpy as np
import paddle
import paddle.nn.functional as F

from paddlemix.errors import UserError
from paddlemix.lazy_paddlenlp import GenerationConfig
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.tensor_files import read_json

__all__ = [
    "GenerationSettings",
    "Sampler",
    "beam_search",
    "decode_steps",
    "default_generation_config",
    "merged_settings",
    "read_generation_config",
]

STRATEGIES = ("greedy_search", "sampling", "beam_search")


@dataclass(frozen=True)
class GenerationSettings:
    """What ``generate`` takes, under PaddleNLP's names, checked once.

    Args:
        max_new_tokens (int): at most so many new tokens.
        min_new_tokens (int): no end token before so many.
        decode_strategy (str): ``greedy_search``, ``sampling`` or ``beam_search``.
        temperature (float): divides the logits when sampling; 0 is greedy.
        top_k (int): sample among the k likeliest; 0 for all.
        top_p (float): sample among the likeliest whose probabilities reach p (Holtzman et al., 2020).
        repetition_penalty (float): divides the positive and multiplies the negative logits of tokens already in the
            prompt or the answer (Keskar et al., 2019).
        seed (int): makes sampling repeatable, whatever the device; None draws one from Paddle's generator, so that
            ``paddle.seed`` does it too.
        num_beams, length_penalty, early_stopping: beam search; a beam's score is its log-probability divided by
            ``length ** length_penalty``.
        num_return_sequences (int): answers per prompt (sampling: draws; beam search: best beams).
        eos_token_ids (list of int): end an answer. pad_token_id fills what follows.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    decode_strategy: str = "greedy_search"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: Optional[int] = None
    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    eos_token_ids: List[int] = field(default_factory=list)
    pad_token_id: int = 0

    def __post_init__(self):
        def require(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

        def whole(name: str, least: int) -> bool:
            value = getattr(self, name)
            return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least

        for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            require(number and np.isfinite(value), name, "a number")
        require(whole("max_new_tokens", 1), "max_new_tokens", "a whole number of at least 1")
        require(whole("min_new_tokens", 0), "min_new_tokens", "a whole number, 0 or more")
        require(self.decode_strategy in STRATEGIES, "decode_strategy", "one of " + ", ".join(STRATEGIES))
        require(self.temperature >= 0, "temperature", "0 (greedy) or more")
        require(whole("top_k", 0), "top_k", "a whole number, 0 (all) or more")
        require(0 < self.top_p <= 1, "top_p", "a number above 0, at most 1")
        require(self.repetition_penalty > 0, "repetition_penalty", "a number above 0")
        require(self.seed is None or whole("seed", 0), "seed", "a whole number, 0 or more, or None")
        several = isinstance(self.eos_token_ids, (list, tuple))
        ends = several and all(isinstance(each, (int, np.integer)) for each in self.eos_token_ids)
        require(ends, "eos_token_ids", "a list of token ids, each of which ends an answer by itself")
        pad = self.pad_token_id
        require(isinstance(pad, (int, np.integer)) and not isinstance(pad, bool), "pad_token_id", "a token id")
        require(whole("num_return_sequences", 1), "num_return_sequences", "a whole number of at least 1")
        if self.decode_strategy == "beam_search":
            require(whole("num_beams", 2), "num_beams", "a whole number of at least 2 for beam_search")
            require(isinstance(self.early_stopping, bool), "early_stopping", "true or false")
            require(self.num_return_sequences <= self.num_beams, "num_return_sequences", "at most num_beams")
        elif self.decode_strategy == "greedy_search":
            require(self.num_return_sequences == 1, "num_return_sequences", "1 with greedy_search")

    @classmethod
    def build(cls, config, generation_config, given: Dict[str, Any]) -> "GenerationSettings":
        """From what a call gives, else the generation config (PaddleNLP's), else the model's config.

        Raises:
            UserError: a name, or a setting of the generation config, that nothing here reads.
        """
        if generation_config is not None and not hasattr(generation_config, "__dict__"):
            raise UserError(f"generation_config is {generation_config!r:.100}; expected PaddleNLP's, or a dict.")
        stored = dict(vars(generation_config)) if generation_config is not None else {}
        if stored.get("num_beams") == 1 and stored.get("decode_strategy") != "beam_search":
            # PaddleNLP's default, with which it searches no beams
            del stored["num_beams"]
        if stored.get("max_length") and stored.get("max_new_tokens") in (None, cls.max_new_tokens):
            stored["max_new_tokens"] = stored["max_length"]
        stored["min_new_tokens"] = stored.get("min_new_tokens") or stored.get("min_length")
        given = _newer_names(given)
        _refuse_unread(stored, "generation_config sets")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(given) - known - set(_UNREAD) - _ANYTHING - {"eos_token_id"})
        if unknown:
            hint = " Pictures are pixel_values, as LlavaProcessor gives them." if "images" in unknown else ""
            raise UserError(
                f"generate() doesn't know {', '.join(unknown)}; it takes {', '.join(f.name for f in fields(cls))}.{hint}"
            )
        _refuse_unread(given, "generate() was given")
        asked = {**stored, **{name: value for name, value in given.items() if value is not None}}
        values = {name: asked[name] for name in known if asked.get(name) is not None}
        eos = asked.get("eos_token_id")
        eos = config.eos_token_ids if eos is None else eos
        if "eos_token_ids" not in given:
            values["eos_token_ids"] = list(eos) if isinstance(eos, (list, tuple)) else [eos]
        settings = cls(**values)
        if given.get("pad_token_id") is not None:
            return settings
        # early LLaMA files say -1
        stored_pads = [each for each in (values.get("pad_token_id"), config.pad_token_id) if each is not None]
        pads = [each for each in stored_pads if 0 <= each < config.vocab_size]
        return replace(settings, pad_token_id=[*pads, *settings.eos_token_ids, 0][0])


# other names of the same, in PaddleNLP too
_OLDER_NAMES = {"max_length": "max_new_tokens", "min_length": "min_new_tokens", "min_new_token": "min_new_tokens"}


def _newer_names(given: Dict[str, Any]) -> Dict[str, Any]:
    given = dict(given)
    for older, name in _OLDER_NAMES.items():
        value = given.pop(older, None)
        if given.get(name) is None and value is not None:
            given[name] = value
    return given


def merged_settings(stored: Dict[str, Any], given: Dict[str, Any]) -> Dict[str, Any]:
    """Two dicts of settings, of which the second goes before the first."""
    return {**_newer_names(stored), **{name: value for name, value in _newer_names(given).items() if value is not None}}


# what PaddleNLP's callers may pass whatever it is: there is always a cache, and the prompt begins as it should
_ANYTHING = {"use_cache", "bos_token_id"}
# PaddleNLP's settings that nothing here reads, and the values with which they ask for nothing
_UNREAD = {
    "diversity_rate": 0.0,
    "no_repeat_ngram_size": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": None,
    "num_beam_groups": 1,
    "trunc_input": True,
    "use_fast": False,
    "use_fp16_decoding": False,
    "fast_ptq_sampling": False,
    "stopping_criteria": None,
    "logits_processors": None,
    "synced_gpus": False,
}


def _refuse_unread(values: Dict[str, Any], who: str) -> None:
    for name, neutral in _UNREAD.items():
        value = values.get(name)
        if value is not None and value != neutral:
            raise UserError(f"{who} {name} to {value!r}, which isn't built here; leave it out.")


def default_generation_config(config: LlavaConfig) -> GenerationConfig:
    """PaddleNLP's, with the special tokens of the model."""
    return GenerationConfig(**{name: getattr(config, name) for name in _SPECIAL})


_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation_config(folder: Path, config: LlavaConfig) -> GenerationConfig:
    """What generation_config.json of a checkpoint says; the default where there is none.

    Raises:
        UserError: a value that PaddleNLP refuses.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return default_generation_config(config)
    values = read_json(path)
    if "transformers_version" in values:
        values.pop("max_length", None)  # there it counts the prompt too
    for name in _SPECIAL:
        if values.get(name) is None:
            values[name] = getattr(config, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a temperature beside greedy search, as in Vicuna's files
            return GenerationConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds a value that can't be used: {error}") from error


def penalise_repetition(scores: np.ndarray, seen: List[List[int]], penalty: float) -> np.ndarray:
    """scores [B, V] with the tokens that each row has seen made less likely; placeholders (negative ids) don't count.

    Any penalty gives finite numbers: they are float64, and none is beyond 1e300.
    """
    scores = scores.astype(np.float64)
    for row, ids in enumerate(seen):
        ids = np.unique(np.array([i for i in ids if i >= 0], dtype=np.int64))
        held = scores[row, ids]
        with np.errstate(over="ignore"):
            held = np.where(held > 0, held / penalty, held * penalty)
        scores[row, ids] = np.clip(held, -1e300, 1e300)
    return scores


def forbid(scores: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    """scores [..., V] without those tokens; ids that the vocabulary lacks can't come anyway."""
    scores = scores.copy()
    scores[..., [each for each in ids if 0 <= each < scores.shape[-1]]] = -np.inf
    return scores


def check_finite(scores: np.ndarray) -> None:
    """Refuses scores [B, V] from which no token can be picked.

    Raises:
        UserError: a row has NaN, or an infinite best.
    """
    if not np.isfinite(scores.max(axis=1)).all():  # the maximum is NaN where any of them is
        raise UserError(
            "the model's logits are not finite (NaN or infinite): its weights are damaged, or too large for the dtype that "
            "they are computed in; try dtype float32, or fetch the checkpoint again."
        )


class Sampler:
    """Picks the next token of each row; keeps the random state.

    Sampling runs on the host in float64 from a seeded NumPy generator, so a seed gives one answer on every device.
    """

    def __init__(self, settings: GenerationSettings):
        self.settings = settings
        self.greedy = settings.decode_strategy == "greedy_search" or settings.temperature == 0
        seed = settings.seed
        if seed is None and not self.greedy:
            seed = paddle.randint(0, 2**31 - 1, [1]).item()
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: paddle.Tensor, seen: List[List[int]], step: int) -> Tuple[np.ndarray, np.ndarray]:
        """logits [B, V], what each row holds so far, how many tokens are new -> ids [B], log-probabilities [B].

        The log-probability is that of the distribution the token was picked from by the model itself: before
        temperature and cuts, after the repetition penalty.
        """
        settings = self.settings
        scores = logits.astype("float32").numpy()
        check_finite(scores)
        if settings.repetition_penalty != 1.0:
            scores = penalise_repetition(scores, seen, settings.repetition_penalty)
        if step < settings.min_new_tokens and settings.eos_token_ids:
            scores = forbid(scores, settings.eos_token_ids)
        ids = scores.argmax(axis=1) if self.greedy else np.array([self._draw(row) for row in scores])
        top = scores.max(axis=1)
        partition = np.exp(scores - top[:, None]).sum(axis=1)
        log_probs = scores[np.arange(len(ids)), ids] - top - np.log(partition)
        return ids, log_probs

    def _draw(self, scores: np.ndarray) -> int:
        """One draw from scores [V]."""
        settings = self.settings
        candidates = np.arange(scores.size)
        if 0 < settings.top_k < scores.size:
            candidates = np.argpartition(scores, -settings.top_k)[-settings.top_k :]
        weights = scores[candidates].astype(np.float64)
        with np.errstate(over="ignore"):  # as the temperature nears 0, all but the best end up at -inf
            weights = np.exp((weights - weights.max()) / settings.temperature)
        weights /= weights.sum()
        if settings.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            before = np.cumsum(weights[order]) - weights[order]
            kept = order[before < settings.top_p]  # the likeliest always stays
            candidates, weights = candidates[kept], weights[kept] / weights[kept].sum()
        return int(self.random.choice(candidates, p=weights))


def decode_steps(
    model, cache, logits: paddle.Tensor, sampler: Sampler, prompt_ids: List[List[int]], max_new_tokens: int
) -> Iterator[Tuple[np.ndarray, np.ndarray]]:
    """Yields ids [B] and log-probabilities [B] of one step after another; rows that have ended get the pad id.

    Args:
        cache: holds the prompt; every token but the last one yielded is in it when the consumer gets the next. Once half of
            its rows have ended it forgets them, so that one long answer doesn't cost as much as a batch of them.
        logits: [B, V] after the prompt.
        prompt_ids: of each row, for the repetition penalty.

    Ends when every row has given an end token, or after ``max_new_tokens`` (the end token is yielded).
    """
    settings = sampler.settings
    seen = [list(ids) for ids in prompt_ids]
    held = np.arange(len(seen))  # the rows that are in the cache
    ended = np.zeros(len(seen), dtype=bool)
    for step in range(max_new_tokens):
        ids, log_probs = np.full(len(seen), settings.pad_token_id), np.zeros(len(seen))
        chosen, chances = sampler(logits, [seen[row] for row in held], step)
        ids[held] = np.where(ended[held], settings.pad_token_id, chosen)
        log_probs[held] = np.where(ended[held], 0.0, chances)
        yield ids, log_probs
        ended |= np.isin(ids, settings.eos_token_ids)
        if ended.all() or step + 1 == max_new_tokens:
            return
        for row in held:
            seen[row].append(int(ids[row]))
        going = np.flatnonzero(~ended[held])
        if 2 * len(going) <= len(held):
            cache.reorder(paddle.to_tensor(going))
            held = held[going]
        # an ended row reads what doesn't matter; a pad id of the caller's may be outside the vocabulary
        read = np.where(ended[held], 0, ids[held])
        logits = model.step(paddle.to_tensor(read.reshape([-1, 1]), dtype="int64"), cache)


def beam_search(
    model, cache, logits: paddle.Tensor, settings: GenerationSettings, prompt_ids: List[List[int]]
) -> Tuple[List[List[int]], List[float]]:
    """Beam search over B prompts, of which the cache and logits [B, V] hold one row each.

    Returns:
        the best ``num_return_sequences`` id lists of each prompt, best first, and their scores (log-probability
        divided by ``length ** length_penalty``).
    """
    prompts, beams, eos = len(prompt_ids), settings.num_beams, set(settings.eos_token_ids)
    cache.reorder(paddle.to_tensor(np.repeat(np.arange(prompts), beams)))
    logits = paddle.repeat_interleave(logits.astype("float32"), beams, axis=0)  # which has no float16 on a GPU
    totals = np.full((prompts, beams), -np.inf)
    totals[:, 0] = 0.0  # all beams of a prompt are the same at first
    ids = [[[] for _ in range(beams)] for _ in range(prompts)]
    finished: List[List[Tuple[float, List[int]]]] = [[] for _ in range(prompts)]
    done = [False] * prompts
    candidates = max(2, 1 + len(eos)) * beams  # each beam may like all the ends best
    for step in range(settings.max_new_tokens):
        log_probs = F.log_softmax(logits.astype("float32"), axis=-1).numpy()
        check_finite(log_probs)
        if settings.repetition_penalty != 1.0:  # of log-probabilities, as in PaddleNLP and transformers
            seen = [list(prompt) + beam for prompt, held in zip(prompt_ids, ids) for beam in held]
            log_probs = penalise_repetition(log_probs, seen, settings.repetition_penalty)
        log_probs = log_probs.reshape(prompts, beams, -1)
        if step < settings.min_new_tokens and eos:
            log_probs = forbid(log_probs, eos)
        vocabulary = log_probs.shape[-1]
        rows, tokens = [], []
        for p in range(prompts):
            if done[p]:  # the cache holds its rows still; what they read doesn't matter
                rows += range(p * beams, (p + 1) * beams)
                tokens += [0] * beams
                continue
            scores = (totals[p][:, None] + log_probs[p]).ravel()
            count = min(candidates, scores.size)
            best = np.argpartition(-scores, count - 1)[:count]
            best = best[np.argsort(-scores[best], kind="stable")]
            kept_ids, kept_totals, kept_rows = [], [], []
            for rank, flat in enumerate(best):
                beam, token = divmod(int(flat), vocabulary)
                if token in eos:
                    if rank < beams:
                        sequence = ids[p][beam] + [token]
                        finished[p].append((scores[flat] / len(sequence) ** settings.length_penalty, sequence))
                    continue
                kept_ids.append(ids[p][beam] + [token])
                kept_totals.append(scores[flat])
                kept_rows.append(p * beams + beam)
                if len(kept_ids) == beams:
                    break
            for _ in range(beams - len(kept_ids)):  # nothing but ends was left
                kept_ids.append(ids[p][0] + [0])
                kept_totals.append(-np.inf)
                kept_rows.append(p * beams)
            finished[p] = sorted(finished[p], key=lambda pair: -pair[0])[:beams]
            ids[p], totals[p] = kept_ids, np.array(kept_totals)
            if len(finished[p]) == beams:
                reachable = totals[p].max() / (step + 1) ** settings.length_penalty
                done[p] = settings.early_stopping or finished[p][-1][0] >= reachable
            rows += kept_rows
            tokens += [sequence[-1] for sequence in kept_ids]
        if all(done) or step + 1 == settings.max_new_tokens:
            break
        cache.reorder(paddle.to_tensor(rows))
        logits = model.step(paddle.to_tensor(tokens, dtype="int64").unsqueeze(1), cache)
    sequences, scores = [], []
    for p in range(prompts):
        if not done[p]:
            for sequence, total in zip(ids[p], totals[p]):
                finished[p].append((total / len(sequence) ** settings.length_penalty, sequence))
        for score, sequence in sorted(finished[p], key=lambda pair: -pair[0])[: settings.num_return_sequences]:
            sequences.append(sequence)
            scores.append(float(score))
    return sequences, scores
