"""Reading recipes and other YAML: where each key was given, dotted overrides, and one line per mistake."""

import difflib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mstkd.errors import UserError

PATH_KEYS = {"runs_dir", "path", "cache_dir", "init_from", "uri"}


def recipe_folder() -> Path:
    """Where the packaged recipes lie (package data of mstkd.launch)."""
    return Path(importlib.util.find_spec("mstkd.launch").origin).parent / "recipes"


def find_recipe(recipe: str) -> Path:
    """The recipe file called `recipe` (packaged) or at the path `recipe`."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"recipe {recipe}: no such file")
        return path
    packaged = recipe_folder() / f"{recipe}.yaml"
    if packaged.is_file():
        return packaged
    names = sorted(p.stem for p in recipe_folder().glob("*.yaml"))
    raise UserError(f"recipe {recipe}: no such packaged recipe{nearest(recipe, names)}; or give the path of a file ending in .yaml")


def parse_override(override: str) -> tuple[str, Any]:
    """("train.steps", 100) from "train.steps=100"; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: write it as key=value, e.g. train.steps=100")
    try:
        return key.strip(), yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it") from None


def written_override(key: str, value: Any) -> str:
    """What `parse_override` reads as (key, value), for plain data."""
    plain = isinstance(value, str) and yaml.safe_load(value) == value
    return f"{key}={value if plain else json.dumps(value)}"


def read_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    """A YAML mapping and the line of every dotted key in it."""
    try:
        text = path.read_text()
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path.name}:{mark.line + 1 if mark else '?'}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path.name}: not a text file in UTF-8; save it as one") from None
    if not isinstance(values, dict):
        raise UserError(f"{path.name}: expected a mapping of keys to values")
    return values, dict(_key_lines(node, ""))


def read_with_overrides(path: Path, overrides: Sequence[str]) -> tuple[dict, dict[str, str]]:
    """A YAML mapping with dotted overrides, and where each dotted key was given: "recipe.yaml:12" or "override ..."."""
    values, lines = read_yaml(path)
    values = _unshared(values)
    origin = {key: f"{path.name}:{line}" for key, line in lines.items()}
    for override in overrides:
        key, value = parse_override(override)
        assign(values, key, value, override)
        origin = {k: v for k, v in origin.items() if k != key and not k.startswith(key + ".")}
        origin[key] = f"override {override!r}"
    return values, origin


def _unshared(value: Any) -> Any:
    """What anchors share is shared no more: an override changes the key that it names alone."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def read_json(path: str) -> dict:
    """A JSON file that holds an object; `path` counts from the working directory. Raises ValueError, for a validator."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); give the path of a JSON file, or keys") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno} ({error.msg}); correct the file") from None
    except UnicodeDecodeError:
        raise ValueError("not a text file in UTF-8; save it as one") from None
    if not isinstance(values, dict):
        raise ValueError("holds no JSON object; correct the file")
    return values


def validate_section(model: type[BaseModel], values: dict, prefix: str, source: str, origin: dict[str, str] | None = None) -> Any:
    """`model` from `values`; the first problem becomes one UserError naming key, place and nearest valid key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # a misspelt key is reported before the one that is missing because of it
        problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in (*([prefix] if prefix else []), *problem["loc"]))
        place = _place(key, source, origin or {})
        if problem["type"] == "extra_forbidden":
            valid = _valid_keys(model, problem["loc"][:-1])
            raise UserError(f"{place}: unknown key {key}{nearest(str(problem['loc'][-1]), valid)}") from None
        message = problem["msg"].removeprefix("Value error, ")
        changed = [where for at, where in (origin or {}).items() if at.startswith(f"{key}.") and where.startswith("override")]
        place = ", ".join([place, *changed])
        given = f" (given: {problem['input']!r})" if not isinstance(problem["input"], dict) else ""
        raise UserError(f"{place}: {key + ': ' if key else ''}{message}{given}") from None


def assign(values: dict, key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    values[last] = value


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested plain data; lists of mappings or lists count by position."""
    if isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        values = dict(enumerate(values))
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def run_params(values: dict) -> dict[str, Any]:
    """What a resolved recipe says, by dotted key and without paths, so that it may be shown."""
    return {key: value for key, value in leaves(values) if value != {} and not _is_path(key, value)}


def _is_path(key: str, value: Any) -> bool:
    return not PATH_KEYS.isdisjoint(key.split(".")) or (isinstance(value, str) and ("/" in value or "\\" in value))


def _key_lines(node: yaml.Node | None, prefix: str):
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _key_lines(value, dotted + ".")


def _place(key: str, source: str, origin: dict[str, str]) -> str:
    parts = key.split(".")
    for n in range(len(parts), 0, -1):  # a missing key is reported at its parent
        if ".".join(parts[:n]) in origin:
            return origin[".".join(parts[:n])]
    return source


def _valid_keys(model: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is None:
            continue  # a list index or a dict key: the model stays
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return [f.alias or name for name, f in model.model_fields.items()]


def nearest(word: str, valid: list[str]) -> str:
    """The end of a message about an unknown word: the valid one it is closest to, else all of them."""
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; valid here: {', '.join(valid)}"
