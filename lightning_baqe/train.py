"""``python train.py recipe=<name> [group=choice ...] [key=value ...]``: composes a recipe and runs it.

A recipe is a YAML file in ``recipes/recipe``; its ``flow`` names the function of
:mod:`lightning_baqe.flows` that runs it.
"""

from __future__ import annotations

import difflib
import functools
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lightning_baqe.errors import BaqeError, ConfigError, DataError
from lightning_baqe.files import MIB, make_folder, read_file, replace_file
from lightning_baqe.interrupts import ending_in_order, interruption, status_of
from lightning_baqe.resources import shortage
from lightning_baqe.scratch import remove_leftovers_of_run

RECIPES = "lightning_baqe.recipes"
FAILED, USAGE = 1, 2
# What a run may be resumed with in another way than it was begun: none of it changes what a trial means.
_DEEPEST = 50  # of a configuration's nesting
MAY_CHANGE = (
    *(
        "run_dir",
        "logger",
        "trainer",
        "search.trials",
        "search.max_failures",
        "search.recover",
        "candidates",
        "budget_s",
        "allocation.budget",
    ),
    "search.limits",  # checked by the search: not once a trial is complete
)
# Of third parties, about what is meant so: images in memory need no loader processes, epochs may be short, batch norms
# may be frozen.
_KNOWN_WARNINGS = (
    "Found .* module.s. in eval mode at the start of training",
    ".*does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    ".*isinstance.treespec, LeafSpec.. is deprecated",
    ".*torch.jit.* is deprecated",
)
# Values that are paths: read as they are written, whatever their characters mean in Hydra's grammar.
PATHS = (
    *("run_dir", "data.root", "data.cache_dir", "model.weights", "bits.file", "records"),
    *("search.records", "search.storage"),
)
MAY_BE_NULL = ("search.limits",)  # sections


class UsageError(BaqeError):
    """A command line that cannot be right."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Args:
        arguments: of the command line; None: ``sys.argv``'s.

    Returns:
        the exit status: 0, 1 after an error of the run, 2 for a wrong command line, 130 or 143 when interrupted by
        Ctrl-C or SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    with ending_in_order():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    console = Console(stderr=True, highlight=False)
    run_dir: Path | None = None
    try:
        if {"-h", "--help"} & set(arguments):
            print(help_text())
            return 0
        cfg = compose(arguments)
        run_dir = open_run(cfg)
        flow: Callable[[DictConfig, Path], None] = hydra.utils.get_method(cfg.flow._target_)
        with _known_warnings_ignored():  # the imports of a flow warn, too
            flow(cfg, run_dir)
    except UsageError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return USAGE
    except (KeyboardInterrupt, SystemExit) as error:
        interrupted = interruption(error)
        if interrupted is None:
            raise
        console.print("Interrupted.", style="yellow")
        _say_how_to_go_on(console, arguments, run_dir)
        return status_of(interrupted)
    except Exception as error:
        missing = shortage(error)
        if missing is None and not isinstance(error, BaqeError):
            raise
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        if missing is not None:
            if missing not in str(error):
                console.print(f"What is missing: {missing}.", style="red", markup=False, soft_wrap=True)
            _say_how_to_go_on(console, arguments, run_dir)
        return FAILED
    return 0


def _say_how_to_go_on(console: Console, arguments: Sequence[str], run_dir: Path | None) -> None:
    if run_dir is not None:
        console.print(f"To go on: {resume_command(arguments, run_dir)}", markup=False, soft_wrap=True)


@functools.cache
def recipe_groups() -> dict[str, dict[str, str]]:
    """``{group: {choice: what it is, the first comment of its file}}``, ``recipe`` first."""
    groups: dict[str, dict[str, str]] = {}
    for folder in resources.files(RECIPES).iterdir():
        if folder.is_dir() and folder.name != "sweeps":  # which W&B reads, not Hydra
            files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
            texts = {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}
            groups[folder.name] = {choice: _first_comment(texts[choice]) for choice in sorted(texts)}
    return {name: groups[name] for name in sorted(groups, key=lambda name: (name != "recipe", name)) if groups[name]}


def _first_comment(text: str) -> str:
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def help_text() -> str:
    """What ``--help`` prints."""
    program = _program()
    lines = [f"usage: {program} recipe=<name> [group=choice ...] [key=value ...] [run_dir=folder]", ""]
    for group, choices in recipe_groups().items():
        width = max(len(choice) for choice in choices)
        lines += [f"{group}:", *(f"  {choice:<{width}}  {what}" for choice, what in choices.items()), ""]
    lines += [
        "A key is any value of the composed configuration, such as pretrain.epochs=4.",
        "The same command with run_dir=<folder of an earlier run> goes on with that run.",
        f"example: {program} recipe=qat_search search.trials=20",
    ]
    return "\n".join(lines)


def _program() -> str:
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else "lightning-baqe"


def resume_command(arguments: Sequence[str], run_dir: Path) -> str:
    """The command that goes on with a run."""
    kept = [argument for argument in arguments if not argument.startswith("run_dir=")]
    return f"{_program()} {shlex.join([*kept, f'run_dir={run_dir}'])}"


def compose(arguments: Sequence[str]) -> DictConfig:
    """The configuration of ``key=value`` arguments in Hydra's grammar; paths are read as they are written.

    Raises:
        UsageError: an argument that cannot be read, no recipe, or a recipe, choice or key that there is not; names the
            near ones.
    """
    arguments = [_path_quoted(argument) for argument in arguments]
    overrides = [_parse(argument) for argument in arguments]
    groups = recipe_groups()
    for override in overrides:
        _check_choice(override, groups)
    if not any(override.key_or_group == "recipe" for override in overrides):
        raise UsageError(f"No recipe was given: add recipe=<name>, one of {', '.join(groups['recipe'])}.")
    chosen = [text for text, each in zip(arguments, overrides, strict=True) if each.key_or_group in groups]
    base = _compose(chosen)
    known = list(_paths(base))
    for override in overrides:
        key = override.key_or_group
        if key not in groups and not override.is_add() and key not in known:
            raise UsageError(f"There is no key {key!r}{_near(key, known)}. --help lists what there is.")
        if key in known and key not in groups:
            _check_section(override, OmegaConf.select(base, key, throw_on_missing=False))
    return _compose(arguments)


def quoted(text: str) -> str:
    """A text as one value in Hydra's grammar, in which a backslash means something before a quote alone."""
    inside = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{inside}'"


def _path_quoted(argument: str) -> str:
    """The argument, in quotes if it is a path; those that are there, null and references to other keys stay."""
    key, _, value = argument.partition("=")
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    is_path = key.lstrip("+") in PATHS and value.lower() not in ("", "null")
    return f"{key}={quoted(value)}" if is_path and not is_quoted and "${" not in value else argument


def _parse(argument: str) -> Override:
    key, equals, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if not equals or not re.fullmatch(r"\s*[+~]{0,2}[\w./@:-]+\s*", key):
            raise UsageError(
                f"{argument!r} is no key=value: {error}\nArguments are key=value; --help lists what there is."
            ) from error
        raise UsageError(f"{argument!r} cannot be read: {error}\n{_quotes_wanted(key, value)}") from error
    if not override.key_or_group:
        raise UsageError(f"{argument!r} has no key. Arguments are key=value; --help lists what there is.")
    return override


def _quotes_wanted(key: str, value: str) -> str:
    """What to write for a value that is one text; the shell takes away the outer quotes."""
    return f"If the value is one text, put it in quotes that the shell leaves: {shlex.quote(f'{key}={quoted(value)}')}"


def _check_section(override: Override, default: Any) -> None:
    key, value = override.key_or_group, override.value()
    if not isinstance(default, DictConfig) or isinstance(value, dict) or override.is_delete():
        return
    if value is not None or key not in MAY_BE_NULL:
        raise UsageError(
            f"{override.input_line!r} gives one value to {key!r}, which has several: give "
            f"{' or '.join(f'{key}.{name}=...' for name in map(str, default))}."
        )


def _compose(arguments: Sequence[str]) -> DictConfig:
    try:
        with hydra.initialize_config_module(RECIPES, version_base="1.3"):
            cfg = hydra.compose("config", overrides=list(arguments))
            OmegaConf.to_container(cfg, resolve=True)  # references to keys that there are not show now
            return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"{error}\n--help lists what there is.") from error


def _check_choice(override: Override, groups: dict[str, dict[str, str]]) -> None:
    key, text = override.key_or_group, str(override.input_line)
    if override.is_sweep_override():
        wanted = _quotes_wanted(*text.split("=", 1))
        raise UsageError(f"{text!r} names several values, but a run has one: start one run for each. {wanted}")
    if key not in groups or override.is_delete():
        return
    value = override.value()
    if value not in groups[key]:
        raise UsageError(
            f"There is no {key} {str(value)!r}{_near(str(value), list(groups[key]))}. "
            f"Wanted is {key}=<one of {', '.join(groups[key])}>."
        )


def _near(name: str, names: Sequence[str]) -> str:
    close = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close += [known for known in difflib.get_close_matches(name, names, n=3) if known not in close]
    return f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        path = f"{prefix}{key}"
        yield path
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from _paths(child, f"{path}.")


def open_run(cfg: DictConfig) -> Path:
    """Make the run folder, or open an earlier run's, and write ``config.yaml``; sets ``cfg.run_dir``.

    Raises:
        ConfigError: the folder cannot be made or written, or holds a run of another configuration.
        UsageError: a key without a value.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UsageError(f"{' and '.join(missing)} must be given: add {' '.join(f'{key}=...' for key in missing)}.")
    recipe = recipe_name(cfg)
    if cfg.run_dir is None:
        run_dir = _new_folder(Path("outputs", recipe, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")).absolute())
    else:
        run_dir = make_folder(Path(str(cfg.run_dir)).expanduser().absolute(), "run_dir")
    cfg.run_dir = str(run_dir)
    remove_leftovers_of_run(run_dir)
    path = run_dir / "config.yaml"
    if path.exists():
        try:
            _check_same(_read_configuration(path), cfg, path)
        except (DataError, UnicodeDecodeError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{path} cannot be read ({error}): remove it, or give another run_dir.") from error
    replace_file(path, OmegaConf.to_yaml(cfg).encode())
    return run_dir


def _new_folder(path: Path) -> Path:
    """Make a folder of this name, or with a number behind it: agents of a sweep may begin in the same second.

    Raises:
        ConfigError: it cannot be made.
    """
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}_{number}")
        except OSError as error:
            raise ConfigError(f"run_dir={folder} cannot be made ({error}): give another run_dir.") from error


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield


def recipe_name(cfg: DictConfig) -> str:
    """The name of the recipe, that of its flow."""
    return str(cfg.flow._target_).rpartition(".")[2]


def _read_configuration(path: Path) -> Any:
    """What :func:`open_run` wrote. Anchors are refused: it writes none, and few bytes of them are gigabytes."""
    text, depth = read_file(path, 4 * MIB).decode(), 0
    for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        is_no_mapping = number == 2 and not isinstance(event, yaml.MappingStartEvent)  # after stream and document
        if is_no_mapping or isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
            raise DataError("it is no mapping, refers to parts of itself, or is nested too deeply")
    return OmegaConf.create(text)


def _check_same(old: Any, new: DictConfig, path: Path) -> None:
    if not isinstance(old, DictConfig):
        raise ConfigError(f"{path} is no configuration of a run: remove it, or give another run_dir.")
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changes = [
        f"{key}: {_shown(before, key)} there, {_shown(after, key)} here"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == may or key.startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    if changes:
        raise ConfigError(
            f"{path.parent} holds a run of another configuration:\n  "
            + "\n  ".join(changes)
            + "\nGive the arguments that it was begun with, or another run_dir."
        )


def _leaves(cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    for path in _paths(cfg):
        value = OmegaConf.select(cfg, path, throw_on_missing=False)
        if not isinstance(value, DictConfig):
            yield path, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


def _shown(leaves: dict[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "nothing"
