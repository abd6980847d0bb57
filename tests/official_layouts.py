"""Small data sets in the official layouts, of easy-VQA's pictures and questions.

Pictures are enlarged and saved under official names, a photograph that matplotlib ships is among
them; keys, numbers and folders are those of the official files. The same at every call.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import cbook
from PIL import Image

from fused_route.training.data import easy_vqa
from fused_route.training.data.samples import Source

SIZE = (96, 72)
QUESTIONS = 4  # of an image
CAPTIONS = ("a {}", "there is a {}", "a {} on white ground", "the picture shows a {}", "one {}.")
OTHER_WORDS = {
    "yes": ("no", "Yes"),
    "no": ("yes", "nope"),
    "rectangle": ("square", "box", "a rectangle"),
    "circle": ("round", "ball", "the circle"),
    "triangle": ("pyramid", "cone", "triangle."),
    "gray": ("grey", "silver", "black"),
    "teal": ("green", "turquoise", "blue"),
    "navy": ("blue", "dark blue", "black"),
    "woman": ("lady", "officer", "a woman"),
    "1": ("one", "only one", "2"),
}
# How many of ten people say the majority's answer: question after question.
AGREEING = (10, 9, 7, 10, 6, 8, 4)
KARPATHY = ("restval", "val", "test")  # of val2014's images, in turn


@dataclass(frozen=True)
class Scene:
    """A picture, what it shows, and questions about it with their answers."""

    file: Path
    shows: str
    questions: tuple[tuple[str, str], ...]

    def save(self, path: Path) -> None:
        """Writes it, enlarged, in the format that the name says."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(self.file) as image:
            image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)


PHOTOGRAPH = (
    "woman in a navy uniform",
    (
        ("what is the person wearing?", "uniform"),
        ("how many people are there?", "1"),
        ("is there a flag in the image?", "yes"),
        ("what color is the uniform?", "navy"),
    ),
)


@cache
def scenes(split: easy_vqa.Split) -> tuple[Scene, ...]:
    """The photograph, then the pictures of a split of easy-VQA whose shape and colour are asked."""
    asked: defaultdict[int, dict[str, str]] = defaultdict(dict)
    data = easy_vqa.load(split)
    for text, answer, image in zip(data.texts, data.answers, data.image_ids, strict=True):
        asked[image][text] = answer
    paths = easy_vqa.image_paths(split)
    found = [
        Scene(Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))), *PHOTOGRAPH)
    ]
    for image, questions in sorted(asked.items()):
        kinds = {easy_vqa.answer_type(answer): answer for answer in questions.values()}
        if len(kinds) == 3 and len(questions) >= QUESTIONS:
            shows = f"{kinds['colour']} {kinds['shape']}"
            # the first of each kind, then what is left
            first = {easy_vqa.answer_type(a): (q, a) for q, a in reversed(questions.items())}
            chosen = [*first.values(), *questions.items()]
            found.append(Scene(paths[image], shows, tuple(dict.fromkeys(chosen))[:QUESTIONS]))
    return tuple(found)


def numbered(split: easy_vqa.Split, images: int, first: int) -> list[tuple[int, Scene]]:
    """(image id, scene) of so many scenes: ids with gaps, as COCO's are."""
    return [(first + 7 * place, scene) for place, scene in enumerate(scenes(split)[:images])]


def write(path: Path, content: Any) -> None:
    """Writes a JSON file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def coco_name(subset: str, image: int) -> str:
    """The official name of an image of COCO."""
    return f"{subset}/{f'COCO_{subset}_' if subset[-4:] != '2017' else ''}{image:012d}.jpg"


def ten_answers(answer: str, draw: random.Random, agreeing: int) -> list[dict[str, Any]]:
    """As an annotation of VQAv2 has them: so many that agree, the others each in other words."""
    others = OTHER_WORDS.get(answer, ("unknown", f"dark {answer}", "not sure"))
    said = [answer] * agreeing + [draw.choice(others) for _ in range(10 - agreeing)]
    draw.shuffle(said)
    return [
        {"answer": word, "answer_confidence": draw.choice(("yes", "maybe")), "answer_id": number}
        for number, word in enumerate(said, start=1)
    ]


def asked(images: Sequence[tuple[int, Scene]]) -> Iterator[tuple[dict[str, Any], str]]:
    """(question as VQAv2 has it, its answer)."""
    for image, scene in images:
        for number, (text, answer) in enumerate(scene.questions):
            question = {"image_id": image, "question": text, "question_id": 1000 * image + number}
            yield question, answer


def annotated(questions: Sequence[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    """What VQAv2 has to questions, in their order."""
    found = []
    for place, (question, answer) in enumerate(questions):
        draw = random.Random(question["question_id"])
        number = "number" if answer.isdecimal() else "other"
        found.append(
            {
                "question_type": " ".join(question["question"].split()[:3]),
                "multiple_choice_answer": answer,
                "answers": ten_answers(answer, draw, AGREEING[place % len(AGREEING)]),
                "image_id": question["image_id"],
                "answer_type": "yes/no" if answer in ("yes", "no") else number,
                "question_id": question["question_id"],
            }
        )
    return found


def vqav2(folder: Path, images: int = 12) -> Source:
    """VQAv2: so many images in train2014 and test2015, twice as many in val2014.

    Four questions are about each. A third of val2014 is Karpathy's restval, one val, one test.
    """
    of_subset = {
        "train2014": numbered("train", images, 9),
        "val2014": numbered("test", 2 * images, 42),
        "test2015": numbered("test", 3 * images, 262_144)[2 * images :],
    }
    of_subset["test-dev2015"] = of_subset["test2015"][: max(2, images // 2)]
    for subset, numbers in of_subset.items():
        questions = list(asked(numbers))
        write(
            folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
            {
                "info": {"version": "2.0"},
                "task_type": "Open-Ended",
                "data_type": "mscoco",
                "license": {},
                "data_subtype": subset,
                "questions": [question for question, _ in questions],
            },
        )
        for image, scene in numbers if subset != "test-dev2015" else ():
            scene.save(folder / coco_name(subset, image))
        if not subset.startswith("test"):
            content = {
                "info": {"version": "2.0"},
                "license": {},
                "annotations": annotated(questions),
            }
            write(folder / f"v2_mscoco_{subset}_annotations.json", content)
    karpathy(folder, of_subset)
    return Source("vqav2", folder)


def karpathy(folder: Path, of_subset: dict[str, list[tuple[int, Scene]]]) -> None:
    """dataset_coco.json, of the images of train2014 and val2014."""
    found: list[dict[str, Any]] = []
    for subset in ("train2014", "val2014"):
        for place, (image, scene) in enumerate(of_subset[subset]):
            split = "train" if subset == "train2014" else KARPATHY[place % 3]
            numbers = [10 * image + number for number in range(len(CAPTIONS))]
            found.append(
                {
                    "filepath": subset,
                    "sentids": numbers,
                    "filename": coco_name(subset, image).rpartition("/")[2],
                    "imgid": len(found),
                    "split": split,
                    "sentences": [
                        {
                            "tokens": text.format(scene.shows).strip(".").split(),
                            "raw": text.format(scene.shows),
                            "imgid": len(found),
                            "sentid": number,
                        }
                        for number, text in zip(numbers, CAPTIONS, strict=True)
                    ],
                    "cocoid": image,
                }
            )
    write(folder / "dataset_coco.json", {"images": found, "dataset": "coco"})


def coco(folder: Path, images: int = 12) -> Source:
    """COCO's captions: so many images in train, twice as many in val, five captions each.

    The years have the same images, as the official ones do; both forms, official and Karpathy's.
    """
    for year in ("2014", "2017"):
        of_subset = {
            f"train{year}": numbered("train", images, 9),
            f"val{year}": numbered("test", 2 * images, 42),
        }
        for subset, numbers in of_subset.items():
            for image, scene in numbers:
                scene.save(folder / coco_name(subset, image))
            write(folder / "annotations" / f"captions_{subset}.json", captions(subset, numbers))
        if year == "2014":
            karpathy(folder, of_subset)
    return Source("coco", folder)


def captions(subset: str, images: Sequence[tuple[int, Scene]]) -> dict[str, Any]:
    """The official file: captions in no order of images."""
    written = [
        {"image_id": image, "id": 10 * image + number, "caption": text.format(scene.shows)}
        for number, text in enumerate(CAPTIONS)
        for image, scene in images
    ]
    width, height = SIZE
    return {
        "info": {"year": int(subset[-4:])},
        "images": [
            {
                "license": 1,
                "file_name": coco_name(subset, image).rpartition("/")[2],
                "height": height,
                "width": width,
                "id": image,
            }
            for image, _ in images
        ],
        "licenses": [],
        "annotations": written,
    }


def gqa(folder: Path, images: int = 12) -> Source:
    """GQA: so many images each in train, val, testdev and test, four questions about each.

    "All" of train are the balanced ones, in ten files; "all" of val are twice as many.
    """
    everything = scenes("train")
    number = iter(range(20_000_000, 30_000_000, 13))
    for place, split in enumerate(("train", "val", "testdev", "test")):
        chosen = everything[1 + place * images : 1 + (place + 1) * images]
        by_name = {f"{2_300_000 + 11 * (place * images + i)}": s for i, s in enumerate(chosen)}
        for name, scene in by_name.items():
            scene.save(folder / "images" / f"{name}.jpg")
        found = {
            f"{next(number):08d}": gqa_question(name, text, answer, split)
            for name, scene in by_name.items()
            for text, answer in scene.questions
        }
        write(folder / f"{split}_balanced_questions.json", found)
        if split == "train":
            for part in range(10):
                of_part = dict(list(found.items())[part::10])
                write(folder / "train_all_questions" / f"train_all_questions_{part}.json", of_part)
        elif split == "val":
            again = {f"{next(number):08d}": {**q, "isBalanced": False} for q in found.values()}
            write(folder / "val_all_questions.json", found | again)
    return Source("gqa", folder)


def gqa_question(name: str, text: str, answer: str, split: str) -> dict[str, Any]:
    """A question as GQA has it; of the test split without what tells the answer."""
    asked = {"isBalanced": True, "question": text[:1].upper() + text[1:], "imageId": name}
    if split == "test":
        return asked
    is_verify = answer in ("yes", "no")
    types = {
        "detailed": "existAttrC" if is_verify else "directOf",
        "semantic": "obj" if is_verify else "attr",
        "structural": "verify" if is_verify else "query",
    }
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "shape (1)"}],
        "entailed": [],
        "equivalent": [],
        **asked,
        "groups": {"global": None, "local": "10q-shape"},
        "answer": answer,
        "semanticStr": "select: shape (1)",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": types,
        "fullAnswer": f"{answer[:1].upper()}{answer[1:]}.",
    }


def nlvr2(folder: Path, pairs: int = 12) -> Source:
    """NLVR2: so many pairs of images in train, dev and test1, two sentences each."""
    everything = scenes("train")[1:]
    for place, split in enumerate(("train", "dev", "test1")):
        found = []
        for pair in range(pairs):
            left, right = (everything[2 * (place * pairs + pair) + side] for side in (0, 1))
            name, directory = f"{split}-{100 + pair // 2}-{pair % 2}", 7 + pair % 3
            within = f"images/train/{directory}" if split == "train" else split
            for side, scene in enumerate((left, right)):
                scene.save(folder / within / f"{name}-img{side}.png")
            for number, sentence in enumerate(two_sentences(left, right, pair)):
                of_train: dict[str, Any] = {"directory": directory} if split == "train" else {}
                found.append(
                    {"identifier": f"{name}-{number}", "synset": "shape", **of_train, **sentence}
                )
        text = "".join(f"{json.dumps(sentence)}\n" for sentence in found)
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return Source("nlvr2", folder)


def two_sentences(left: Scene, right: Scene, pair: int) -> list[dict[str, str]]:
    """One about the left image, true every second time, and one about both."""
    shown = left if pair % 2 == 0 else right
    both = {scene.shows.split()[1] for scene in (left, right)}
    return [
        {
            "sentence": f"The left image shows a {shown.shows}.",
            "label": str(shown.shows == left.shows),
        },
        {"sentence": "Both images show the same shape.", "label": str(len(both) == 1)},
    ]


MAKERS: dict[str, Callable[[Path, int], Source]] = {
    "vqav2": vqav2,
    "coco": coco,
    "gqa": gqa,
    "nlvr2": nlvr2,
}
