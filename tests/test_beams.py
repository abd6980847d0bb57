"""Beams of encoder-decoder models, whose encoder runs for each text once: as the messages say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vlm_models import LANGUAGE, PAIRS, TARGETS, texts

from fused_route import RoutedConfig, RoutingInput, attach, fold

BEAMS = 3
IDS, IMAGES = texts(2), torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(4))
SETTINGS: dict[str, Any] = {
    "num_beams": BEAMS, "max_new_tokens": 5, "do_sample": False,
    "return_dict_in_generate": True, "output_scores": True,
}  # fmt: skip
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
AROUND: dict[str, tuple[Callable[[Any, Tensor, int], Any], str]] = {
    "using": (
        lambda attached, images, beams: attached.using(RoutingInput(images).repeated(beams)),
        r"x_r is for a batch of .*an encoder runs before that, with x_r: generate\(encoder_outputs",
    ),
    "fold": (
        lambda attached, images, beams: fold(attached.model, images, beams=beams),
        r"folded in, .*an encoder runs before that, without beams: generate\(encoder_outputs",
    ),
}


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("language", PAIRS)
def test_the_encoder_runs_before_beams(language: str, way: str) -> None:
    around, message = AROUND[way]
    model = LANGUAGE[language]().eval()
    attached = attach(model, RoutedConfig(r=4, **TARGETS[language]))
    for layer in attached.layers.values():
        nn.init.normal_(layer.B)

    def scores(rows: slice) -> Tensor:
        given = {"attention_mask": VALID[rows]}
        with around(attached, IMAGES[rows], 1):
            states = model.get_encoder()(IDS[rows], **given)
        with around(attached, IMAGES[rows], BEAMS):
            out = model.generate(encoder_outputs=states, **given, **SETTINGS)
        return out.sequences_scores

    together, alone = scores(slice(2)), [scores(slice(i, i + 1)) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs() > 1e-3
    for beams in (1, BEAMS):
        with around(attached, IMAGES, beams), pytest.raises(ValueError, match=message):
            model.generate(IDS, attention_mask=VALID, **SETTINGS)
