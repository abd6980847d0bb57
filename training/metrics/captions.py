"""Scores of captions as the evaluation of COCO counts them, through pycocoevalcap."""

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fused_route.checks import one_of, shown
from fused_route.training.metrics.answers import same_ids, text_of_each
from fused_route.training.packages import missing

Cut = dict[str, list[str]]  # image id → captions as words with spaces between them

NOTES = {
    "ptb": "words of the PTB tokenizer, as in published scores",
    "regex": "words of a regular expression, not of the PTB tokenizer: not comparable with "
    "published scores, and without METEOR",
}
# What ends a line for the PTB tokenizer, which is given a caption a line.
LINE_ENDS = re.compile(r"[\n\r\v\f\u2028\u2029]")

QUOTES = str.maketrans("‘’", "''")
# In lower case they are not among the punctuation that pycocoevalcap removes.
BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
ABBREVIATIONS = """
adm al apr ariz ave bldg blvd bros capt cf co col colo conn corp cpl dec dept dr esq est etc fla fri
ft ga gen gov hon inc jan jr lt ltd maj mar md mich minn mo mon mr mrs ms msgr mt nev oct okla penn
pres prof pvt rd rep rev sen sept sgt sq sr st supt tenn thu tue univ va vs wed wis
"""
TOKEN = re.compile(
    rf"""
      <\w+>
    | (?<!\w) (?: (?:[a-z]\.){{2,}} | [a-z]\.(?!\s*$) ) (?!\w)  # p.m.
    | (?<!\w) (?: {"|".join(ABBREVIATIONS.split())} )\. (?!\w)
    | (?<!\w) (?: can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) )
    | \w+?(?=n't\b) | n't\b | '(?:s|re|ve|ll|d|m)\b  # do n't, it 's
    | (?<!\w) [dlo]'\w\w+  # o'clock
    | [\#@]?(?!\d)\w+ (?: [-/]\w+ | \.(?!\d)\w+ )*  # black-and-white
    | \d\w* (?: [-/]\w+ | [.,:]\d\w* )*  # 5:30, 3-year-old
    | [!?]{{2,}}
    | [^\w\s.,:;!?'"`“”«»…‐-―\U00010000-\U0010ffff-]  # $ % & (
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions, and how the captions were cut into words.

    Attributes:
        scores: name → score. "bleu_1" to "bleu_4", "rouge_l" and "meteor" are in [0, 1], "cider"
            in [0, 10]; "images" is how many images were scored.
        tokenizer: "ptb" or "regex"; scores of the two are not comparable.
        each: image id → its CIDEr, of which "cider" is the mean.
    """

    scores: dict[str, float]
    tokenizer: str
    each: dict[str, float]

    @property
    def note(self) -> str:
        """What must be said beside the scores, in one line."""
        images = f"{self.scores['images']:.0f} images"
        return f"{images}, the source of CIDEr's document frequencies; {NOTES[self.tokenizer]}"


def _loaded(module: str) -> Any:
    try:
        return import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise missing("pycocoevalcap") from error


def java_runs() -> bool:
    """Whether `java` is there and starts; some systems have one that only says how to get it."""
    try:
        return (
            subprocess.run(["java", "-version"], capture_output=True, check=False).returncode == 0
        )
    except OSError:
        return False


def ptb_words(texts: Sequence[str]) -> list[str]:
    """Texts as the words of the PTB tokenizer that pycocoevalcap brings, without punctuation.

    By the command of its own class, which writes into the installed package and to standard error
    and gives a caption to another image where one before it has a line end other than "\\n".

    Raises:
        ValueError: pycocoevalcap is missing, or its tokenizer failed.
    """
    official = _loaded("tokenizer.ptbtokenizer")
    jar = Path(official.__file__).parent / official.STANFORD_CORENLP_3_4_1_JAR
    program = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*program, "-preserveLines", "-lowerCase"],
        input="\n".join(LINE_ENDS.sub(" ", text) for text in texts).encode("utf-8", "replace"),
        capture_output=True,
        check=False,
    )
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    if done.returncode or len(lines) != len(texts):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(
            f"the PTB tokenizer gave {len(lines)} lines for {len(texts)} captions and status "
            f"{done.returncode}: {said[-1] if said else 'no message'}"
        )
    dropped = frozenset(official.PUNCTUATIONS)
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines
    ]


def regex_words(texts: Sequence[str]) -> list[str]:
    """Texts as words, near those of the PTB tokenizer without punctuation, by one expression.

    Lower case. Words keep inner hyphens, slashes and points, numbers their commas and colons,
    abbreviations their point, and single letters theirs but in the end (where the PTB tokenizer
    looks at the caption that comes next); "n't", "'s" and the like are words of their own, and
    "cannot" is two; brackets become "-lrb-" and the like; other signs stay, each a word. What
    pycocoevalcap drops goes (. , : ; ! ? - and quotes), but not "!!" and "?!", which it keeps.
    """
    return [
        " ".join(BRACKETS.get(word, word) for word in TOKEN.findall(text.translate(QUOTES).lower()))
        for text in texts
    ]


TOKENIZERS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "ptb": ptb_words,
    "regex": regex_words,
}


def _chosen(tokenizer: str) -> str:
    one_of("tokenizer", tokenizer, ("auto", *TOKENIZERS))
    if tokenizer == "regex":
        return tokenizer
    runs = java_runs()
    if tokenizer == "ptb" and not runs:
        raise ValueError("tokenizer 'ptb' needs `java`, which does not run here; accepted: 'regex'")
    return "ptb" if runs else "regex"


def wordless(texts: Sequence[str], tokenizer: str = "auto") -> set[str]:
    """Those texts of which the words, as `caption_scores` has them, are none.

    Raises:
        ValueError: as `caption_scores`, of the tokenizer.
    """
    if not any(map(str.strip, texts)):
        return set(texts)
    cut = TOKENIZERS[_chosen(tokenizer)](texts)
    return {text for text, words in zip(texts, cut, strict=True) if not words}


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    same_ids("predictions", predictions, "references", references)
    text_of_each("predictions", predictions)
    for key, captions in references.items():
        if isinstance(captions, str) or not isinstance(captions, Sequence) or not captions:
            raise ValueError(
                f"references[{key!r}] must be captions, one at least, got {shown(captions)}"
            )
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"references[{key!r}] must be text, got {shown(caption)}")


def _cut(captions: Mapping[str, Sequence[str]], tokenizer: str) -> Cut:
    cut = iter(TOKENIZERS[tokenizer]([text for texts in captions.values() for text in texts]))
    return {key: [next(cut) for _ in texts] for key, texts in captions.items()}


def _meteor(references: Cut, predictions: Cut) -> float:
    scorer = _loaded("meteor.meteor").Meteor()
    process = scorer.meteor_p
    try:
        score, _ = scorer.compute_score(references, predictions)
    except (OSError, ValueError) as error:
        process.kill()
        said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        raise ValueError(f"METEOR failed: {said[-1] if said else error}") from error
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):  # from what could not be written
                pipe.close()
        if scorer.lock.locked():
            scorer.lock.release()  # held after an error, its __del__ would wait for ever
    return float(score)


def _scores(references: Cut, predictions: Cut) -> tuple[dict[str, float], dict[str, float]]:
    """(scores, CIDEr of each image)."""
    bleu, _ = _loaded("bleu.bleu").Bleu(4).compute_score(references, predictions, verbose=0)
    rouge, _ = _loaded("rouge.rouge").Rouge().compute_score(references, predictions)
    cider, of_images = _loaded("cider.cider").Cider().compute_score(references, predictions)
    scores = {f"bleu_{n}": float(score) for n, score in enumerate(bleu, 1)}
    each = dict(zip(references, map(float, of_images), strict=True))
    return scores | {"rouge_l": float(rouge), "cider": float(cider)}, each


def caption_scores(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: str = "auto",
) -> CaptionScores:
    """BLEU-1 to 4, ROUGE-L, CIDEr and METEOR of captions, as the evaluation of COCO counts them.

    CIDEr weighs an n-gram by log(images / images with it in a reference), of the images given: on
    a few of them it means nothing in absolute terms, and on one it is 0. METEOR runs in Java. SPICE
    is not offered: it downloads CoreNLP where it first runs.

    Args:
        predictions: image id → the caption to judge; an empty one scores 0.
        references: image id → the captions that people gave the image.
        tokenizer: "ptb", that of the published scores, in Java; "regex", near it and without Java,
            and without METEOR; "auto", "ptb" where `java` runs and else "regex".

    Returns:
        The scores, with the tokenizer they are of and a note to print beside them.

    Raises:
        ValueError: other ids in one mapping than in the other, no images, an image without
            references or with one that has no word, something that is no text, an unknown
            tokenizer, "ptb" without Java, or pycocoevalcap is missing.
    """
    _check(predictions, references)
    chosen = _chosen(tokenizer)
    # A call for each, in order: what the PTB tokenizer does with a last point may depend on the
    # caption that follows, as it does in the official evaluation.
    said = _cut(references, chosen)
    for key, captions in said.items():
        if "" in captions:
            text = references[key][captions.index("")]
            raise ValueError(f"references[{key!r}] must have words, got {shown(text)}")
    judged = _cut({key: [predictions[key]] for key in references}, chosen)
    scores, each = _scores(said, judged)
    if chosen == "ptb":
        scores["meteor"] = _meteor(said, judged)
    return CaptionScores(scores | {"images": float(len(said))}, chosen, each)
