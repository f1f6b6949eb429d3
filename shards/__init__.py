"""Shard sets: what is in them, how they are made, checked and imitated."""
