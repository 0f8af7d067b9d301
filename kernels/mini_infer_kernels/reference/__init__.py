"""Plain-torch references of every operation: the CPU backend and the oracle of the tests."""
