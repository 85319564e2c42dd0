"""What turns pixels into embeddings: frozen networks, their weights and their number format."""
