"""Vision towers as encoders: what they compute, and the key that says so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoding_script import paint
from transformers import AutoModel, CLIPImageProcessor, ViTImageProcessor
from vlm_models import clip, vit

from fused_route.training.data.images import load_image
from fused_route.training.encoders import encoder_of
from fused_route.training.feature_cache import FeatureCache
from fused_route.training.towers import features_of, wrap_timm

timm = pytest.importorskip("timm")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [paint(tmp_path / f"{i}.png", i) for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def processor(**settings: Any) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": 8, "width": 8}, **settings)


def clip_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=True
    )


def tiny_timm() -> Any:
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    return wrap_timm(model, img_size=32, depth=1)


TOWERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "vit": (vit, processor),
    "clip": (clip, clip_processor),
    "timm": (tiny_timm, lambda: None),
}


@pytest.mark.parametrize("features", ["pooled", "tokens"])
@pytest.mark.parametrize("name", TOWERS)
def test_equal_to_the_tower(name: str, features: str, images: list[Path], folder: Path) -> None:
    tower, own = (make() for make in TOWERS[name])
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5  # which training mode would show
    opened = [load_image(path) for path in images]
    if own is None:
        size = {"input_size": (3, 32, 32)}
        config = timm.data.resolve_data_config(size, model=tower.timm_model)
        transform = timm.data.create_transform(**config, is_training=False)
        batch = torch.stack([transform(image) for image in opened])
    else:
        batch = own(images=opened, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        direct = features_of(tower.eval(), batch, features)
    tower.train()
    made = encoder_of(tower, own, features)
    cache = FeatureCache(folder, made.key, direct.shape[-1])
    with torch.autocast("cpu", torch.bfloat16):
        cache.encode(made, images, batch_size=len(images))
    assert all(module.training for module in tower.modules()), "left as it was"
    assert torch.equal(cache.batch(images), direct)
    assert torch.equal(cache[images[3]], direct[3])
    assert not cache.batch(images).requires_grad
    assert (direct.shape[1] == 1) == (features == "pooled")


def test_a_wrapped_processor_is_the_same() -> None:
    class Wrapper:
        image_processor = processor()

    wrapped = encoder_of(vit(), Wrapper(), "pooled")
    assert wrapped.key == encoder_of(vit(), processor(), "pooled").key


def test_key(tmp_path: Path) -> None:
    def changed(how: Callable[[Any], object]) -> Any:
        tower = vit()
        how(tower)
        return tower

    def nudge(tower: Any) -> None:
        with torch.no_grad():
            tower.embeddings.cls_token.view(-1)[0] += 1e-7

    key = encoder_of(vit(), processor(), "pooled").key
    vit().save_pretrained(tmp_path)
    same = {
        "made again": vit(),
        "in another mode": changed(lambda tower: tower.train()),
        "from a folder": AutoModel.from_pretrained(tmp_path),
        "of another version": changed(
            lambda tower: setattr(tower.config, "transformers_version", "6")
        ),
    }
    for name, tower in same.items():
        assert encoder_of(tower, processor(), "pooled").key == key, name
    others = {
        "features": (vit(), processor(), "tokens"),
        "a weight": (changed(nudge), processor(), "pooled"),
        "dtype": (vit().half(), processor(), "pooled"),
        "settings": (
            changed(lambda tower: setattr(tower.config, "hidden_act", "relu")), processor(),
            "pooled",
        ),
        "mean": (vit(), processor(image_mean=[0.1, 0.2, 0.3]), "pooled"),
        "processor": (vit(), clip_processor(), "pooled"),
        "tower": (clip(), processor(), "pooled"),
    }  # fmt: skip
    keys = {name: encoder_of(*given).key for name, given in others.items()}
    assert len({key, *keys.values()}) == 1 + len(keys), keys


def test_key_of_timm() -> None:
    tower = tiny_timm()
    key = encoder_of(tower, None, "pooled").key
    assert encoder_of(tiny_timm(), None, "pooled").key == key
    tower.timm_model.pretrained_cfg["crop_pct"] = 0.5
    assert encoder_of(tower, None, "pooled").key != key


def test_half_precision(images: list[Path], folder: Path) -> None:
    """A tower computes in its own dtype, whatever features are kept in."""
    made = encoder_of(vit().bfloat16(), processor(), "tokens")
    cache = FeatureCache(folder, made.key)
    cache.encode(made, images, dtype="float32")
    kept = cache.batch(images)
    assert kept.dtype == torch.float32 and torch.equal(kept, kept.bfloat16().float())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: (vit(), processor(), "patches"), "features must be one of pooled, tokens"),
        (lambda: (vit(), None, "pooled"), "processor is None, but ViTModel is not timm's"),
        (lambda: (vit(), "vit", "pooled"), "processor must be an image processor"),
        (lambda: (torch.nn.Linear(1, 1), processor(), "pooled"), "vision must be a vision"),
        (lambda: (vit().to("meta"), processor(), "pooled"), "on the meta device"),
    ],
)
def test_refusals(given: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        encoder_of(*given())
    assert "\n" not in str(caught.value)


def test_tiles_of_an_image_are_refused(images: list[Path], folder: Path) -> None:
    made = encoder_of(vit(), processor(), "pooled")
    tiled = replace(made, preprocess=lambda image: torch.stack([made.preprocess(image)] * 2))
    with pytest.raises(ValueError, match=r"processor makes \(2, 3, 8, 8\) of an image"):
        FeatureCache(folder, made.key).encode(tiled, images)
