"""The tokens with a meaning of their own; their ids are their places in `SPECIAL_TOKENS`."""

END_OF_TEXT = "<|endoftext|>"
BOS = "<|bos|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"

SPECIAL_TOKENS = (END_OF_TEXT, BOS, SYSTEM, USER, ASSISTANT, END_OF_TURN)

END_OF_TEXT_ID = SPECIAL_TOKENS.index(END_OF_TEXT)
BOS_ID = SPECIAL_TOKENS.index(BOS)
END_OF_TURN_ID = SPECIAL_TOKENS.index(END_OF_TURN)
EOS_IDS = (END_OF_TEXT_ID, END_OF_TURN_ID)
