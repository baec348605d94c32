"""What an artifact lost: divergence from the baseline, tiers, the gate before timing."""
