"""Sampling in Triton: nothing here waits for the device, so a CUDA graph can hold all of it."""
