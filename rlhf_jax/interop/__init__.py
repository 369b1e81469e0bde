"""Models and tokenizers from files, and back."""
