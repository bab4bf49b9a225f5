"""What finished runs tell: learning rate and batch, allocation, loss, each with intervals."""
