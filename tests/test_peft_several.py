"""Several routed adapters of one model under PEFT: what belongs to one leaves the others alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_attach import IDS
from test_peft import IMAGE, MODELS, adapter, drawn, lora, run
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as RobertaClassifier

peft = pytest.importorskip("peft", minversion="0.21")

from fused_route.peft import RoutedAdapterConfig, RoutedLoraConfig, context_of  # noqa: E402

DECODER = r".*decoder.*\.q_proj"
TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}


def of(targets: str, routed_by: str = "image", **more: Any) -> RoutedLoraConfig:
    return RoutedLoraConfig(r=4, target_modules=targets, routed_by=routed_by, **more)


def bart(*configs: RoutedLoraConfig) -> Any:
    """With these adapters, called 0, 1, …, the first of which is active."""
    model = peft.get_peft_model(MODELS["bart"](), configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    return drawn(model).eval()


def plain(model: Any) -> Tensor:
    """Without an image."""
    return model(input_ids=IDS, decoder_input_ids=IDS)[0]


def test_an_inactive_adapter_takes_no_image_from_others() -> None:
    alone = bart(of(DECODER))
    model = bart(of(DECODER), of(DECODER, "encoder"))
    model.load_state_dict(alone.state_dict(), strict=False)
    assert torch.equal(run(model), run(alone))
    model.set_adapter("1")
    routed = plain(model)
    copied = copy.deepcopy(model)  # its hooks ask its own layers
    model.set_adapter("0")
    model.delete_adapter("1")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(model), run(alone))
    assert torch.equal(plain(copied), routed)
    copied.set_adapter("0")
    assert torch.equal(run(copied), run(alone))


@pytest.mark.parametrize("order", [("text", "encoder"), ("encoder", "text")])
def test_each_is_routed_by_its_own(order: tuple[str, str]) -> None:
    """By the encoder's states, or by the encoder's text: nobody sets an image."""
    places = {"text": r".*encoder\.layers.*\.q_proj", "encoder": DECODER}
    model = bart(*(of(places[kind], kind) for kind in order))
    for name in ("0", "1"):
        model.set_adapter(name)
        routed = plain(model)
        with model.disable_adapter():
            base = plain(model)
        assert not torch.equal(routed, base)


def test_disabled_they_need_nothing() -> None:
    """The decoder alone, which has no encoder's states."""
    model = bart(of(DECODER, "encoder"))
    expected = MODELS["bart"]().get_decoder()(IDS)[0]
    with model.disable_adapter():
        assert torch.equal(model.base_model.model.get_decoder()(IDS)[0], expected)
    with pytest.raises(ValueError, match="called without the encoder's"):
        model.base_model.model.get_decoder()(IDS)


def test_the_image_is_not_active_beside_another_kind() -> None:
    model = bart(of(DECODER), of(r".*decoder.*\.v_proj", "encoder"), of(r".*\.fc1"))
    with pytest.raises(ValueError, match=r"routed by the image and by encoder cannot be active"):
        model.base_model.set_adapter(["0", "1"])
    assert model.base_model.active_adapters == ["0"]
    model.base_model.set_adapter(["0", "2"])
    run(model)
    bert = peft.get_peft_model(MODELS["bert"](), lora("bert"))  # which has no hooks
    bert.add_adapter("text", lora("bert", routed_by="text"))
    bert.base_model.set_adapter(["default", "text"])
    with context_of(bert).using(IMAGE, text_mask="all"):
        assert drawn(bert)(IDS)[0].isfinite().all()


def test_text_and_encoder_are_active_together() -> None:
    """One in the encoder, one in the decoder: each does what it does alone."""
    model = bart(of(r".*encoder\.layers.*\.q_proj", "text"), of(DECODER, "encoder"))
    states = model.base_model.model.get_encoder()(IDS)
    model.set_adapter("1")
    expected = model(encoder_outputs=states, decoder_input_ids=IDS)[0]
    alone = plain(model)
    model.base_model.set_adapter(["0", "1"])
    assert torch.equal(plain(model), expected) and not torch.equal(alone, expected)


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify", "ignore:Already found a `peft_config`"
)
def test_hooks_of_an_adapter_that_is_gone_do_nothing() -> None:
    base = bart(of(DECODER, "encoder")).base_model.model
    model = drawn(peft.get_peft_model(base, of(DECODER), adapter_name="0")).eval()
    fresh = bart(of(DECODER))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(model), run(fresh))


def test_an_adapter_around_the_encoder_knows_its_padding() -> None:
    config = RoutedAdapterConfig(r=4, target_modules="encoder", routed_by="text")
    model = drawn(peft.get_peft_model(MODELS["bart"](), config))
    encoder = model.base_model.model.get_encoder()
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([2]), 0)
    padded = encoder(IDS, attention_mask=mask)[0][:, :2]
    torch.testing.assert_close(padded, encoder(IDS[:, :2])[0])


def projected(**more: Any) -> Any:
    config = lora("bert", visual_width=5, **more)
    return drawn(peft.get_peft_model(MODELS["bert"](), config))


def projectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "visual_projector" in name]


def test_a_projector_is_never_shared() -> None:
    model = projected()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"adapter 'b': visual_width with several.*default"):
        model.add_adapter("b", lora("bert", projector="frozen"))
    assert model.state_dict().keys() == before
    assert list(model.peft_config) == ["default"]
    model.set_adapter("default")
    assert all(p.requires_grad for p in projectors(model))


def test_equal_widths_need_no_projector() -> None:
    for config in (lora("bert", visual_width=8), adapter("bert", visual_width=8)):
        model = peft.get_peft_model(MODELS["bert"](), config)
        model.add_adapter("b", type(config)(r=2, target_modules=["query"]))
        peft.inject_adapter_in_model(config, MODELS["bert"]())


@pytest.mark.parametrize("projector", ["trainable", "frozen"])
def test_a_projector_trains_as_its_adapter_does(projector: str, tmp_path: Path) -> None:
    model = projected(projector=projector)
    trains = projector == "trainable"

    def are_trained(model: Any) -> set[bool]:
        return {p.requires_grad for p in projectors(model)}

    assert are_trained(model) == {trains}
    with model.disable_adapter():
        assert are_trained(model) == {False}
    assert are_trained(model) == {trains}
    model.set_requires_grad("default", False)
    assert are_trained(model) == {False}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(MODELS["bert"](), tmp_path)
    assert are_trained(loaded) == {False}
    loaded.set_adapter("default")
    assert are_trained(loaded) == {trains}


def test_a_projector_goes_with_its_adapter(tmp_path: Path) -> None:
    model = projected()
    context = model.context
    model.delete_adapter("default")
    assert not projectors(model) and context.projector is None
    model.add_adapter("b", lora("bert"))
    model.set_adapter("b")
    assert model.context is context is context_of(model)
    run(drawn(model))


def test_a_projector_without_a_place_is_refused() -> None:
    """Whoever keeps the layers and drops the tuner would neither train nor save it."""
    base = MODELS["bert"]()
    before = base.state_dict().keys()
    with pytest.raises(ValueError, match=r"visual_width=5: its projector would be neither trained"):
        peft.inject_adapter_in_model(lora("bert", visual_width=5), base)
    assert base.state_dict().keys() == before
    peft.inject_adapter_in_model(lora("bert", setting="none", visual_width=5), base)


def test_a_target_in_what_peft_copies_is_refused() -> None:
    torch.manual_seed(0)
    base = RobertaClassifier(RobertaConfig(**TINY, max_position_embeddings=20)).eval()
    inside = lora("roberta", modules_to_save=["classifier"])
    inside.target_modules = ["query", "out_proj"]
    with pytest.raises(ValueError, match=r"has classifier, in which classifier.out_proj is"):
        peft.get_peft_model(base, inside)
    model = peft.get_peft_model(base, lora("roberta", modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match=r"modules_to_save has classifier"):
        model.add_adapter("b", of(r".*out_proj"))
    model.add_adapter("all", RoutedLoraConfig(r=2, target_modules="all-linear"))
    assert not any("classifier" in name for name in model.peft_config["all"].target_modules)
    model.set_adapter("all")
    with context_of(model).using(IMAGE):
        assert model(IDS).logits.isfinite().all()
    other = peft.get_peft_model(
        RobertaClassifier(RobertaConfig(**TINY, max_position_embeddings=20)), of(r".*out_proj")
    )
    with pytest.raises(ValueError, match=r"in which classifier.out_proj is a target"):
        other.add_adapter("b", lora("roberta", modules_to_save=["classifier"]))


def test_route_none_needs_no_context_in_what_peft_copies() -> None:
    torch.manual_seed(0)
    base = RobertaClassifier(RobertaConfig(**TINY, max_position_embeddings=20)).eval()
    settings: dict[str, Any] = {"r": 2, "target_modules": ["query", "dense"]}
    with pytest.raises(ValueError, match=r"has classifier, by task_type='SEQ_CLS', in which"):
        peft.get_peft_model(base, RoutedLoraConfig(**settings, task_type="SEQ_CLS"))
    config = RoutedLoraConfig(**settings, task_type="SEQ_CLS", route="none")
    model = peft.get_peft_model(base, config)
    model(IDS).logits.sum().backward()
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.grad is not None)


def test_heads_that_peft_adds_by_the_task_are_passed_by() -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**TINY)).eval()
    config = RoutedLoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    with context_of(model).using(IMAGE):
        assert model(IDS).logits.isfinite().all()


def test_a_module_in_two_places_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

    with pytest.raises(ValueError, match=r"target a is b too: PEFT adapts one of them; `attach`"):
        peft.get_peft_model(Twice(), of("a|b"))
