"""Loss, perplexity and bits per byte per language; sample texts."""
