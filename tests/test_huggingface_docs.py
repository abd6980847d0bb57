"""The scripts of docs/huggingface.md run as they stand, from model directories on the disk."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel, ViTImageProcessor
from vlm_models import LANGUAGE, LAYERS, images, texts, vit

pytest.importorskip("peft", minversion="0.21")

PAGE = Path(__file__).parents[1] / "docs" / "huggingface.md"
SCRIPTS = dict(
    zip(
        ["peft", "transformers", "trainer", "captions"],
        re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL),
        strict=True,
    )
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where path/to/… are models, with a processor and a tokenizer beside them."""
    to = tmp_path / "path" / "to"
    vit().save_pretrained(to / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(to / "vit")
    LANGUAGE["bert"]().save_pretrained(to / "bert")
    LANGUAGE["gpt2"]().save_pretrained(to / "gpt2")
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(**LAYERS)).save_pretrained(to / "roberta")
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "is", "it", "red", "blue", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(to / "roberta")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, **names: Any) -> dict[str, Any]:
    exec(compile(SCRIPTS[script], f"huggingface.md, {script}", "exec"), names)
    return names


@pytest.mark.parametrize("script", ["peft", "transformers"])
def test_peft(script: str, folder: Path) -> None:
    from test_peft import takes_this_peft

    if script == "transformers" and not takes_this_peft:
        pytest.skip("transformers refuses this version of peft")
    names = run(
        script,
        image_features=torch.randn(2, 4, 1280),
        projected_features=torch.randn(2, 4, 8),
        input_ids=torch.tensor([[3, 4, 5], [6, 7, 8]]),
    )
    assert names["states"].shape == (2, 3, 8)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of the Trainer, without a GPU
def test_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    questions = ["is it red ?", "is it blue ?", "is it red or blue ?"]
    samples = [
        {
            "image": Image.new("RGB", (10, 6), (80 * i, 40, 90)),
            "question": questions[i],
            "label": i,
        }
        for i in range(3)
    ]
    names = run("trainer", samples=samples)
    assert names["trainer"].state.global_step == 4
    saved = {path.name for path in (folder / "my-vqa-adapter").iterdir()}
    assert saved == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert isinstance(names["model"], nn.Module)


def test_captions(folder: Path) -> None:
    names = run(
        "captions",
        caption_ids=texts(2),
        prompt_ids=texts(2, 3),
        pixel_values=images(2),
    )
    assert torch.equal(names["tokens"], names["again"])
    trained = [p.grad for p in names["model"].parameters() if p.requires_grad]
    assert trained and all(grad is not None for grad in trained)
