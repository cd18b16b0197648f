"""Small language models from scratch, on public text."""
