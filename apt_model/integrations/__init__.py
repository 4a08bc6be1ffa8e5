"""Other people's files and libraries: compressed-tensors, ModelOpt, Hugging Face. Each module loads what it needs."""
