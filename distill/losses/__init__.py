"""Distillation losses: pure functions of tensors, one file per method."""
