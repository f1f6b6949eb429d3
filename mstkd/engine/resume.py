"""Continuing from a checkpoint, also one that another number of ranks wrote.

<checkpoints>/step-00000120.universal/   the roles under ZeRO 1-3, converted once, for any number of ranks
    <role>/...                           DeepSpeed's universal form
    state.json                           what it was converted from, sha256 of its own files; written last
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

from mstkd.engine import backend
from mstkd.engine.backend import RoleEngine
from mstkd.engine.checkpoint import STATE, checksums, damage, read_sealed
from mstkd.engine.distributed import on_main
from mstkd.engine.environment import Ranks
from mstkd.engine.new_files import write_durably
from mstkd.errors import TrainingError, UserError

log = logging.getLogger(__name__)


def load_roles(folder: Path, engines: dict[str, RoleEngine], ranks: Ranks) -> None:
    """Load every role's state from a sound checkpoint. Collective.

    Raises UserError, before anything is changed, if a network is not the one that was saved or another number of ranks cannot
    load it; TrainingError if there is no room for the converted copy.
    """
    wrote = read_sealed(folder)["ranks"]
    cut = [name for name, engine in engines.items() if engine.zero_stage and wrote != ranks.world]
    on_main(lambda: _check(folder, engines, cut), ranks)
    converted = on_main(lambda: universal_form(folder, cut), ranks) if cut else None
    for name, engine in engines.items():
        if name in cut:
            engine.load(converted, universal=True)
        else:
            engine.load(folder)


def _check(folder: Path, engines: dict[str, RoleEngine], cut: list[str]) -> None:
    """Raise UserError naming the first parameter or buffer whose shape is not the saved one, or the role that cannot be converted."""
    sealed = read_sealed(folder)
    for role, saved in sealed.get("roles", {}).items():
        here = engines[role].shapes() if role in engines else {}
        for name in {**saved, **here}:
            if saved.get(name) != here.get(name):
                raise UserError(
                    f"{folder}: {name} of role {role} is {_said(saved, name)} in the checkpoint and {_said(here, name)} here; "
                    "restore the code that wrote it, or start another run with name=... init_from=RUN"
                )
    for role in cut:
        if engines[role].optimizer.name == "sgd":
            raise UserError(
                f"{folder}: {sealed['ranks']} ranks wrote it; role {role} is trained by sgd, whose state under ZeRO 1-3 "
                f"no other number of ranks can load: resume on {sealed['ranks']}, or start another run from its weights with name=... init_from=RUN"
            )


def _said(shapes: dict[str, list[int]], name: str) -> str:
    return str(shapes[name]) if name in shapes else "missing"


def universal_form(folder: Path, roles: list[str]) -> Path:
    """The folder that holds `roles` of the checkpoint `folder` in a form for any number of ranks; made unless it is there."""
    target = folder.with_name(f"{folder.name}.universal")
    source = {name: digest for name, digest in read_sealed(folder)["sha256"].items() if name.split("/")[0] in roles}
    if damage(target) is None and read_sealed(target)["converted"] == source:
        return target
    partial, began = target.with_name(f"{target.name}.tmp"), time.perf_counter()
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    try:
        partial.mkdir()
        for role in roles:
            backend.convert(folder / role, partial / role)
        write_durably(partial / STATE, json.dumps({"converted": source, "sha256": checksums(partial)}))
        os.replace(partial, target)
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into the other one
        shutil.rmtree(partial, ignore_errors=True)
        wrote = read_sealed(folder)["ranks"]
        raise TrainingError(f"{target}: cannot be written ({error}); free some space there, or resume on {wrote} ranks") from error
    log.info("%s: converted for another number of ranks in %.1f s", folder.name, time.perf_counter() - began)
    return target
