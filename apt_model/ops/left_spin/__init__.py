"""Left spin: a gate on the step that a residual takes. README.md beside this file holds the mathematics."""

from apt_model.ops.left_spin.select import design_step, guard_step, trust_step

__all__ = ["design_step", "guard_step", "trust_step"]
