"""fused-route encode: what it encodes, and what --verify says of it."""

import re
from pathlib import Path

import pytest
from experiments import refused, run, save_all, written

from fused_route.training import feature_cache
from fused_route.training.experiment import commands

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("encoded"))


class TestEncode:
    def test_encodes_what_training_then_reads(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, "roberta", "lora", "encoded")
        cache = ["--cache", tmp_path / "cache"]
        assert run("encode", file, *cache, "--dtype", "float16", "--workers", "0", "--verify") == 0
        first = capsys.readouterr().out
        assert "0 images encoded" not in first and f"next: fused-route train {file}" in first
        assert run("encode", file, *cache) == 0
        assert capsys.readouterr().out.startswith("0 images encoded")
        assert run("train", file, *cache) == 0
        assert "encoding" not in capsys.readouterr().err

    def test_verify_ends_with_1_where_something_is_wrong(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = written(folder, "roberta", "lora", "verified")
        command = ["encode", file, "--cache", tmp_path / "cache"]
        assert run(*command, "--verify") == 0
        (images,) = re.findall(r"; ([0-9]+) encoded again agree", capsys.readouterr().out)
        assert 8 < int(images) <= commands.COMPARED
        (shard,) = (tmp_path / "cache").rglob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[-1000] ^= 0xFF
        shard.write_bytes(content)
        assert run(*command, "--verify") == 1
        said = capsys.readouterr()
        assert "1 damaged shards set aside" in said.out and "take" not in said.err
        assert f"next: fused-route encode {file} --cache" in said.out
        assert run(*command) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feature_cache, "_apart", lambda *_: 1.0)
            assert run(*command, "--verify") == 1
        said = capsys.readouterr()
        assert "DO NOT agree" in said.out and f"take {tmp_path / 'cache'}" in said.err
        assert "next: fused-route encode" in said.out

    def test_nothing_to_encode(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = written(folder, "roberta", "lora", "tower")
        line = refused(capsys, "encode", file, "--features_from", "tower")
        assert "keeps no features" in line
