"""All of DeepSpeed that mstkd uses: the process group, one engine per role; no other folder imports it."""

from mstkd.engine.backend.compiled_ops import load_ops
from mstkd.engine.backend.process_group import shutdown, start
from mstkd.engine.backend.role_engine import RoleEngine
from mstkd.engine.backend.settings import RoleSettings, check_precision, check_role, role_settings

__all__ = ["RoleEngine", "RoleSettings", "check_precision", "check_role", "load_ops", "role_settings", "shutdown", "start"]
