"""mstkd: distil a teacher that sees every MR sequence into a student that works with any subset."""

__version__ = "0.1.0"
