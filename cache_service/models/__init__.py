"""Networks by name and their cell logits, for teachers and students alike."""
