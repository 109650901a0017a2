"""Routes of the caches and what all routes share: settings, problems, tokens, limits."""
