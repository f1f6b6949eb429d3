"""From shard set to batch: store, order, crop, intensity, loader."""
