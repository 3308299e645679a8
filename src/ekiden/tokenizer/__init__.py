"""SentencePiece models and Hugging Face tokenizers: train, load, convert."""
