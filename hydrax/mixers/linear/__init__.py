"""Mixers with a linear recurrence: an additive, delta-rule, slot or elementwise state."""
