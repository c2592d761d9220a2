"""What settings must be, by themselves and to each other: pure rules, each of which yields sentences (`sound`)."""
