"""Mixers with an additive or delta-rule matrix state."""
