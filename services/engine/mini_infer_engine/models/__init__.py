"""Model architectures, one file each, as Hugging Face names them."""
