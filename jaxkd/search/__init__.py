"""Which channels to keep. Knows graphs; knows no data and no training loop."""
