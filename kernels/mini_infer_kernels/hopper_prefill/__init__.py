"""Prefill attention for Hopper's tensor cores (contract: `prefill_attention.py`)."""
