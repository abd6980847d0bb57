"""How an experiment's visual projector starts."""

from collections.abc import Sequence
from pathlib import Path

from fused_route.training.experiment.build import Built
from fused_route.training.projector import fit_projector

VECTORS = 2**16  # features that it is fitted to, at most
PART = 2**12  # of them at a time: 21 MB of 1,280 numbers each


def start_projector(built: Built, images: Sequence[Path]) -> None:
    """Sets the projector as `Recipe.projector_init` says, by these images' features in the cache.

    Of many images as many are taken, evenly, as have `VECTORS` features. Without a projector, or
    with "random", nothing is done.

    Raises:
        ValueError: features that it cannot be fitted to.
    """
    projector = built.tuned.projector
    if projector is None or built.recipe.projector_init == "random":
        return
    assert built.cache is not None
    cache = built.cache
    tokens, _ = cache[images[0]].shape
    step = -(-len(images) // max(1, VECTORS // tokens))
    taken, together = images[::step], max(1, PART // tokens)
    places = range(0, len(taken), together)
    try:
        fit_projector(
            projector, (cache.batch(taken[i : i + together]).flatten(0, 1) for i in places)
        )
    except ValueError as error:
        raise ValueError(f"projector_init={built.recipe.projector_init!r}: {error}") from None
