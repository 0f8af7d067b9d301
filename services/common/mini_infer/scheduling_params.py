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
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        expected = f"expected -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}"
        violations.append(FieldViolation("priority", expected))
    num_bytes = len(cache_salt.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_CACHE_SALT_BYTES:
        expected = f"expected at most {MAX_CACHE_SALT_BYTES} bytes of UTF-8, got {num_bytes}"
        violations.append(FieldViolation("cache_salt", expected))
    return violations
