"""From logits to tokens: edits, penalties, filters, the draw, and the log-probabilities that were asked for."""
