"""The `mini-infer` command."""
