"""Recipe to draws to pixels: the one truth shared by recording and training."""
