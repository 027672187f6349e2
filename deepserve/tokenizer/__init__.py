"""Text to token ids and back: the checkpoint's own tokenizer, its chat template, and incremental decoding."""
