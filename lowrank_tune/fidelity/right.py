"""How right an answer is: VQA accuracy as TextVQA defines it, and ANLS as ST-VQA and DocVQA do."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PEOPLE = 10
"""As many were asked each question of VQA and TextVQA; of a shorter list each answer is right."""
_AGREEING = 3
"""So many people's answer is wholly right."""
_SIMILAR = 0.5
"""ANLS takes what is less similar for a wrong answer, and not for a misspelt one."""

# The answers are made alike as the evaluation of VQA does it, to its letter: figures are compared with published ones.
_WRITTEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WRITTEN)}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITHOUT_ONE_APOSTROPHE = {
    whole[: mark.start()] + whole[mark.end() :]: whole
    for whole in _CONTRACTIONS.split()
    for mark in re.finditer("'", whole)
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def alike(answer: str) -> str:
    """An answer without what does not count: capitals, punctuation, articles, how numbers are written."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    bare = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text)
        bare = bare.replace(mark, "" if apart else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", bare).split()]
    return " ".join(_WITHOUT_ONE_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, right: Sequence[str]) -> float:
    """The part of an answer that is right: with each of ten people left out, a third for each other who says it.

    Of fewer than ten, as where a data set lists what is right, any one is wholly right.
    """
    own, people = alike(answer), [alike(each) for each in right]
    agreeing = people.count(own)
    if len(people) < _PEOPLE:
        return float(agreeing > 0)
    others = [agreeing - (each == own) for each in people]
    return sum(min(1.0, count / _AGREEING) for count in others) / len(people)


def similarity(answer: str, right: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest of the right answers, 0 below a half."""
    found = 0.0
    for each in right:
        ours, theirs = answer.lower().strip(), each.lower().strip()
        longest = max(len(ours), len(theirs))
        near = 1.0 - _edits(ours, theirs) / longest if longest else 1.0
        found = max(found, near if near >= _SIMILAR else 0.0)
    return found


def _edits(first: str, second: str) -> int:
    """Characters to insert, remove or replace that make one text of the other."""
    row = list(range(len(second) + 1))
    for number, ours in enumerate(first, start=1):
        before, row[0] = row[0], number
        for place, theirs in enumerate(second, start=1):
            diagonal, before = before, row[place]
            row[place] = min(before + 1, row[place - 1] + 1, diagonal + (ours != theirs))
    return row[-1]
