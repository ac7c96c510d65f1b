"""Where bytes come from: sources, splits, windows, and what compressors make of them."""
