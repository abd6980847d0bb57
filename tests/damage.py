"""Damaged checkpoints: by kind, what is done to the folder of a good one."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = (f"base_model.model.first.lora_{which}.weight" for which in "AB")
FLAG = "executed"

Damage = Callable[[Path], object]
KINDS = {
    "truncated": "either file, cut off anywhere",
    "bits": "either file, with bits turned over",
    "types": "every setting in JSON with values of other types",
    "text": "adapter_config.json: broken, nested, in other encodings, with keys like code",
    "headers": "adapter_model.safetensors: names, dtypes, shapes and offsets made up",
    "tensors": "missing, additional, renamed and reshaped tensors, other dtypes",
    "pickles": "pickles that would execute code, in place of either file and beside them",
    "places": "links, folders and pipes in place of files",
}


def config_with(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        written = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**written, **values}))

    return change


def writing(name: str, content: bytes | str) -> Damage:
    encoded = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(encoded)


def cut(name: str, share: float) -> Damage:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def turned(name: str, places: list[float]) -> Damage:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        for place in places:
            bit = int(place * 8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)

    return change


def truncated() -> dict[str, Damage]:
    random_ = random.Random(0)
    return {
        f"{name} at {share:.4f}": cut(name, share)
        for name in (TENSORS, CONFIG)
        for share in [0.0, *(random_.random() for _ in range(99))]
    }


def bits() -> dict[str, Damage]:
    random_ = random.Random(1)
    return {
        f"{name} {count} {i}": turned(name, [random_.random() for _ in range(count)])
        for name in (TENSORS, CONFIG)
        for count in (1, 3)
        for i in range(150)
    }


SETTINGS = (
    "peft_type", "target_modules", "r", "inner_rank", "route", "transpose", "segments", "pool",
    "normalize", "routed_by", "lora_dropout", "layers_to_transform", "layers_pattern",
    "modules_to_save", "train", "visual_width", "projector", "lora_alpha", "adapted", "of",
    "auto_mapping", "base_model_name_or_path", "fused_route_version", "task_type", "x",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 1.5, 1e308, float("nan"), float("inf"), 2**62, 10**30, "", "x",
    "first", "__reduce__", "../../etc/passwd", "\ud800", "ﬁrst\u0000", [], [0], [-1], [None], ["x"],
    [["first"]], {}, {"a": 1}, {"first": []}, [float("nan")], {"base_model_class": ["Model"]},
)  # fmt: skip


def unmarked(folder: Path) -> None:
    """Without the digest in the tensors that tells settings of another save."""
    save_file(load_file(folder / TENSORS), folder / TENSORS)


def after(one: Damage, other: Damage) -> Damage:
    def change(folder: Path) -> None:
        one(folder)
        other(folder)

    return change


def types() -> dict[str, Damage]:
    damages = {f"{n}={value!r}": config_with(**{n: value}) for n in SETTINGS for value in VALUES}
    return damages | {
        f"{name}, unmarked": after(unmarked, damage) for name, damage in damages.items()
    }


def text() -> dict[str, Damage]:
    good = '{"peft_type": "ROUTED_LORA", "target_modules": ["first"]'
    broken = {
        "empty": "", "blank": "  \n", "null": "null", "number": "3", "string": '"x"', "list": "[]",
        "unclosed": good, "twice": f"{good}}}{good}}}", "trailing": f"{good}}} x", "nan": "NaN",
        "single quotes": "{'peft_type': 'ROUTED_LORA'}", "comment": f"{good}, // x\n}}",
        "deep": "[" * 100_000, "deep object": '{"a":' * 100_000,
        "deep value": f'{good}, "x": {"[" * 50_000}{"]" * 50_000}}}',
        "many digits": f'{good}, "r": {"9" * 5000}}}', "digits": f'{good}, "r": {"9" * 400}}}',
        "huge alpha": f'{good}, "lora_alpha": {"9" * 400}}}', "control": f'{good}, "r": \x01}}',
        "long key": f'{good}, "{"k" * 1_000_000}": 1}}',
        "many keys": f"{good}, {', '.join(f'{chr(34)}k{i}{chr(34)}: 1' for i in range(9999))}}}",
    }  # fmt: skip
    keys = "__reduce__ __class__ __init__ __import__('os').system('x') self cls {0.__class__} %s"
    damages = {name: writing(CONFIG, content) for name, content in broken.items()}
    damages |= {f"key {key}": config_with(**{key: "os.system"}) for key in keys.split()}
    damages |= {f"off {key}": config_with(**{key: None}) for key in keys.split()}
    for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-7"):
        damages[encoding] = writing(CONFIG, f"{good}}}".encode(encoding))
    damages["latin-1"] = writing(CONFIG, f'{good}, "é": 1}}'.encode("latin-1"))
    damages["zeros"] = writing(CONFIG, b"\0" * 100)
    damages["noise"] = writing(CONFIG, random.Random(2).randbytes(1000))
    return damages


def with_header(header: Any, length: int | None = None, data: bytes = b"\0" * 256) -> Damage:
    written = header if isinstance(header, str) else json.dumps(header)
    size = len(written.encode()) if length is None else length
    return writing(TENSORS, struct.pack("<Q", size) + written.encode() + data)


def tensor(dtype: Any = "F32", shape: Any = (4, 8), offsets: Any = (0, 128)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def headers() -> dict[str, Damage]:
    up = tensor(shape=(8, 4), offsets=(128, 256))
    made = {
        "no object": [], "number": 3, "null": None, "empty": {}, "no fields": {A: {}, B: {}},
        "dtype": {A: tensor("F33"), B: up}, "dtype 3": {A: tensor(3), B: up},
        "shape nan": {A: tensor(shape=(float("nan"), 8)), B: up},
        "shape negative": {A: tensor(shape=(-4, -8)), B: up},
        "shape float": {A: tensor(shape=(4.0, 8.0)), B: up},
        "shape text": {A: tensor(shape="48"), B: up}, "shape null": {A: tensor(shape=None), B: up},
        "shape huge": {A: tensor(shape=(2**62, 8)), B: up},
        "shape overflow": {A: tensor(shape=(2**63, 2**63)), B: up},
        "shape deep": {A: tensor(shape=[[[4]], 8]), B: up},
        "offsets swapped": {A: tensor(offsets=(128, 0)), B: up},
        "offsets over": {A: tensor(offsets=(0, 2**40)), B: up},
        "offsets negative": {A: tensor(offsets=(-128, 0)), B: up},
        "offsets shared": {A: tensor(), B: tensor(shape=(8, 4))},
        "offsets with a hole": {A: tensor(), B: tensor(shape=(8, 4), offsets=(129, 257))},
        "metadata list": {"__metadata__": [], A: tensor(), B: up},
        "metadata numbers": {"__metadata__": {"format": 1}, A: tensor(), B: up},
        "metadata digest": {"__metadata__": {"fused_route_config": "0" * 64}, A: tensor(), B: up},
        "metadata code": {"__metadata__": {"__reduce__": "os.system"}, A: tensor()},
        "twice": f'{{"{A}": {json.dumps(tensor())}, "{A}": {json.dumps(up)}}}',
        "deep": "[" * 100_000, "deep object": '{"a":' * 100_000, "nan": "NaN",
    }  # fmt: skip
    names = ("", "/", "../../x", "C:\\x", "__reduce__", "__metadata__", "a" * 100_000, "\u202e",
             "é", "base_model.model..lora_A.weight", "base_model.model.first", f"{A}.", f".{A}",
             A.upper())  # fmt: skip
    made |= {f"named {name[:20]!r}": {name: tensor(), B: up} for name in names}
    damages = {name: with_header(header) for name, header in made.items()}
    for length in (0, 1, 2**20, 2**31, 2**62, 2**64 - 1):
        damages[f"length {length}"] = with_header({A: tensor(), B: up}, length)
    damages["no data"] = with_header({A: tensor(), B: up}, data=b"")
    damages["more data"] = with_header({A: tensor(), B: up}, data=b"\0" * 1000)
    damages["not utf-8"] = writing(TENSORS, struct.pack("<Q", 4) + b"\xff\xfe{}")
    damages["noise"] = writing(TENSORS, random.Random(3).randbytes(2000))
    return damages


def retensored(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def rewrite(folder: Path) -> None:
        with safe_open(folder / TENSORS, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS, metadata=metadata)

    return rewrite


def tensors() -> dict[str, Damage]:
    dtypes = (
        torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
        torch.uint64, torch.bool, torch.complex64,
    )  # fmt: skip
    shapes = ((), (0,), (32,), (8, 4), (4, 8, 1), (1, 4, 8), (4, 9), (0, 8), (4, 0))
    names = ("x", "first.lora_A.weight", "__reduce__", "../x", f"{A}.x", "base_model.model.first.A")
    extra = torch.ones(2)
    damages = {
        f"dtype {kind}": retensored(lambda t, kind=kind: t.update({A: t[A].to(kind)}))  # type: ignore[misc]
        for kind in dtypes
    }
    for shape in shapes:
        damages[f"shape {shape}"] = retensored(
            lambda t, shape=shape: t.update({A: torch.ones(shape)})  # type: ignore[misc]
        )
    for name in names:
        damages[f"extra {name}"] = retensored(lambda t, n=name: t.update({n: extra}))  # type: ignore[misc]
        damages[f"renamed {name}"] = retensored(lambda t, n=name: t.update({n: t.pop(A)}))  # type: ignore[misc]
    for name in (A, B):
        damages[f"missing {name}"] = retensored(lambda t, n=name: t.pop(n))  # type: ignore[misc]
        for value in (float("nan"), float("inf"), -0.0, 1e-45):
            damages[f"{value} in {name}"] = retensored(lambda t, n=name, v=value: t[n].fill_(v))  # type: ignore[misc]
    damages["none"] = retensored(lambda t: t.clear())
    damages["swapped"] = retensored(lambda t: t.update({A: t[B], B: t[A]}))
    return damages


class Payload:
    """Executes code when it is unpickled: makes a folder."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.flag),)


def pickled(name: str, *, by_torch: bool, beside: bool = False) -> Damage:
    def change(folder: Path) -> None:
        payload = {A: Payload(folder.parent / FLAG)}
        if by_torch:
            torch.save(payload, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(payload))
        if beside:
            (folder / TENSORS).unlink()

    return change


def pickles() -> dict[str, Damage]:
    names = (TENSORS, CONFIG, "adapter_model.bin", "pytorch_model.bin", "adapter_model.pt")
    return {
        f"{name} by {'torch' if by_torch else 'pickle'}{' alone' * beside}": pickled(
            name, by_torch=by_torch, beside=beside
        )
        for name in names
        for by_torch in (True, False)
        for beside in ((False, True) if name not in (TENSORS, CONFIG) else (False,))
    }


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).rename(folder / f"{name}.kept")
        make(folder / name)

    return change


def places() -> dict[str, Damage]:
    makers: dict[str, Callable[[Path], object]] = {
        "nothing": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "link to it": lambda path: path.symlink_to(f"{path.name}.kept"),
        "link to nothing": lambda path: path.symlink_to("nowhere"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to the folder": lambda path: path.symlink_to("."),
        "link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    }
    return {
        f"{name}: {what}": replaced(name, make)
        for name in (TENSORS, CONFIG)
        for what, make in makers.items()
    }


DAMAGES: dict[str, dict[str, Damage]] = {
    "truncated": truncated(),
    "bits": bits(),
    "types": types(),
    "text": text(),
    "headers": headers(),
    "tensors": tensors(),
    "pickles": pickles(),
    "places": places(),
}
