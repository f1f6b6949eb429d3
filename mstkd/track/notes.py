"""A run's description in Markdown, which MLflow's page shows at the top of the run: a head, and sections under headings."""

import re

MAX_CHARS = 8000  # as many as MLflow keeps of a tag
ROOM = 4 * "&nbsp;"
CUT = "\n\n(cut: the rest is in the run's artifacts)"


def with_section(note: str, text: str, heading: str = "") -> str:
    """`note` with `text` under `heading`, in place of what stood there; without a heading, in front of the sections."""
    head, *parts = re.split(r"^## ", note, flags=re.MULTILINE)
    sections = dict(part.split("\n", 1) if "\n" in part else (part, "") for part in parts)
    if heading:
        sections[heading] = f"\n{text.strip()}\n"
    else:
        head = text
    whole = "\n\n".join([head.strip(), *(f"## {title}\n\n{body.strip()}" for title, body in sections.items())]).strip()
    return whole if len(whole) <= MAX_CHARS else whole[: MAX_CHARS - len(CUT)] + CUT


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns by their headings, and rows of cells. MLflow's page leaves no room between columns: the headings make it."""
    lines = [[f"{heading}{ROOM}" for heading in columns], ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
