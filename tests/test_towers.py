"""Vision towers: those of transformers and timm, encoded, saved, and back to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_models import LANGUAGE, clip, drawn, texts, vision_language, vit

from fused_route import RoutedConfig, attach
from fused_route.training.towers import wrap_timm
from fused_route.training.vlm import VisionLanguageModel

timm = pytest.importorskip("timm")

TOWERS: dict[str, Any] = {
    "vit": vit,
    "clip": clip,
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3
    ),
    "timm convolutions": lambda: timm.create_model("resnet10t"),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_keeps_its_weights(tower: str) -> None:
    """Also one that no from_pretrained has loaded."""
    made = TOWERS[tower]()
    if tower.startswith("timm"):
        told = {"img_size": 32, "depth": 1} if tower == "timm vit" else {}
        made = wrap_timm(made, **told)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    whole: Any = VisionLanguageModel.from_parts(made, LANGUAGE["gpt2"](), projection="linear")
    after = whole.vision.state_dict()
    kept = {name: tensor for name, tensor in before.items() if name in after}
    assert len(kept) >= len(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", LANGUAGE)
def test_a_language_model_keeps_what_was_put_into_it(kind: str) -> None:
    language: Any = LANGUAGE[kind]()
    for name, module in list(language.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":  # which is tied
            mine = torch.nn.Linear(module.in_features, module.out_features)
            language.set_submodule(name, mine)
    before = {name: tensor.clone() for name, tensor in language.state_dict().items()}
    whole = VisionLanguageModel.from_parts(None, language, visual_width=8)
    after = whole.language.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("features", ["pooled", "tokens"])
@pytest.mark.parametrize("tower", TOWERS)
def test_towers(tower: str, features: str, tmp_path: Path) -> None:
    """Encoded, routed by, saved with the model, and back to the bit."""
    made = TOWERS[tower]()
    if tower == "timm vit":
        with pytest.raises(ValueError, match=r"wrap_timm\(model, …\) with the arguments"):
            VisionLanguageModel.from_parts(made, LANGUAGE["gpt2"]())
        made = wrap_timm(made, img_size=32, depth=1)
    model = vision_language("gpt2", made, features=features, projection="linear").eval()
    side = 32 if tower.startswith("timm") else 8
    pixels, ids = torch.randn(2, 3, side, side), texts(2)
    with torch.no_grad():
        encoded = model.encode_images(pixels)
        assert encoded.shape[::2] == (2, model.visual_width)
        assert (encoded.shape[1] == 1) == (features == "pooled" or tower == "timm convolutions")
        pair = model.encode_images(torch.stack([pixels, pixels.flip(0)], 1))
        torch.testing.assert_close(pair, torch.cat([encoded, encoded.flip(0)], 1))
        attached = attach(model, RoutedConfig(["c_attn"], r=2, adapted=(0, 2), of=3))
        drawn(model)
        expected = model(ids, pixel_values=pixels).logits
        attached.save(tmp_path / "adapter")
        attached.detach()
        model.save_pretrained(tmp_path / "model")
        again = VisionLanguageModel.from_pretrained(tmp_path / "model")
        attach(again, tmp_path / "adapter")
        logits = again(ids, pixel_values=pixels).logits
        if tower == "timm convolutions":  # whose sums differ with where in memory weights lie
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(logits, expected)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "largest in place of the mean": ({"global_pool": "max"}, {}),
    "another activation": ({"act_layer": "gelu"}, {}),
    "another stride": ({"output_stride": 8}, {}),
    "told wrongly": ({}, {"global_pool": "max"}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_timm_model_that_would_come_back_as_another_is_refused(what: str) -> None:
    made, told = OTHERS[what]
    model = timm.create_model("resnet10t", num_classes=7, **made)
    with pytest.raises(ValueError, match="with the arguments that it was made with"):
        wrap_timm(model, **told)
    assert model.num_classes == 7, "left as it was"
    assert wrap_timm(model, **made).timm_model is model


WIDTHS = {"mobilenetv3_small_050": (1024, 288), "resnet10t": (512, 512)}


@pytest.mark.parametrize("name", WIDTHS)
def test_grids_are_read_cell_by_cell(name: str) -> None:
    """(B, width, H, W) to (B, H·W, width); a head's own width where pooled."""
    tower = timm.create_model(name)
    pixels = torch.randn(2, 3, 64, 64)
    for features, width in zip(("pooled", "tokens"), WIDTHS[name], strict=True):
        model = vision_language("gpt2", tower, features=features, projection="linear").eval()
        with torch.no_grad():
            found = model.encode_images(pixels)
            grid = model.vision.timm_model.forward_features(pixels)
        assert found.shape[-1] == model.visual_width == width
        if features == "tokens":
            assert torch.equal(found[:, 1], grid[:, :, 0, 1])
            assert torch.equal(found[:, 2], grid[:, :, 1, 0])


def test_grids_with_channels_behind_are_read_too() -> None:
    tower = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1))
    tower = wrap_timm(tower, img_size=56, depths=(1, 1, 1, 1)).eval()
    model = vision_language("gpt2", tower, features="tokens", projection="linear").eval()
    with torch.no_grad():
        found = model.encode_images(torch.randn(2, 3, 56, 56))
    assert found.shape == (2, 4, 768) and model.visual_width == 768
