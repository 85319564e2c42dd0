"""Which encoder made an embedding: a fingerprint over what changes the numbers, and what differs between two."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FIELDS_THAT_DO_NOT_CHANGE_NUMBERS = ("model", "pretrained", "versions", "batch_size", "compiled")  # beyond rounding


def fingerprint(description: Mapping[str, Any]) -> str:
    """Return the sha256 over the fields of an encoder description that change the embeddings, in canonical JSON."""
    deciding = {k: v for k, v in description.items() if k not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say which number-changing fields of two encoder descriptions differ, a line each, values included."""
    names = [n for n in {**ours, **theirs} if n not in FIELDS_THAT_DO_NOT_CHANGE_NUMBERS]
    return [f"{n}: {ours.get(n)!r} against {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]
