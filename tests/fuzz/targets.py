"""Every target by name."""

from __future__ import annotations

import fuzz_data
import fuzz_images
import fuzz_models
import fuzz_recipes
import fuzz_students

_MODULES = (fuzz_recipes, fuzz_data, fuzz_images, fuzz_students, fuzz_models)
TARGETS = {target.name: target for module in _MODULES for target in module.TARGETS}
