"""The APT model: configuration, network, generation, tokenizer. Each module is imported by its own name."""
