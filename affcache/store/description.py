"""What a store says of how its embeddings were made, and what of that changes the numbers."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# beyond rounding
FIELDS_THAT_DO_NOT_CHANGE_NUMBERS = ("model", "pretrained", "versions", "batch_size", "compiled", "licence", "every")
SIDE_BY_SIDE = "stores"  # in a description of several encoders: the description of each
TABLE = "table"  # an encoder's "imported_from", where it is none: features of frames that stood in a table


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the sha256 over the fields of an encoder description that change the embeddings, in canonical JSON."""
    deciding = {k: v for k, v in description.items() if k not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS}
    if SIDE_BY_SIDE in description:
        deciding = {SIDE_BY_SIDE: [fingerprint(one) for one in encoders_of(description)]}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def encoders_of(description: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the description of each encoder whose embeddings stand side by side; of one alone, itself."""
    found = description.get(SIDE_BY_SIDE)
    return [dict(of) for of in found] if isinstance(found, list) and found else [dict(description)]


def require_sound(description: Mapping[str, Any], sha256: str, width: Any) -> None:
    """Refuse a description of encoders side by side that isn't what its fingerprint is of; raises ValueError."""
    if SIDE_BY_SIDE not in description:
        return
    found = description[SIDE_BY_SIDE]
    if not (isinstance(found, list) and len(found) > 1 and all(isinstance(one, dict) for one in found)):
        raise ValueError(f"{SIDE_BY_SIDE} of its encoder are no descriptions")
    widths = [one.get("width") for one in found]
    if any(SIDE_BY_SIDE in one for one in found) or not all(type(one) is int and one > 0 for one in widths):
        raise ValueError("the description of one of its encoders can't be")
    if fingerprint(description) != sha256 or sum(widths) != width:
        raise ValueError("the description of its encoders doesn't match their fingerprint, or their width")


def is_table(description: Mapping[str, Any]) -> bool:
    """Say whether features stood in a table, so that no encoder can make such ones of an image."""
    return description.get("imported_from") == TABLE


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say which number-changing fields of two encoder descriptions differ, a line each, values included."""
    pairs = [encoders_of(one) for one in (ours, theirs)]
    if max(map(len, pairs)) > 1:
        if len(pairs[0]) != len(pairs[1]):
            return [f"encoders: {len(pairs[0])} against {len(pairs[1])}"]
        each = enumerate(zip(*pairs, strict=True), start=1)
        return [f"encoder {number}, {line}" for number, both in each for line in differing_fields(*both)]
    names = [n for n in {**ours, **theirs} if n not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS]
    return [f"{n}: {ours.get(n)!r:.200} against {theirs.get(n)!r:.200}" for n in names if ours.get(n) != theirs.get(n)]
