"""A visual projector that starts from the features themselves instead of random weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fused_route import VisualProjector
from fused_route.checks import shown


@torch.no_grad()
def fit_projector(projector: VisualProjector, features: Iterable[Tensor]) -> None:
    """Sets a projector from features (N, visual_width) alone: centred, rotated, scaled.

    x_r = (x − μ) V √(d / tr VᵀΣV): the directions V of greatest variance, as many as the layers are
    wide, with entries of mean square 1 on these features. No labels are used.

    Args:
        projector: changed in place.
        features: in parts, of which one at a time is held.

    Raises:
        ValueError: features of another shape, none, that do not vary, or narrower than the layers.
    """
    mean, covariance = _moments(projector.visual_width, features)
    values, V = torch.linalg.eigh(covariance)
    rounding = torch.finfo(torch.float32).eps * mean.norm()
    if not values[-1] > rounding.square():
        raise ValueError("features do not vary: there are no directions of variance to take")
    for projection in projector.projections.values():
        assert isinstance(projection, nn.Linear)
        if projection.out_features > projector.visual_width:
            raise ValueError(
                f"features are {projector.visual_width} wide and the layers "
                f"{projection.out_features}: there are not as many directions of variance"
            )
        directions = V[:, -projection.out_features :].flip(-1)
        scale = values[-projection.out_features :].mean().rsqrt()
        projection.weight.copy_((directions * scale).T)
        projection.bias.copy_(-(mean @ directions) * scale)


def _moments(width: int, features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (width,) and covariance (width, width) of all parts, in float64."""
    count, total = 0, torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    shift = None  # near the mean, so that little cancels where the mean is large
    for part in features:
        if part.dim() != 2 or part.shape[-1] != width:
            raise ValueError(
                f"features must be (N, {width}), as visual_width says, got {shown(part)}"
            )
        if not len(part):
            continue
        part = part.float()
        shift = part.mean(0) if shift is None else shift
        part = part - shift
        count += len(part)
        total += part.sum(0)
        products += part.T @ part
    if shift is None:
        raise ValueError("features is empty: there is nothing to fit a projector to")
    mean = total / count
    return shift + mean, products / count - torch.outer(mean, mean)
