"""The accuracy of VQA: an answer against those of ten people, as the official evaluation counts."""

import re
from collections.abc import Sequence

from fused_route.checks import one_of, shown

NORMALIZE = ("official", "always")
ARTICLES = frozenset(["a", "an", "the"])
NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
# What may be typed without its apostrophe. Words that are others without one ("we'll", "she'd") are
# not among them.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll you'd you'd've
you'll you're you've
"""
# Written otherwise by the official table.
IRREGULAR = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# A point that no digit follows: "3.5." loses its last, ".5" keeps its first. The official pattern
# means to ask what is before it too, and does not; it takes 32 of them away at most (the value of
# re.UNICODE, given in the place of a count).
POINT, MOST_POINTS = re.compile(r"\.(?!\d)"), 32


def _one_missing(word: str) -> list[str]:
    places = [place for place, letter in enumerate(word) if letter == "'"]
    return [word[:place] + word[place + 1 :] for place in places]


EXPANDED = {
    typed: word for word in CONTRACTIONS.split() for typed in _one_missing(word)
} | IRREGULAR


def normalized(answer: str) -> str:
    """An answer without punctuation and articles, in lower case, with numbers as digits.

    A sign of punctuation vanishes where it stands at a space anywhere in the answer, or where the
    answer has a comma between digits; elsewhere a space takes its place.
    """
    text = answer
    is_number = COMMA_IN_NUMBER.search(answer) is not None
    for sign in PUNCTUATION:
        at_space = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if at_space or is_number else " ")
    text = POINT.sub("", text, count=MOST_POINTS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(EXPANDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], normalize: str = "official") -> float:
    """Accuracy of an answer, in [0, 1]: the mean, over the people, of min(1, matches / 3).

    Matches are counted among the others, so that with ten people 1, 2, 3 and 4 of them who say the
    same give 0.3, 0.6, 0.9 and 1.

    Args:
        prediction: the answer to judge.
        answers: what people have said, ten as a rule.
        normalize: "official", both sides only where the people differ, as the official evaluation
            does ("Yes" is wrong where all said "yes"); "always".

    Raises:
        ValueError: no answers, something that is no text, or an unknown way to normalize.
    """
    one_of("normalize", normalize, NORMALIZE)
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be those of several people, got {shown(answers)}")
    for name, text in [("prediction", prediction), *(("answers", answer) for answer in answers)]:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {shown(text)}")
    prediction, *said = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)
    )
    if normalize == "always" or len(set(said)) > 1:
        prediction, *said = map(normalized, (prediction, *said))
    matches = said.count(prediction)
    # who agrees leaves matches − 1 others that do
    agreed, differed = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * max(agreed, 0.0) + (len(said) - matches) * differed) / len(said)
