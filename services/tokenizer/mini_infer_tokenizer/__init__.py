"""The tokenizer process: text to token ids and back; its core modules know no sockets."""
