"""The demo on the first images of easy-VQA, for a few steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fused_route.training.data import easy_vqa
from fused_route.training.demo import compare

IMAGES = 60
ARMS = (compare.Arm("none"), compare.Arm("gram", "unit"), compare.Arm("mul", prefix=True))


def first(questions: easy_vqa.Questions) -> easy_vqa.Questions:
    """The questions about the first images."""
    kept = [i for i, image in enumerate(questions.image_ids) if image < IMAGES]
    return easy_vqa.Questions(
        [questions.texts[i] for i in kept],
        [questions.answers[i] for i in kept],
        [questions.image_ids[i] for i in kept],
    )


@contextmanager
def first_images_only() -> Iterator[None]:
    """easy_vqa as if it had no more than these images."""
    load, paths = easy_vqa.load, easy_vqa.image_paths
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(easy_vqa, "load", lambda split: first(load(split)))
        patch.setattr(easy_vqa, "image_paths", lambda split: paths(split)[:IMAGES])
        yield


def made_up_split() -> compare.Split:
    """Sixteen questions of random tokens about random features."""
    ids = torch.randint(1000, 2000, (16, 5))
    return compare.Split(
        easy_vqa.Questions([], [], []), ids, torch.ones_like(ids), torch.arange(16),
        torch.randint(0, 13, (16,)), torch.randn(16, 400),
    )  # fmt: skip
