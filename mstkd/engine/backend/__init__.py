"""All of DeepSpeed that mstkd uses: the process group, one engine per role; no other folder imports it."""

from mstkd.engine.backend.communication import timed_collectives
from mstkd.engine.backend.compiled_ops import load_ops
from mstkd.engine.backend.consolidate import saved_weights
from mstkd.engine.backend.process_group import shutdown, start
from mstkd.engine.backend.role_engine import PLAIN_BUCKET, RoleEngine
from mstkd.engine.backend.settings import RoleSettings, check_role, role_settings
from mstkd.engine.backend.sharded import ShardedNetwork
from mstkd.engine.backend.universal import convert

__all__ = [
    "PLAIN_BUCKET", "RoleEngine", "RoleSettings", "ShardedNetwork", "check_role", "convert", "load_ops", "role_settings", "saved_weights",
    "shutdown", "start", "timed_collectives",
]  # fmt: skip
