"""What each op of a recipe does to an image: one file per family, one class per op."""
