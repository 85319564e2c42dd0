"""How long something takes, in words."""


def duration_text(seconds: float) -> str:
    """Write a duration for people: 40 s, 12 min, 3.4 h, 2.1 days."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}" if length > 60 else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
