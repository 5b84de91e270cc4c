"""The factory that Lightning calls for every `Trainer`, through its entry point for callbacks of other packages."""

import os
from typing import Any

VARIABLE = "SMARTFRZ_LIGHTNING"


def make_callbacks() -> list[Any]:
    """Return a `SmartFRZCallback` if the environment variable SMARTFRZ_LIGHTNING asks for it, else nothing.

    Installing this package therefore changes no training. The variable names a predictor, as for
    `smartfrz.zoo.load`; `1` stands for the default one, and `0` for none. A script that passes a
    `SmartFRZCallback` itself must run without the variable: Lightning refuses two of them.

    Source:
        https://lightning.ai/docs/pytorch/stable/extensions/entry_points.html
    """
    wanted = os.environ.get(VARIABLE, "").strip()
    if wanted in ("", "0"):
        return []
    from smartfrz.adapters.torch.lightning import SmartFRZCallback

    return [SmartFRZCallback() if wanted == "1" else SmartFRZCallback(wanted)]
