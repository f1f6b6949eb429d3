"""Tables on a terminal, in a file or a pipe."""

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print `table` as wide as the terminal; into a file or a pipe wide enough that nothing is cut off."""
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
