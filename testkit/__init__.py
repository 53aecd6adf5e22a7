"""What tests and benchmarks both need: fuzz cases, kills, made-up weights and references."""
