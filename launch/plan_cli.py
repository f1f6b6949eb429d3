"""`mstkd plan`: what a recipe will take, as tables."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mstkd.config import load_config
from mstkd.files import size_text
from mstkd.launch.arguments import Overrides, RecipeName, writable_file
from mstkd.launch.printing import print_table

PARTS = {
    "weights": "weights", "gradients": "gradients", "moments": "moments", "master": "fp32 copy", "buffers": "buffers",
    "gathered": "gathered weights",
}  # fmt: skip


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(help="Ranks: nodes times GPUs per node.", min=1)] = 1,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything, in bytes, as JSON.", callback=writable_file)] = None,
) -> None:
    """Say what a recipe takes on so many ranks: memory, traffic, steps, disk. Trains nothing; needs the shards and no GPU.

    Example: mstkd plan mst_kdnet_brats2024 --world-size 8 data.shards=shards/brats2024_gli train.zero_stage=2
    """
    config = load_config(recipe, overrides or [])
    config.train.accumulation(world_size)  # said at once, not after seconds of imports
    from mstkd.plan import plan as run

    found = run(config, world_size)
    print_table(_data(found))
    for stage in found.stages:
        print_table(_roles(stage, found.device))
    typer.echo(_disk(found))
    if found.note:
        typer.echo(f"WARNING: {found.note}")
    if json is not None:
        from json import dumps

        json.write_text(dumps(found.to_json(), indent=1))
        typer.echo(f"wrote {json}")


def _data(plan) -> Table:
    """Of a mstkd.plan.Plan."""
    table = Table("run", plan.recipe)
    counts = ", ".join(str(count) for count in plan.rank_counts)
    table.add_row("ranks", f"{plan.world}, accumulation {plan.accumulation}; the global batch allows {counts}")
    table.add_row("training items", f"{plan.items} per epoch, {plan.steps_per_epoch:g} steps; {plan.dropped} subjects dropped")
    table.add_row("shards", f"{plan.tars} tars, {_bytes(plan.data_bytes)}")
    table.add_row("precision", plan.precision)
    return table


def _roles(stage, device: str) -> Table:
    """Parts as rows, roles as columns: it must fit a terminal."""
    roles = stage.roles
    table = Table(f"stage {stage.name}, {stage.steps} steps", *(role.name for role in roles), "together")
    table.add_row("parameters", *("\n".join(f"{name} {count:,}" for name, count in role.networks.items()) for role in roles), f"{_total(roles):,}")
    table.add_row("optimizer, ZeRO", *(f"{role.optimizer}, {role.zero_stage}" for role in roles))
    for part, title in PARTS.items():
        sizes = [getattr(role.memory, part) for role in roles]
        if any(sizes):
            table.add_row(title, *map(_bytes, [*sizes, sum(sizes)]))
    table.add_row(f"activations, as on {device}" + " (a GPU keeps more)" * (device == "cpu"), *(_bytes(role.activations) for role in roles))
    table.add_row("batch, frozen networks", *[""] * len(roles), f"{_bytes(stage.batch)}, {_bytes(stage.frozen_bytes)}")
    table.add_row("memory per rank", *[""] * len(roles), _bytes(stage.device_bytes), style="bold")
    table.add_row("on the host per rank", *(_bytes(role.memory.host) for role in roles), _bytes(stage.host_bytes), end_section=True)
    table.add_row("sent per rank and step", *(_sent(role.sent, role.sent_gloo) for role in roles), _bytes(stage.sent))
    table.add_row("checkpoint", *(_bytes(role.checkpoint) for role in roles), f"{_bytes(stage.checkpoint)}, the best {_bytes(stage.best)} more")
    return table


def _disk(plan) -> str:
    needed = sum(stage.disk for stage in plan.stages)
    verdict = "" if needed <= plan.free_bytes else "; WARNING: that is too little: free some, lower checkpoint.keep, or set runs_dir=..."
    return f"disk: {_bytes(needed)} for checkpoints and logs, {_bytes(plan.free_bytes)} free where the run will lie{verdict}"


def _total(roles: list) -> int:
    return sum(role.parameters for role in roles)


def _sent(nccl: float, gloo: float) -> str:
    return _bytes(nccl) if nccl == gloo else f"{_bytes(nccl)} (gloo {_bytes(gloo)})"


def _bytes(size: float | None) -> str:
    return "?" if size is None else size_text(size)
