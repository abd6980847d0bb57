"""Every argument's bad values are refused by name, and what was there stays as it was."""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
from bad_inputs import KINDS, Bad, Later, Subject, identified, label, ways_to_show
from bad_inputs_cli import COMMANDS, OPTIONS, VALID
from bad_inputs_config import SUBJECTS as CONFIGS
from bad_inputs_functions import SUBJECTS as FUNCTIONS
from bad_inputs_layers import SUBJECTS as LAYERS
from bad_inputs_models import SUBJECTS as MODELS
from damage import DAMAGES
from damage import KINDS as DAMAGE_KINDS
from watching import same, seen

import fused_route
from fused_route.published import load_published
from fused_route.routes import RouteTable
from fused_route.training import cli
from fused_route.training.demo import compare

SUBJECTS = [*FUNCTIONS, *LAYERS, *MODELS, *CONFIGS]
ROWS = identified(SUBJECTS)
# Arguments of what is exported that have no bad value of their own, and why.
FREE = {
    "AdapterCall.call": "what forward calls",
    "LinearCall.call": "what forward calls",
    "LinearCall.onto": "called by a layer of several adapters, which checks what it is given",
    "Attached": "made by attach, not by users",
    "Attached.checkpoint_activations.kwargs": "for the model's own method, which checks them",
    "Routed.around": "called by the layer itself, which checks what it is given",
    "Routed.routing_input": "called by the layer itself, which checks what it is given",
    "Dropout.down": "called by the functions, which have checked everything",
    "Folded": "made by fold, not by users",
    "Operand": "made by shift, scale, rank1 and matrix; checked where it is used: see route",
    "RoutedLinear.forward.args": "for the base, which checks them",
    "RoutedLinear.forward.kwargs": "for the base, which checks them",
    "AdapterCall.around": "called by the layer itself, which checks what it is given",
    "LinearCall.around": "called by the layer itself, which checks what it is given",
    "Routing.check": "the check itself",
    "Routing.mix": "called by the functions, which have checked everything",
    "Routing.operand": "called by the functions, which have checked everything",
    "RoutingContext.captured.function": "called as it is: what cannot be called says so itself",
    "RoutingContext.get.layer": "only shown, in errors",
    "RoutingContext.pooled": "called by the layers, which have checked x_h",
    "RoutingContext.pop": "called by hooks, with themselves",
    "RoutingContext.projected": "called by the layers, with themselves",
    "RoutingContext.push": "called by hooks, with themselves",
    "RoutingContext.taken": "called by the layers, with themselves",
    "RoutingInput.prepared": "called by layers: checked where the routing input is used",
    "RoutingInput.projected": "called by layers: checked where the routing input is used",
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")


def given(row: Bad, folder: Path) -> Any:
    return row.value.make(folder) if isinstance(row.value, Later) else row.value


def assert_says(message: str, row: Bad, argument: str) -> None:
    assert "\n" not in message
    assert (argument if row.named is None else row.named) in message
    assert row.accepted in message
    shown = ways_to_show(row.value) if row.given is None else [row.given]
    assert any(way in message for way in shown), message


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_value_is_refused_by_name(name: str, tmp_path: Path) -> None:
    subject, argument, row = ROWS[name]
    call, arguments = subject.make(tmp_path)
    value = given(row, tmp_path)
    involved = {**arguments, "owner": getattr(call, "__self__", None)}
    before = seen(involved)
    with pytest.raises(ValueError) as caught:
        call(**{**arguments, **row.also, argument: value})
    assert same(seen(involved), before)
    assert_says(str(caught.value), row, argument)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_the_call_is_good_without_the_bad_value(subject: Subject, tmp_path: Path) -> None:
    call, arguments = subject.make(tmp_path)
    call(**arguments)


LINES = {
    f"{command} {option} {label(row.value)}": (command, option, row)
    for command, options in OPTIONS.items()
    for option, rows in options.items()
    for row in rows
}


def error_of(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with status 2 and prints nothing else."""
    try:
        status = cli.main(line)
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    *usage, error = printed.err.strip("\n").split("\n")
    assert error.startswith("fused-route") and ": error: " in error
    assert not usage or usage[0].startswith("usage: ")
    return error.partition(": error: ")[2]


@pytest.mark.parametrize("name", LINES)
def test_a_bad_option_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr(compare, "run_arm", started)
    command, option, row = LINES[name]
    if option != "--bundle":
        monkeypatch.setattr(compare, "run", started)
    values = {key: make(tmp_path) for key, make in VALID[command].items()}
    values[option] = given(row, tmp_path)
    told = [f"{k}={value}" if k.startswith("-") else str(value) for k, value in values.items()]
    line = [command, *told]
    argument = option.removeprefix("--") if option.startswith("-") else ""
    assert_says(error_of(line, capsys), row, argument)


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: " ".join(row.value))
def test_a_bad_command_is_one_line(row: Bad, capsys: pytest.CaptureFixture[str]) -> None:
    assert row.accepted in error_of(row.value, capsys)


def arguments_of(name: str, function: Any) -> Iterator[str]:
    for parameter in inspect.signature(function).parameters:
        if parameter != "self":
            yield f"{name}.{parameter}"


def public_arguments() -> Iterator[str]:
    exports = {
        name: value
        for name, value in vars(fused_route).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    del exports["ROUTES"]
    exports |= {"RouteTable": RouteTable, "load_published": load_published}
    for name, value in exports.items():
        if value is not RouteTable:
            yield from arguments_of(name, value)
        if inspect.isclass(value):
            yield from arguments_of_methods(name, value)


def arguments_of_methods(name: str, owner: type) -> Iterator[str]:
    for base in owner.__mro__:
        if not base.__module__.startswith("fused_route"):
            continue
        called = name if base is owner else base.__name__
        for method, function in vars(base).items():
            function = getattr(function, "__func__", function)
            if isinstance(function, FunctionType) and not method.startswith("_"):
                bound = getattr(owner, method) if isinstance(vars(base)[method], classmethod) else 0
                yield from arguments_of(f"{called}.{method}", bound or function)


def test_every_argument_has_bad_values() -> None:
    tried = {f"{s.name}.{argument}" for s in SUBJECTS for argument, rows in s.rows.items() if rows}
    excused = set()
    for argument in public_arguments():
        reasons = {argument, argument.rpartition(".")[0]} & FREE.keys()
        excused |= reasons
        assert argument in tried or reasons, f"{argument} has no bad value in the table"
    assert excused == FREE.keys(), "excused, but not there"


def test_every_option_has_bad_values() -> None:
    (commands,) = (
        action
        for action in cli._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    options = {
        name: {[a.dest, *a.option_strings][-1] for a in parser._actions if a.dest != "help"}
        for name, parser in commands.choices.items()
    }
    assert options == {name: set(rows) for name, rows in OPTIONS.items()}


def test_kinds_are_known() -> None:
    rows = [row for *_, row in [*ROWS.values(), *LINES.values()]]
    assert {row.kind for row in [*rows, *COMMANDS]} == KINDS.keys()


GROUPS = {"functions": FUNCTIONS, "layers": LAYERS, "models": MODELS, "configurations": CONFIGS}


def tables() -> str:
    """What docs/reliability.md says was tried."""
    columns = {
        name: [row.kind for s in subjects for rows in s.rows.values() for row in rows]
        for name, subjects in GROUPS.items()
    }
    columns["commands"] = [row.kind for row in [*(row for *_, row in LINES.values()), *COMMANDS]]
    columns["all"] = [kind for kinds in columns.values() for kind in kinds]
    lines = [f"| {' | '.join(['', *columns])} |", f"| --- {'| ---: ' * len(columns)}|"]
    for kind, meaning in KINDS.items():
        lines.append(f"| {meaning} | {' | '.join(str(c.count(kind)) for c in columns.values())} |")
    lines.append(f"| all | {' | '.join(str(len(c)) for c in columns.values())} |")
    lines += ["", "| damage | files |", "| --- | ---: |"]
    lines += [f"| {meaning} | {len(DAMAGES[kind])} |" for kind, meaning in DAMAGE_KINDS.items()]
    lines.append(f"| all | {sum(map(len, DAMAGES.values()))} |")
    return "\n".join(lines)


def test_the_page_says_what_was_tried() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in page, f"put this into docs/reliability.md:\n{table}"
