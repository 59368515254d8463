"""Loads what `ckpt.rewrite` wrote. Knows nothing of searching or calibrating."""
