"""All of DeepSpeed that mstkd uses: the process group, one engine per role; no other folder imports it."""

from mstkd.engine.backend.process_group import shutdown, start
from mstkd.engine.backend.role_engine import RoleEngine
from mstkd.engine.backend.settings import check_precision, role_settings
from mstkd.engine.backend.sharded import ShardedNetwork

__all__ = ["RoleEngine", "ShardedNetwork", "check_precision", "role_settings", "shutdown", "start"]
