"""What `apt-model serve` adds to the server: blocks of models, weights in 4 bits, weights streamed through levels."""
