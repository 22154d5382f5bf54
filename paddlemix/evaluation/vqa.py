"""Exact match of short answers after the normalisation of the VQA challenge (Goyal et al., 2017, visualqa.org/evaluation).

The rules, in that order: line ends and tabs are spaces; punctuation goes; letters are small; number words up to ten are
digits; articles go; contractions that lost their apostrophe get it back.
"""

import re
from typing import List

__all__ = ["exact_match", "normalize_answer", "with_articles"]

_NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
        "i'd i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock shan't "
        "she's should've shouldn't somebody's someone's something's that'd that's there'd there're there's they'd "
        "they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
        "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
    ).split()
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`?!,'
_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_LONE_PERIOD = re.compile(r"\.(?!\d)")


def normalize_answer(answer: str) -> str:
    """
    >>> normalize_answer("The  Two dogs.")
    '2 dogs'
    >>> normalize_answer("isnt it 1,000?")
    "isn't it 1000"
    """
    return " ".join(word for word in _words(answer) if word not in _ARTICLES)


def with_articles(answer: str) -> str:
    """For an answer of which normalisation leaves nothing: an article alone, such as the choice "A", or punctuation alone.

    >>> with_articles("A."), with_articles("?")
    ('a', '?')
    """
    return " ".join(_words(answer)) or answer.strip().lower()


def _words(answer: str) -> List[str]:
    text = _BETWEEN_DIGITS.sub("", " ".join(answer.split()))
    for mark in _PUNCTUATION:
        # a mark at a word's end or start just goes; one between two words parts them, as in "black/white"
        apart = f"{mark} " in f"{text} " or f" {mark}" in f" {text}"
        text = text.replace(mark, "" if apart else " ")
    text = _LONE_PERIOD.sub("", text).lower()
    words = (_NUMBERS.get(word, word) for word in text.split())
    return [_CONTRACTIONS.get(word, word) for word in words]


def exact_match(prediction: str, reference: str) -> bool:
    """Whether both say the same after normalisation; an answer of which that leaves nothing is the same as itself alone.

    >>> exact_match("A.", "A"), exact_match("", "A")
    (True, False)
    """
    said, right = normalize_answer(prediction), normalize_answer(reference)
    if said and right:
        return said == right
    return with_articles(prediction) == with_articles(reference)
