"""Which scalings there are (paper, section 3). No tensors, so that settings can be read without loading torch."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "column", "scalar"]
"""``"auto"`` is the paper's rule: column scaling, else scalar scaling, else none. The others try only the one."""

LEFT_ALONE, SCALAR, COLUMN = 0, 1, 2
"""Values of `scalora.maths.scaling.Scaling.choice`: what was done with a layer."""
