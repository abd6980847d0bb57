"""The model card that a save writes."""

from pathlib import Path
from typing import Any

import pytest
from cases import BUILT_IN
from test_attach import bert

from fused_route import Attached, RoutedConfig, attach
from fused_route.card import FORMULAS, START


def attached(**settings: Any) -> Attached:
    return attach(bert(), RoutedConfig(["query"], **settings))


def test_a_save_writes_what_it_is_and_how_it_loads(tmp_path: Path) -> None:
    attached(route="gram", r=4, normalize="unit").save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags:\n- fused_route\n")
    for part in (
        "# Routed LoRA, route `gram`",
        "z = x_t x_vᵀ x_v",
        "| r | `4` |",
        "| normalize | `unit` |",
        "import fused_route.peft  # before loading",
        "cannot be merged",
    ):
        assert part in card
    assert "projector" not in card and "None" not in card


def test_the_formula_is_that_of_the_settings(tmp_path: Path) -> None:
    attached(host="adapter", residual=False, inner_rank=2, r=4).save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "    y = act(z) Bᵀ + b_B" in card
    assert "x_t = x_h Aᵀ Uᵀ, x_v = x_r A_vᵀ U_vᵀ, z = x_t ∘ x_v" in card
    attached(host="adapter").save(tmp_path)
    assert "y = x_h + act(z) Bᵀ" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_every_route_has_its_formula() -> None:
    assert set(FORMULAS) == set(BUILT_IN) - {"self_gram"}


MERGING = {
    "lora": 'depends on no image: `fused_route.attach(base_model, "this directory").merge()`',
    "adapter": "depends on no image, but an adapter cannot be merged",
}


@pytest.mark.parametrize("host", MERGING)
def test_route_none_has_no_image(host: str, tmp_path: Path) -> None:
    attached(host=host, route="none").save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert MERGING[host] in card and "    x_t = x_h Aᵀ, z = x_t\n" in card
    for part in ("x_v", "x_r", "depends on the image", "Runtimes that expect plain LoRA"):
        assert (part in card) == (part.startswith("Runtimes") and host == "lora"), part


def test_a_card_names_what_routes(tmp_path: Path) -> None:
    attached(routed_by="text").save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "mixed there with the mean of the layer's own text x_r" in card and "image" not in card


def test_what_else_is_in_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Mine\n\nAccuracy 71 %.\n", encoding="utf-8")
    attached(r=4).save(tmp_path)
    once = path.read_text(encoding="utf-8")
    assert once.startswith("# Mine\n\nAccuracy 71 %.\n\n" + START)
    path.write_text(once + "\n## Licence\nCC0\n", encoding="utf-8")
    attached(r=8, host="adapter").save(tmp_path)
    again = path.read_text(encoding="utf-8")
    assert again.count(START) == 1 and again.startswith("# Mine\n\nAccuracy 71 %.\n\n")
    assert "Routed adapter" in again and "| r | `8` |" in again and "| r | `4` |" not in again
    assert again.endswith("\n## Licence\nCC0\n")


def test_a_file_that_is_no_text_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"\xff\xfe\x00")
    attached(r=4).save(tmp_path)
    assert path.read_bytes() == b"\xff\xfe\x00"
    assert attach(bert(), tmp_path).config.r == 4


def test_peft_writes_it_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    from fused_route.peft import RoutedLoraConfig

    model = peft.get_peft_model(bert(), RoutedLoraConfig(target_modules=["query"], r=2))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and card.count("# Routed LoRA, route `mul`") == 1
