"""What model a checkpoint holds, and reading it safely."""
