"""Changes to how PyTorch's DataLoader fetches rows."""
