"""What happens at `optimizer.apply`: gradients are measured and clipped, weights updated, the update measured."""
