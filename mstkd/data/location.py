"""Where a shard set may lie: a local folder, or below an http, https or s3 address. Nothing else is ever opened."""

import re
from urllib.parse import urlsplit

from mstkd.errors import UserError

REMOTE_SCHEMES = ("http", "https", "s3")
_PREFIX = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_location(path: str) -> str:
    """The scheme of a shard set's location: "" for a local folder, else one of `REMOTE_SCHEMES`.

    UserError for commands (`pipe:`), chains of file systems (`a::b`), any other scheme, control characters and remote
    addresses without a host. The message never holds more of an address than its scheme: it may carry credentials.
    """
    if not path or path.isspace():
        raise UserError("data.shards: the path of a shard set is empty; give its folder")
    if _CONTROL.search(path):
        raise UserError("data.shards: a path holds a control character; write the address again")
    if path.lstrip().startswith("|"):
        raise UserError("data.shards: commands are not run; give a local folder, http://, https:// or s3://")
    prefix = _PREFIX.match(path)
    if prefix is None:
        return ""
    scheme = prefix[1].lower()
    if scheme not in REMOTE_SCHEMES:
        local = f"a local folder (./{scheme}:... if it is one)"
        raise UserError(f"data.shards: {scheme}: is not read from; give {local}, http://, https:// or s3://")
    if not _plain_address(path):
        raise UserError(f"data.shards: the {scheme} address is not of the form {scheme}://host/folder; write it again")
    return scheme


def _plain_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port  # of "user:pa/ss@host" the port is no number
    except ValueError:
        return False
    chained = "::" in re.sub(r"\[[0-9A-Fa-f:.]+\]", "", parts.netloc) + parts.path + parts.query + parts.fragment
    steps_out = ".." in parts.path.split("/")
    cut_password = "@" in parts.path and parts.scheme.lower() != "s3"  # a slash in it ends the host too early
    return bool(host) and not (chained or parts.fragment or cut_password or steps_out or " " in address)
