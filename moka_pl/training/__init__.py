"""The LightningModule that trains adapters, and what it needs."""
