"""A visual projector that starts from the features themselves instead of random weights."""

import torch
from torch import Tensor, nn

from fused_route import VisualProjector
from fused_route.checks import shown


@torch.no_grad()
def fit_projector(projector: VisualProjector, features: Tensor) -> None:
    """Sets a projector from features (N, visual_width) alone: centred, rotated, scaled.

    x_r = (x − μ) V √(d / tr Σ): the directions V of greatest variance, as many as the layers are
    wide, with entries of mean square 1 on these features. No labels are used.

    Raises:
        ValueError: features of another shape, that do not vary, or narrower than the layers.
    """
    if features.dim() != 2 or features.shape[-1] != projector.visual_width:
        raise ValueError(
            f"features must be (N, {projector.visual_width}), as visual_width says, got "
            f"{shown(features)}"
        )
    features = features.float()
    mean = features.mean(0)
    centred = features - mean
    values, V = torch.linalg.eigh(centred.T @ centred / len(features))
    if not values[-1] > 0.0:
        raise ValueError("features do not vary: there are no directions of variance to take")
    for projection in projector.projections.values():
        assert isinstance(projection, nn.Linear)
        if projection.out_features > projector.visual_width:
            raise ValueError(
                f"features are {projector.visual_width} wide and the layers "
                f"{projection.out_features}: there are not as many directions of variance"
            )
        directions = V[:, -projection.out_features :].flip(-1)
        scale = (centred @ directions).square().mean().rsqrt()
        projection.weight.copy_((directions * scale).T)
        projection.bias.copy_(-(mean @ directions) * scale)
