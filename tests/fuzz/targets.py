"""Every target by name."""

from __future__ import annotations

import fuzz_data
import fuzz_models
import fuzz_recipes

TARGETS = {target.name: target for target in (*fuzz_recipes.TARGETS, *fuzz_data.TARGETS, *fuzz_models.TARGETS)}
