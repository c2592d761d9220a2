"""What watches a run while it trains, and says afterwards how it went."""
