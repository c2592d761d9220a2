"""What a run would take and cost on so many GPUs, before any of them is there."""
