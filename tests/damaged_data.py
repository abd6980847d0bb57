"""Data sets that are not as their layouts have them: what is done, and what is said of it."""

import json
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def without(file: str, key: str, entry: str) -> Damage:
    """Takes a key away from the first entry of the list under `key`, or of the object."""

    def damage(root: Path) -> None:
        held = json.loads((root / file).read_bytes())
        del (held[key][0] if key else next(iter(held.values())))[entry]
        (root / file).write_text(json.dumps(held))

    return damage


def instead(file: str, old: str, new: str) -> Damage:
    """Replaces a text at its first place."""

    def damage(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new, 1))

    return damage


def holding(file: str, content: bytes) -> Damage:
    return lambda root: void((root / file).write_bytes(content))


def cut(file: str) -> Damage:
    return lambda root: void((root / file).write_bytes((root / file).read_bytes()[:-200]))


def away(file: str) -> Damage:
    return lambda root: void((root / file).rename(root / "renamed"))


def void(_: object) -> None:
    """Nothing, whatever was done."""


Q, A = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
K, C, G = "dataset_coco.json", "annotations/captions_val2017.json", "val_balanced_questions.json"
FIRST, SECOND = (f"train2014/COCO_train2014_{number:012d}.jpg" for number in (9, 16))
PART = "train_all_questions/train_all_questions_7.json"
NO_LIST = "must hold an object with a list 'questions', and does not"
# (layout, split, [(damage, message where it is done; {root} is the folder)])
DAMAGES: dict[tuple[str, str], list[tuple[Damage, str]]] = {
    ("vqav2", "train"): [
        (
            away(Q),
            f"{{root}}/{Q} does not exist: unpack v2_Questions_Train_mscoco.zip in {{root}}$",
        ),
        (away(A), "unpack v2_Annotations_Train_mscoco.zip in {root}$"),
        (cut(Q), f"{Q} is broken JSON after [0-9]+ .* premature EOF.* download it again"),
        (cut(A), f"{A} is broken JSON"),
        (holding(Q, b""), f"{Q} is broken JSON after 0 entries"),
        (holding(Q, b"<html>404</html>"), "invalid char in json text. near '<html>404</html>'"),
        (holding(Q, b'{"questions": [{"a": "\xff"}]}'), "invalid bytes in UTF8 string"),
        (holding(Q, b'[{"question_id": 1}]'), f"{{root}}/{Q} {NO_LIST}"),
        (holding(Q, b'{"annotations": []}'), NO_LIST),
        (holding(Q, b'{"questions": {"1": {}}}'), NO_LIST),
        (holding(Q, b'{"questions": [[]]}'), r"entry 0 of 'questions' must be an object, got \[\]"),
        (holding(Q, b'{"questions": []}'), "vqav2 train in {root} has no rows"),
        (without(Q, "questions", "image_id"), f"{Q}: entry 0 of 'questions' has no 'image_id'; it"),
        (
            instead(Q, '"image_id": 9', '"image_id": true'),
            "has 'image_id' = True; .* a whole number",
        ),
        (
            without(A, "annotations", "answers"),
            "entry 0 of 'annotations' has no 'answers'; .* a list",
        ),
        (
            instead(A, '"answer": "uniform"', '"answer": 3'),
            "0 of 'annotations', answers 0 has 'an.* = 3",
        ),
        (
            instead(Q, '"question_id": 9000', '"question_id": 9001'),
            "vqav2 train in {root} has the id '9001' twice",
        ),
        (
            instead(A, '"question_id": 9001', '"question_id": 5'),
            "{root} has no answer to 1 of 16 rows of train, the first is 9001: .* --skip-broken",
        ),
        (
            away(SECOND),
            f"{{root}}/{SECOND} does not exist, 1 image is missing: unpack train2014.zip in "
            "{root}, or leave out such rows, with --skip-broken",
        ),
        (
            away("train2014"),
            f"{{root}}/{FIRST} does not exist, 4 images are missing: unpack train2014.zip",
        ),
    ],
    ("vqav2", "karpathy-val"): [
        (away(K), "unpack caption_datasets.zip in {root}$"),
        (away("val2014"), "3 images are missing: unpack val2014.zip"),
        (instead(K, '"split": "val"', '"split": 1'), f"{K}: entry 5 of 'images' has 'split' = 1"),
        (holding(K, b'{"images": []}'), "vqav2 karpathy-val in {root} has no rows"),
    ],
    ("coco", "karpathy-val"): [
        (without(K, "images", "split"), f"{K}: entry 0 of 'images' has no 'split'"),
    ],
    ("coco", "val2017"): [
        (away(C), f"{{root}}/{C} does not exist: unpack annotations_trainval2017.zip in {{root}}$"),
        (without(C, "annotations", "caption"), "entry 0 of 'annotations' has no 'caption'"),
        (
            instead(C, '"image_id": 42,', '"image_id": 43,'),
            "0 of 'annotations' is about image 43, ",
        ),
        (away("val2017"), "8 images are missing: unpack val2017.zip in {root}"),
    ],
    ("gqa", "train-all"): [
        (away(PART), f"{PART} does not exist: unpack questions1.2.zip in {{root}}$")
    ],
    ("gqa", "val"): [
        (away(G), f"{G} does not exist: unpack questions1.2.zip in {{root}}$"),
        (cut(G), f"{G} is broken JSON"),
        (holding(G, b"[]"), f"{G} must hold an object of entries by key, and does not"),
        (holding(G, b"{}"), "gqa val in {root} has no rows"),
        (holding(G, b'{"1": "question"}'), "entry '1' must be an object, got 'question'"),
        (without(G, "", "imageId"), "entry '[0-9]+' has no 'imageId'"),
        (without(G, "", "answer"), "{root} has no answer to 1 of 16 rows of val"),
        (
            away("images"),
            "{root}/images/2300044.jpg does not exist, 4 images .*: unpack images.zip",
        ),
    ],
    ("nlvr2", "dev"): [
        (away("dev.json"), "dev.json does not exist: put nlvr2/data/dev.json of .* into {root}$"),
        (
            instead("dev.json", "}\n", "\n"),
            "dev.json is broken at line 1: .* one JSON object a line",
        ),
        (holding("dev.json", b"[]\n"), r"dev.json: entry in line 1 must be an object, got \[\]"),
        (holding("dev.json", b"\xff\n"), "dev.json is broken at line 1"),
        (holding("dev.json", b"\n \n"), "nlvr2 dev in {root} has no rows"),
        (
            instead("dev.json", '"True"', '"true"'),
            "line 1 has the label 'true'; .* one of True, False",
        ),
    ],
    ("nlvr2", "train"): [
        (instead("train.json", '"directory": 7', '"folder": 7'), "in line 1 has no 'directory'"),
        (
            away("images/train/8"),
            "100-1-img0.png does not exist, 2 images .*: unpack train_img.zip",
        ),
    ],
}
CASES = [(*where, *case) for where, cases in DAMAGES.items() for case in cases]
