"""Plain networks: torch modules without a framework base class."""
