"""What a request may say about its scheduling, the same for gRPC and in-process users."""

from __future__ import annotations

from mini_infer.errors import FieldViolation

MAX_PRIORITY = 100
"""And the negative of the least one."""
MAX_CACHE_SALT_BYTES = 128


def scheduling_violations(priority: int, cache_salt: str) -> list[FieldViolation]:
    """Lists what is out of range; empty when all is well.

    Args:
        priority: Class, lower ones run first.
        cache_salt: Prefixes are shared only between requests of the same salt; may be empty.
    """
    violations = []
    if not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        expected = (
            f"expected an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r:.40}"
        )
        violations.append(FieldViolation("priority", expected))
    if not isinstance(cache_salt, str):
        expected = f"expected a text, got {cache_salt!r:.40}"
        violations.append(FieldViolation("cache_salt", expected))
    elif len(cache_salt.encode("utf-8", "surrogatepass")) > MAX_CACHE_SALT_BYTES:
        expected = f"expected at most {MAX_CACHE_SALT_BYTES} bytes of UTF-8, got more"
        violations.append(FieldViolation("cache_salt", expected))
    return violations
