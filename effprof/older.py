"""What an older version of effprof wrote, beside what this one would write of the same: a setting
that was added since and is left at its default is no difference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from effprof.plan import Plan


def plan_as_then(old: Mapping[str, Any], new: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """``new``, which describes ``plan`` by its flags, without what ``old`` could not know; both as
    JSON reads them.
    """
    found = as_then(old, new, Plan)
    for name, half in (
        ("settings", plan.halves.addressed),
        ("update_settings", plan.halves.update),
    ):
        found[name] = as_then(old.get(name) or {}, new[name], half.Settings)
    return found


def as_then(old: Mapping[str, Any], new: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """``new`` without the fields of the dataclass ``kind`` that ``old`` lacks and that hold their
    default.
    """
    defaults = {
        item.name: json.loads(json.dumps(item.default))
        for item in dataclasses.fields(kind)
        if item.default is not dataclasses.MISSING
    }
    return {
        key: value
        for key, value in new.items()
        if key in old or key not in defaults or value != defaults[key]
    }
